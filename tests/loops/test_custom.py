"""What a stage of the user's own works with."""

import pytest
import torch

import quartet
from quartet.config.toml import ConfigError, settings_of_table
from quartet.data.records import Comparison, Demonstration
from quartet.data.sampler import Sampler
from quartet.errors import PartError
from quartet.experience import Prompt
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.loops.custom import StageContext, custom
from quartet.loops.responses import Responses
from quartet.loops.sft import sft
from quartet.models.language_model import stop_ids
from quartet.rewards.functions import TextReward
from quartet.rewards.protocol import Weighted
from quartet.training.budget import Budget
from quartet.training.optim import Optimizer, OptimizerConfig
from tests.support.world import model, tokenizer

ROWS = [
    Demonstration(str(i), (3, 4, 5 + i % 3), (6, 7 + i % 4, *range(8, 8 + i % 5), 1))
    for i in range(12)
]
PROMPTS = [Prompt(str(i), (3, 4 + i), f"p{i}") for i in range(6)]


def context_of(source, policy, rows=ROWS, responses=None, reference=None, tokens=4096):
    optimizer = Optimizer(
        list(policy.parameters()), OptimizerConfig(lr=1e-3), source.steps * source.updates
    )
    rows = Sampler(rows, 4, seed=0)
    budget = Budget(tokens)
    return StageContext(source, policy, reference, tokenizer(), rows, responses, optimizer, budget)


def responses_of(policy, **settings):
    made = tokenizer()
    generator = NativeGenerator(policy, made, stop_ids(policy, made), seed=0)
    reward = Weighted(TextReward("length", lambda prompt, response: float(len(response))))
    return Responses(generator, Sampling(max_new_tokens=5, **settings), [reward])


def own(step, steps=3, reads="demonstrations", updates=1):
    members = {"step": step, "reads": reads, "internal": True, "updates": updates}
    return type("OfATest", (quartet.StageSource,), members)(steps=steps)


@pytest.mark.parametrize("tokens", [4096, 14])
def test_a_stage_that_imitates_is_sft_to_the_bit(tokens):
    def step(self, context):
        context.update(context.batch(), lambda t: -t.logprobs)
        return {}

    source, one, other = own(step), model(), model()
    optimizer = Optimizer(list(other.parameters()), OptimizerConfig(lr=1e-3), 3)
    theirs = list(sft(other, Sampler(ROWS, 4, seed=0), optimizer, 3, Budget(tokens)))
    ours = list(custom(context_of(source, one, tokens=tokens), 3))
    assert [p.metrics for p in ours] == [p.metrics for p in theirs]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_rows_of_a_micro_batch_are_named_and_the_mean_is_over_all_tokens():
    """A loss of 1 for each token of row 2, and 0 for others, is the share of its tokens."""
    batch, seen, found = ROWS[:5], [], {}

    def step(self, context):
        weight = [0.0, 0.0, 1.0, 0.0, 0.0]
        everywhere = context.logprobs(batch)

        def loss(tokens):
            seen.extend(tokens.rows)
            assert tokens.ref_logprobs is not None and not tokens.ref_logprobs.requires_grad
            assert torch.equal(tokens.ref_logprobs, tokens.logprobs)  # both are the same weights
            assert (tokens.logprobs[~tokens.mask] == 0).all()
            torch.testing.assert_close(tokens.of(everywhere), tokens.logprobs.detach())
            return tokens.of(weight) + 0 * tokens.logprobs + 5.0 * ~tokens.mask

        found.update(context.update(batch, loss))
        return {}

    policy = model()
    context = context_of(own(step), policy, reference=quartet.freeze(model()), tokens=14)
    list(custom(context, 1))
    assert sorted(seen) == [0, 1, 2, 3, 4]
    lengths = [len(row.response_ids) for row in batch]
    assert found["loss"] == pytest.approx(lengths[2] / sum(lengths))
    assert found["grad_norm/policy"] == 0


