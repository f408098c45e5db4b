"""The other benchmarks at toy size, through their own functions."""

import dataclasses
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quartet.experience import Prompt
from quartet.generation.sampling import Sampling
from quartet.models.forward import masked_logprobs
from quartet.training.batch import collate
from tests.support.audits import made_audit
from tests.support.tiny_run import SMALL_REVIEWS
from tests.support.world import rollout

GPU = torch.cuda.is_available()


@pytest.mark.slow
@pytest.mark.parametrize("work", ["generation", "continuous batching", "ppo", "grpo"])
def test_gpu_measures_a_work_on_whatever_device_there_is(work):
    import gpu

    device = torch.device("cuda" if GPU else "cpu")
    shape = gpu.SHAPES["tiny"]
    machine = gpu.Machine(device, tflops=1.0, gb_s=1.0)
    result = gpu.WORKS[work](shape, gpu.make_model(shape, device), machine)
    if "skipped" in result:
        pytest.skip(result["skipped"])
    seconds = result["phases"]["update"] if "phases" in result else result["seconds"]
    assert seconds > 0 and result["tokens"] > 0


def test_gpu_compares_numbers_with_transformers():
    import gpu

    device = torch.device("cuda" if GPU else "cpu")
    machine = gpu.Machine(device, tflops=1.0, gb_s=1.0)
    shape = gpu.SHAPES["tiny"]
    errors = gpu.correctness(shape, gpu.make_model(shape, device), machine)
    assert errors["ours fp32"]["max"] < 1e-4 < errors["ours bf16"]["max"] < 0.1
    assert errors["ours bf16"]["mean"] < 2 * errors["transformers bf16"]["mean"]
    assert errors["sampler against learner"]["mean"] < 0.001


@pytest.mark.slow
def test_gpu_takes_steps_of_every_method():
    import gpu

    found = gpu.presets(gpu.Machine(torch.device("cuda" if GPU else "cpu"), 1.0, 1.0))
    assert {"ppo", "grpo", "rloo"} <= found.keys() and "trpo" not in found
    assert [name for name, numbers in found.items() if "failed" in numbers] == []


def test_gpu_predicts_memory_by_the_plan():
    """PPO trains a critic and reads a reward model beside what GRPO has: 16 + 2 bytes a parameter. Rounded weights and activations
    are those of one model at a time."""
    import gpu

    shape, cpu, parameters = gpu.SHAPES["tiny"], torch.device("cpu"), 10**9
    ppo, grpo = (
        gpu.predicted_gb(shape, gpu.ALGORITHMS[name], parameters, 4, cpu)
        for name in ("ppo", "grpo")
    )
    assert ppo["update"] - grpo["update"] == pytest.approx(16 + 2, rel=1e-3)
    assert ppo["generation"] - grpo["generation"] == pytest.approx(12 + 2, rel=1e-3)
    # weights and moments, the frozen model, the decoder's copy in bf16
    assert grpo["generation"] == pytest.approx(12 + 2 + 2, rel=1e-3)
    huge = gpu.predicted_gb(shape, gpu.ALGORITHMS["ppo"], 10**11, 4, cpu)
    assert huge["generation"] is None and huge["update"] > 3_000


@pytest.mark.parametrize(
    "error", [RuntimeError("no memory"), KeyError("a name"), TypeError("of an API")]
)
def test_gpu_reports_a_work_that_fails_and_goes_on(error, capsys):
    import gpu

    def fails(*_):
        raise error

    machine = gpu.Machine.measured(torch.device("cpu"))
    assert machine.tflops > 0 and machine.gb_s > 0
    assert gpu.attempt(fails, gpu.SHAPES["tiny"], None, machine) == {
        "failed": f"{type(error).__name__}: {error}"
    }
    assert "in fails" in capsys.readouterr().err, "where it failed"


