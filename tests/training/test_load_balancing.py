"""The load-balancing loss in optimizer steps: micro-batches, ranks, metrics, and every kind of training."""

import copy
import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quartet.algorithms.ilql import Ilql
from quartet.algorithms.preference import PREFERENCES, LastTokenLoss
from quartet.algorithms.presets import ALGORITHMS
from quartet.data.records import Comparison, Demonstration
from quartet.data.sampler import Sampler
from quartet.generation.sampling import Sampling
from quartet.loops.ilql import IlqlLearner, ilql
from quartet.loops.preference import preference
from quartet.loops.reward_model import reward_model
from quartet.loops.sft import sft
from quartet.models.actor_critic import ForwardRequest, Separate, Shared, freeze
from quartet.models.adapters import POLICY, AdapterView, add_adapter
from quartet.models.forward import masked_logprobs
from quartet.models.heads import ScalarModel, ValueHead
from quartet.models.lora import Lora
from quartet.models.padding import response_mask, right_pad
from quartet.models.precision import compute_in
from quartet.models.q_heads import QHeads
from quartet.models.routing import recorded_routing
from quartet.training.budget import Budget
from quartet.training.imitation import imitation_losses
from quartet.training.learner import Learner
from quartet.training.load_balancing import LoadBalancing
from quartet.training.optim import Optim, Optimizer, OptimizerConfig
from quartet.training.trust_region import TrustRegionLearner
from tests.models.test_plain_path import SHAPE
from tests.models.test_routing import language_model
from tests.support.pretended_device import on_device, pretended
from tests.support.thread_ranks import on_ranks
from tests.support.world import model, prompts, rollout

NAMES = {"experts/balance_loss", "experts/largest_share"}


def ids(count, seed):
    return tuple(random.Random(seed).choices(range(3, 40), k=count))


def demonstrations():
    lengths = [(4, 12), (3, 5), (6, 7), (2, 3)]
    return [Demonstration(str(i), ids(p, i), ids(r, 9 + i)) for i, (p, r) in enumerate(lengths)]


def comparisons():
    return [Comparison(str(i), ids(4 + i, i), ids(5, 9 + i), ids(3, 19 + i)) for i in range(4)]


def balance_of(made, rows):
    """The loss of these demonstrations in one pass."""
    tokens, lengths = right_pad([(*d.prompt_ids, *d.response_ids) for d in rows])
    starts = torch.tensor([len(d.prompt_ids) for d in rows])
    with recorded_routing(made.base_model) as recorder:
        masked_logprobs(made, tokens, response_mask(starts, lengths, tokens.shape[1]))
    return recorder.routing


def test_the_loss_is_the_mean_over_micro_batches_by_their_tokens():
    made, rows = language_model(), demonstrations()
    [longest, others] = balance_of(made, rows[:1]), balance_of(made, rows[1:])
    tokens = [len(d.prompt_ids) + len(d.response_ids) for d in rows]
    share = tokens[0] / sum(tokens)
    expected = share * longest.loss() + (1 - share) * others.loss()
    balancing = LoadBalancing(0.5)
    plain = sum(imitation_losses(made, rows, 40))
    both = list(imitation_losses(made, rows, 40, balancing=balancing))
    assert len(both) == 2
    assert float((sum(both) - plain).detach()) == pytest.approx(
        0.5 * float(expected.detach()), rel=1e-4
    )
    metrics = balancing.metrics()
    assert metrics["experts/balance_loss"] == pytest.approx(float(expected.detach()), rel=1e-4)
    loads = longest.loads() + others.loads()
    counted = float(longest.counts.sum() + others.counts.sum())
    assert counted == sum(tokens) - len(rows)
    assert metrics["experts/largest_share"] == pytest.approx(float(loads.max()) / counted)
    whole = LoadBalancing(0.5)
    list(imitation_losses(made, rows, 1000, balancing=whole))
    assert whole.metrics()["experts/balance_loss"] == pytest.approx(
        float(balance_of(made, rows).loss().detach()), rel=1e-4
    )
    assert whole.metrics()["experts/largest_share"] == pytest.approx(
        metrics["experts/largest_share"]
    )


