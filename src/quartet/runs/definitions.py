"""What each metric is and how to read it: one row each, shown wherever the metric is."""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Definition:
    name: str
    """As in events.jsonl; `*` stands for any one word."""
    label: str
    what: str
    """What the number is. Of Quartet's own metrics, it completes the sentence "LABEL is …"; of a
    user's metric, it is the docstring of its class."""
    reading: str = ""
    """How to read it, in sentences."""
    chart: str = ""
    """The title of the chart that shows it; of a metric of a user's own only, the charts of the
    others are listed in `figures`."""
    percent: bool = False
    """Whether that chart is in percent."""
    exact: bool = False
    """Whether the number is set or counted and not estimated from samples, so that it is never
    drawn smoothed."""


LOGGED = "logged/"
"""Stands before REWARD/NAME in the metrics that reward functions log."""
DEFINITIONS = (
    Definition(
        "reward",
        "reward",
        "the mean score of the responses, which is the weighted sum of all rewards",
        "It should rise. Read responses when it does.",
    ),
    Definition(
        "reward/gold",
        "gold reward",
        "the mean of the embedded world's true score of the responses, on which nothing is trained",
        "If it falls while the reward rises, the policy exploits the reward (reward hacking).",
    ),
    Definition(
        "reward/std",
        "spread of reward",
        "the standard deviation of the scores in the step",
        "Near 0, there is nothing to compare.",
    ),
    Definition(
        "reward/unscored",
        "unscored",
        "the share of responses that no reward could score; they were left out",
        "Above 5%, see run.log.",
    ),
    Definition(
        "reward/clipped",
        "clipped scores",
        "the share of responses whose score algorithm.scores cuts off at its limit",
        "Above a half, the limit does more than bound outliers.",
    ),
    Definition(
        "reward/length_correlation",
        "reward against length",
        "Pearson's r of score and number of tokens in the step",
        "Above 0.5, the reward may pay for length.",
    ),
    Definition(
        "reward/deviation/*",
        "deviation of *",
        "the mean over responses of the standard deviation of an ensemble's scores",
        "If it rises, the policy writes what the members disagree about.",
    ),
    Definition("reward/*", "reward *", "the mean of this reward alone, before its weight"),
    Definition(
        LOGGED + "*",
        "logged *",
        "what a reward function gave to log_metric, as a mean over the step's responses",
    ),
    Definition(
        "kl",
        "KL",
        "the mean over responses of Σ_t log π_old(t) − log π_ref(t), in nats (k1)",
        "It says how far the policy is from the reference, and is 0 at step 1.",
    ),
    Definition(
        "kl/token_k1",
        "KL per token, k1",
        "the mean over tokens of log π_old − log π_ref",
        "It is unbiased and noisy, and may be negative.",
    ),
    Definition(
        "kl/token_k2",
        "KL per token, k2",
        "the mean over tokens of ½ (log π_old − log π_ref)²",
        "It is slightly biased and never negative.",
    ),
    Definition(
        "kl/token_k3",
        "KL per token, k3",
        "the mean over tokens of ρ − 1 − log ρ, where ρ = π_ref / π_old",
        "It is unbiased and never negative.",
    ),
    Definition(
        "kl/coef",
        "KL coefficient",
        "the factor of the KL penalty in this step",
        "If it only grows, the penalty does not hold the policy.",
        exact=True,
    ),
    Definition(
        "value/explained_variance",
        "explained variance",
        "1 − Var(return − value) / Var(return) over tokens",
        "At 1 the critic is perfect, at 0 it knows only the mean, and below 0 it is worse than a "
        "constant. For λ < 1 the returns contain the values, and it reads too high: "
        "docs/critic.md has figures.",
    ),
    Definition(
        "value/mean",
        "mean value",
        "the return that the critic expects, as a mean over tokens",
        "It should follow the mean return.",
    ),
    Definition("q/mean", "mean Q", "Q of the tokens of the data, as a mean over tokens (ilql)"),
    Definition(
        "q/explained_variance",
        "variance that Q explains",
        "1 − Var(return − Q) / Var(return) over the tokens of the data (ilql)",
        "It should rise above 0. What the rest of a text decides cannot be explained before it.",
    ),
    Definition("return/mean", "mean return", "the target of the critic, as a mean over tokens"),
    Definition(
        "return/rms",
        "size of returns",
        "the root mean square of the returns of the data, over tokens (ilql)",
    ),
    Definition(
        "advantage/std",
        "spread of advantage",
        "the standard deviation over tokens of the advantages that the update used (whitened "
        "where the algorithm whitens)",
        "At 0 there is no gradient.",
    ),
    Definition(
        "advantage/raw_mean",
        "mean advantage before whitening",
        "the mean over tokens of the advantage before it is whitened",
        "Far from 0, the critic is off by a constant.",
    ),
    Definition(
        "advantage/raw_std",
        "spread of advantage before whitening",
        "the standard deviation over tokens of the advantage before it is whitened",
        "It falls as the critic learns.",
    ),
    Definition(
        "groups_without_signal",
        "share without signal",
        "the share of prompts whose responses all had the same score",
        "Near 1, almost nothing is learned from groups. With one response per prompt it is absent.",
    ),
    Definition(
        "prompts/*",
        "* prompts",
        "the number of prompts in this pool of data.sampling: unseen, hard (recent pass rate near "
        "0), learnable, or easy (near 1)",
        "Hard and easy ones are drawn less often. Nothing changes before prompts are seen again.",
        exact=True,
    ),
    Definition(
        "policy/clip_fraction",
        "clip fraction",
        "the share of token visits at which the clip removed the gradient",
        "Above 0.3, take smaller steps.",
    ),
    Definition(
        "policy/clip_high",
        "clipped above",
        "the share of tokens that were clipped at the last visit with A > 0",
        "The update could not make these tokens more likely.",
    ),
    Definition(
        "policy/clip_low",
        "clipped below",
        "the share of tokens that were clipped at the last visit with A < 0",
        "The update could not make these tokens less likely.",
    ),
    Definition(
        "policy/kl_to_old",
        "KL of the update",
        "k3 of π_old to π at the last visit, as a mean over tokens",
        "It says how far one update went, and is typically below 0.05.",
    ),
    Definition(
        "policy/step_kl",
        "KL of the step",
        "k3 of π_old to π at the end of the step, per token",
        "The coefficient algorithm.policy_loss.beta follows it.",
    ),
    Definition(
        "policy/entropy",
        "entropy",
        "the mean entropy of the next-token distribution, in nats",
        "Near 0, the policy stops exploring.",
    ),
    Definition(
        "policy/surprise_gap",
        "surprise − entropy",
        "the mean of −log π_old of the sampled tokens, less the entropy of π_old",
        "It is 0 except for noise. Below 0, rollouts are greedy or filtered.",
    ),
    Definition(
        "experts/balance_loss",
        "load-balancing loss",
        "the load-balancing loss of a mixture of experts, before policy.router_aux_loss_coef",
        "It is near the number of experts of a token where the load is even, else larger.",
    ),
    Definition(
        "experts/largest_share",
        "largest share of one expert",
        "the largest share of the step's tokens that one expert of one layer was given",
        "Near 1, a router sends every token to the same expert.",
    ),
    Definition("critic_experts/*", "critic: *", "what experts/* are for the policy, of the critic"),
    Definition(
        "staleness/mean",
        "staleness",
        "the mean age, in updates, of the weights that sampled a token when it is learnt from",
        "It is 0 where rollouts wait for updates, and at most rollout.staleness.",
    ),
    Definition(
        "staleness/max", "oldest rollout", "the same number for the oldest token", exact=True
    ),
    Definition(
        "staleness/ratio",
        "drift while waiting",
        "the mean of exp |log-prob of the weights that sampled − of the learner|, where those "
        "are older",
        "It grows with the learning rate and the staleness; a correction weighs it.",
    ),
    Definition(
        "staleness/thrown_away",
        "thrown away",
        "the share of response tokens to which the correction gave the weight 0",
        "Above 10%, sampler and learner are too far apart.",
    ),
    Definition(
        "policy/win_rate",
        "win rate",
        "the share of 32 held-out prompts for which the policy's response is better than the one "
        "of the policy that RL started from, by the gold reward where there is one and else by "
        "the training reward; a tie is half a win; it is measured twenty times a run, after the "
        "step's update",
        "Equal policies have ½, and 32 prompts give it to ± 0.17. If it falls while the reward "
        "rises, the policy exploits the reward (reward hacking).",
    ),
    Definition(
        "advantage/reward_correlation",
        "advantage against reward",
        "Pearson's r, over the step's responses, of the sum of a response's token rewards and its "
        "mean advantage in the update, within groups where advantages compare these",
        "It should be well above 0. Near 0, responses are credited with the rewards of others; "
        "below 0, a sign is wrong.",
    ),
    Definition(
        "policy/sft_perplexity",
        "perplexity on SFT data",
        "exp of the mean −log π per token of held-out demonstrations, measured twenty times a run",
        "It rises as the policy moves away from what SFT taught, and steeply where it forgets.",
    ),
    Definition(
        "reward/drift",
        "drift of the reward model",
        "the mean |score now − score at first| of the same responses, measured twenty times a run",
        "It must be 0, because a reward model is not trained during RL.",
    ),
    Definition(
        "policy/beta", "KL penalty β", "the coefficient of the KL to π_old in this step", exact=True
    ),
    Definition(
        "ratio/first_error",
        "first ratio error",
        "the largest |π / π_old − 1| before the first optimizer step",
        "It is rounding, 1e-5 or less. More means that sampler and learner disagree.",
    ),
    Definition("ratio/max", "largest ratio", "the largest π / π_old at the last visit"),
    Definition("ratio/min", "smallest ratio", "the smallest π / π_old at the last visit"),
    Definition(
        "sampler_mismatch",
        "sampler mismatch",
        "the largest |log-prob of the sampler − of the learner|",
        "It is rounding, unless top-k or top-p is on without rollout.keep_mask.",
    ),
    Definition(
        "sampler_ratio",
        "sampler ratio",
        "the mean of exp |log-prob of the sampler − of the learner|",
        "It is 1 except for rounding (1.0001), unless top-k or top-p is on without "
        "rollout.keep_mask; more stops the run. With a staleness, it covers the responses by the "
        "newest weights: the first ones and those of the win rate.",
    ),
    Definition(
        "reference/moved",
        "reference moved",
        "1 where the bits of the reference's weights are not those with which the stage began",
        "It must be 0; anything else stops the run.",
        exact=True,
    ),
    Definition(
        "skipped",
        "skipped steps",
        "the number of optimizer steps left out because the loss or a gradient was not finite",
        "It should be 0. The step before it shows why.",
        exact=True,
    ),
    Definition(
        "policy/epochs",
        "number of epochs",
        "the number of passes over the experience, which optim.target_kl may end early",
        "If it is 1 at every step, the learning rate is too high for this target.",
        exact=True,
    ),
    Definition(
        "logratio/abs",
        "distance to the reference",
        "the mean |log π − log π_ref| over chosen and rejected responses",
        "It must be 0 at step 1; anything else stops the run.",
    ),
    Definition(
        "response/tokens",
        "response length",
        "the mean number of tokens of a response",
        "If it drifts in either direction, read responses.",
    ),
    Definition(
        "continuations/tokens",
        "tokens of continuations",
        "the tokens that were sampled in the step for Monte Carlo values, beside its responses",
        "Fewer states (algorithm.advantage.every) or continuations make it smaller.",
    ),
    Definition(
        "response/ended",
        "ended",
        "the share of responses that the policy ended, by an end-of-sequence token or stop string",
        "Below 0.75, raise rollout.max_new_tokens.",
    ),
    Definition(
        "response/repetition",
        "repetition",
        "the share of pairs of neighbouring tokens that occurred before in the same response",
        "It rises when text degenerates.",
    ),
    Definition(
        "response/distinct",
        "distinct",
        "the share of responses that no other one repeats",
        "It falls when the policy collapses.",
    ),
    Definition(
        "response/most_common",
        "most common response",
        "the share of prompts that got the same response, the most common one",
        "Near 1, the policy gives one response to every prompt.",
    ),
    Definition(
        "response/turns", "mean turns", "the mean number of turns of the policy in an environment"
    ),
    Definition(
        "responses",
        "number of responses",
        "the number of responses in the step",
        "It is less than prompts × samples where some were left out.",
        exact=True,
    ),
    Definition(
        "correction/mean_weight",
        "mean weight",
        "the mean weight of rollouts by another engine or policy",
        "It should be near 1. Far below, most tokens are masked out.",
    ),
    Definition(
        "trust_region/kl",
        "KL of the trust region",
        "the KL of the step",
        "It is at most the bound.",
    ),
    Definition(
        "trust_region/fraction",
        "step taken",
        "the share of the full natural-gradient step",
        "At 0, no step was better.",
    ),
    Definition("trust_region/improvement", "improvement", "the decrease of the loss in the step"),
    Definition(
        "loss", "loss", "the stage's loss, as a mean over its optimizer steps", "It should fall."
    ),
    Definition("loss/*", "loss: *", "this term of the loss, as a mean over optimizer steps"),
    Definition("grad_norm/*", "gradient norm, *", "the norm of the gradient before it is clipped"),
    Definition("grad_norm", "gradient norm", "the norm of the gradient before it is clipped"),
    Definition(
        "accuracy",
        "pair accuracy",
        "the share of pairs in which the preferred side has the higher score",
        "Chance is 0.5.",
    ),
    Definition(
        "margin",
        "margin",
        "the mean difference between the scores of the preferred side and the other",
    ),
    Definition(
        "labels/chosen",
        "desirable labels",
        "the share of the unpaired preferences that are desirable",
        "If it is 0 or 1 at every step, there is nothing to compare.",
    ),
    Definition(
        "held_out/loss",
        "held-out loss",
        "the loss on the held-out rows, every eval_every steps",
        "If it rises while the loss falls, the model overfits.",
    ),
    Definition(
        "held_out/accuracy",
        "held-out pair accuracy",
        "the share of the held-out pairs in which the preferred side has the higher score",
        "Far below the pair accuracy, the model overfits.",
    ),
    Definition(
        "held_out/gold",
        "gold reward on held-out prompts",
        "the mean gold reward of the answers to held-out prompts, in the stage evaluation",
    ),
    Definition(
        "held_out/confidence",
        "accuracy that the held-out margins claim",
        "the mean of σ(|difference of the scores|) over the held-out pairs",
        "Far above the held-out pair accuracy, the model is too sure of itself.",
    ),
    Definition(
        "held_out/prefers_longer",
        "held-out preference for the longer side",
        "the share of the held-out pairs, of those with sides of different lengths, whose longer "
        "side has the higher score",
        "Far from the share in which the longer side is the chosen one, it scores length.",
    ),
    Definition(
        "held_out/logprobs/*",
        "log p * of held-out pairs",
        "the mean log-probability of whole responses of the held-out pairs",
        "Both sides often fall together; this is a known weakness of these losses.",
    ),
    Definition(
        "logprobs/*",
        "log p *",
        "the mean log-probability of whole responses",
        "Both sides often fall together; this is a known weakness of these losses.",
    ),
    Definition(
        "lr", "learning rate", "the learning rate of the step's first optimizer step", exact=True
    ),
    Definition(
        "lr/*",
        "learning rate, *",
        "the learning rate of the step's first optimizer step",
        exact=True,
    ),
)
"""In the order in which they are looked up and shown."""


