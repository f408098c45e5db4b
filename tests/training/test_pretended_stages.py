"""SFT, reward models, preferences and ILQL on a GPU that is not there: nothing mixes devices."""

import pytest
import torch

from quartet.algorithms.ilql import Ilql
from quartet.algorithms.preference import LastTokenLoss, PerTokenLoss, PreferenceLoss
from quartet.data.records import Comparison, Demonstration
from quartet.data.sampler import Sampler
from quartet.loops.ilql import IlqlLearner, ilql
from quartet.loops.preference import held_out_preference, preference
from quartet.loops.reward_model import held_out_pairs, pair_accuracy, reward_model
from quartet.loops.sft import held_out_loss, sft
from quartet.models.actor_critic import freeze
from quartet.models.heads import ScalarModel
from quartet.models.precision import compute_in
from quartet.models.q_heads import QHeads
from quartet.training.budget import Budget
from quartet.training.optim import Optimizer, OptimizerConfig
from tests.support.pretended_device import on_device, pretended
from tests.support.world import model

BF16 = torch.bfloat16
DEMONSTRATIONS = [Demonstration(f"d{i}", tuple(range(4, 7 + i)), (5, 6, 7, 8)) for i in range(6)]
COMPARISONS = [Comparison(f"c{i}", tuple(range(4, 7 + i)), (5, 6, 7, 8), (6, 7)) for i in range(6)]


def optimizer(*modules):
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    made = Optimizer(trained, OptimizerConfig(lr=1e-3), 2)
    assert made.is_fused
    return made


def policy():
    return compute_in(on_device(model()), BF16)


def metrics(steps):
    found = [step.metrics for step in steps]
    assert len(found) == 2 and all(each["loss"] > 0 for each in found)
    return found


def test_demonstrations_are_imitated():
    with pretended():
        actor = policy()
        first, second = metrics(
            sft(actor, Sampler(DEMONSTRATIONS, 6, 0), optimizer(actor), 2, Budget(40))
        )
        assert second["loss"] < first["loss"]
        held_out_loss(actor, DEMONSTRATIONS, 40)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [LastTokenLoss(), PerTokenLoss()])
def test_a_reward_model_learns_from_comparisons(loss):
    with pretended():
        scalar = ScalarModel.from_trunk(model(), None, seed=0)
        on_device(scalar.model)
        scalar.compute_in(BF16)
        rows = Sampler(COMPARISONS, 6, 0)
        metrics(reward_model(scalar, rows, loss, optimizer(scalar), 2, Budget(40)))
        assert 0 <= pair_accuracy(scalar, COMPARISONS, 40) <= 1
        held_out_pairs(scalar, COMPARISONS, loss, 40)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PreferenceLoss.__subclasses__())
def test_a_policy_learns_from_comparisons(kind):
    with pretended():
        actor, reference = policy(), on_device(compute_in(freeze(model(seed=1)), BF16))
        steps = preference(
            actor, reference, Sampler(COMPARISONS, 6, 0), kind(), optimizer(actor), 2, Budget(60)
        )
        metrics(steps)
        held_out_preference(actor, reference, COMPARISONS, kind(), 60)


def test_values_and_actions_are_learnt_from_data():
    with pretended():
        heads, actor = on_device(QHeads(model())), policy()
        learner = IlqlLearner(actor, heads, Ilql())
        rows = Sampler(DEMONSTRATIONS, 6, 0)
        metrics(ilql(learner, rows, optimizer(actor, heads), 2, Budget(60)))
