"""Monte Carlo values of states (VinePPO), against the enumerated ones."""

import dataclasses
import json
import math

import pytest
import torch
from typer.testing import CliRunner

from quartet.algorithms.presets import ALGORITHMS
from quartet.algorithms.state_values import MonteCarloValues, state_advantages
from quartet.cli import app
from quartet.config.toml import ConfigError, read_settings
from quartet.data.sampler import Sampler
from quartet.errors import QuartetError
from quartet.generation.native import NativeGenerator
from quartet.generation.scripted import ScriptedGenerator
from quartet.loops.collect import Collector
from quartet.loops.state_values import with_state_values
from quartet.planning.plan import plan as make_plan
from quartet.recipes import recipe_path
from quartet.rewards.protocol import Weighted
from quartet.training.batch import collate
from tests.support.enumerated import (
    EOS,
    PROMPTS,
    SAMPLING,
    Enumerated,
    reward,
    tokenizer,
    toy_learner,
)
from tests.support.tiny_run import make_run

NAN = math.nan
VINEPPO = ALGORITHMS["vineppo"]


class TableReward:
    """The score of the ids, as `tests.support.enumerated` has it."""

    name = "table"

    def score(self, rollouts):
        return [r.score for r in reward(rollouts)]


def vine(**fields):
    return dataclasses.replace(VINEPPO, advantage=MonteCarloValues(**fields))


def test_tokens_between_two_states_share_what_the_value_rose_by():
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0, 9.0], [0.0, 0.5, 0.0, 2.0, 0.0]])
    values = torch.tensor([[0.5, NAN, 0.75, NAN, 7.0], [NAN, 1.0, NAN, 1.5, NAN]])
    mask = torch.tensor([[True, True, True, True, False], [True, True, True, True, True]])
    expected = [[0.25, 0.25, 0.25, 0.25, 0.0], [0.0, 1.0, 1.0, 0.5, 0.5]]
    found = state_advantages(rewards, values, mask)
    assert torch.allclose(found, torch.tensor(expected))


def test_tokens_of_an_environment_are_stepped_over():
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    values = torch.tensor([[0.5, NAN, 0.75, NAN]])
    mask = torch.tensor([[True, False, True, True]])
    assert state_advantages(rewards, values, mask).tolist() == [[0.25, 0.0, 0.25, 0.25]]


def test_with_a_state_at_every_token_it_is_the_td_error_and_the_advantages_add_up():
    rng = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(3, 6, generator=rng) for _ in range(2))
    mask = torch.arange(6) < torch.tensor([6, 4, 1])[:, None]
    found = state_advantages(rewards, values, mask)
    following = torch.nn.functional.pad(torch.where(mask, values, 0.0)[:, 1:], (0, 1))
    assert torch.allclose(found, torch.where(mask, rewards + following - values, 0.0), atol=1e-6)
    total = torch.where(mask, rewards, 0.0).sum(dim=1) - values[:, 0]
    assert torch.allclose(found.sum(dim=1), total, atol=1e-5)


def test_where_states_are():
    every = MonteCarloValues(every=3)
    assert every.states(["a"] * 7) == [0, 3, 6] and every.states([]) == []
    by_line = MonteCarloValues(separator="\n")
    assert by_line.states(["a", "b\n", "c", "\n", "d", "\n"]) == [0, 2, 4]


@pytest.fixture(scope="module")
def exact():
    """Enumeration without a KL penalty and without a discount, which is what the values are of."""
    return Enumerated(toy_learner(), dataclasses.replace(VINEPPO, advantage=MonteCarloValues()))


def collected(algorithm, samples=1, prompts=PROMPTS):
    learner = toy_learner()
    generator = NativeGenerator(learner.models.actor, tokenizer(), frozenset({EOS}), 0)
    collector = Collector(
        Sampler(prompts, len(prompts), 0), generator, [Weighted(TableReward())], samples
    )
    return collector.collect(algorithm, SAMPLING).rollouts


def expected_score(exact, prompt, prefix):
    rows, p, _ = exact.after(prompt, prefix)
    return float(p @ exact.batch.scores[rows].double().numpy())