def definition(name: str, own: Sequence[Definition] = ()) -> Definition:
    """Return the definition of a metric, `own` being those of the run's user. A metric without one
    has its name in plain words as its label."""
    for row in (*own, *DEFINITIONS):
        if row.name == name:
            return row
        head, star, _ = row.name.partition("*")
        if star and name.startswith(head) and len(name) > len(head):
            return replace(row, name=name, label=row.label.replace("*", _words(name[len(head) :])))
    return Definition(name, _words(name), "")


def _words(name: str) -> str:
    return name.replace("_", " ").replace("/", " ")


def caption(name: str, own: Sequence[Definition] = ()) -> str:
    """Return what follows a metric's label in a caption: what the metric is and how to read it, in
    sentences."""
    row = definition(name, own)
    if not row.what:
        return " is not described by this run."
    what = f": {sentence(row.what)}" if row in own else f" is {row.what}."
    return f"{what} {sentence(row.reading)}".rstrip()


def sentence(text: str) -> str:
    """Return the text with a capital at its start and a full stop at its end."""
    return text and text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")


def markdown_table() -> str:
    """For docs/metrics.md."""
    rows = [f"| `{d.name.replace('*', 'NAME')}` | {d.what} | {d.reading} |" for d in DEFINITIONS]
    return "\n".join(["| name | what it is | how to read it |", "|---|---|---|", *rows])
