"""What only a GPU can show. Skipped where there is none.

On a machine with a GPU run this file and `tests/benchmarks/test_scripts.py` by themselves, and all others with
`CUDA_VISIBLE_DEVICES= pytest`: they are of CPUs, and their runs would be on the GPU.
"""

import json

import pytest
import torch

from quartet.assembly.device import planned_device
from quartet.config.toml import read_settings
from quartet.generation import slots
from quartet.planning.gpu_plan import plan_on
from quartet.planning.hardware import GB
from quartet.recipes import recipe_path
from tests.support import gpu_checks as checks
from tests.support.command import quartet
from tests.support.tiny_run import SMALL_REVIEWS, make_run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

WORDS = ["run.steps=4", "run.checkpoint_every=2", "run.precision=fp32"]
"""In float32, whose products are in TF32 there: 10 bits of each factor."""
MIDDLE = [
    *(f"policy.create.{key}" for key in ("hidden_size=1024", "num_layers=12", "num_heads=16")),
    *(
        "data.rows=64",
        "sft.steps=1",
        "reward_model.steps=1",
        "run.steps=3",
        "evaluation.best_of=0",
        "evaluation.prompts=8",
    ),
    "optim.micro_batch_tokens=2048",
]
"""190 M parameters: what is not theirs is little beside them."""


def numbers(path):
    lines = map(json.loads, (path / "events.jsonl").read_text().splitlines())
    return [line["metrics"] for line in lines if line["event"] == "metrics"]


def close(found, expected, within):
    assert len(found) == len(expected) and expected
    for row, other in zip(found, expected, strict=True):
        for name in ("loss", "kl", "reward", "value/mean"):
            if name in other:
                assert row[name] == pytest.approx(other[name], abs=within, rel=within), name


def said(caplog):
    """What Quartet has warned of: a step that is not recorded, a forward pass that is not taken."""
    names = {"quartet.generation.slots", "quartet.models.fused", "quartet.distributed.offload"}
    return [r.getMessage() for r in caplog.records if r.name in names]


@pytest.mark.parametrize("kind", [*checks.KINDS, checks.IN_4_BITS])
def test_recorded_steps_are_those_that_the_learner_computes(kind, monkeypatch, caplog):
    """CUDA graphs of every kind of block, against the same steps without, and against whole sequences."""
    monkeypatch.setattr(slots, "_NOT_RECORDED", set())
    model = checks.policy(kind, pretends=False)
    recorded = checks.decoded(model)
    assert said(caplog) == []
    mean, largest = checks.sampler_gap(model)
    assert mean < 0.03 and largest < 0.5
    monkeypatch.setattr(slots, "_can_record", lambda *_: False)
    assert checks.off(recorded, checks.decoded(model)) < 0.02


@pytest.mark.parametrize("kind", checks.KINDS)
def test_gradients_are_those_of_a_cpu_up_to_rounding(kind, caplog):
    assert checks.gradient_cosine(kind, pretends=False) > 0.99
    assert said(caplog) == []


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "muon"])
def test_optimizers_step_as_on_a_cpu(optimizer):
    assert checks.steps_apart(optimizer, pretends=False) < 0.1


def test_the_tokens_that_a_cpu_draws_are_drawn():
    share, apart = checks.share_drawn_alike()
    assert share > 0.95 and apart < 0.005


ADAPTER = 'policy.adapter={type="lora", rank=4}'
RUNS = {
    "in bf16": [],
    "on 4 bits": ["policy.create.hidden_size=128", ADAPTER, 'policy.quantize="nf4"'],
    "moments of 8 bits": ["policy.create.hidden_size=128", "optim.optimizer=adamw_8bit"],
    "blocks computed again": ["policy.gradient_checkpointing=true"],
    "ahead": ["rollout.staleness=1"],
    "pairs": ['recipe=["sft","dpo"]', "preference.steps=2", "preference.batch_size=8"],
    "offloaded": ["run.offload=true"],
}


@pytest.mark.parametrize("kind", RUNS)
def test_runs_of_every_kind_end_without_a_warning(tmp_path, kind, monkeypatch, caplog):
    """ "ahead": graphs are recorded in one thread while another trains."""
    monkeypatch.setattr(slots, "_NOT_RECORDED", set())
    words = ["run.device=cuda", "run.steps=3", "run.checkpoint_every=2", *RUNS[kind]]
    run = make_run(tmp_path, "reviews", *words)
    assert run.status == "done" and said(caplog) == []


def test_the_learning_is_that_of_a_cpu(tmp_path):
    """Up to the first answers, which other rounding may change."""
    here = numbers(make_run(tmp_path / "gpu", "reviews", *WORDS, "run.device=cuda").path)
    there = numbers(make_run(tmp_path / "cpu", "reviews", *WORDS, "run.device=cpu").path)
    close(here[:6], there[:6], 1e-2)


def test_what_rests_comes_back_as_it_was(tmp_path):
    """Up to the order in which attention adds up its gradients, which is another each time."""
    plain, rests = (
        numbers(
            make_run(
                tmp_path / word, "reviews", *WORDS, "run.device=cuda", f"run.offload={word}"
            ).path
        )
        for word in ("false", "true")
    )
    close(rests, plain, 1e-2)


def peak(tmp_path, *words):
    torch.cuda.reset_peak_memory_stats()
    make_run(tmp_path, "reviews", *MIDDLE, "run.device=cuda", *words)
    return torch.cuda.max_memory_allocated()


def test_memory_is_what_the_plan_says(tmp_path):
    """Within 30%, and by as much less as what rests is said to be."""
    planned = {}
    for word in ("false", "true"):
        config = read_settings(
            recipe_path("reviews"), [*SMALL_REVIEWS, *MIDDLE, f"run.offload={word}"]
        ).config
        memory = plan_on(config, planned_device(torch.device("cuda", 0))).memory
        planned[word] = memory["ppo update"]
    plain, rests = (peak(tmp_path / word, f"run.offload={word}") for word in ("false", "true"))
    assert plain == pytest.approx(planned["false"], rel=0.3), f"{plain / GB:.2f} GB"
    assert plain - rests == pytest.approx(planned["false"] - planned["true"], rel=0.3), (
        f"{rests / GB:.2f} GB"
    )


def test_in_parts_on_one_gpu(tmp_path):
    for name, words in {"whole": [], "parts": ["launch.shard=true"]}.items():
        made = quartet(
            "run",
            "reviews",
            *SMALL_REVIEWS,
            *WORDS,
            "run.device=cuda",
            f"run.name={name}",
            *words,
            cwd=tmp_path,
        )
        assert made.returncode == 0, made.stderr
    whole, parts = (
        numbers(next((tmp_path / "runs").glob(f"*{name}"))) for name in ("whole", "parts")
    )
    close(parts, whole, 1e-2)
