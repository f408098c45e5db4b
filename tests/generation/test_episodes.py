"""Answers of several turns: whose token is whose, and that only the policy's are learnt from."""

import copy
import dataclasses

import pytest
import torch

from quartet.algorithms.advantages import gae
from quartet.algorithms.presets import ALGORITHMS
from quartet.data.encoding import Encoder
from quartet.data.examples import Example
from quartet.data.sampler import Sampler
from quartet.experience import Prompt
from quartet.generation.episodes import Episodes, check_second_turn
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.generation.scripted import ScriptedGenerator
from quartet.loops.collect import Collector
from quartet.loops.rl import rl
from quartet.loops.sft import sft
from quartet.models.actor_critic import Separate, freeze
from quartet.models.chat import ChatError
from quartet.models.forward import masked_logprobs
from quartet.models.heads import ScalarModel
from quartet.models.language_model import create
from quartet.models.shape import Shape
from quartet.rewards.environment import EnvironmentReward
from quartet.rewards.protocol import RewardError, Weighted, rewarded
from quartet.training.batch import collate
from quartet.training.budget import Budget
from quartet.training.learner import Learner
from quartet.training.optim import Optim, Optimizer, OptimizerConfig
from quartet.worlds.guess import GUESSES, Guess, Host, message
from tests.support.chats import CHATML, REASONING, byte_level
from tests.support.thread_ranks import on_ranks
from tests.support.world import prompts as plain_prompts
from tests.support.world import rollout

WORLD = Guess(0)
TOKENIZER = WORLD.tokenizer()
SAMPLING = Sampling(max_new_tokens=2)


def game_prompts(count):
    return Encoder(TOKENIZER, 4, 16).prompts(WORLD.prompts(count))


def policy(seed=0):
    return create(Shape(hidden_size=32, num_layers=2, num_heads=2, max_length=24), TOKENIZER, seed)


@pytest.fixture(scope="module")
def player():
    """A policy that has seen some games, so that its turns are mostly letters."""
    made = policy()
    games = Encoder(TOKENIZER, 4, 16).demonstrations(WORLD.demonstrations(200))
    optimizer = Optimizer(list(made.parameters()), OptimizerConfig(lr=5e-3), 60)
    list(sft(made, Sampler(games, 64, 0), optimizer, 60, Budget(4096)))
    return made


def episodes(turns, max_turns=GUESSES, max_tokens=24, make=Host):
    return Episodes(turns, TOKENIZER, make, max_turns, max_tokens)


def prompt_with(secret):
    [made] = Encoder(TOKENIZER, 4, 16).prompts(
        [dataclasses.replace(WORLD.prompts(1)[0], extra={"secret": secret})]
    )
    return made


def test_a_game_by_hand():
    scripted = ScriptedGenerator(["h", "c", "e"], TOKENIZER)
    [made] = episodes(scripted).generate([prompt_with("e")], SAMPLING)
    assert TOKENIZER.decode(made.response_ids) == "h<eos><c<eos>>e<eos>="
    assert made.policy_mask == (True, True, False) * 3
    assert made.turn_rewards == (0, 0, 0, 0, 0, 0, 0, 1.0, 0)
    assert made.finish_reason == "stop" and made.response == "h<c>e="
    assert EnvironmentReward().score([made]) == [1.0] and WORLD.gold("?", made.response) == 1.0


def test_an_episode_ends_after_its_turns_or_when_the_next_one_would_not_fit():
    lost = episodes(ScriptedGenerator(["a", "a", "a", "a"], TOKENIZER)).generate(
        [prompt_with("e")], SAMPLING
    )[0]
    assert (
        lost.response == "a>a>a>a>"
        and lost.finish_reason == "length"
        and sum(lost.turn_rewards) == 0
    )
    short = episodes(ScriptedGenerator(["a"], TOKENIZER), max_tokens=8).generate(
        [prompt_with("e")], SAMPLING
    )[0]
    assert short.response == "a>a" and short.finish_reason == "length"
    wrong = episodes(ScriptedGenerator(["?"], TOKENIZER)).generate([prompt_with("e")], SAMPLING)[0]
    assert wrong.response == "?" and wrong.finish_reason == "stop"