def test_values_and_advantages_are_the_enumerated_ones(exact):
    algorithm = vine(continuations=600, every=1)
    rollouts = collected(algorithm, prompts=PROMPTS[:4])
    advantages = algorithm.advantage(algorithm.token_rewards(collate(rollouts)), collate(rollouts))
    for rollout, own in zip(rollouts, advantages[0], strict=True):
        ids = rollout.response_ids
        values = [expected_score(exact, rollout.prompt.ids, ids[:t]) for t in range(len(ids))]
        assert rollout.state_values == pytest.approx(values, abs=0.15)
        ends = [*values[1:], rollout.score]
        rises = [after - before for before, after in zip(values, ends, strict=True)]
        assert own[2 : 2 + len(ids)].tolist() == pytest.approx(rises, abs=0.25)


def test_states_that_are_shared_are_sampled_from_once():
    rollouts = collected(vine(continuations=4, every=8), samples=3)
    by_group = {}
    for rollout in rollouts:
        by_group.setdefault(rollout.group, []).append(rollout)
    for own in by_group.values():
        assert len({r.state_values[0] for r in own}) == 1
        assert own[0].continuation_tokens >= 4
        assert [r.continuation_tokens for r in own[1:]] == [0, 0]


def test_a_state_without_a_score_joins_its_neighbours():
    rollouts = collected(VINEPPO, prompts=PROMPTS[:2])

    class Silent(TableReward):
        def score(self, rollouts):
            return [None for _ in rollouts]

    generator = NativeGenerator(toy_learner().models.actor, tokenizer(), frozenset({EOS}), 0)
    found = with_state_values(
        rollouts, generator, [Weighted(Silent())], VINEPPO.advantage, SAMPLING
    )
    assert all(set(r.state_values) == {None} for r in found)
    advantages = VINEPPO.experience(collate(found)).advantages
    assert (advantages == 0).all()


def test_other_generators_are_refused():
    scripted = ScriptedGenerator(["a"], tokenizer())
    made = scripted.generate(PROMPTS[:1], SAMPLING)
    with pytest.raises(QuartetError, match="ScriptedGenerator cannot go on from the middle"):
        with_state_values(made, scripted, [], VINEPPO.advantage, SAMPLING)


WORDS = ("algorithm.preset=vineppo", 'recipe=["sft", "vineppo"]')


def settings(*words):
    return read_settings(recipe_path("sums"), [*WORDS, *words], "recipe sums")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["algorithm.scores=[{type='clip'}]"], "continuations have neither shaped scores"),
        (["algorithm.kl={type='in_reward'}"], "continuations have neither shaped scores"),
        (["generator={type='vllm', urls=['http://127.0.0.1:1']}"], "only the native generator"),
    ],
)
def test_what_it_cannot_be_combined_with(words, sentence):
    with pytest.raises(ConfigError, match=sentence):
        settings(*words)


def test_the_plan_counts_the_tokens_of_continuations():
    config = settings(
        "algorithm.advantage.every=2", "algorithm.advantage.continuations=5", "run.steps=2"
    ).config
    plan = make_plan(config)
    length, rollout = plan.row_tokens[1], config.rollout
    responses = 2 * rollout.prompts_per_step * rollout.samples_per_prompt
    later = sum(length - t for t in range(2, math.ceil(length), 2))
    tokens = 5 * (2 * rollout.prompts_per_step * length + responses * later)
    assert plan.tokens["vineppo, continuations generated"] == pytest.approx(tokens)


@pytest.mark.slow
def test_an_update_of_a_run_is_computed_again_to_the_bit(tmp_path):
    """The continuations come from the generator's random numbers, which a checkpoint holds."""
    run = make_run(tmp_path, "sums", *WORDS, "run.steps=3", "rollout.prompts_per_step=4")
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    steps = [e["metrics"] for e in events if e["event"] == "metrics" and e["stage"] == "vineppo"]
    assert len(steps) == 3 and all(m["continuations/tokens"] > 0 for m in steps)
    shown = CliRunner().invoke(app, ["replay", str(run.path), "--step", "3"])
    assert shown.exit_code == 0, shown.output
    assert "every metric is the recorded one, to the bit" in shown.output
