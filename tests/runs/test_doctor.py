"""Each rule speaks of its fault, with the evidence, and of nothing in a healthy run."""

import ast
import inspect
import math
import random
import re

import pytest

from quartet.assembly import build
from quartet.config.suggestions import known_keys
from quartet.config.toml import read_settings
from quartet.recipes import recipe_path
from quartet.runs import answer_rules, definitions, rules, training_rules
from quartet.runs.doctor import Watch, examine
from quartet.runs.history import TOLERANCES, History
from quartet.runs.rules import RULES
from quartet.stages.rl import RLStage
from tests.support.tiny_run import SMALL_REVIEWS, make_run


def healthy(step: int) -> dict[str, float]:
    """A PPO run that goes well: what most metrics are at a step, with some noise."""
    wave = math.sin(7.3 * step)
    learnt = 1 - math.exp(-step / 15)
    return {
        "reward": 4 * learnt + 0.1 * wave,
        "reward/model": 4 * learnt + 0.1 * wave,
        "reward/gold": 1.5 * learnt + 0.05 * wave,
        "reward/std": 1.0 - 0.4 * learnt,
        "reward/unscored": 0.0,
        "reward/length_correlation": 0.3 + 0.2 * wave,
        "kl": 8 * learnt + 0.05 * wave * learnt,
        "kl/token_k3": 0.0 if step == 1 else 0.2 * learnt,
        "value/explained_variance": 0.7 * learnt - 0.05,
        "loss/value": 0.2 + 0.02 * wave,
        "advantage/std": 1.0,
        "policy/clip_fraction": 0.08,
        "grad_norm/actor": 0.5,
        "policy/entropy": 1.8 - 0.6 * learnt,
        "policy/surprise_gap": 0.03 * wave,
        "ratio/first_error": 1e-6,
        "sampler_mismatch": 1e-6,
        "sampler_ratio": 1 + 1e-7,
        "reference/moved": 0.0,
        "response/tokens": 22 + 8 * learnt,
        "response/ended": 0.99,
        "response/repetition": 0.04 + 0.01 * wave,
        "response/distinct": 0.99,
        "response/most_common": 0.03,
        "advantage/reward_correlation": 0.6 + 0.1 * wave,
        **(
            {
                "policy/win_rate": 0.5 + 0.4 * learnt + 0.08 * wave,
                "policy/sft_perplexity": 6 + 3 * learnt,
            }
            if step % 2
            else {}
        ),
    }