def test_ranks_add_up_to_the_micro_batches_of_one_process():
    made, rows = language_model(), demonstrations()
    alone = LoadBalancing(0.1)
    list(imitation_losses(made, rows, 40, balancing=alone))

    def work(group):
        balancing = LoadBalancing(0.1)
        list(imitation_losses(copy.deepcopy(made), rows, 1000, group, balancing))
        return balancing.metrics(group)

    first, second = on_ranks(2, work)
    assert first == second
    assert first["experts/largest_share"] == pytest.approx(alone.metrics()["experts/largest_share"])


def test_a_coefficient_of_zero_observes_and_changes_nothing():
    made, rows = language_model(), demonstrations()
    seen = LoadBalancing()
    plain = [float(x.detach()) for x in imitation_losses(made, rows, 40)]
    observed = list(imitation_losses(made, rows, 40, balancing=seen))
    assert [float(x.detach()) for x in observed] == pytest.approx(plain, abs=1e-6)
    assert seen.metrics().keys() == NAMES
    dense = model()
    nothing = LoadBalancing(0.1)
    short = [Demonstration("a", (4, 5), (6, 7))]
    assert [float(x.detach()) for x in imitation_losses(dense, short, 30, balancing=nothing)] == [
        float(x.detach()) for x in imitation_losses(dense, short, 30)
    ]
    assert nothing.metrics() == {}


# --- every kind of training


def optimizer(made):
    return Optimizer(list(made.parameters()), OptimizerConfig(lr=1e-4), 1)


def sft_step(coef):
    made = language_model()
    rows = Sampler(demonstrations(), 4, 0)
    return next(sft(made, rows, optimizer(made), 1, Budget(30), balance_coef=coef)), made


def reward_model_step(coef):
    made = ScalarModel.from_trunk(language_model(), 0, 0)
    rows = Sampler(comparisons(), 4, 0)
    steps = reward_model(
        made, rows, LastTokenLoss(), optimizer(made), 1, Budget(60), balance_coef=coef
    )
    return next(steps), made.model


def dpo_step(coef):
    made = language_model()
    reference = freeze(copy.deepcopy(made))
    rows = Sampler(comparisons(), 4, 0)
    steps = preference(
        made, reference, rows, PREFERENCES["dpo"], optimizer(made), 1, Budget(60), balance_coef=coef
    )
    return next(steps), made


def ilql_step(coef):
    made = language_model()
    heads = QHeads(made)
    parameters = [p for each in (made, heads) for p in each.parameters() if p.requires_grad]
    steps = ilql(
        IlqlLearner(made, heads, Ilql(), balance_coef=coef),
        Sampler(demonstrations(), 4, 0),
        Optimizer(parameters, OptimizerConfig(lr=1e-4), 1),
        1,
        Budget(30),
    )
    return next(steps), made


@pytest.mark.parametrize("step", [sft_step, reward_model_step, dpo_step, ilql_step])
def test_each_stage_before_rl_adds_the_loss_and_shows_the_load(step):
    plain, before = step(0.0)
    balanced, after = step(10.0)
    assert plain.metrics.keys() == balanced.metrics.keys() >= NAMES
    loss = plain.metrics["experts/balance_loss"]
    assert balanced.metrics["experts/balance_loss"] == pytest.approx(loss)
    added = balanced.metrics["loss"] - plain.metrics["loss"]
    assert added == pytest.approx(10 * loss, rel=1e-4)
    gates = "model.layers.0.mlp.gate.weight"
    assert not torch.equal(before.state_dict()[gates], after.state_dict()[gates])


def updated(models, coef, warm_up=0, preset="ppo"):
    algorithm = ALGORITHMS[preset]
    optim = Optim(lr=1e-4, critic_lr=1e-4, minibatches=2, critic_warmup_steps=warm_up)
    kind = TrustRegionLearner if preset == "trpo" else Learner
    learner = kind(
        models,
        freeze(language_model()),
        optim,
        Sampling(max_new_tokens=8),
        1,
        micro_batch_tokens=40,
        balance_coef=coef,
    )
    rollouts = [rollout(p, ids(6, i), float(i % 3)) for i, p in enumerate(prompts(6))]
    experience = algorithm.experience(learner.score(rollouts, algorithm))
    return learner.update(experience, algorithm)


