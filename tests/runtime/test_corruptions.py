"""Checkpoints that are not what was written: each is passed over with a sentence, or refused with one, and the run that goes on
has the weights of the run that was left alone."""

import json
import os
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quartet.assembly import build
from quartet.config.toml import read_settings
from quartet.files import fingerprints, sweep
from quartet.recording.run_folder import RunFolder
from quartet.recording.tokens import TokenTexts
from quartet.runtime.pipeline import Pipeline
from quartet.runtime.resume import CannotResume, choose, set_aside
from quartet.runtime.worker import Worker
from quartet.training.checkpoint import DamagedCheckpoint, read_checkpoint, write_checkpoint
from quartet.training.checkpoints import Checkpoints
from tests.malformed.saying import readable
from tests.support.tiny_run import make_run

WORDS = (
    "run.steps=3",
    "run.checkpoint_every=1",
    "run.keep_last=3",
    "optim.schedule=constant",
    'recipe=["sft", "grpo"]',
)
NEWEST, BEFORE = "grpo-000003", "grpo-000002"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run with three checkpoints of its RL stage."""
    return make_run(tmp_path_factory.mktemp("whole"), "sums", *WORDS).path


@pytest.fixture(scope="module")
def job(whole):
    return build(read_settings(whole / "config.resolved.toml").config)


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(
        shutil.copytree(
            whole, tmp_path / "run", ignore=shutil.ignore_patterns("policy", "README.md")
        )
    )


def chosen(run: Path, job):
    return choose(run, read_settings(run / "config.resolved.toml").config, job.made_with, ())


def sealed(folder: Path) -> None:
    """The manifest says again what the files are: only what they say is wrong."""
    (folder / "manifest.json").unlink(missing_ok=True)
    files = fingerprints(folder, folder)
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


def in_state(change):
    """Change what state.json holds, and seal it."""

    def corrupt(folder: Path) -> None:
        table = json.loads((folder / "state.json").read_text())
        change(table)
        (folder / "state.json").write_text(json.dumps(table))
        sealed(folder)

    return corrupt


def facts(**changed):
    return in_state(lambda table: table["facts"].update(changed))


def without(*names):
    return in_state(lambda table: [table["facts"].pop(name) for name in names])


def in_manifest(change):
    def corrupt(folder: Path) -> None:
        table = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(change(table)))

    return corrupt


def in_tensors(change):
    """Change the tensors, and seal them."""

    def corrupt(folder: Path) -> None:
        tensors = load_file(folder / "state.safetensors")
        change(tensors)
        save_file(tensors, folder / "state.safetensors")
        sealed(folder)

    return corrupt


def weights_in(tensors):
    return next(name for name in sorted(tensors) if "parameters" in name)


def not_finite(tensors) -> None:
    tensors[weights_in(tensors)].view(-1)[0] = torch.nan


def overlapping(folder: Path) -> None:
    """Two tensors share their bytes."""
    path = folder / "state.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    first, second, *_ = [name for name in header if name != "__metadata__"]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    sealed(folder)


def flipped_and_unlisted(folder: Path) -> None:
    """The manifest lists nothing, and the weights are others."""
    path = folder / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 64
    path.write_bytes(bytes(data))
    (folder / "manifest.json").write_text('{"format": 1, "files": {}}')


def only_state_listed(folder: Path) -> None:
    table = json.loads((folder / "manifest.json").read_text())
    del table["files"]["state.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(table))


def replaced_by(make):
    def corrupt(folder: Path) -> None:
        (folder / "manifest.json").unlink()
        make(folder / "manifest.json")

    return corrupt


def a_pipe_for_the_state(folder: Path) -> None:
    (folder / "state.json").unlink()
    os.mkfifo(folder / "state.json")


def under_another_name(folder: Path) -> None:
    """The contents of an earlier step under the newest name."""
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name(BEFORE), folder)


def without_tensors(folder: Path) -> None:
    (folder / "state.safetensors").unlink()
    sealed(folder)


DIGEST = "0" * 64
PASSED_OVER = {
    "an empty state without tensors": (
        lambda f: (in_tensors(dict.clear)(f), in_state(lambda t: t.update(state={}))(f)),
        "its state does not have what step 3 needs: random and work",
    ),
    "an empty state": (in_state(lambda t: t.update(state={})), "state.safetensors has random/.*, which its state does not name"),
    "a state without random numbers": (in_state(lambda t: t["state"].pop("random")), "has random/.*, which its state does not name"),
    "a state that is a list": (in_state(lambda t: t.update(state=[])), "which its state does not name"),
    "a state that is a number": (in_state(lambda t: t.update(state=3)), "which its state does not name"),
    "a state of another kind of thing": (in_state(lambda t: t["state"].update(more=1)), "does not have what step 3 needs"),
    "a tensor's name that is a number": (in_state(lambda t: t["state"].update(x={"$tensor": 3})), "state.json is not that of"),
    "a tensor that is nowhere": (in_state(lambda t: t["state"].update(x={"$tensor": "y"})), "state.safetensors lacks y"),
    "a shard that is nowhere": (in_state(lambda t: t["state"].update(x={"$sharded": "y"})), "shard-00000.safetensors is not"),
    "a step that is text": (facts(step="3"), "its facts are not those of a checkpoint: step: input should be a valid integer"),
    "a negative step": (facts(step=-3), "step: input should be greater than or equal to 0"),
    "a step with a fraction": (facts(step=3.5), "step: input should be a valid integer"),
    "a step that is true": (facts(step=True), "step: input should be a valid integer"),
    "an absurd step": (facts(step=10**30), "step: input should be less than"),
    "another step": (facts(step=2), "holds grpo-000002, which is not what its folder is called"),
    "another stage": (facts(stage="sft"), "holds sft-000003, which is not what its folder is called"),
    "a stage that is null": (facts(stage=None), "stage: input should be a valid string"),
    "no facts": (in_state(lambda t: t.update(facts={})), "stage: field required"),
    "facts that are a list": (in_state(lambda t: t.update(facts=[])), "its facts are not those of a checkpoint"),
    "no results": (without("results"), "results: field required"),
    "results that are a list": (facts(results=["sft"]), "results: input should be an object|results: input should be a valid dict"),
    "a result without a size": (facts(results={"sft/x": {"sha256": DIGEST}}), "results.sft/x.size: field required"),
    "a result outside of the folder": (
        facts(results={"../../x": {"size": 1, "sha256": DIGEST}}),
        "../../x is named in it and lies outside of the folder",
    ),
    "a result that is missing": (facts(results={"sft/x": {"size": 1, "sha256": DIGEST}}), "sft/x is missing"),
    "a result with a long name": (facts(results={"x" * 5000: {"size": 1, "sha256": DIGEST}}), "cannot be read .File name too long"),
    "no steps": (without("steps"), "steps: field required"),
    "steps that are text": (facts(steps={"sft": "3"}), "steps.sft: input should be a valid integer"),
    "steps of other stages": (facts(steps={"ppo": 3}), "the recipe has other stages before it now"),
    "no record": (without("events"), "events: field required"),
    "a record of a negative size": (facts(events={"size": -1, "sha256": DIGEST}), "events.size: input should be greater"),
    "a record without a digest": (facts(events={"size": 1, "sha256": "x"}), "events.sha256: string should match"),
    "a merit that is text": (facts(merit="best"), "merit: input should be a valid number"),
    "a merit that is not finite": (facts(merit=float("nan")), "merit: input should be a finite number"),
    "no config": (without("config"), "config: field required"),
    "a config that is text": (facts(config="x"), "config: input should be"),
    "data that are a list": (facts(data=[]), "data: input should be"),
    "no fault": (without("fault"), "fault: field required"),
    "state.json that is no JSON": (lambda f: ((f / "state.json").write_text("{"), sealed(f)), "state.json is not that of a"),
    "state.json nested deeply": (lambda f: ((f / "state.json").write_text("[" * 10**5), sealed(f)), "state.json is not that of a"),
    "state.json that is not UTF-8": (lambda f: ((f / "state.json").write_bytes(b"\xff"), sealed(f)), "state.json is not that of a"),
    "state.json that is a list": (lambda f: ((f / "state.json").write_text("[]"), sealed(f)), "state.json is not that of a"),
    "overlapping tensors": (overlapping, "its tensors cannot be read"),
    "tensors that are text": (
        lambda f: ((f / "state.safetensors").write_text("x" * 99), sealed(f)),
        "its tensors cannot be read",
    ),
    "weights that are not finite": (in_tensors(not_finite), "in state.safetensors is not finite"),
    "a tensor too many": (in_tensors(lambda t: t.update(more=torch.zeros(1))), "state.safetensors has more"),
    "a tensor too few": (in_tensors(lambda t: t.pop(weights_in(t))), "state.safetensors lacks .*parameters"),
    "no tensors": (without_tensors, "state.safetensors lacks"),
    "contents of another step": (under_another_name, "holds grpo-000002, which is not what its folder is called"),
    "a manifest that lists no file": (flipped_and_unlisted, "its manifest does not list state.json"),
    "a manifest without the tensors": (only_state_listed, "its manifest does not list state.safetensors"),
    "a manifest that is a pipe": (replaced_by(os.mkfifo), "cannot be read .not a regular file"),
    "a manifest that is a device": (replaced_by(lambda p: p.symlink_to("/dev/zero")), "cannot be read .not a regular file"),
    "a manifest that is nested deeply": (replaced_by(lambda p: p.write_text("[" * 10**5)), "its manifest cannot be read"),
    "a manifest that is not UTF-8": (replaced_by(lambda p: p.write_bytes(b"\xff\xfe")), "its manifest cannot be read"),
    "a manifest with a size of text": (
        in_manifest(lambda t: {**t, "files": {n: {**f, "size": "9"} for n, f in t["files"].items()}}),
        "its manifest cannot be read",
    ),
    "a manifest with an absurd size": (
        in_manifest(lambda t: {**t, "files": {n: {**f, "size": 10**40} for n, f in t["files"].items()}}),
        "its manifest cannot be read",
    ),
    "a manifest of a format of text": (in_manifest(lambda t: {**t, "format": "1"}), "its manifest cannot be read"),
    "a manifest with files as a list": (in_manifest(lambda t: {**t, "files": list(t["files"])}), "its manifest cannot be read"),
    "a manifest that names a file elsewhere": (
        in_manifest(lambda t: {**t, "files": {**t["files"], "/etc/passwd": {"size": 1, "sha256": DIGEST}}}),
        "/etc/passwd is named in it and lies outside of the folder",
    ),
    "a state that is a pipe": (a_pipe_for_the_state, "state.json is missing"),
}  # fmt: skip


def state_of(path: Path):
    return read_checkpoint(path).state()


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, list) else a == b


@pytest.mark.parametrize("name", PASSED_OVER)
def test_a_checkpoint_that_is_not_one_is_passed_over_for_the_one_before(whole, job, run, name):
    corrupt, sentence = PASSED_OVER[name]
    corrupt(run / "checkpoints" / NEWEST)
    choice = chosen(run, job)
    [(path, reason)] = choice.skipped
    assert path.name == NEWEST and re.search(sentence, readable(reason)), reason
    assert choice.checkpoint.name == BEFORE
    assert equal(choice.checkpoint.state(), state_of(whole / "checkpoints" / BEFORE)), (
        "what goes on is what was written"
    )


def resumed(run: Path, job) -> None:
    choice = chosen(run, job)
    set_aside(choice.skipped)
    folder = RunFolder(run)
    config = read_settings(run / "config.resolved.toml").config
    pipeline = Pipeline(job.stages, folder, TokenTexts(job.tokenizer), job.saving(config.run))
    pipeline.cut_back(choice.checkpoint)
    for _ in pipeline.run(choice.checkpoint):
        pass
    folder.close()


def gone_on(whole: Path, run: Path, job) -> None:
    resumed(run, job)
    for path in ("policy/model.safetensors", f"checkpoints/{NEWEST}/state.safetensors"):
        assert (run / path).read_bytes() == (whole / path).read_bytes(), path


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["an empty state", "overlapping tensors", "a manifest that lists no file"]
)
def test_the_run_that_goes_on_has_the_weights_of_the_run_left_alone(whole, job, run, name):
    PASSED_OVER[name][0](run / "checkpoints" / NEWEST)
    gone_on(whole, run, job)


@pytest.mark.long
@pytest.mark.parametrize("name", PASSED_OVER)
def test_every_run_that_goes_on_has_the_weights_of_the_run_left_alone(whole, job, run, name):
    PASSED_OVER[name][0](run / "checkpoints" / NEWEST)
    gone_on(whole, run, job)


def work(change):
    return in_state(lambda table: change(table["state"]["work"]))


def optimizer(table):
    return table["learner"]["optimizers"]["actor"]


def half_of(tensors) -> None:
    name = weights_in(tensors)
    tensors[name] = tensors[name][: len(tensors[name]) // 2].contiguous()


LISTS = {
    "a position beyond the rows": (work(lambda w: w["prompts"].update(position=10**6)), "row 1000000 of epoch 0 of "),
    "a position that is text": (work(lambda w: w["prompts"].update(position="1")), "row 1 of epoch 0 of "),
    "a negative epoch": (work(lambda w: w["prompts"].update(epoch=-1)), "of epoch -1"),
    "negative optimizer steps": (work(lambda w: optimizer(w).update(steps=-1)), "an optimizer after -1 steps"),
    "optimizer steps of text": (work(lambda w: optimizer(w).update(steps="3")), "an optimizer after 3 steps"),
    "learning rates times two": (work(lambda w: optimizer(w).update(scale=2.0)), "learning rates × 2.0"),
    "learning rates that are not finite": (work(lambda w: optimizer(w).update(scale=float("nan"))), "learning rates × nan"),
    "a budget of no tokens": (work(lambda w: w["learner"]["budget"].update(tokens=0)), "a budget of 0 tokens"),
    "an unknown algorithm": (work(lambda w: w.update(algorithm={"advantage": {"type": "none"}})), "advantage: no such type"),
    "random numbers of text": (work(lambda w: w["learner"].update(rng="x")), "unpack"),
}  # fmt: skip
OF_ANOTHER_RUN = {
    "another reference": (work(lambda w: w["learner"].update(reference_mark="x")), "To go on, put back the model of reference.model"),
    "fewer weights": (in_tensors(half_of), "To go on, put back the model that the stage began with"),
    "another optimizer": (work(lambda w: optimizer(w).update(optimizer="muon")), 'To go on, set optimizer = "muon" again.'),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_a_state_that_the_stage_cannot_take_is_refused_with_a_sentence(job, run, name):
    corrupt, sentence = LISTS[name]
    newest = run / "checkpoints" / NEWEST
    corrupt(newest)
    assert chosen(run, job).checkpoint.name == NEWEST, "only the stage can know"
    with pytest.raises(DamagedCheckpoint) as caught:
        Worker(job.stages, run).begin("grpo", str(newest))
    said = readable(str(caught.value))
    assert sentence in said and f"Rename {newest} to go on from an earlier one." in said


@pytest.mark.parametrize("name", OF_ANOTHER_RUN)
def test_a_state_of_another_run_is_refused_without_sending_the_user_to_earlier_ones(job, run, name):
    """All checkpoints of a run have the same reference, model and optimizer."""
    corrupt, remedy = OF_ANOTHER_RUN[name]
    newest = run / "checkpoints" / NEWEST
    corrupt(newest)
    with pytest.raises(DamagedCheckpoint) as caught:
        Worker(job.stages, run).begin("grpo", str(newest))
    said = readable(str(caught.value))
    assert remedy in said and "earlier ones do not either" in said and "Rename" not in said


def test_a_state_without_a_part_of_the_stage_is_refused_with_a_sentence(job, run):
    newest = run / "checkpoints" / NEWEST
    table = json.loads((newest / "state.json").read_text())
    tensors = load_file(newest / "state.safetensors")
    del table["state"]["work"]["learner"]
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("work/learner")}
    (newest / "state.json").write_text(json.dumps(table))
    save_file(kept, newest / "state.safetensors")
    sealed(newest)
    with pytest.raises(
        DamagedCheckpoint, match="does not fit what this config trains .there is no 'learner'"
    ):
        Worker(job.stages, run).begin("grpo", str(newest))


def test_where_every_checkpoint_is_damaged_nothing_is_changed(job, run):
    for path in (run / "checkpoints").iterdir():
        replaced_by(os.mkfifo)(path)
    with pytest.raises(
        CannotResume,
        match="no checkpoint can be used .grpo-000003: cannot be read .not a regular file",
    ):
        chosen(run, job)
    assert (run / "checkpoints" / NEWEST).is_dir()


def test_a_checkpoint_that_is_a_link_is_read_and_only_the_link_goes(tmp_path):
    checkpoints = Checkpoints(tmp_path / "a", {"ppo": 0}, keep_last=1)
    checkpoints.write("ppo", 1, {"w": torch.ones(2)}, {})
    (tmp_path / "a" / "ppo-000001").rename(tmp_path / "elsewhere")
    (tmp_path / "a" / "ppo-000001").symlink_to(tmp_path / "elsewhere")
    checkpoints.write("ppo", 2, {"w": torch.ones(2)}, {})
    assert [path.name for path in checkpoints.newest_first()] == ["ppo-000002"]
    assert (tmp_path / "elsewhere" / "state.json").is_file()


def test_what_a_killed_process_left_half_done_is_swept_away(tmp_path):
    kept = write_checkpoint(tmp_path / "ppo-000001", {}, {"stage": "ppo", "step": 1})
    for name in (".ppo-000002.tmp", ".ppo-000000.gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("x")
    (tmp_path / "config.toml.tmp").write_text("x")
    (tmp_path / ".hidden").mkdir()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", kept.name]
