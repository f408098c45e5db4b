"""Runs whose stages are evaluated while they train: what is recorded, kept, and handed on."""

import json
import shutil
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from quartet.assembly import build
from quartet.config.toml import read_settings
from quartet.recording.run_folder import RunFolder
from quartet.recording.tokens import TokenTexts
from quartet.runtime.lifecycle import AlreadyDone, resume
from quartet.runtime.pipeline import Pipeline
from quartet.training.checkpoint import read_checkpoint

TOML = """
recipe = "sft"
data.train = "{file}"
[policy]
create = {{ type = "llama", num_layers = 1, hidden_size = 16, num_heads = 2 }}
tokenizer = {{ type = "train", vocab_size = 300 }}
[run]
checkpoint_every = 1
keep_last = 99
[sft]
steps = 12
batch_size = 4
lr = 0.03
schedule = "constant"
"""
EVALUATED = ("sft.eval_every=2", 'sft.keep="best"')


def settings_of(root, *words):
    """Settings of runs on 40 rows that have nothing in common but their form: what is learnt of
    some is wrong of the others."""
    random = Random(0)
    number = lambda: str(random.randrange(10**6))  # noqa: E731
    rows = [{"prompt": number(), "chosen": number(), "rejected": number()} for _ in range(40)]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "run.toml").write_text(TOML.format(file=root / "rows.jsonl"))
    return read_settings(root / "run.toml", words)


def run(root, *words, since=None):
    """Run a recipe, or go on with it from a checkpoint, and return its folder and summaries."""
    settings = settings_of(root, *words)
    job = build(settings.config)
    folder = RunFolder.create(root, "run", {}) if since is None else RunFolder(root / "run")
    texts = TokenTexts(job.tokenizer)
    pipeline = Pipeline(job.stages, folder, texts, job.saving(settings.config.run))
    if since is not None:
        pipeline.cut_back(since)
    for _ in pipeline.run(since):
        pass
    folder.event("done")
    events = folder.record().events
    folder.close()
    return (
        folder.path,
        {e["stage"]: e["summary"] for e in events if e["event"] == "finished"},
        events,
    )


def held_out(events, name):
    return {
        e["step"]: e["metrics"][name]
        for e in events
        if e["event"] == "metrics" and name in e["metrics"]
    }


def weights(path):
    return {file.name: load_file(file) for file in path.glob("sft/*.safetensors")}


def equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[f][n], b[f][n]) for f in a for n in a[f].keys() | b[f].keys()
    )


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    return run(tmp_path_factory.mktemp("evaluated"), *EVALUATED)


def test_the_best_evaluation_is_handed_on(evaluated):
    _, summary, events = evaluated
    losses = held_out(events, "held_out/loss")
    assert list(losses) == [2, 4, 6, 8, 10, 12]
    best = min(losses, key=losses.__getitem__)
    assert best < 12, "else the best would be the last"
    assert summary["sft"]["best_step"] == best
    assert summary["sft"]["held_out_loss"] == losses[best]


@pytest.mark.slow
def test_evaluating_changes_no_step(evaluated, tmp_path):
    _, summary, events = run(tmp_path, "run.checkpoint_every=99")
    losses = [e["metrics"] for e in events if e["event"] == "metrics"]
    kept = [
        {k: v for k, v in e["metrics"].items() if not k.startswith("held_out")}
        for e in evaluated[2]
        if e["event"] == "metrics"
    ]
    assert losses == kept
    last = held_out(evaluated[2], "held_out/loss")[12]
    assert summary["sft"] == {
        "held_out_loss_before": evaluated[1]["sft"]["held_out_loss_before"],
        "held_out_loss": last,
    }


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 7, 12])
def test_a_run_resumes_with_the_best_so_far_to_the_bit(evaluated, tmp_path, step):
    path, summary, events = evaluated
    since = read_checkpoint(path / "checkpoints" / f"sft-{step:06d}")
    shutil.rmtree(shutil.copytree(path, tmp_path / "run") / "sft")
    again, resumed, later = run(tmp_path, *EVALUATED, since=since)
    assert equal(weights(path), weights(again)) and weights(path)
    assert resumed == summary
    assert held_out(later, "held_out/loss") == held_out(events, "held_out/loss")


def test_patience_ends_a_stage_and_the_run_is_done_then(tmp_path):
    words = [*EVALUATED, "sft.lr=0.1", "sft.patience=1", "run.checkpoint_every=99"]
    path, summary, events = run(tmp_path, *words)
    losses = held_out(events, "held_out/loss")
    stopped = summary["sft"]["stopped_at"]
    assert stopped == max(losses) < 12, "it had more steps left"
    assert losses[stopped] > losses[stopped - 2]
    settings = settings_of(tmp_path, *words)
    assert (path / "checkpoints" / f"sft-{stopped:06d}").is_dir()
    with pytest.raises(AlreadyDone):
        resume(RunFolder(path), settings, build(settings.config))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["reward_model", "dpo"])
def test_pairs_are_chosen_by_accuracy_and_then_by_loss(tmp_path, stage):
    table = {"dpo": "preference"}.get(stage, stage)
    words = [f"{table}.{word}" for word in ("steps=8", "lr=0.01", "eval_every=2", "keep=best")]
    _, summary, events = run(tmp_path, f'recipe="{stage}"', *words)
    accuracy, loss = (held_out(events, f"held_out/{name}") for name in ("accuracy", "loss"))
    best = max(accuracy, key=lambda step: (accuracy[step], -loss[step]))
    assert summary[stage]["best_step"] == best
    assert summary[stage]["held_out_accuracy"] == accuracy[best]
