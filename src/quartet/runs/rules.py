"""The doctor's rules: each looks at the metrics of a stage and says what is wrong.

A rule takes the history of a stage and returns a sentence, with the evidence and a remedy, or None.
It reads only what is in events.jsonl, so a running stage and a finished folder give the same
findings. docs/doctor.md says what each rule finds and when it is silent.
"""

from quartet.runs import answer_rules as answers
from quartet.runs import training_rules as training
from quartet.runs.history import RECENT, History, Rule, Terms

MIN_PROMPTS = 20
"""Prompts with a pass rate that say something of all."""
FEW = 0.05
"""The share of prompts between passing and failing that is nearly none."""


def responses_do_not_end(history: History) -> str | None:
    """A response that is cut off has no end for the reward to judge, and its last token gets a
    reward it did not earn (Huang et al. 2024, "The N+ implementation details of RLHF with PPO")."""
    cut = 1 - history.now("response/ended", 1.0)
    if cut <= 0.25 or "response/turns" in history.columns:  # out of turns is an end
        return None
    if cut > 0.95:
        return (
            f"{cut:.0%} of responses were cut off at the limit. Raise rollout.max_new_tokens; if "
            "answers fit into it, look whether SFT taught the end-of-sequence token and the "
            "sampler stops at it."
        )
    return (
        f"{cut:.0%} of responses end without EOS. Raise rollout.max_new_tokens, or let SFT see "
        "whole answers."
    )


def scores_are_clipped(history: History) -> str | None:
    """Scores beyond the limit of `algorithm.scores` earn the same, however they differ. The limit
    bounds outliers of a reward model; another reward may have a scale of its own."""
    if not history.clips_most_scores:
        return None
    share = history.now("reward/clipped", 0.0)
    return (
        f"{share:.0%} of the scores are beyond the limit of algorithm.scores, so these responses "
        "all earn the same. Scale the reward (reward.weight), or set algorithm.scores: "
        '[{ type = "clip", limit = … }] with a larger limit, or [].'
    )


def no_signal(history: History) -> str | None:
    """Nothing tells responses apart that all score the same; group advantages are 0 where all
    answers to a prompt do (Yu et al. 2025, DAPO, section 3.2)."""
    if history.is_taught:
        return None
    if history.now("reward/std", 1.0) == 0:
        return (
            "every response has the same score: nothing is learnt from it. The task is too hard, "
            "too easy, or the reward is a constant."
        )
    if history.now("advantage/std", 1.0) > 0:
        return None
    return (
        "every group has equal rewards: no gradient. The task is too hard, too easy, or the "
        "verifier never matches."
    )


def few_prompts_teach(history: History) -> str | None:
    """A prompt that all responses pass, or none, gives group advantages of 0 (Zhang et al. 2025,
    SPEED-RL, theorem 3.1). Where nearly all are such, no sampling by pass rates finds others."""
    hard, learnable, easy, unseen = (
        history.now(f"prompts/{name}", 0.0) for name in ("hard", "learnable", "easy", "unseen")
    )
    seen = hard + learnable + easy
    if seen < max(MIN_PROMPTS, unseen) or learnable > FEW * seen:
        return None
    remedy = (
        "Train longer by SFT, or add easier prompts"
        if hard >= easy
        else "They are learnt: stop, or add harder ones"
    )
    return (
        f"of {seen:,.0f} prompts with a pass rate, hardly any response passes in {hard:,.0f} and "
        f"nearly all pass in {easy:,.0f}: {learnable:,.0f} are left to learn from. {remedy}; of "
        "scores that are no passes or failures, set data.sampling.pass_score."
    )


def unscored(history: History) -> str | None:
    """A response without a score is left out of the step; a judge that often gives none changes
    what is learnt from."""
    share = history.now("reward/unscored", 0.0)
    if share <= 0.05:
        return None
    return (
        f"{share:.0%} of responses got no score and were left out. See run.log for what the reward "
        "said."
    )