FAULTS = {
    rules.responses_do_not_end: (
        lambda s: {"response/ended": 0.6},
        "40% of responses end without EOS",
    ),
    rules.no_signal: (lambda s: {"advantage/std": 0.0}, "every group has equal rewards"),
    rules.few_prompts_teach: (
        lambda s: {
            "prompts/unseen": 0.0,
            "prompts/hard": 90.0,
            "prompts/learnable": 4.0,
            "prompts/easy": 6.0,
        },
        "of 100 prompts with a pass rate, hardly any response passes in 90 and nearly all pass in 6",
    ),
    rules.unscored: (lambda s: {"reward/unscored": 0.2}, "20% of responses got no score"),
    rules.sampler_disagrees: (
        lambda s: {"sampler_ratio": 1.4},
        "40.00% from the learner's on average. Do both use",
    ),
    rules.sampler_is_imprecise: (
        lambda s: {"sampler_ratio": 1.05},
        "5.0% from the learner's on average, by rounding",
    ),
    rules.ratio_is_not_one: (
        lambda s: {"ratio/first_error": 0.05},
        "up to 0.05 from 1 before any weight has moved",
    ),
    rules.reference_differs: (
        lambda s: {"kl/token_k3": 0.3},
        "0.3 per token at step 1, and should be 0",
    ),
    rules.reference_moved: (lambda s: {"reference/moved": 1.0}, "the reference's weights changed"),
    rules.does_not_start_at_the_reference: (
        lambda s: {"logratio/abs": 0.2 * s},
        "log-ratios to the reference are 0.2 on average",
    ),
    rules.not_sampled_as_trained: (
        lambda s: {"policy/surprise_gap": -1.0},
        "likelier than draws from the policy",
    ),
    rules.kl_is_negative: (lambda s: {"kl": -0.4}, "below 0 for 5 steps (now -0.4)"),
    rules.kl_above_target: (
        lambda s: {"kl": 20.0},
        "20 over ten steps, more than twice the target 6",
    ),
    rules.critic_knows_nothing: (
        lambda s: {"value/explained_variance": -0.5},
        "-0.50 after 22 steps",
    ),
    rules.value_loss_explodes: (lambda s: {"loss/value": 0.2 * 1.3**s}, "the value loss is"),
    rules.clipped_too_often: (
        lambda s: {"policy/clip_fraction": 0.5},
        "50% of token visits were clipped",
    ),
    rules.nothing_moves: (lambda s: {"grad_norm/actor": 0.0}, "no gradient in ten updates"),
    rules.entropy_collapse: (
        lambda s: {"policy/entropy": 1.8 * 0.8**s, "response/most_common": min(0.95, s / 20)},
        "of prompts get the same response. Raise algorithm.kl.coef",
    ),
    answer_rules.duplicates: (
        lambda s: {"response/most_common": min(0.95, s / 20)},
        "the policy found one that always pays",
    ),
    answer_rules.length_drift: (
        lambda s: {"response/tokens": 20.0 + 3 * s},
        "tokens. If that is not intended",
    ),
    answer_rules.paid_for_length: (
        lambda s: {"reward/length_correlation": 0.95},
        "a correlation of 0.95 over ten steps",
    ),
    answer_rules.repeats_itself: (
        lambda s: {"response/repetition": min(0.9, 0.02 * s)},
        "repetition within responses went from",
    ),
    answer_rules.hacked: (
        lambda s: {"reward": 0.1 * s, "reward/gold": min(s, 24 - s) / 5.0},
        "the reward model is being fooled",
    ),
    rules.reward_falls: (
        lambda s: {"reward": -0.1 * s, "reward/gold": -0.1 * s},
        "Is a sign wrong?",
    ),
    rules.paid_for_others: (
        lambda s: {"advantage/reward_correlation": 0.05 * (-1) ** s},
        "a correlation of 0.00 over ten steps: responses are paid what others and not what they earned",
    ),
    answer_rules.loses_held_out: (
        lambda s: {"policy/win_rate": 0.95 - 0.04 * s},
        "the win rate on held-out prompts fell from 87% to",
    ),
    answer_rules.forgets: (
        lambda s: {"policy/sft_perplexity": 5.0 + 2 * s, "policy/win_rate": 0.5},
        "went from 7 to",
    ),
    rules.reward_saturates: (lambda s: {"reward/std": 0.8**s}, "no longer tells answers apart"),
    rules.scores_are_clipped: (
        lambda s: {"reward/clipped": 0.75},
        "75% of the scores are beyond the limit of algorithm.scores",
    ),
}
BESIDE = {
    rules.entropy_collapse: {answer_rules.duplicates},
}
"""What a fault brings along."""


ROUNDING = {rules.sampler_is_imprecise: "bf16"}
"""What samples where a fault is looked for, if not float32."""


def spoken(metrics, steps=40, rounding="fp32"):
    watch = Watch(6.0, tolerance=TOLERANCES[rounding])
    found = {}
    for step in range(1, steps + 1):
        for rule, sentence in watch.see(healthy(step) | metrics(step)):
            found[rule] = (step, sentence)
    return found


def test_a_healthy_run_is_silent():
    assert spoken(lambda s: {}, steps=200) == {}