def test_responses_are_of_the_present_policy_and_scored():
    def step(self, context):
        prompts = context.batch()
        rollouts = context.sample(prompts, 2)
        assert [r.prompt.id for r in rollouts] == [p.id for p in prompts for _ in range(2)]
        assert all(r.score == len(r.response) for r in rollouts)
        again = context.logprobs(rollouts)
        for row, rollout in enumerate(rollouts):
            start, end = len(rollout.prompt.ids), len(rollout.prompt.ids) + len(rollout.logprobs)
            expected = torch.tensor(rollout.logprobs)
            torch.testing.assert_close(again[row, start:end], expected, atol=1e-5, rtol=0)
            assert again[row, :start].eq(0).all() and again[row, end:].eq(0).all()
        context.saved["seen"] = context.saved.get("seen", 0) + len(rollouts)
        context.update(rollouts, lambda tokens: -tokens.logprobs)
        return {"mine": context.number}

    policy = model()
    source = own(step, reads="prompts")
    made = responses_of(policy, temperature=0.7)
    context = context_of(source, policy, PROMPTS, made)
    steps = list(custom(context, 3))
    assert [p.metrics["mine"] for p in steps] == [1, 2, 3] and context.saved == {"seen": 24}
    assert all(p.metrics["reward"] == p.metrics["reward/length"] > 0 for p in steps)
    assert {"loss", "lr", "grad_norm/policy", "response/tokens"} <= steps[0].metrics.keys()
    assert steps[0].metrics["lr"] > steps[2].metrics["lr"] > 0


def test_a_stage_goes_on_from_its_state():
    def step(self, context):
        context.saved["sum"] = context.saved.get("sum", 0) + context.number
        rollouts = context.sample(context.batch(), 2)
        context.update(rollouts, lambda tokens: -tokens.logprobs)
        return {"sum": context.saved["sum"]}

    source = own(step, steps=4, reads="prompts")
    policy = model()
    whole = context_of(source, policy, PROMPTS, responses_of(policy))
    expected = [p.metrics for p in custom(whole, 4)]
    first, second = model(), model()
    begun = context_of(source, first, PROMPTS, responses_of(first))
    assert [p.metrics for p in custom(begun, 2)] == expected[:2]
    later = context_of(source, second, PROMPTS, responses_of(second))
    second.load_state_dict(first.state_dict())
    later.load_state(begun.state())
    later._optimizer.load_state(begun._optimizer.state())
    assert [p.metrics for p in custom(later, 4, 2)] == expected[2:]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda self, c: None, "step returned a NoneType, not a dict of metrics"),
        (lambda self, c: {"mine": "1.x"}, "step returned a str as the metric mine, not a number"),
        (lambda self, c: {"mine": torch.ones(2)}, "a Tensor as the metric mine, not a number"),
        (lambda self, c: c.sample([]), 'only where its class has reads = "prompts"'),
        (lambda self, c: c.update(ROWS, lambda t: t.logprobs.mean()), "returned a Tensor of shape"),
        (
            lambda self, c: c.update([Demonstration("a", (3,), ())], lambda t: t.logprobs),
            "no response token",
        ),
        (lambda self, c: c.update(ROWS, lambda t: t.logprobs.detach()), "has no gradient"),
        (
            lambda self, c: c.update([Comparison("a", (3,), (4,), (5,))], lambda t: t.logprobs),
            "a Comparison is no row with a response",
        ),
        (
            lambda self, c: [c.update(ROWS[:2], lambda t: -t.logprobs) for _ in range(2)],
            "takes more than 1 optimizer steps in a step",
        ),
    ],
)
def test_what_a_stage_does_wrong_is_said_in_a_sentence(step, message):
    with pytest.raises(PartError, match=message):
        list(custom(context_of(own(step), model()), 1))


def test_several_updates_of_a_step_are_counted_by_the_schedule():
    def step(self, context):
        return {f"lr/{i}": context.update(ROWS, lambda t: -t.logprobs)["lr"] for i in range(2)}

    rates = [
        p.metrics[f"lr/{i}"]
        for p in custom(context_of(own(step, steps=2, updates=2), model()), 2)
        for i in range(2)
    ]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_log_probs_of_an_environments_tokens_are_left_out():
    row = Demonstration("a", (3, 4), (5, 6, 7, 1), (True, False, False, True))
    found = []

    def step(self, context):
        context.update([row], lambda t: found.append(t.mask.tolist()) or -t.logprobs)
        return {}

    list(custom(context_of(own(step), model()), 1))
    assert found == [[[False, False, True, False, False, True]]]


def test_a_type_that_is_no_class_is_said_with_what_to_write(monkeypatch):
    monkeypatch.setattr(quartet.StageSource, "members", {})
    table = {"recipe": "custom", "data": {"world": "sums"}, "custom": {"type": "nosuch"}}
    with pytest.raises(ConfigError, match=r"custom.type = .nosuch.: no such type. Name a class"):
        settings_of_table({**table, "policy": {"create": {"hidden_size": 16}}}, "test", "a test")
