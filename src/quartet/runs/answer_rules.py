"""The doctor's rules on what a policy has learnt to write: its length, its repetitions, and whether
more reward comes with better answers.

`rules.py` has the other rules on RL and the table of all rules.
"""

import math

from quartet.runs.history import WIN_RATES, History, Rule, Terms, moving_means, roughness

HACKED_WITHIN = 200
"""Steps over which gold and reward are compared."""
HACKED_MEAN = 10
"""Steps of which one mean is taken there."""
FORGOTTEN = 5.0
"""How many times the first perplexity on demonstrations is too much."""
PAYS = 0.3
"""The correlation of score and length from which a change of length is what the reward pays for."""


def duplicates(history: History) -> str | None:
    """The same response to different prompts: the policy has found one that pays, whatever was
    asked."""
    now, first = history.recent("response/most_common"), history.first("response/most_common")
    if now is None or first is None or now < 0.5 or now < 2 * first:
        return None
    return (
        f"{now:.0%} of prompts get the same response, {first:.0%} did at first: the policy found "
        "one that always pays. Read it."
    )


def length_drift(history: History) -> str | None:
    """Reward models pay for length (Singhal et al. 2023, "A long way to go"); a policy that learns
    that writes more and more, or less and less."""
    now, first = history.recent("response/tokens"), history.first("response/tokens")
    if now is None or first is None or 0.5 * first < now < 2 * first:
        return None
    return (
        f"responses went from {first:.0f} to {now:.0f} tokens. If that is not intended, read "
        f"samples{_pay_for_length(history, longer=now > first)}."
    )


def _pay_for_length(history: History, *, longer: bool) -> str:
    """Return what the correlation of score and length has to do with a change of length, as the end
    of a sentence; nothing where it was not recorded."""
    r = history.recent("reward/length_correlation", 10)
    if r is None:
        return ""
    found = f"score and length have a correlation of {r:.2f} over ten steps"
    if (r if longer else -r) < PAYS:
        return f"; {found}, so it is not length that the reward pays for"
    return f"; {found}, so the reward pays for it"


def paid_for_length(history: History) -> str | None:
    """Of the responses of one step, the long ones score higher, or lower, whatever they say; the
    policy learns their length first (Singhal et al. 2023, "A long way to go")."""
    r = history.recent("reward/length_correlation", 10)
    if r is None or abs(r) < 0.8:
        return None
    return (
        f"score and length have a correlation of {r:.2f} over ten steps: the reward is mostly a "
        f"measure of length: {'long' if r > 0 else 'short'} answers earn more whatever they say. "
        'Add a [[reward]] with type = "length", or train the reward model on pairs whose chosen '
        "side is as often the shorter as the longer one."
    )


def repeats_itself(history: History) -> str | None:
    """Degenerate text: the same words in circles, which a reward model may never have seen in
    training (Stiennon et al. 2020 show such summaries)."""
    now, first = history.recent("response/repetition"), history.first("response/repetition")
    if now is None or first is None or now < max(0.25, 3 * first):
        return None
    return (
        f"repetition within responses went from {first:.0%} to {now:.0%}. Read samples; raise "
        "algorithm.kl.coef."
    )


def hacked(history: History) -> str | None:
    """The reward goes on rising while what it stands for falls: over-optimisation (Gao et al. 2023,
    "Scaling laws for reward model overoptimization")."""
    gold, reward = (
        history.columns.get(name, [])[-HACKED_WITHIN:] for name in ("reward/gold", "reward")
    )
    if len(gold) < 2 * HACKED_MEAN or len(reward) != len(gold):
        return None
    means, rewards = moving_means(gold, HACKED_MEAN), moving_means(reward, HACKED_MEAN)
    top = max(range(len(means)), key=means.__getitem__)
    fallen, then, now = means[top] - means[-1], rewards[top], rewards[-1]
    # The top of noise is the highest of many means, looked for at every step: eight standard
    # errors.
    noise = 8 * roughness(gold) / math.sqrt(HACKED_MEAN)
    if fallen < max(0.15 * (means[top] - means[0]), noise, 0.05) or now <= then + noise:
        return None
    since = history.steps - len(gold) + top + HACKED_MEAN // 2
    return (
        f"reward rose from {then:.2f} to {now:.2f} since step {since}, gold reward fell from "
        f"{means[top]:.2f} to {means[-1]:.2f}: the reward model is being fooled. Stop there, or "
        "raise algorithm.kl.coef."
    )


