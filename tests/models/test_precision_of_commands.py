"""What commands load to read is held as a run holds what it does not train: in bfloat16 on a GPU that has it."""

import pytest
import torch

import quartet
from quartet.assembly.evaluation.measures import Measure, ScoredText, _context
from quartet.assembly.evaluation.policies import LoadedPolicy
from quartet.assembly.reward_model_labels import RewardModelLabeller
from quartet.assembly.serving import TextScorer
from quartet.cli.chat import ChatSession
from quartet.models import precision
from tests.support.tiny_run import make_run

HERE = torch.device("cpu")
BEST = {"cpu": "fp32", "cuda": "bf16"}
"""What "auto" is on each device, of which the second is not there: models stay on the first, in its precision."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs"), "reviews", "run.steps=1").path


def scalar_of(reward):
    return reward.model if hasattr(reward, "model") else reward.scalar


COMMANDS = {
    "quartet chat": lambda run: ChatSession(run, 1.0, 4).after.model,
    "quartet chat, before": lambda run: ChatSession(run, 1.0, 4).before.model,
    "quartet eval": lambda run: LoadedPolicy(str(run / "policy")).model,
    "quartet eval --measure model": lambda run: ScoredText("m", str(run)).scorer.reward.model,
    "quartet eval --measure model, a label": lambda run: (
        ScoredText("m", str(run / "reward_model"), 0).text_model.model
    ),
    "quartet serve-reward": lambda run: TextScorer(run, HERE).reward.model,
    "quartet label --labeller": lambda run: RewardModelLabeller(run).scorer.reward.model,
    "run.policy": lambda run: quartet.train(resume=run).policy,
    "run.reward_model": lambda run: quartet.train(resume=run).reward_model,
}


@pytest.mark.parametrize("device", BEST)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_reads_is_held_in_the_best_precision(run, monkeypatch, command, device):
    monkeypatch.setattr(precision, "best_precision", lambda _: BEST[device])
    model = COMMANDS[command](run)
    held = {name: p.dtype for name, p in model.named_parameters()}
    heads = {
        dtype for name, dtype in held.items() if name.endswith("score.weight") or ".head" in name
    }
    trunk = {dtype for name, dtype in held.items() if "layers" in name or "embed" in name}
    assert trunk == {precision.DTYPES[BEST[device]]}
    assert heads <= {torch.float32}, "what gives a score stays in float32"
    trained_on = command == "run.policy"  # a run that is given it trains all of its weights
    assert all(p.requires_grad == trained_on for p in model.parameters())


@pytest.mark.parametrize("device", BEST)
def test_so_are_the_reward_models_of_measures_by_steps(monkeypatch, device):
    monkeypatch.setattr(precision, "best_precision", lambda _: BEST[device])
    measure = Measure("accuracy", "texts")
    assert _context(measure, None, None, None).dtype == precision.DTYPES[BEST[device]]
