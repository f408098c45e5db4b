import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from quartet.algorithms.advantages import Gae
from quartet.algorithms.correction import Truncated
from quartet.algorithms.imitation import Pretraining
from quartet.algorithms.kl import AdaptiveCoef, KLInLoss, KLInReward, NoKL
from quartet.algorithms.preference import PREFERENCES, LastTokenLoss, PerTokenLoss
from quartet.algorithms.presets import ALGORITHMS
from quartet.algorithms.rewards import EveryToken
from quartet.data.prompt_sampling import PassRate, PromptSampler
from quartet.data.records import Comparison, Demonstration
from quartet.data.sampler import Sampler
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.generation.scripted import ScriptedGenerator
from quartet.loops import progress
from quartet.loops.collect import Collector
from quartet.loops.preference import OnlinePairs, held_out_preference, preference
from quartet.loops.responses import Responses
from quartet.loops.reward_model import pair_accuracy, reward_model
from quartet.loops.rl import rl
from quartet.loops.rl_async import Ahead, rl_async
from quartet.loops.sft import held_out_loss, sft
from quartet.models.actor_critic import Separate, Shared, freeze
from quartet.models.heads import ScalarModel, ValueHead
from quartet.models.text import decoded_response
from quartet.rewards.functions import TextReward
from quartet.rewards.protocol import RewardError, Weighted, rewarded
from quartet.training.batch import collate
from quartet.training.budget import Budget
from quartet.training.learner import Learner
from quartet.training.optim import Optim, Optimizer, OptimizerConfig
from quartet.training.trust_region import TrustRegionLearner
from tests.support.world import model, prompts, tokenizer

GOOD, BAD, THE = (tokenizer().encode(word)[0] for word in ("good", "bad", "the"))
END = 1


def demonstrations():
    return [Demonstration(f"d:{i}", (THE, 4 + i), (GOOD, END)) for i in range(6)]


def comparisons():
    return [Comparison(f"c:{i}", (THE, 4 + i), (GOOD, END), (BAD, END)) for i in range(6)]


def optimizer(made, lr=3e-3, steps=40):
    return Optimizer(list(made.parameters()), OptimizerConfig(lr=lr), steps)