def sampler_disagrees(history: History) -> str | None:
    """The learner must see the probabilities that were sampled from: another temperature, template,
    shift or older weights make PPO's ratio a ratio of two other things (Yao et al. 2025, "Your
    efficient RL framework secretly brings you off-policy RL training")."""
    tolerance, gap = history.tolerance, history.now("sampler_ratio", 1.0) - 1
    first = history.columns.get("sampler_ratio", [1.0])[0] - 1
    grown = gap > tolerance.growth_from and gap > tolerance.growth * first
    if history.filtered or not (gap >= tolerance.sampler_wrong or grown):
        return None
    if first < tolerance.sampler_wrong:
        return (
            f"the sampler's probabilities are {gap:.2%} from the learner's on average, and were "
            f"{first:.2g} from them at step 1: the sampler does not get the learner's new weights."
        )
    return (
        f"the sampler's probabilities are {gap:.2%} from the learner's on average. Do both use the "
        "same temperature, filters, chat template, weights and padding, and is dropout off?"
    )


def sampler_is_imprecise(history: History) -> str | None:
    """Where the sampler computes in bfloat16 or with other kernels, its probabilities are a little
    off, and what is learnt is off-policy by as much. Truncated importance weights
    (algorithm.correction) bound the harm (Yao et al. 2025)."""
    tolerance, gap = history.tolerance, history.recent("sampler_ratio", 3)
    if gap is None or history.filtered:
        return None
    if not tolerance.sampler_noted <= gap - 1 < tolerance.sampler_wrong:
        return None
    corrected = "correction/mean_weight" in history.columns
    remedy = (
        "algorithm.correction weighs the tokens for it; sampling in fp32 removes it."
        if corrected
        else 'Set algorithm.correction = { type = "truncated" }, or sample in fp32.'
    )
    return (
        f"the sampler's probabilities are {gap - 1:.1%} from the learner's on average, by rounding "
        f"as it seems. {remedy}"
    )


def ratio_is_not_one(history: History) -> str | None:
    """Before the first optimizer step π is π_old, so every ratio is 1. What is more than rounding
    is dropout in the update, or a forward pass that is not the one the old log-probs came from
    (Huang et al. 2022, "The 37 implementation details")."""
    error = history.now("ratio/first_error", 0.0)
    if error < history.tolerance.ratio:
        return None
    return (
        f"ratios are up to {error:.2g} from 1 before any weight has moved. Is dropout on in the "
        "update? Are the old log-probs of the same weights, temperature and masks?"
    )


def reference_differs(history: History) -> str | None:
    """At step 1 the policy is the reference, and the KL between them is 0 (Ziegler et al. 2019). If
    not, the penalty pulls towards another model, which only reference.model asks for. A filter that
    is trained on keeps less than the reference has, so its KL begins above 0."""
    first = history.columns.get("kl/token_k3", [0.0])[0]
    if not history.starts_at_reference or history.renormalized:
        return None
    if history.steps > 1 or first < history.tolerance.kl:
        return None
    return (
        f"the KL to the reference is {first:.2g} per token at step 1, and should be 0: the "
        "reference is not the policy that RL starts from."
    )


def reference_moved(history: History) -> str | None:
    """The KL is measured against a model that stands still (Ziegler et al. 2019). One that learns
    with the policy holds it to nothing."""
    if history.now("reference/moved", 0.0) == 0:
        return None
    return (
        "the reference's weights changed during the step. Does it share parameters with what is "
        "trained?"
    )


def does_not_start_at_the_reference(history: History) -> str | None:
    """Before the first step a policy is its reference, unless reference.model names another: all
    log-ratios are 0, and DPO's loss is ln 2 (Rafailov et al. 2023)."""
    apart = history.columns.get("logratio/abs", [0.0])[0]
    if not history.starts_at_reference or history.steps > 1 or apart < 1e-3:
        return None
    return (
        f"log-ratios to the reference are {apart:.2g} on average at step 1, and should be 0: the "
        "reference is another model."
    )