def worse_for_more_reward(history: History) -> str | None:
    """The evaluation compares answers of before and after RL to held-out prompts by the gold
    reward, on which nothing is trained. A policy that earns more and loses there has learned what
    the reward pays for and not what it stands for (Gao et al. 2023)."""
    names = ("reward", "gold", "response/tokens", "response/repetition")
    after = {name: history.now(f"held_out/{name}", 0.0) for name in names}
    before = {name: history.now(f"held_out/{name}_before", 0.0) for name in names}
    low, high = (history.columns[f"held_out/win_rate_{end}"][-1] for end in ("low", "high"))
    if high >= 0.5 or after["reward"] <= before["reward"] or after["gold"] >= before["gold"]:
        return None
    reward, gold = (f"from {before[n]:.2f} to {after[n]:.2f}" for n in ("reward", "gold"))
    tokens, repeated = names[2:]
    return (
        f"on held-out prompts the reward rose {reward}, but the gold reward fell {gold}, and the "
        f"answers lose to those from before RL (they win {low:.0%} to {high:.0%}). They have "
        f"{after[tokens]:.0f} tokens, and had {before[tokens]:.0f}; {after[repeated]:.0%} of their "
        f"token pairs are repetitions, and {before[repeated]:.0%} were. Read the answers with the "
        "highest scores, and raise algorithm.kl.coef, lower optim.lr or change the reward."
    )


def loses_held_out(history: History) -> str | None:
    """Rewarded more and more for responses that are worse: the win rate on prompts that are not
    trained on falls while the reward rises (Stiennon et al. 2020, figure 5)."""
    wins, reward = history.columns.get("policy/win_rate", []), history.columns.get("reward", [])
    if len(wins) < 2 * WIN_RATES:
        return None
    top, now = history.best_wins, sum(wins[-WIN_RATES:]) / WIN_RATES
    begin = int(history.best_place * len(reward) / len(wins))
    then = reward[begin : begin + HACKED_MEAN]
    last = reward[-HACKED_MEAN:]
    if not then or top - now < 0.2 or sum(last) / len(last) <= sum(then) / len(then):
        return None
    return (
        f"the win rate on held-out prompts fell from {top:.0%} to {now:.0%} while the reward rose: "
        "the answers get worse. Stop there, or raise algorithm.kl.coef."
    )


def forgets(history: History) -> str | None:
    """What SFT taught is lost as the reward is gained: the alignment tax (Ouyang et al. 2022, who
    mix pretraining texts in). Silent where held-out responses get better all the same."""
    seen = history.columns.get("policy/sft_perplexity", [])
    wins = history.recent("policy/win_rate", WIN_RATES)
    if wins is not None and wins > 0.55:
        return None
    if len(seen) < 2 or seen[-1] < FORGOTTEN * seen[0] or history.now("kl", 0.0) < 1:
        return None
    return (
        f"perplexity on held-out demonstrations went from {seen[0]:.3g} to {seen[-1]:.3g}: the "
        "policy forgets what SFT taught. Raise algorithm.kl.coef, lower optim.lr, or mix "
        "demonstrations in (algorithm.ptx)."
    )


RULES: dict[Rule, Terms] = {
    duplicates: Terms(("response/most_common",)),
    length_drift: Terms(("response/tokens",)),
    paid_for_length: Terms(("reward/length_correlation",)),
    repeats_itself: Terms(("response/repetition",)),
    hacked: Terms(("reward/gold", "reward"), steps=3),
    worse_for_more_reward: Terms(
        (
            "held_out/gold",
            "held_out/gold_before",
            "held_out/reward",
            "held_out/reward_before",
            "held_out/win_rate_low",
            "held_out/win_rate_high",
        )
    ),
    loses_held_out: Terms(("policy/win_rate", "reward")),
    forgets: Terms(("policy/sft_perplexity",)),
}
"""The rules, in the order of the studio's page."""