@pytest.mark.parametrize("rule", FAULTS, ids=lambda rule: rule.__name__)
def test_the_rule_speaks_of_its_fault_and_no_other_does(rule):
    fault, words = FAULTS[rule]
    found = spoken(fault, rounding=ROUNDING.get(rule, "fp32"))
    assert words in found[rule][1]
    assert set(found) - {rule} <= BESIDE.get(rule, set())


def evaluated(reward, gold, wins):
    """The summary of an evaluation: reward and gold reward before and after, and the win rate."""
    sides = [
        {"reward": r, "gold": g, "response/tokens": 20.0, "response/repetition": 0.1}
        for r, g in zip(reward, gold, strict=True)
    ]
    win = {"mean": wins, "interval": 0.1}
    return {"judge": "gold", "prompts": 60, "win_rate": win, "before": sides[0], "after": sides[1]}


def test_more_reward_for_answers_that_lose_is_a_finding_of_the_evaluation():
    def found(*measured):
        watch = Watch()
        watch.see({})
        return dict(watch.finish(evaluated(*measured)))

    [(rule, sentence)] = found((0.5, 2.0), (0.25, -1.0), 0.3).items()
    assert rule is answer_rules.worse_for_more_reward
    assert "reward rose from 0.50 to 2.00" in sentence and "from 0.25 to -1.00" in sentence
    assert "they win 20% to 40%" in sentence
    assert found((0.5, 2.0), (0.25, -1.0), 0.45) == {}  # the interval includes ½
    assert found((0.5, 0.4), (0.25, -1.0), 0.3) == {}  # the reward fell too
    assert found((0.5, 2.0), (0.25, 1.0), 0.8) == {}


def test_a_change_of_length_is_told_from_a_reward_for_length():
    def said(correlation):
        found = spoken(
            lambda s: {
                "response/tokens": 20.0 + 3 * s,
                "reward/length_correlation": correlation,
            }
        )
        return found[answer_rules.length_drift][1]

    assert "so the reward pays for it" in said(0.6)
    assert "not length that the reward pays for" in said(-0.6)


def test_a_reward_that_is_always_0_has_not_fallen():
    found = spoken(lambda s: {"reward": 0.0, "reward/std": 0.0})
    assert rules.reward_falls not in found
    found = spoken(lambda s: {"reward": -0.0001 * s, "reward/std": 0.0001})
    assert "the reward fell from -0.0003 to " in found[rules.reward_falls][1]


def test_a_reference_that_was_named_need_not_be_the_start():
    for metrics in ({"kl/token_k3": 0.3}, {"logratio/abs": 0.2}):
        assert Watch(6.0).look(healthy(1) | metrics)
        assert not Watch(6.0, starts_at_reference=False).look(healthy(1) | metrics)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_says_why(rule):
    assert rule.__doc__ and len(rule.__doc__) > 80


def test_noise_on_a_plateau_is_no_hacking():
    rng = random.Random(0)
    for _ in range(20):
        watch = Watch()
        for step in range(300):
            found = watch.see({"reward": 4 + 0.001 * step, "reward/gold": 1.5 + rng.gauss(0, 0.05)})
            assert found == []


def test_a_solved_task_is_no_fault_of_the_critic():
    """All answers right: returns do not vary, and 1 − Var(R − V) / Var(R) is anything."""

    def solved(step):
        return {
            "value/explained_variance": -50.0 if step > 10 else 0.1,
            "reward/std": 0.5 * 0.7**step,
        }

    assert rules.critic_knows_nothing not in spoken(solved)


def test_what_is_no_number_is_not_looked_at():
    watch = Watch()
    assert all(watch.see({"advantage/std": math.nan, "kl": math.nan}) == [] for _ in range(20))


def test_a_fault_is_said_once_and_a_good_step_in_between_starts_the_count_again():
    watch = Watch()
    said = [watch.see({"response/ended": 0.5}) for _ in range(6)]
    assert [len(s) for s in said] == [0, 0, 1, 0, 0, 0]
    watch = Watch()
    for ended in (0.5, 0.5, 1.0, 0.5, 0.5):
        assert watch.see({"response/ended": ended}) == []