def test_sft_learns_the_answers():
    made = model()
    before = held_out_loss(made, demonstrations(), 4096)
    steps = list(sft(made, Sampler(demonstrations(), 4, 0), optimizer(made), 40, Budget(4096)))
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
        steps = list(
            sft(made, Sampler(demonstrations(), 6, 0), optimizer(made, steps=3), 3, Budget(tokens))
        )
        losses.append(steps[-1].metrics["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_reward_model_learns_the_preference():
    made = ScalarModel.from_trunk(model(), 0, seed=0)
    steps = list(
        reward_model(
            made, Sampler(comparisons(), 4, 0), LastTokenLoss(), optimizer(made), 40, Budget(4096)
        )
    )
    assert steps[-1].metrics["loss"] < 0.1 < steps[0].metrics["loss"]
    assert pair_accuracy(made, comparisons(), 4096) == 1
    swapped = [Comparison(c.id, c.prompt_ids, c.rejected_ids, c.chosen_ids) for c in comparisons()]
    assert pair_accuracy(made, swapped, 4096) == 0


SAMPLING = Sampling(max_new_tokens=6)


def goodness(prompt, response):
    return float(response.split().count("good") - response.split().count("bad"))


def run_rl(preset, critic, steps=30, samples=1, seed=0, algorithm=None, staleness=0):
    actor = model(seed=seed)
    models = {
        "shared": lambda: Shared(actor, ValueHead(actor.config.hidden_size)),
        "separate": lambda: Separate(actor, ScalarModel.from_trunk(actor, 0, seed=0)),
        "none": lambda: Separate(actor, None),
    }[critic]()
    algorithm = algorithm or ALGORITHMS[preset]
    make = TrustRegionLearner if algorithm.update.type == "trust_region" else Learner
    pretraining = Sampler(demonstrations(), 4, seed) if algorithm.ptx.coef else None
    optim = Optim(lr=3e-3, critic_lr=3e-3, epochs=2, ema=0.9)
    learner = make(models, freeze(copy.deepcopy(actor)), optim, SAMPLING, steps, seed, pretraining)
    sampled = copy.deepcopy(actor) if staleness else actor
    generator = NativeGenerator(sampled, tokenizer(), frozenset({END}), seed, copied=staleness > 0)
    rewards = [Weighted(TextReward("goodness", goodness))]
    collector = Collector(Sampler(prompts(16), 16, seed), generator, rewards, samples)
    if staleness:
        return rl_async(collector, learner, algorithm, Ahead(staleness))
    return rl(collector, learner, algorithm)


def long(*values):
    """These values of a parameter, for the long suite alone."""
    return [
        pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.long) for v in values
    ]


def improvement(steps):
    rewards = [step.metrics["reward"] for step in steps]
    return sum(rewards[-3:]) / 3 - sum(rewards[:3]) / 3


@pytest.mark.parametrize(
    ("preset", "critic", "samples"),
    [("ppo", "separate", 1), ("ppo", "shared", 1), ("grpo", "none", 4)],
)
@pytest.mark.parametrize("seed", [0, *long(1, 2)])
@pytest.mark.slow
def test_rl_learns_to_please(preset, critic, samples, seed):
    assert improvement(run_rl(preset, critic, samples=samples, seed=seed)) > 0.8


@pytest.mark.parametrize(("staleness", "seed"), [(1, 0), (3, 1), *long((1, 1), (3, 0))])
@pytest.mark.slow
def test_rollouts_may_be_older_but_no_older_than_said(staleness, seed):
    """Each batch is sampled by the weights that there were when the update so many batches before it began."""
    algorithm = dataclasses.replace(ALGORITHMS["ppo"], correction=Truncated())
    steps = list(run_rl("ppo", "separate", seed=seed, algorithm=algorithm, staleness=staleness))
    assert [s.number for s in steps] == list(range(1, 31))
    for step in steps:
        assert {r.policy_version for r in step.rollouts} == {max(step.number - 1 - staleness, 0)}
        assert step.metrics["staleness/max"] == min(step.number - 1, staleness)
        assert step.metrics["staleness/thrown_away"] == 0
    assert improvement(steps) > 0.7
    first, later = steps[0].metrics, steps[staleness].metrics
    assert first["sampler_ratio"] < 1 + 1e-5 < later["staleness/ratio"], (
        "old log-probs are the learner's, not the sampler's"
    )
    assert "staleness/ratio" not in first and "sampler_ratio" not in later, (
        "between older weights and newer it is no fault"
    )
    assert all(s.metrics["ratio/first_error"] < 1e-5 for s in steps)


GENTLE = {"minimal": 0.1, "instructgpt": 0.3, "npg": 0.3, "trpo": 0.3}
"""What these gain in 30 steps is less: a KL coefficient of 1, a pull of 27.8 towards other texts, steps of 0.01 nats."""


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("preset", sorted(ALGORITHMS))
def test_every_preset_learns_to_please(preset, seed):
    algorithm = ALGORITHMS[preset]
    critic, samples = (
        ("separate", 1) if algorithm.needs_critic else ("none", 4 if algorithm.needs_group else 1)
    )
    gained = improvement(run_rl(preset, critic, samples=samples, seed=seed))
    assert gained > GENTLE.get(preset, 0.5), f"{preset}: {gained:.2f}"


@pytest.mark.parametrize("preset", sorted(ALGORITHMS))
def test_every_preset_takes_a_step(preset):
    """Through generation, rewards, scoring and update: everything it asks for is there, and nothing but rounding is between
    sampler and learner."""
    algorithm = ALGORITHMS[preset]
    critic, samples = (
        ("separate", 1) if algorithm.needs_critic else ("none", 4 if algorithm.needs_group else 1)
    )
    first, second = run_rl(preset, critic, steps=2, samples=samples)
    assert first.metrics["ratio/first_error"] < 1e-5
    assert second.metrics["policy/kl_to_old"] > 0
    assert (second.batch.values is not None) == algorithm.needs_critic
    assert (second.batch.greedy_scores is not None) == algorithm.needs_greedy
    assert (second.batch.state_values is not None) == bool(algorithm.num_continuations)


def test_the_exact_kl_is_taken_where_it_is_asked_for():
    ppo = ALGORITHMS["ppo"]
    for kl in (
        KLInReward(estimator="exact"),
        KLInLoss(estimator="exact"),
        KLInLoss(estimator="exact", weight="sequence"),
    ):
        *_, last = run_rl("ppo", "shared", steps=3, algorithm=dataclasses.replace(ppo, kl=kl))
        assert (last.batch.exact_kl is not None) == kl.exact_reward
        assert last.metrics["loss/kl"] > 0 if kl.exact_loss else last.batch.exact_kl.sum() > 0


def test_values_after_cut_off_responses_are_those_of_one_token_more():
    """Bootstrapping: the value that the critic would give the next token, had there been one."""
    algorithm = dataclasses.replace(ALGORITHMS["ppo"], advantage=Gae(bootstrap_truncated=True))
    for critic in ("separate", "shared"):
        step = next(iter(run_rl("ppo", critic, steps=1, algorithm=algorithm)))
        assert step.batch.final_values is not None
        if critic == "shared":
            continue
        judge = ScalarModel.from_trunk(model(), 0, seed=0)
        with torch.no_grad():
            outputs = judge.scores(step.batch.tokens, step.batch.lengths)
        torch.testing.assert_close(step.batch.final_values, outputs, atol=1e-5, rtol=0)
        assert not step.batch.ended.all()


def test_an_adaptive_coefficient_moves_from_step_to_step():
    kl = KLInReward(coef=0.1, controller=AdaptiveCoef(target=0.001, horizon=100))
    steps = list(
        run_rl("ppo", "shared", steps=3, algorithm=dataclasses.replace(ALGORITHMS["ppo"], kl=kl))
    )
    coefficients = [step.metrics["kl/coef"] for step in steps] + [steps[-1].algorithm.kl.coef]
    assert coefficients[0] == 0.1
    for before, after, step in zip(coefficients, coefficients[1:], steps, strict=False):
        assert after == pytest.approx(
            AdaptiveCoef(target=0.001, horizon=100)(before, step.metrics["kl"], 16.0)
        )


@pytest.mark.slow
def test_pretraining_texts_stay_likely_under_ptx():
    plain, mixed = (
        list(
            run_rl(
                "ppo",
                "shared",
                steps=15,
                algorithm=dataclasses.replace(ALGORITHMS["ppo"], ptx=Pretraining(coef=c)),
            )
        )
        for c in (0.0, 5.0)
    )
    assert "loss/ptx" not in plain[-1].metrics
    assert mixed[-1].metrics["loss/ptx"] < mixed[0].metrics["loss/ptx"] / 2


# --- what a step learns from ----------------------------------------------------------------------------------------------


def collected(algorithm, answers, scores, groups=3):
    scripted = ScriptedGenerator(answers, tokenizer())
    worth = dict(zip(answers, scores, strict=True))
    reward = [Weighted(TextReward("worth", lambda prompt, response: worth[response]))]
    return (
        Collector(Sampler(prompts(groups), groups, 0), scripted, reward, 2)
        .collect(algorithm, SAMPLING)
        .rollouts
    )


def test_dynamic_sampling_fills_the_step_with_groups_that_have_a_signal():
    dapo = ALGORITHMS["dapo"]
    # the script goes round: good/good, bad/good, … so that some groups are equal and some are not
    made = collected(
        dapo, ["good", "bad", "good film", "bad film", "the"], [1.0, 0.0, 1.0, 0.0, 0.0]
    )
    assert len(made) == 6 and [r.group for r in made] == [0, 0, 1, 1, 2, 2]
    for one, other in zip(made[::2], made[1::2], strict=True):
        assert one.score != other.score and one.prompt == other.prompt


def test_when_no_group_ever_has_a_signal_the_last_batch_is_kept():
    made = collected(ALGORITHMS["dapo"], ["good"], [1.0])
    assert len(made) == 6 and {r.score for r in made} == {1.0}


def test_pass_rates_count_groups_that_are_dropped():
    scripted = ScriptedGenerator(["good", "good", "bad", "good"], tokenizer())
    reward = [Weighted(TextReward("worth", lambda prompt, response: float(response == "good")))]
    drawn = PromptSampler(prompts(2), 2, 0, PassRate())
    made = Collector(drawn, scripted, reward, 2).collect(ALGORITHMS["dapo"], SAMPLING)
    # Two rounds, each with good, good for one prompt (dropped) and bad, good for the other.
    assert sorted(drawn.rates.values()) in ([0.5, 1.0], [0.75, 0.75])
    assert len(made.rollouts) == 4 and sum(made.pools.values()) == 2


def test_responses_without_a_score_are_left_out_and_counted():
    class Shy:
        name = "shy"

        def score(self, rollouts):
            return [None if i == 2 else float(i) for i, _ in enumerate(rollouts)]

    scripted = ScriptedGenerator(["good", "bad"], tokenizer())
    grpo = dataclasses.replace(ALGORITHMS["grpo"], kl=NoKL())
    found = Collector(Sampler(prompts(2), 2, 0), scripted, [Weighted(Shy())], 2).collect(
        grpo, SAMPLING
    )
    made, unscored = found.rollouts, found.unscored
    assert [(r.group, r.score) for r in made] == [(0, 0.0), (0, 1.0), (1, 3.0)] and unscored == 0.25
    advantages = grpo.experience(collate(made, torch.device("cpu"))).advantages
    assert advantages[0].min() < 0 < advantages[1].max()
    assert (advantages[2] == 0).all()  # alone in its group, it can be compared with nothing


def test_remax_compares_with_the_greedy_answer_to_the_same_prompt():
    actor = model()
    generator = NativeGenerator(actor, tokenizer(), frozenset({END}), 0)
    reward = [Weighted(TextReward("length", lambda prompt, response: float(len(response))))]
    collector = Collector(Sampler(prompts(4), 4, 0), generator, reward, 3)
    made = collector.collect(ALGORITHMS["remax"], SAMPLING).rollouts
    assert all(r.greedy_score is not None for r in made)
    for rollout in made:
        ids, text = list(rollout.prompt.ids), ""
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(actor(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == END:
                break
        prompt = rollout.prompt.ids
        text = decoded_response(tokenizer(), prompt, ids[len(prompt) :])
        assert rollout.greedy_score == len(text)


def test_a_reward_without_token_scores_is_refused_where_they_are_read():
    dense = dataclasses.replace(ALGORITHMS["grpo"], rewards=EveryToken())
    with pytest.raises(RewardError, match="gives one number per response"):
        collected(dense, ["good", "bad"], [1.0, 0.0])


class Dense:
    """A user's dense reward: 1 for every "good"."""

    name = "dense"

    def score(self, rollouts):
        return [sum(scores) for scores in self.token_scores(rollouts)]

    def token_scores(self, rollouts):
        return [[float(token == GOOD) for token in r.response_ids] for r in rollouts]


def test_dense_rewards_reach_their_tokens():
    dense = dataclasses.replace(ALGORITHMS["reinforce"], rewards=EveryToken(), scores=(), kl=NoKL())
    scripted = ScriptedGenerator(["good bad good"], tokenizer())
    made = (
        Collector(Sampler(prompts(1), 1, 0), scripted, [Weighted(Dense(), 2.0)])
        .collect(dense, SAMPLING)
        .rollouts
    )
    batch = collate(made, torch.device("cpu"))
    rewards = dense.experience(batch).token_rewards[batch.response_mask]
    assert rewards.tolist() == [2, 0, 2, 0][: len(rewards)]


# --- comparisons ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PREFERENCES))
@pytest.mark.slow
def test_the_whole_family_learns_the_preference(name):
    made = model()
    loss, reference = (
        PREFERENCES[name],
        freeze(copy.deepcopy(made)) if PREFERENCES[name].needs_reference else None,
    )
    source = Sampler(comparisons(), 4, 0)
    steps = list(preference(made, reference, source, loss, optimizer(made), 40, Budget(4096)))
    assert steps[-1].metrics["loss"] < steps[0].metrics["loss"]
    assert held_out_preference(made, reference, comparisons(), loss, 4096)["accuracy"] == 1


@pytest.mark.parametrize("tokens", [4096, 16], ids=["one micro-batch", "one for each pair"])
def test_both_sides_of_a_pair_read_their_prompt_once(tokens):
    """Four pairs with prompts of 5 tokens and answers of 3 and 2: the policy and the reference read 5 + 2 tokens of
    the chosen side, and the last of the prompt again and 1 of the other: the last of an answer predicts nothing."""
    made = model()
    reference = freeze(copy.deepcopy(model()))
    prompt = (GOOD, BAD, THE, THE)
    pairs = [Comparison(f"c:{i}", (4 + i, *prompt), (GOOD, 5, END), (BAD, END)) for i in range(4)]
    held_out_preference(made, reference, pairs, PREFERENCES["dpo"], tokens)  # compares two forwards
    read = {"policy": [], "reference": []}
    for name, each in (("policy", made), ("reference", reference)):
        each.base_model.embed_tokens.register_forward_hook(
            lambda _, args, __, name=name: read[name].append(args[0].numel())
        )
    source = Sampler(pairs, 4, 0)
    steps = preference(
        made, reference, source, PREFERENCES["dpo"], optimizer(made), 1, Budget(tokens)
    )
    next(iter(steps))
    assert {name: sum(each) for name, each in read.items()} == dict.fromkeys(read, 4 * (7 + 2))
    assert len(read["policy"]) == (1 if tokens == 4096 else 4)


@pytest.mark.parametrize("name", sorted(PREFERENCES))
def test_micro_batches_do_not_change_it(name):
    weights = []
    for tokens in (4096, 1):
        made = model().double()  # Adam makes a step of a gradient that is nothing but rounding
        reference = (
            freeze(copy.deepcopy(model(seed=1))).double()
            if PREFERENCES[name].needs_reference
            else None
        )
        list(
            preference(
                made,
                reference,
                Sampler(comparisons(), 6, 0),
                PREFERENCES[name],
                optimizer(made, steps=3),
                3,
                Budget(tokens),
            )
        )
        weights.append(torch.cat([p.detach().flatten() for p in made.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-9, rtol=0)


def test_online_dpo_learns_what_the_judge_likes():
    made = model()
    generator = NativeGenerator(made, tokenizer(), frozenset({END}), 0)
    judge = [Weighted(TextReward("goodness", goodness))]
    responses = Responses(generator, Sampling(max_new_tokens=6), judge)
    source = OnlinePairs(Sampler(prompts(16), 16, 0), responses)

    def mean_goodness():
        return (
            sum(
                r.score
                for r in rewarded(
                    generator.generate(prompts(16) * 4, Sampling(max_new_tokens=6)), judge
                )
            )
            / 64
        )

    before = mean_goodness()
    list(
        preference(
            made,
            freeze(copy.deepcopy(made)),
            source,
            PREFERENCES["online_dpo"],
            optimizer(made),
            40,
            Budget(4096),
        )
    )
    assert mean_goodness() > before + 0.3


def test_a_judge_that_never_prefers_stops_with_its_reason():
    generator = ScriptedGenerator(["good"], tokenizer())
    judge = [Weighted(TextReward("g", goodness))]
    responses = Responses(generator, Sampling(max_new_tokens=6), judge)
    source = OnlinePairs(Sampler(prompts(4), 4, 0), responses)
    with pytest.raises(ValueError, match="always scored the same"):
        source.next()


@pytest.mark.parametrize("loss", [LastTokenLoss(centring=0.01), PerTokenLoss()])
def test_other_losses_of_the_reward_model_learn_too(loss):
    made = ScalarModel.from_trunk(model(), 0, seed=0)
    list(reward_model(made, Sampler(comparisons(), 4, 0), loss, optimizer(made), 40, Budget(4096)))
    assert pair_accuracy(made, comparisons(), 4096) == 1


@pytest.mark.parametrize(
    ("preset", "critic", "samples"), [("ppo", "separate", 1), ("grpo", "none", 4)]
)
def test_the_same_seed_gives_bitwise_the_same_metrics(preset, critic, samples):
    first, second = (
        [s.metrics for s in run_rl(preset, critic, 4, samples, seed=5)] for _ in range(2)
    )
    assert first == second
    assert first != [s.metrics for s in run_rl(preset, critic, 4, samples, seed=6)]


def test_the_first_step_starts_at_the_reference():
    step = next(iter(run_rl("ppo", "separate")))
    assert step.metrics["kl"] == pytest.approx(0, abs=1e-4)
    assert step.metrics["ratio/first_error"] < 1e-5
    assert step.metrics["sampler_mismatch"] < 1e-5


def test_the_loop_takes_any_generator():
    actor = model()
    learner = Learner(
        Separate(actor, None), freeze(copy.deepcopy(actor)), Optim(lr=3e-3), SAMPLING, 2
    )
    scripted = ScriptedGenerator(["good", "bad"], tokenizer())
    collector = Collector(
        Sampler(prompts(4), 4, 0), scripted, [Weighted(TextReward("goodness", goodness))], 2
    )
    steps = list(rl(collector, learner, ALGORITHMS["grpo"]))
    assert [r.response for r in steps[0].rollouts] == ["good", "bad"] * 4
    assert scripted.version == 2
    # Each group holds scores 1 and −1: mean 0, sample std √2, advantage ±1/√2
    first = steps[0].experience.advantages[0][steps[0].experience.response_mask[0]]
    assert first.tolist() == pytest.approx([0.70711] * 2, abs=1e-4)


def test_phases_are_the_loop_s_own_time_and_not_its_consumer_s(monkeypatch):
    now = [0.0]

    def tick():
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=tick))
    for step in run_rl("grpo", "none", samples=4, steps=3):
        assert step.seconds == {"rollouts": 1.0, "scoring": 1.0, "update": 1.0}
        now[0] += 1000.0