def test_gpu_goes_on_behind_what_it_has_measured(tmp_path, monkeypatch, capsys):
    """A command that was cut off: the works of before are not repeated, and presets come after the first shape."""
    import gpu

    done, shapes = [], dict.fromkeys(("one", "two"), gpu.SHAPES["tiny"])
    works = {
        what: lambda shape, model, machine, what=what: done.append(what) or {"number": len(done)}
        for what in ("first", "second")
    }
    monkeypatch.setattr(gpu, "SHAPES", shapes)
    monkeypatch.setattr(gpu, "WORKS", works)
    monkeypatch.setattr(gpu, "presets", lambda _: done.append("presets") or {"ppo": {}})
    out = (
        tmp_path / "results" / "gpu.json"
    )  # a folder that is not there yet, as in the command of the docs
    words = ["gpu.py", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(gpu, "is_lost", lambda _: len(done) == 1)
    monkeypatch.setattr(sys, "argv", [*words, "--shapes", "one"])
    with pytest.raises(SystemExit, match="shapes one first: the GPU refuses all work since"):
        gpu.main()
    monkeypatch.setattr(gpu, "is_lost", lambda _: False)
    monkeypatch.setattr(sys, "argv", [*words, "--shapes", "one,two"])
    gpu.main()
    assert done == ["first", "second", "presets", "first", "second"]
    found = json.loads(out.read_text())
    assert found["shapes"]["one"] == {"first": {"number": 1}, "second": {"number": 2}}
    gpu.main()
    assert len(done) == 5, "nothing is left"
    failed = {"one": {"first": {"failed": "no"}, "second": {"number": 2}}}
    out.write_text(json.dumps(found | {"shapes": found["shapes"] | failed}))
    gpu.main()
    assert len(done) == 5, "what has failed may have lost the GPU"
    monkeypatch.setattr(sys, "argv", [*words, "--shapes", "one,two", "--again"])
    gpu.main()
    assert done[5:] == ["first"]
    assert json.loads(out.read_text())["shapes"]["one"]["first"] == {"number": 6}
    out.write_text(json.dumps(found | {"device": "NVIDIA H200"}))
    with pytest.raises(SystemExit, match="is of NVIDIA H200, and this is cpu"):
        gpu.main()


def test_gpu_leaves_out_steps_that_cannot_fit(monkeypatch):
    import gpu

    gpu_of = SimpleNamespace(total_memory=141e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu_of)
    there = torch.device("cuda")
    found = {}
    for name in ("0.5b", "7b"):
        with torch.device("meta"):
            model = gpu.make_model(gpu.SHAPES[name], torch.device("meta"))
        for preset in ("ppo", "grpo"):
            algorithm = gpu.ALGORITHMS[preset]
            found[name, preset] = gpu.why_too_large(gpu.SHAPES[name], model, algorithm, there)
            assert (
                gpu.why_too_large(gpu.SHAPES[name], model, algorithm, torch.device("cpu")) is None
            )
    assert found["0.5b", "ppo"] is found["0.5b", "grpo"] is None
    for preset in ("ppo", "grpo"):
        assert "GB by the plan, and the GPU has 141" in found["7b", preset]


def test_gpu_does_not_take_what_transformers_left_unwritten_for_its_speed():
    """`generate_batch` returns what it has where its thread fails."""
    import gpu

    class Model:
        def generate_batch(self, inputs, **_):
            return {}

    machine = gpu.Machine(torch.device("cuda"), 1.0, 1.0)
    machine = SimpleNamespace(device=machine.device, timed=lambda work: (1.0, work()))
    found = gpu.attempt(gpu.continuous, gpu.SHAPES["tiny"], Model(), machine)
    assert found["failed"].startswith("RuntimeError: 0 tokens of ")


def test_gpu_counts_a_prompt_that_a_group_shares_once():
    """Three answers to a prompt of 5 tokens: two rows leave out its first four."""
    import gpu

    prompts = [Prompt("a", (1, 2, 3, 4, 5), ""), Prompt("b", (6, 7), "")]
    rollouts = [rollout(prompts[0], (1,), 0.0, number=i) for i in range(3)]
    assert gpu.repeated_tokens([*rollouts, rollout(prompts[1], (1, 2), 0.0)]) == 2 * 4


def test_answers_of_given_lengths_have_the_policys_own_log_probs():
    import gpu
    import ours

    shape = gpu.SHAPES["tiny"]
    model = gpu.make_model(shape, torch.device("cpu")).float()
    rows = shape.size.rows
    generator = ours.FixedLengthGenerator(model, shape.size, rows)
    sampling = Sampling(max_new_tokens=shape.limit, temperature=0.7)
    answers = generator.generate(shape.asked, sampling, rows // shape.prompts)
    assert [len(a.response_ids) for a in answers] == shape.size.lengths(rows)
    assert all(a.response_ids.index(shape.size.eos) == len(a.response_ids) - 1 for a in answers)
    batch = collate([replace(a, score=0.0) for a in answers])
    exact = masked_logprobs(model, batch.tokens, batch.response_mask, 0.7)
    assert (batch.rollout_logprobs - exact).abs().max() < 1e-4


def test_gpu_counts_the_bytes_of_decoding():
    import gpu

    shape = dataclasses.replace(gpu.SHAPES["tiny"], layers=1, kv_heads=1, hidden=8, heads=4)
    model = torch.nn.Linear(3, 2, bias=False)  # 24 bytes
    # Two steps read the weights; 5 + 6 tokens of one row and 2 of the other, 2 · 2 · 2 bytes each.
    assert shape.kv_bytes_per_token == 8
    assert gpu.bytes_read(shape, model, [5, 2], [2, 1]) == 2 * 24 + (5 + 6 + 2) * 8


@pytest.mark.parametrize("way", ["torch's own log_softmax", "selective", "quartet"])
def test_each_way_through_the_head_computes_the_same(way):
    import head

    measured, expected = (head.measure(name, 97, 16, 24) for name in (way, "selective"))
    assert measured["sum"] == pytest.approx(expected["sum"], rel=1e-5)
    assert measured["norm"] == pytest.approx(expected["norm"], rel=1e-4)


@pytest.mark.long
def test_the_ways_through_the_head_are_measured_in_processes_of_their_own():
    import head

    assert len(head.compare(97, 16, 24, 1)) == 2 + len(head.WAYS)


def test_scaling_measures_the_three_phases():
    import scaling
    import workload as w

    phases = scaling.phases(w.SIZES["tiny"], 1)
    assert list(phases) == ["generate", "score", "train"]
    assert phases["score"].operations < phases["train"].operations < 4 * phases["score"].operations
    assert scaling.row("tiny", phases, 1.0).count("|") == 8


def test_the_studio_is_measured_on_a_small_folder(tmp_path):
    import studio

    load = studio.Workload(steps=20, rows=4, tokens=40, folder_bytes=10**5)
    results = studio.looking(tmp_path, load)
    assert results["overview of 20 steps"]["median"] > 0 and results["peak memory, MB"] > 0


@pytest.mark.slow
def test_the_share_of_a_step_that_is_written_is_measured(tmp_path):
    import studio

    share = studio.writing_share(tmp_path, *SMALL_REVIEWS, "run.steps=2")
    assert all(0 < value < 1 for name, value in share.items() if name != "probes")


def test_the_engines_are_compared_with_one_process():
    import engines

    measured = {name: [0.25, 0.5, 1.0] for name in engines.ENGINES}
    assert engines.table(measured).splitlines()[2] == "| Local | 500 ms | +0 ms |"


@pytest.mark.long
@pytest.mark.parametrize("engine", range(7))
def test_every_engine_is_measured(engine):
    import engines

    name = list(engines.ENGINES)[engine]
    if name.startswith("Ray"):
        pytest.importorskip("ray")
    assert engines.seconds_of_a_step([*engines.ENGINES[name], "run.steps=7"]) > 0


def test_the_recorded_results_of_doctor_and_learning_make_their_tables():
    import doctor
    import learning

    faulty = json.loads(doctor.RESULTS.read_text(encoding="utf-8"))["broken"]
    assert doctor.table(faulty).count("\n") == 1 + len(doctor.FAULTS)
    for rows in json.loads(learning.RESULTS.read_text(encoding="utf-8")).values():
        assert learning.table(rows).count("\n") == 1 + len(rows) + 2


@pytest.mark.long
def test_the_doctor_and_learning_are_measured_on_the_same_small_runs(tmp_path):
    import doctor
    import learning

    job = learning.run("reviews", 0, [*SMALL_REVIEWS, "run.steps=2"], tmp_path, "reviews", 1)
    assert job["seed"] == 0 and 0 <= job["win_rate"]["mean"] <= 1
    assert doctor.healthy(tmp_path, "reviews", 0)["recipe"] == "reviews"  # the run that is there
    settings = [word for word in SMALL_REVIEWS if word.startswith("rollout.")]
    fault = doctor.faulty(tmp_path, "sign", 0, *settings, "data.rows=64", "run.steps=2")
    assert fault["fault"] == "sign" and isinstance(fault["found"], dict)


@pytest.mark.long
def test_the_hacking_job_starts_from_the_models_of_the_reviews_job(tmp_path):
    import learning

    learning.run("reviews", 0, [*SMALL_REVIEWS, "run.steps=2"], tmp_path, "reviews", 1)
    *_, words = learning.JOBS["hacking"]
    settings = [w for w in SMALL_REVIEWS if w.startswith(("rollout.", "evaluation."))]
    words = [*words, *settings, "data.rows=64", "run.steps=2"]
    job = learning.run("reviews", 0, words, tmp_path, "hacking", 1)
    assert job["reward_model"] is None


def test_mutants_of_a_formula_are_found():
    import mutation

    mutants = mutation.mutants("src/quartet/algorithms/masked.py")
    assert len(mutants) > 10 and all(m.before != m.after for m in mutants)
    chosen = mutation.sample(1, 0)
    assert len({m.file for m in chosen}) == len(
        [f for f in (mutation.ROOT / mutation.FORMULAS).glob("*.py") if mutation.mutants(str(f))]
    )


@pytest.mark.long
def test_a_mutant_is_killed_by_the_tests_of_the_algorithms(tmp_path):
    import subprocess

    script = (
        "import sys, pathlib, mutation\n"
        "first = mutation.mutants('src/quartet/algorithms/masked.py')[:1]\n"
        "ignore = [f'--ignore={mutation.TESTS}/test_closed_form.py']\n"
        "mutation.report(mutation.examine(first, ignore, 120, pathlib.Path(sys.argv[1])))\n"
    )
    from tests.benchmarks.conftest import FOLDER

    out = tmp_path / "mutation.json"
    subprocess.run([sys.executable, "-c", script, str(out)], cwd=FOLDER, check=True, timeout=600)
    [result] = json.loads(out.read_text(encoding="utf-8"))
    assert result["verdict"] == "killed"


@pytest.mark.slow
def test_the_faults_of_stages_before_rl_are_runs(tmp_path, monkeypatch):
    import doctor_stages

    monkeypatch.setattr(doctor_stages, "HELD_OUT_ROWS", 16)
    for fault in ("sft, rate", "reward model, random", "dpo, few", "kto, one label"):
        _, recipe, settings_of = doctor_stages.FAULTS[fault]
        settings = settings_of(tmp_path, 0) | {"data.rows": 64}
        table = "preference" if recipe[0] in {"dpo", "kto"} else recipe[0]
        name = fault.replace(", ", "-").replace(" ", "_")
        diagnosis = doctor_stages.train(
            tmp_path, name, recipe, 0, **settings, **{f"{table}.steps": 2, f"{table}.batch_size": 8}
        )
        assert diagnosis.checks.keys() == {recipe[0]}
        assert f"{recipe[0]}: loss_explodes: loss" in doctor_stages.looked_at(diagnosis)


def test_critic_tabulates_audits_over_seeds():
    import critic

    seeds = [
        [made_audit(step=step, seed=seed, prompts=12) for step in (4, 32)] for seed in range(2)
    ]
    results = {"reviews": seeds}
    text = critic.tables(results)
    levels = [own[1]["level"]["value"] for own in seeds]
    assert critic.over_seeds(levels) in text and "reviews, step 32:" in text
    numbers = critic.summary(results)["reviews, step 32"]
    assert numbers["V − mean return, all states"] == pytest.approx(levels, abs=1e-4)
    assert critic.over_seeds([1.0, 2.0, None]) == "1.50 (1.00 to 2.00)"
    assert len(critic.figure(results).data) == 4


def test_roles_counts_what_the_published_models_have():
    import roles

    counted = {size: roles.row(size, "all weights")["parameters"] for size in roles.SIZES}
    assert counted == {"0.5B": 0.494032768, "1.5B": 1.543714304, "7B": 7.615616512}
    whole, lora, qlora, _ = (roles.row("7B", way) for way in roles.WAYS)
    assert whole["actor"] == pytest.approx(16 * 7.615616512), "weights, gradients and two moments"
    assert whole["reference and reward model"] == pytest.approx(2 * 2 * 7.615616512)
    assert whole["sampling"] == 0.0, "it does not fit"
    assert lora["trunk"] == pytest.approx(2 * 7.615616512), "in bfloat16, for all four roles"
    assert 0.25 * lora["trunk"] < qlora["trunk"] < 0.4 * lora["trunk"]
    assert lora["reference and reward model"] == qlora["reference and reward model"] == 0.0
    docs = Path(__file__).parents[2] / "docs" / "models.md"
    assert roles.table() in docs.read_text(encoding="utf-8")