def test_a_sampler_with_old_weights_is_told_from_one_with_another_temperature():
    found = spoken(lambda s: {"sampler_ratio": 1 + 1e-6 if s == 1 else 1.3})
    assert "does not get the learner's new weights" in found[rules.sampler_disagrees][1]


@pytest.mark.parametrize("rounding", ["bf16", "engine, bf16"])
def test_a_learner_in_bfloat16_may_differ_from_itself_whatever_samples(rounding):
    """Scoring and update have products of other shapes, which a GPU adds up in another order. With servers such a run was stopped at
    its first step."""

    def found(error, kl):
        return spoken(lambda s: {"ratio/first_error": error, "kl/token_k3": kl}, 2, rounding)

    assert found(0.15, 1.5e-3) == {}
    assert set(found(0.6, 0.01)) == {rules.ratio_is_not_one, rules.reference_differs}
    assert rules.ratio_is_not_one in spoken(lambda s: {"ratio/first_error": 0.15}, 2, "engine")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("served", [False, True])
def test_a_stage_says_what_samples_and_what_the_learner_computes_in(served, precision):
    servers = ['generator.type="vllm"', 'generator.urls=["http://127.0.0.1:1"]'] if served else []
    words = [*SMALL_REVIEWS, f"run.precision={precision}", "run.device=cpu", *servers]
    job = build(read_settings(recipe_path("reviews"), words, "recipe reviews").config)
    [stage] = [stage for stage in job.stages if isinstance(stage, RLStage)]
    names = {(False, "fp32"): "fp32", (False, "bf16"): "bf16", (True, "fp32"): "engine"}
    assert stage.rounding == names.get((served, precision), "engine, bf16")


@pytest.mark.parametrize("rounding", ["bf16", "engine", "engine, bf16"])
def test_a_sampler_that_rounds_is_told_from_one_that_is_wrong(rounding):
    """Stopped at 10%, and at five times the gap of step 1; a gap that begins large may stay."""

    def found(gaps):
        return spoken(lambda s: {"sampler_ratio": 1 + gaps[min(s, len(gaps)) - 1]}, 12, rounding)

    assert found([0.002]) == {} and found([0.002, 0.008]) == {} and found([0.01, 0.02]) == {}
    assert found([0.002, 0.02]) == {}  # a policy that becomes surer rounds more
    assert "new weights" in found([0.002, 0.035])[rules.sampler_disagrees][1]
    assert set(found([0.02, 0.04])) == {rules.sampler_is_imprecise}
    corrected = spoken(
        lambda s: {"sampler_ratio": 1.04, "correction/mean_weight": 0.99}, 12, rounding
    )
    assert "algorithm.correction weighs the tokens" in corrected[rules.sampler_is_imprecise][1]
    step, sentence = found([0.12])[rules.sampler_disagrees]
    assert step == 1 and "12.00% from the learner's on average. Do both use" in sentence


def test_a_filter_that_was_asked_for_is_no_disagreement():
    watch = Watch(filtered=True)
    assert watch.see({"sampler_ratio": 1.4}) == []


def test_the_same_rules_look_at_a_folder(ppo_run, grpo_run):
    """Eight tokens are too few for these answers, and a reward model of three steps is no good: that is all."""
    for run in (ppo_run, grpo_run):
        said = {(w["stage"], w["rule"], w["step"]) for w in run.warnings}
        assert said == {(f.stage, f.rule, f.step) for f in examine(run)}
    assert {f.rule for f in examine(ppo_run)} <= {
        "responses_do_not_end",
        "length_drift",
        "duplicates",
        "no_better_than_chance",
    }