def not_sampled_as_trained(history: History) -> str | None:
    """Tokens drawn from π_old have a mean surprise, −log π_old, of the entropy of π_old. Greedy
    decoding, a filter or another temperature draws likelier tokens: a surprise below the
    entropy."""
    gap, entropy = history.recent("policy/surprise_gap", 3), history.recent("policy/entropy", 3)
    if gap is None or entropy is None or abs(gap) < 0.15 + 0.05 * entropy:
        return None
    how = "likelier" if gap < 0 else "less likely"
    return (
        f"the tokens sampled are {how} than draws from the policy would be ({gap:+.2g} nats on a "
        f"mean entropy of {entropy:.2g}): rollouts are greedy, filtered, or of another temperature."
    )


def kl_is_negative(history: History) -> str | None:
    """The mean of log π − log π_ref over samples of π is never below 0 but for noise. Where it is,
    the samples are not π's (filters, another temperature) or the two models read different
    tokens."""
    last = history.columns.get("kl", [])[-RECENT:]
    if len(last) < RECENT or max(last) > -0.05:
        return None
    return (
        f"the KL to the reference was below 0 for {RECENT} steps (now {last[-1]:.2g}): responses "
        "are not samples of the policy."
    )


def kl_above_target(history: History) -> str | None:
    """An adaptive coefficient (Ziegler et al. 2019) that cannot hold the KL is too slow, or the
    reward too steep."""
    kl, target = history.recent("kl", 10), history.kl_target
    if kl is None or target is None or kl < 2 * target:
        return None
    return (
        f"the KL was {kl:.3g} over ten steps, more than twice the target {target:g}. Raise "
        "algorithm.kl.coef, or lower optim.lr."
    )