def test_the_samplers_logprobs_are_those_of_the_whole_text_at_the_policys_tokens(player):
    actor = player
    made = episodes(NativeGenerator(actor, TOKENIZER, frozenset({1}), 0)).generate(
        game_prompts(12), SAMPLING, 2
    )
    assert any(len(r.response_ids) > 6 for r in made) and [r.group for r in made][:4] == [
        0,
        0,
        1,
        1,
    ]
    batch = collate(made, torch.device("cpu"))
    own = masked_logprobs(actor, batch.tokens, batch.response_mask)
    torch.testing.assert_close(batch.rollout_logprobs, own, atol=1e-5, rtol=0)
    for row, r in enumerate(made):
        says = TOKENIZER.decode(
            [
                t
                for t, own in zip(
                    batch.tokens[row].tolist(), batch.response_mask[row].tolist(), strict=True
                )
                if own
            ]
        )
        assert says == TOKENIZER.decode(
            [t for t, mine in zip(r.response_ids, r.policy_mask, strict=True) if mine]
        )


def test_what_the_host_says_has_no_gradient_and_gae_carries_over_it():
    made = episodes(ScriptedGenerator(["h", "c", "e"], TOKENIZER)).generate(
        [prompt_with("e")], SAMPLING
    )
    scored = rewarded(made, [Weighted(EnvironmentReward())], per_token=True)
    batch = collate(scored, torch.device("cpu"))
    mask = batch.response_mask[0]
    assert mask.tolist() == [False, *(True, True, False) * 3] and int(mask.sum()) == 6
    values = torch.where(mask, 0.5, 9.0)[None]
    advantages = gae(batch.token_scores, values, batch.response_mask, lam=0.5)[0]
    packed = gae(
        torch.tensor([[0, 0, 0, 0, 0, 1.0]]),
        torch.full((1, 6), 0.5),
        torch.ones(1, 6, dtype=torch.bool),
        lam=0.5,
    )[0]
    torch.testing.assert_close(advantages[mask], packed)
    actor = policy()
    other = batch.tokens.clone()
    logprobs = masked_logprobs(actor, batch.tokens, batch.response_mask)
    assert (logprobs[0][~mask] == 0).all()
    other[0, -1] = 7  # the host's last word is read by nobody
    torch.testing.assert_close(masked_logprobs(actor, other, batch.response_mask), logprobs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_games_can_be_trained_on_by_ppo_and_by_grpo(name, player):
    actor = copy.deepcopy(player)
    critic = ScalarModel.from_trunk(actor, 0, 0) if name == "ppo" else None
    algorithm = ALGORITHMS[name]
    reference = freeze(copy.deepcopy(player)) if algorithm.needs_reference else None
    learner = Learner(
        Separate(actor, critic),
        reference,
        Optim(lr=3e-3, critic_lr=3e-3, epochs=1, minibatches=2),
        SAMPLING,
        6,
    )
    generator = episodes(NativeGenerator(actor, TOKENIZER, frozenset({1}), 0))
    reward = [Weighted(EnvironmentReward())]
    steps = list(
        rl(Collector(Sampler(game_prompts(32), 16, 0), generator, reward, 4), learner, algorithm)
    )
    assert all(step.metrics["ratio/first_error"] < 1e-4 for step in steps)
    assert learner.sampler_agrees is True
    assert max(len(r.response_ids) for r in steps[0].rollouts) > 6
    assert steps[0].metrics["sampler_mismatch"] < 1e-5


def test_plain_text_and_rollouts_without_an_environment_are_refused():
    with pytest.raises(ChatError, match="is plain text; an environment speaks in conversations"):
        episodes(ScriptedGenerator(["a"], TOKENIZER)).generate([Prompt("p", (5,), "x")], SAMPLING)
    with pytest.raises(RewardError, match="was answered without an environment"):
        EnvironmentReward().score([rollout(plain_prompts(1)[0], (5,), 0.0)])


def test_an_opening_of_the_environment_is_part_of_the_prompt():
    class Opening(Host):
        def reset(self, prompt):
            super().reset(prompt)
            return [message("<")]

    [made] = episodes(ScriptedGenerator(["e"], TOKENIZER), make=Opening).generate(
        [prompt_with("e")], SAMPLING
    )
    assert TOKENIZER.decode(made.prompt.ids) == "?<" and made.response == "e="


def test_of_a_team_the_lead_plays_and_all_hear_what_was_said():
    """An environment with a will of its own would tell each rank something else."""
    hosts = []

    class Willful(Host):
        def __init__(self):
            super().__init__()
            hosts.append(self)

        def reset(self, prompt):
            super().reset(prompt)
            return [{"role": "user", "content": "<>"[len(hosts) % 2]}] if len(hosts) > 1 else []

    def play(process_group):
        turns = ScriptedGenerator(["h", "c", "e"], TOKENIZER)
        return Episodes(turns, TOKENIZER, Willful, GUESSES, 24, process_group).generate(
            [prompt_with("e")], SAMPLING, 2
        )

    first, second = on_ranks(2, play)
    assert first == second and len(hosts) == 2, "one for each episode, on one rank"
    assert first[0].prompt.ids != prompt_with("e").ids, "what it said first"


def test_the_demonstrations_of_the_world_are_games_and_the_loss_is_on_the_guesses():
    encoder = Encoder(TOKENIZER, 4, 16)
    for made in encoder.demonstrations(WORLD.demonstrations(50)):
        own = [
            t
            for t, mine in zip(made.response_ids, made.loss_mask or [True] * 99, strict=False)
            if mine
        ]
        assert set(TOKENIZER.decode(own).replace("<eos>", "")) <= set("abcdefghijklmnop")
        assert TOKENIZER.decode(made.prompt_ids) == "?"


class Asking:
    """An environment that asks on, twice."""

    def reset(self, prompt):
        self.turns = 0
        return []

    def step(self, response):
        self.turns += 1
        return [{"role": "user", "content": "why<|im_end|>"}], 1.0, self.turns == 3


@pytest.mark.parametrize("template", [CHATML, REASONING])
def test_an_environment_goes_on_where_the_template_rewrites_earlier_answers(template):
    words = byte_level(template)
    [prompt] = Encoder(words, 100, 100).prompts(
        [Example("x:1", [{"role": "user", "content": "why"}])]
    )
    check_second_turn(words, prompt)
    said = "<think>\nthink\n</think>\n\nthe answer"
    turns = ScriptedGenerator([said], words)
    [made] = Episodes(turns, words, Asking, 8, 1000).generate([prompt], Sampling(max_new_tokens=64))
    turn = f"{said}<|im_end|>\n<|im_start|>user\nwhy<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert words.decode(made.response_ids) == turn * 3, "sampled tokens stay as they were"
    assert made.response_ids.count(words.eos_token_id) == 6, "what the environment quotes is text"
    own = [t for t, mine in zip(made.response_ids, made.policy_mask, strict=True) if mine]
    assert words.decode(own) == f"{said}<|im_end|>" * 3
    assert sum(made.turn_rewards) == 3.0


def test_a_template_that_cannot_go_on_is_refused_before_the_run():
    words = byte_level("{% for m in messages %}{{ m['role'] }}{% endfor %}")
    prompt = Prompt("x:1", (5,), "x", messages=[{"role": "user", "content": "why"}])
    with pytest.raises(ChatError, match="x:1: an environment cannot answer the policy"):
        check_second_turn(words, prompt)