def separate():
    made = language_model()
    return Separate(made, ScalarModel.from_trunk(made, 0, 1))


def test_rl_balances_actor_and_critic():
    plain, models = updated(separate(), 0.0), separate()
    update = updated(models, 1.0)
    of_critic = {f"critic_{name}" for name in NAMES}
    assert update.step_stats.keys() == plain.step_stats.keys() >= NAMES | of_critic
    assert all(0.5 <= update.step_stats[name] <= 1 for name in update.step_stats if "share" in name)
    assert update.step_stats["loss"] > plain.step_stats["loss"] + 3  # 2 each, if even


def test_a_dense_model_has_no_load():
    config = AutoConfig.for_model("llama", **SHAPE)
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    update = updated(Separate(dense, ScalarModel.from_trunk(dense, 0, 1)), 0.0)
    assert not any("experts" in name for name in update.step_stats)


def test_the_warm_up_of_the_critic_balances_the_critic_only():
    models = separate()
    before = copy.deepcopy(models.actor.state_dict())
    update = updated(models, 1.0, warm_up=1)
    assert update.step_stats.keys() >= NAMES | {f"critic_{name}" for name in NAMES}
    balance = update.step_stats["critic_experts/balance_loss"]
    added = update.step_stats["loss"] - update.losses["value"]
    assert added == pytest.approx(balance, rel=1e-5), "of the critic alone"
    assert all(torch.equal(before[n], p) for n, p in models.actor.state_dict().items())


@pytest.mark.slow
def test_a_trust_region_shows_the_load_of_the_actor():
    update = updated(separate(), 0.0, preset="trpo")
    assert update.step_stats.keys() >= NAMES | {f"critic_{name}" for name in NAMES}


def test_a_critic_on_the_actors_trunk_is_balanced_once():
    made = language_model()
    update = updated(Shared(made, ValueHead(32)), 1.0)
    assert update.step_stats.keys() >= NAMES
    assert not any(name.startswith("critic_experts") for name in update.step_stats)


def test_on_a_gpu_that_is_not_there_a_step_waits_once_more_however_many_micro_batches():
    """For the load of the step, which is read together."""
    with pretended() as counts:
        made = compute_in(on_device(language_model()), torch.bfloat16)
        rows = demonstrations()

        def waits(micro_batch_tokens, balancing):
            counts.reset()
            losses = list(imitation_losses(made, rows, micro_batch_tokens, balancing=balancing))
            metrics = balancing.metrics() if balancing is not None else {}
            return len(losses), sum(counts.waits.values()), metrics

        waits(1000, None)  # what is done once per model is done
        _, plain, _ = waits(1000, None)
        one, few, metrics = waits(1000, LoadBalancing(0.1))
        many, more, _ = waits(20, LoadBalancing(0.1))
        _, plain_many, _ = waits(20, None)
    assert metrics.keys() == NAMES
    assert one == 1 and many == 3
    assert few - plain == more - plain_many == 1


def test_the_reference_on_the_actors_trunk_is_not_in_the_load():
    """The exact KL runs the trunk once more, without the adapter."""
    actor = add_adapter(language_model(), Lora(rank=2), POLICY, seed=0)
    for name, parameter in actor.named_parameters():
        if "lora_B" in name:  # zeros: the adapter would change nothing
            torch.nn.init.normal_(parameter)
    tokens = torch.tensor([[5, 6, 7, 8]])
    mask = torch.arange(4)[None] > 0
    alone, beside = (
        next(Separate(actor, None).forward_passes(ForwardRequest(tokens, mask, 1.0, False, each)))
        for each in (None, AdapterView(actor, None))
    )
    assert beside.exact_kl is not None and alone.exact_kl is None
    assert torch.equal(beside.routing.loss(), alone.routing.loss())
