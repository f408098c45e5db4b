import copy

import pytest
import torch

from quartet.algorithms.presets import ALGORITHMS
from quartet.data.records import Comparison, Demonstration
from quartet.data.sampler import Sampler
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.generation.scripted import ScriptedGenerator
from quartet.loops.reward_model import pair_accuracy, reward_model
from quartet.loops.rl import rl
from quartet.loops.sft import held_out_loss, sft
from quartet.models.actor_critic import Separate, Shared, freeze
from quartet.models.heads import ScalarModel, ValueHead
from quartet.rewards.functions import TextReward
from quartet.rewards.protocol import Weighted
from quartet.training.learner import Learner
from quartet.training.optim import Descent, Optim, Optimizer
from tests.world import model, prompts, tokenizer

GOOD, BAD, THE = (tokenizer().encode(word)[0] for word in ("good", "bad", "the"))
END = 1


def demonstrations():
    return [Demonstration(f"d:{i}", (THE, 4 + i), (GOOD, END)) for i in range(6)]


def comparisons():
    return [Comparison(f"c:{i}", (THE, 4 + i), (GOOD, END), (BAD, END)) for i in range(6)]


def optimizer(made, lr=3e-3, steps=40):
    return Optimizer(list(made.parameters()), Descent(lr=lr), steps)


def test_sft_learns_the_answers():
    made = model()
    before = held_out_loss(made, demonstrations(), 4096)
    steps = list(sft(made, Sampler(demonstrations(), 4, 0), optimizer(made), 40, 4096))
    assert [s.number for s in steps] == list(range(1, 41))
    assert before > 1
    assert held_out_loss(made, demonstrations(), 4096) < 0.2


def test_sft_learns_nothing_of_the_prompt():
    """The loss is the mean over answer tokens: a prompt the model finds absurd costs nothing."""
    made = model()
    demo = Demonstration("d", (THE, BAD, BAD, THE), (GOOD, END))
    ids = torch.tensor([[*demo.prompt_ids, *demo.response_ids]])
    logprobs = made(input_ids=ids).logits.log_softmax(-1)[0]
    by_hand = -(logprobs[3, GOOD] + logprobs[4, END]) / 2
    assert held_out_loss(made, [demo], 4096) == pytest.approx(by_hand.item(), abs=1e-5)


def test_micro_batches_do_not_change_sft():
    losses = []
    for tokens in (4096, 1):
        made = model()
        steps = list(sft(made, Sampler(demonstrations(), 6, 0), optimizer(made, steps=3), 3, tokens))
        losses.append(steps[-1].metrics["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_reward_model_learns_the_preference():
    made = ScalarModel.from_trunk(model(), 0, seed=0)
    steps = list(reward_model(made, Sampler(comparisons(), 4, 0), optimizer(made), 40, 4096))
    assert steps[-1].metrics["loss"] < 0.1 < steps[0].metrics["loss"]
    assert pair_accuracy(made, comparisons(), 4096) == 1
    swapped = [Comparison(c.id, c.prompt_ids, c.rejected_ids, c.chosen_ids) for c in comparisons()]
    assert pair_accuracy(made, swapped, 4096) == 0


def goodness(prompt, response):
    return float(response.split().count("good") - response.split().count("bad"))


def run_rl(preset, critic, steps=30, samples=1, seed=0):
    actor = model(seed=seed)
    models = {
        "shared": lambda: Shared(actor, ValueHead(actor.config.hidden_size)),
        "separate": lambda: Separate(actor, ScalarModel.from_trunk(actor, 0, seed=0)),
        "none": lambda: Separate(actor, None),
    }[critic]()
    learner = Learner(models, freeze(copy.deepcopy(actor)), Optim(lr=3e-3, critic_lr=3e-3, epochs=2), 1.0, steps, seed)
    generator = NativeGenerator(actor, tokenizer(), frozenset({END}), seed)
    return rl(
        Sampler(prompts(16), 16, seed),
        generator,
        Sampling(max_new_tokens=6),
        samples,
        [Weighted(TextReward("goodness", goodness))],
        learner,
        ALGORITHMS[preset],
        steps,
    )


@pytest.mark.parametrize(("preset", "critic", "samples"), [("ppo", "separate", 1), ("ppo", "shared", 1), ("grpo", "none", 4)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rl_learns_to_please(preset, critic, samples, seed):
    rewards = [step.metrics["reward"] for step in run_rl(preset, critic, samples=samples, seed=seed)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.8


@pytest.mark.parametrize(("preset", "critic", "samples"), [("ppo", "separate", 1), ("grpo", "none", 4)])
def test_the_same_seed_gives_bitwise_the_same_metrics(preset, critic, samples):
    first, second = ([s.metrics for s in run_rl(preset, critic, 4, samples, seed=5)] for _ in range(2))
    assert first == second
    assert first != [s.metrics for s in run_rl(preset, critic, 4, samples, seed=6)]


def test_the_first_step_starts_at_the_reference():
    step = next(iter(run_rl("ppo", "separate")))
    assert step.metrics["kl"] == pytest.approx(0, abs=1e-4)
    assert step.metrics["ratio/first_error"] < 1e-5
    assert step.metrics["sampler_mismatch"] < 1e-5


def test_the_loop_takes_any_generator():
    actor = model()
    learner = Learner(Separate(actor, None), freeze(copy.deepcopy(actor)), Optim(lr=3e-3), 1.0, 2, 0)
    scripted = ScriptedGenerator(["good", "bad"], tokenizer())
    steps = list(
        rl(
            Sampler(prompts(4), 4, 0),
            scripted,
            Sampling(max_new_tokens=6),
            2,
            [Weighted(TextReward("goodness", goodness))],
            learner,
            ALGORITHMS["grpo"],
            2,
        )
    )
    assert [r.response for r in steps[0].rollouts] == ["good", "bad"] * 4
    assert scripted.version == 2
    # Each group holds scores 1 and −1: mean 0, sample std √2, advantage ±1/√2
    first = steps[0].experience.advantages[0][steps[0].experience.response_mask[0]]
    assert first.tolist() == pytest.approx([0.70711] * 2, abs=1e-4)