def critic_knows_nothing(history: History) -> str | None:
    """A critic whose errors vary more than the returns adds noise to every advantage; below 0 a
    constant would do better (Huang et al. 2022). It has twenty steps to learn, or ten where its
    errors vary twice as much, as where it began on another scale."""
    seen = sorted(history.columns.get("value/explained_variance", [])[-RECENT:])
    early = 20 if not seen or seen[-1] >= -1 else 10
    if len(seen) < RECENT or history.steps < early or history.pays_all_alike:
        return None
    variance = seen[RECENT // 2]
    if variance >= 0:
        return None
    return (
        f"explained variance is {variance:.2f} after {history.steps} steps: the critic is worse "
        "than a constant. Raise optim.critic_lr, let it begin as the reward model, or give it "
        "optim.critic_warmup_steps."
    )


def value_loss_explodes(history: History) -> str | None:
    """A value loss that grows means returns that the critic cannot follow, or a critic that
    diverges."""
    now, before = history.recent("loss/value", 3), history.first("loss/value")
    if now is None or before is None or now < 20 * max(before, 1e-6):
        return None
    times = now / max(before, 1e-6)
    return (
        f"the value loss is {times:.0f} times what it was. Lower optim.critic_lr, and bound the "
        "reward (algorithm.scores)."
    )


def clipped_too_often(history: History) -> str | None:
    """Where most tokens are clipped, an update went further than its surrogate can be trusted
    (Schulman et al. 2017)."""
    share = history.recent("policy/clip_fraction", 3)
    if share is None or share <= 0.4:
        return None
    return f"{share:.0%} of token visits were clipped. Lower optim.lr or optim.epochs."


def nothing_moves(history: History) -> str | None:
    """An update without a gradient is none: frozen weights, or a loss that does not reach them.
    (Without advantages there is no gradient either; `no_signal` says that.)"""
    norms = history.columns.get("grad_norm/actor", [])[-10:]
    advantages = history.columns.get("advantage/std", [0.0])[-10:]
    if len(norms) < 10 or max(norms) > 0 or max(advantages) == 0:
        return None
    return (
        "the actor had no gradient in ten updates, though advantages differ. Is everything frozen?"
    )


def entropy_collapse(history: History) -> str | None:
    """A policy that is sure of everything explores no more. That is as it should be where it knows
    the answers; where it says the same to different prompts, entropy was lost and not won."""
    entropy, first = history.recent("policy/entropy"), history.first("policy/entropy")
    common, before = history.recent("response/most_common"), history.first("response/most_common")
    if entropy is None or first is None or common is None or before is None:
        return None
    if entropy > 0.2 * first or common < max(0.5, 2 * before):
        return None
    return (
        f"entropy fell from {first:.2g} to {entropy:.2g} nats, and {common:.0%} of prompts get the "
        "same response. Raise algorithm.kl.coef, add entropy, or lower optim.lr."
    )


def reward_falls(history: History) -> str | None:
    """What is maximised should not fall. Where it does from the start, a sign is wrong, or
    responses are paid for others'."""
    now, first = history.recent("reward"), history.first("reward")
    spread = history.first("reward/std")
    if now is None or first is None or spread is None or now >= first - 0.5 * spread:
        return None
    digits = ".2f" if abs(first - now) >= 0.01 else ".2g"
    return (
        f"the reward fell from {first:{digits}} to {now:{digits}}, by more than half of its "
        "spread over responses. Is a sign wrong? Do scores stand at the right responses? Or is "
        "optim.lr far too high?"
    )


def paid_for_others(history: History) -> str | None:
    """Advantages follow what responses earned, less what was expected of them (Williams 1992).
    Where they do not, rows were mixed up, as when a [B, 1] meets a [B]; where they go the other
    way, a sign is wrong. A critic that knows nearly everything leaves advantages that are noise."""
    r = history.recent("advantage/reward_correlation", 10)
    known = history.recent("value/explained_variance") or 0.0
    if r is None or r >= 0.1 or known > 0.9 or history.pays_all_alike:
        return None
    if min(history.columns.get("advantage/std", [0.0])[-10:]) == 0:
        return None
    how = "the opposite of what" if r < -0.1 else "what others and not what"
    return (
        f"rewards and advantages have a correlation of {r:.2f} over ten steps: responses are paid "
        f"{how} they earned. Do rewards, values and advantages stand in the same rows, with the "
        "right sign?"
    )


def reward_saturates(history: History) -> str | None:
    """A reward model that gives all answers the same high score has nothing more to teach (its
    sigmoid was trained on differences that are no longer there)."""
    now, first = history.recent("reward/std"), history.first("reward/std")
    if now is None or not first or "reward/model" not in history.columns or now > 0.1 * first:
        return None
    return (
        f"the spread of scores fell from {first:.2g} to {now:.2g}: the reward model no longer "
        "tells answers apart."
    )


RULES: dict[Rule, Terms] = {
    sampler_disagrees: Terms(("sampler_ratio",)),
    sampler_is_imprecise: Terms(("sampler_ratio",)),
    ratio_is_not_one: Terms(("ratio/first_error",)),
    reference_differs: Terms(("kl/token_k3",), first=True),
    reference_moved: Terms(("reference/moved",)),
    does_not_start_at_the_reference: Terms(("logratio/abs",), first=True),
    not_sampled_as_trained: Terms(("policy/surprise_gap", "policy/entropy"), steps=3),
    kl_is_negative: Terms(("kl",)),
    responses_do_not_end: Terms(("response/ended",), steps=3),
    no_signal: Terms(("advantage/std",), steps=3),
    few_prompts_teach: Terms(("prompts/learnable",), steps=3),
    unscored: Terms(("reward/unscored",)),
    scores_are_clipped: Terms(("reward/clipped",), steps=3),
    kl_above_target: Terms(("kl",)),
    critic_knows_nothing: Terms(("value/explained_variance",), steps=3),
    value_loss_explodes: Terms(("loss/value",)),
    clipped_too_often: Terms(("policy/clip_fraction",)),
    nothing_moves: Terms(("grad_norm/actor",)),
    entropy_collapse: Terms(("policy/entropy", "response/most_common")),
    **answers.RULES,
    reward_falls: Terms(("reward", "reward/std"), steps=3),
    paid_for_others: Terms(("advantage/reward_correlation",)),
    reward_saturates: Terms(("reward/std", "reward/model"), steps=3),
    **training.RULES,
}
"""The rules, in the order of the studio's page."""
INVARIANTS = frozenset(
    rule.__name__
    for rule in (
        sampler_disagrees,
        ratio_is_not_one,
        reference_differs,
        reference_moved,
        does_not_start_at_the_reference,
    )
)
"""What holds in every run that is what it says it is. A run in which one does not hold stops."""