def test_equal_rewards_are_no_finding_where_the_loss_holds_a_teachers_kl():
    """Distillation by the KL in the loss has no advantages, and learns."""
    for starts_at_reference, kl, is_found in (
        (False, 0.5, False),
        (False, 0.0, True),
        (True, 0.5, True),
    ):
        history = History(starts_at_reference=starts_at_reference)
        history.add({"advantage/std": 0.0, "loss/kl": kl})
        assert (rules.no_signal(history) is not None) == is_found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "words", "speaks"),
    [
        # A policy of three SFT steps answers hardly a question of the training set rightly.
        ("sums", ("data.sampling=pass_rate",), True),
        # Half of what the same policy writes about films pleases, so prompts differ by chance.
        ("reviews", ('data.sampling={type="pass_rate", pass_score=0.0}',), False),
        ("sums", (), False),
    ],
)
def test_a_real_run_whose_prompts_hardly_ever_pass_is_found_and_one_whose_prompts_do_is_not(
    tmp_path, recipe, words, speaks
):
    grpo = (*words, "rollout.samples_per_prompt=4", "rollout.prompts_per_step=16", "run.steps=8")
    if recipe == "reviews":
        grpo = (*grpo, 'recipe=["sft", "grpo"]', "algorithm.preset=grpo", 'reward=[{type="gold"}]')
    run = make_run(tmp_path, recipe, *grpo)
    found = [finding for finding in examine(run) if finding.rule == "few_prompts_teach"]
    assert bool(found) == speaks
    series = run.series["grpo"].columns
    assert ("prompts/learnable" in series) == bool(words)
    if speaks:
        assert "are left to learn from. Train longer by SFT" in found[0].sentence
    elif words:
        assert series["prompts/learnable"][-1] > 20


@pytest.mark.parametrize(("explained", "steps"), [((-5.6, -2.5), 10), ((-2.8, -0.3), 20)])
def test_a_critic_on_another_scale_is_named_earlier(explained, steps):
    """Gemma 3 270M under a random head had −5.6, −10.4, −5.3, …; as a reward model, −2.8, −1.6, −0.2, …"""
    watch = Watch(6.0)
    spoke = [
        step
        for step in range(1, 30)
        for rule, _ in watch.see(healthy(step) | {"value/explained_variance": explained[step % 2]})
        if rule is rules.critic_knows_nothing
    ]
    assert spoke[0] == steps + rules.RULES[rules.critic_knows_nothing].steps - 1


@pytest.mark.parametrize(
    ("metrics", "rule", "sentence"),
    [
        ({"reward": 1.0, "reward/std": 0.0}, rules.no_signal, "every response has the same score"),
        ({"reward/clipped": 1.0}, rules.scores_are_clipped, "100% of the scores are beyond"),
    ],
)
def test_where_responses_earn_the_same_the_critic_and_the_advantages_are_not_blamed(
    metrics, rule, sentence
):
    """A reward that is a constant, or beyond the limit of PPO's scores: what is left is noise."""
    noise = {"value/explained_variance": -100.0, "advantage/reward_correlation": 0.0}
    found = spoken(lambda step: {**noise, **metrics})
    assert found.keys() == {rule} and sentence in found[rule][1]
    blamed = spoken(lambda step: noise).keys()
    assert {rules.critic_knows_nothing, rules.paid_for_others} <= blamed


def test_a_remedy_names_settings_as_they_are_written():
    """A key that is cut short, such as kl.coef, is refused by the config."""
    sources = [
        inspect.getsource(module) for module in (rules, answer_rules, training_rules, definitions)
    ]
    texts = [
        node.value
        for node in ast.walk(ast.parse("\n".join(sources)))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    words = {word for text in texts for word in re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+\b", text)}
    files = (".md", ".py", ".log", ".toml", ".json", ".jsonl", ".parquet")
    named = {word for word in words if not word.endswith(files)}
    assert "algorithm.kl.coef" in named and named <= set(known_keys())
