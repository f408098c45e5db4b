"""What each metric is and how to read it: one row each, shown wherever the metric is."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Definition:
    name: str
    """As in events.jsonl; `*` stands for any one word."""
    label: str
    what: str
    reading: str = ""
    chart: str = ""
    """The title of the chart that shows it; of a metric of a user's own only, the charts of the
    others are listed in `figures`."""
    percent: bool = False
    """Whether that chart is in percent."""


DEFINITIONS = (
    Definition(
        "reward",
        "reward",
        "mean score of the responses, the weighted sum of all rewards",
        "should rise; read answers when it does",
    ),
    Definition(
        "reward/gold",
        "gold reward",
        "the embedded world's true worth of the responses, never trained on",
        "falling while reward rises is reward hacking",
    ),
    Definition(
        "reward/std",
        "spread of reward",
        "standard deviation of the scores in the step",
        "towards 0 there is nothing to compare",
    ),
    Definition(
        "reward/unscored",
        "unscored",
        "share of responses that no reward could score; they were left out",
        "above 5 %: see run.log",
    ),
    Definition(
        "reward/length_correlation",
        "reward against length",
        "Pearson's r of score and number of tokens in the step",
        "above 0.5 the policy may be paid for length",
    ),
    Definition("reward/*", "reward *", "mean of this reward alone, before its weight"),
    Definition(
        "kl",
        "KL",
        "mean over responses of Σ_t log π_old(t) − log π_ref(t), in nats (k1)",
        "how far the policy is from the reference; 0 at step 1",
    ),
    Definition(
        "kl/token_k1",
        "KL per token, k1",
        "mean over tokens of log π_old − log π_ref",
        "unbiased, noisy, may be negative",
    ),
    Definition(
        "kl/token_k2",
        "KL per token, k2",
        "mean over tokens of ½ (log π_old − log π_ref)²",
        "biased a little, never negative",
    ),
    Definition(
        "kl/token_k3",
        "KL per token, k3",
        "mean over tokens of ρ − 1 − log ρ, ρ = π_ref / π_old",
        "unbiased, never negative",
    ),
    Definition(
        "kl/coef",
        "KL coefficient",
        "what multiplies the KL, as this step used it",
        "one that only grows: the policy runs away",
    ),
    Definition(
        "value/explained_variance",
        "explained variance",
        "1 − Var(return − value) / Var(return) over tokens",
        "1 perfect, 0 knows the mean only, below 0 worse than nothing",
    ),
    Definition(
        "value/mean",
        "mean value",
        "what the critic expects, over tokens",
        "should follow the mean return",
    ),
    Definition("return/mean", "mean return", "what the critic is taught, over tokens"),
    Definition(
        "advantage/std",
        "spread of advantage",
        "standard deviation over tokens, as trained (whitened where the algorithm whitens)",
        "0 means no gradient",
    ),
    Definition(
        "advantage/raw_mean",
        "mean advantage before whitening",
        "mean over tokens of A before it is whitened",
        "far from 0 the critic is off by a constant",
    ),
    Definition(
        "advantage/raw_std",
        "spread of advantage before whitening",
        "standard deviation over tokens of A before it is whitened",
        "falls as the critic learns",
    ),
    Definition(
        "groups_without_signal",
        "groups without signal",
        "share of prompts whose answers all scored the same",
        "near 1 nothing is learnt from groups; with one answer per prompt it is 1",
    ),
    Definition(
        "policy/clip_fraction",
        "clip fraction",
        "share of token visits at which the clip took the gradient away",
        "above 0.3: smaller steps",
    ),
    Definition(
        "policy/clip_high",
        "clipped above",
        "share of tokens that the last visit found clipped with A > 0",
        "good tokens that may rise no further",
    ),
    Definition(
        "policy/clip_low",
        "clipped below",
        "share of tokens that the last visit found clipped with A < 0",
        "bad tokens that may fall no further",
    ),
    Definition(
        "policy/kl_to_old",
        "KL of the update",
        "k3 of π_old to π at the last visit, mean over tokens",
        "how far one update went; typically below 0.05",
    ),
    Definition(
        "policy/step_kl",
        "KL of the step",
        "k3 of π_old to π when the step is over, per token",
        "what policy_loss.beta follows",
    ),
    Definition(
        "policy/entropy",
        "entropy",
        "mean entropy of the next-token distribution, in nats",
        "towards 0 the policy stops exploring",
    ),
    Definition(
        "policy/surprise_gap",
        "surprise − entropy",
        "mean of −log π_old of the tokens sampled, less the entropy of π_old",
        "0 but for noise; below it rollouts are greedy or filtered",
    ),
    Definition(
        "staleness/mean",
        "staleness",
        "updates between the weights that sampled a token and those that learn from it, on average",
        "0 where rollouts wait for updates; at most rollout.staleness",
    ),
    Definition("staleness/max", "oldest rollout", "the same, of the oldest token"),
    Definition(
        "staleness/ratio",
        "drift while waiting",
        "mean of exp |log-prob of the weights that sampled − of the learner|, where those are "
        "older",
        "grows with the learning rate and the staleness; a correction weighs it",
    ),
    Definition(
        "staleness/thrown_away",
        "thrown away",
        "share of response tokens to which the correction gave the weight 0",
        "above 10 %: sampler and learner are too far apart",
    ),
    Definition(
        "policy/win_rate",
        "win rate",
        "share of 32 held-out prompts to which the policy answers better than the one RL started "
        "from, by the gold "
        "reward where there is one, else by the training reward; a tie is half a win; twenty times "
        "a run",
        "½ at first; falling while reward rises is reward hacking",
    ),
    Definition(
        "advantage/reward_correlation",
        "advantage against reward",
        "Pearson's r, over the step's responses, of the sum of a response's token rewards and the "
        "mean advantage that the "
        "update took for it; within groups where advantages compare these",
        "well above 0; around 0 responses are paid for others', below 0 a sign is wrong",
    ),
    Definition(
        "policy/sft_perplexity",
        "perplexity on SFT data",
        "exp of the mean −log π per token of held-out demonstrations, twenty times a run",
        "what SFT taught; it rises as the policy leaves it, and steeply where it forgets",
    ),
    Definition(
        "reward/drift",
        "drift of the reward model",
        "mean |score now − score at first| of the same answers, twenty times a run",
        "0: a reward model does not learn while it judges",
    ),
    Definition(
        "policy/beta", "KL penalty β", "coefficient of the KL to π_old, as this step used it"
    ),
    Definition(
        "ratio/first_error",
        "first ratio error",
        "max |π / π_old − 1| before the first optimizer step",
        "rounding, 1e-5 or less; more means that sampler and learner disagree",
    ),
    Definition("ratio/max", "largest ratio", "max of π / π_old at the last visit"),
    Definition("ratio/min", "smallest ratio", "min of π / π_old at the last visit"),
    Definition(
        "sampler_mismatch",
        "sampler mismatch",
        "max |log-prob of the sampler − of the learner|",
        "rounding, unless top-k or top-p is on",
    ),
    Definition(
        "sampler_ratio",
        "sampler ratio",
        "mean of exp |log-prob of the sampler − of the learner|",
        "1 but for rounding (1.0001), unless top-k or top-p is on; more stops the run. With a "
        "staleness: of answers by the "
        "newest weights, the first ones and those of the win rate",
    ),
    Definition(
        "reference/moved",
        "reference moved",
        "1 where the bits of the reference's weights are not those that the stage began with",
        "0; anything else stops the run",
    ),
    Definition(
        "skipped",
        "skipped",
        "optimizer steps that were left out, for their loss or gradient was not finite",
        "0; the step before it tells why",
    ),
    Definition(
        "policy/epochs",
        "epochs",
        "passes over the experience, where optim.target_kl may end them early",
        "1 at every step: the learning rate is high for this target",
    ),
    Definition(
        "logratio/abs",
        "distance to the reference",
        "mean |log π − log π_ref| over chosen and rejected responses",
        "0 at step 1; anything else stops the run",
    ),
    Definition(
        "response/tokens",
        "response length",
        "mean number of tokens",
        "drift in either direction: read answers",
    ),
    Definition(
        "response/ended",
        "ended",
        "share of responses that end with the end-of-sequence token",
        "below 0.75: raise rollout.max_new_tokens",
    ),
    Definition(
        "response/repetition",
        "repetition",
        "share of neighbouring token pairs said before in the same response",
        "rises when text degenerates",
    ),
    Definition(
        "response/distinct",
        "distinct",
        "share of responses that no other repeats",
        "falls when the policy collapses",
    ),
    Definition(
        "response/most_common",
        "said to most",
        "share of prompts that got the same response, the most common one",
        "towards 1 the policy says one thing to everything",
    ),
    Definition(
        "response/turns",
        "turns",
        "mean number of turns of the policy, where an environment answers it",
    ),
    Definition(
        "responses",
        "responses",
        "responses in the step",
        "fewer than prompts × samples where some were dropped",
    ),
    Definition(
        "correction/mean_weight",
        "mean weight",
        "mean weight of rollouts by another engine or policy",
        "near 1; far below, most tokens are masked out",
    ),
    Definition(
        "trust_region/kl", "KL of the trust region", "KL of the step taken", "at most the bound"
    ),
    Definition(
        "trust_region/fraction",
        "step taken",
        "share of the full natural-gradient step",
        "0: no step was better",
    ),
    Definition("trust_region/improvement", "improvement", "by how much the loss fell"),
    Definition("loss", "loss", "the stage's loss, mean over its optimizer steps", "should fall"),
    Definition("loss/*", "loss: *", "this term of the loss, mean over optimizer steps"),
    Definition("grad_norm/*", "gradient norm, *", "norm of the gradient before it is clipped"),
    Definition("grad_norm", "gradient norm", "norm of the gradient before it is clipped"),
    Definition(
        "accuracy", "pair accuracy", "share of pairs in which the better side wins", "0.5 is chance"
    ),
    Definition(
        "held_out/loss",
        "held-out loss",
        "the loss on the held-out rows, every eval_every steps",
        "rising while the loss falls is overfitting",
    ),
    Definition(
        "held_out/accuracy",
        "held-out pair accuracy",
        "share of the held-out pairs in which the better side wins",
        "far below the pair accuracy is overfitting",
    ),
    Definition("margin", "margin", "mean of what the better side wins by"),
    Definition(
        "logprobs/*",
        "log p *",
        "mean log-probability of whole responses",
        "both sides falling together is the family's usual illness",
    ),
    Definition("lr", "learning rate", "of the step's last optimizer step"),
    Definition("lr/*", "learning rate, *", "of the step's last optimizer step"),
)
"""In the order in which they are looked up and shown."""


def definition(name: str, own: Sequence[Definition] = ()) -> Definition:
    """Return the definition of a metric, `own` being those of the run's user. A metric without one
    is its own label."""
    for row in (*own, *DEFINITIONS):
        if row.name == name:
            return row
        head, star, _ = row.name.partition("*")
        if star and name.startswith(head) and len(name) > len(head):
            word = name.removeprefix(head).replace("_", " ")
            return Definition(name, row.label.replace("*", word), row.what, row.reading)
    return Definition(name, name.replace("_", " "), "")


def markdown_table() -> str:
    """For docs/metrics.md."""
    rows = [f"| `{d.name.replace('*', 'NAME')}` | {d.what} | {d.reading} |" for d in DEFINITIONS]
    return "\n".join(["| name | what it is | how to read it |", "|---|---|---|", *rows])
