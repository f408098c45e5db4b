"""The doctor's rules on SFT, reward models and preferences: losses, pair accuracies and margins.

What is measured on held-out rows comes from the evaluations of a stage while it trains, and from
its summary, see `History.finish`. `rules.py` has the rules on RL and the table of all rules.
"""

import math

from quartet.runs.history import RECENT, History, Rule, Terms

LOSS_EXPLODES = 2.0
"""How many times the loss of the first step is too much."""
WORSE = 1.02
"""How many times the first held-out loss is more than the last digits of a sum."""
OVERFITS = 1.1
"""How many times the lowest held-out loss is too much, while the training loss falls."""
MEMORISED = 0.95
"""The training accuracy above which pairs may be known by heart."""
GAP = 0.15
"""By how much two shares must differ, beyond the confidence interval of one of them."""
ONE_SIDED = 0.95
"""The share of choices that one property alone explains if it explains nearly all."""
UNLIKELY = 1.25
"""How many times the first log-prob of the chosen responses is too much."""
UNSEEN = 1.1
"""How many times the conservative term of a Q without preference is too much."""
LABELS = 10
"""Steps in which all labels are alike before that is no coincidence."""


def wilson(share: float, count: float) -> tuple[float, float]:
    """Return the 95% confidence interval of a share of `count` independent cases (Wilson 1927).

    (p + z²/2n ± z √(p (1 − p)/n + z²/4n²)) / (1 + z²/n), z = 1.96. 0.5 of 100: 0.404 to 0.596.
    """
    square = 1.96**2 / count
    middle = (share + square / 2) / (1 + square)
    variance = share * (1 - share) + square / 4
    # A record may be damaged, and say that a share is not between 0 and 1.
    width = math.sqrt(square * max(0.0, variance)) / (1 + square)
    return middle - width, middle + width


def steps_are_skipped(history: History) -> str | None:
    """A step whose loss or gradient is not finite is left out (on_nonfinite = "skip"). One may be a
    bad row; several in a row are a model that has diverged."""
    if not history.latest.get("skipped", 0.0):
        return None
    count = sum(number > 0 for number in history.columns["skipped"])
    return (
        f"in {count} steps the loss or a gradient was not finite and the update was left out, the "
        "last ones in a row: the model has diverged. Lower the learning rate, or raise the warm-up."
    )


def loss_explodes(history: History) -> str | None:
    """The loss of the first step is that of the model before any update. A loss of twice as much
    is one that updates have made: the learning rate is too high (Smith 2017, "Cyclical learning
    rates", finds the highest usable one by that)."""
    now, first = history.recent("loss"), history.columns["loss"][0]
    if now is None or not now > LOSS_EXPLODES * first > 0:
        return None
    norms = next(
        (column for name, column in history.columns.items() if name.startswith("grad_norm/")), None
    )
    gradient = f" (gradient norm {norms[0]:.2g} → {norms[-1]:.2g})" if norms else ""
    return (
        f"the training loss is {now:.3g} over {RECENT} steps and was {first:.3g} at step 1"
        f"{gradient}: training diverges. Lower the learning rate, or raise the warm-up."
    )


def worse_on_held_out(history: History) -> str | None:
    """A stage that ends with a higher loss on rows it was not trained on has made the model worse:
    it diverged or overfitted. The rows are the same before and after, so nothing of the difference
    is chance."""
    losses, before = history.columns["held_out/loss"], history.columns["held_out/loss_before"][0]
    now = losses[-1]
    if not now > WORSE * before > 0:
        return None
    remedy = (
        "Take fewer steps, or keep the best weights."
        if min(losses) < before
        else "Lower the learning rate, or raise the warm-up."
    )
    return (
        f"the held-out loss rose from {before:.3g} to {now:.3g}: the model is worse than before "
        f"the stage. {remedy}"
    )


def overfits(history: History) -> str | None:
    """From the point on at which the held-out loss rises while the training loss still falls, a
    stage learns its rows and not the task (Ouyang et al. 2022, appendix C, choose the epoch
    of their reward model for that)."""
    losses = history.columns["held_out/loss"]
    train = history.columns["loss"]
    lowest = min(losses)
    if len(losses) < 2 or not losses[-1] > OVERFITS * lowest > 0:
        return None
    place = len(train) * (losses.index(lowest) + 1) // len(losses)
    before, now = train[:place][-RECENT:], history.recent("loss")
    if not before or now is None or now >= sum(before) / len(before):
        return None
    return (
        f"the held-out loss rose from {lowest:.3g} to {losses[-1]:.3g} while the training loss "
        f"fell to {now:.3g}: the model overfits. Take fewer steps, keep the best weights, or add "
        "rows."
    )


def worse_than_chance(history: History) -> str | None:
    """A model that has learnt nothing is right in half of the pairs. One that is right in fewer, by
    more than chance, has learnt the opposite of the held-out labels."""
    share, count, (_, high) = _accuracy(history)
    if high >= 0.5:
        return None
    return (
        f"{share:.0%} of {count:,.0f} held-out pairs are ordered as labelled (95% interval up to "
        f"{high:.0%}), fewer than by chance: are chosen and rejected swapped in one of the files?"
    )


def no_better_than_chance(history: History) -> str | None:
    """Where the confidence interval of the held-out accuracy includes ½, the model cannot be told
    from one that tosses a coin; what is trained on its preferences is trained on noise."""
    share, count, (low, high) = _accuracy(history)
    if not low <= 0.5 <= high:
        return None
    return (
        f"{share:.0%} of {count:,.0f} held-out pairs are ordered as labelled (95% interval "
        f"{low:.0%} to {high:.0%}): no better than chance. Look at the labels, train longer or "
        "with another learning rate, or hold out more pairs."
    )


def memorised(history: History) -> str | None:
    """Pairs that the model orders rightly in training, and their like that it does not: it knows
    the rows by heart. Reward models overfit within a few epochs (Stiennon et al. 2020 and Ouyang
    et al. 2022 train for one)."""
    train = history.recent("accuracy", 2 * RECENT)
    share, count, (_, high) = _accuracy(history)
    if train is None or train < MEMORISED or high > train - GAP:
        return None
    return (
        f"pair accuracy is {train:.0%} in training and {share:.0%} on {count:,.0f} held-out pairs "
        f"(95% interval up to {high:.0%}): the pairs are memorised. Take fewer steps, or add "
        "pairs."
    )


def margins_explode(history: History) -> str | None:
    """A score difference m says that the chosen side wins with probability σ(m) (Bradley & Terry
    1952). Margins that go on growing when the accuracy no longer does make a model that is sure
    of its errors, and RL is paid for them."""
    share, count, (_, high) = _accuracy(history)
    claimed = history.now("held_out/confidence", 0.0)
    if claimed <= high + GAP:
        return None
    return (
        f"the score differences of {count:,.0f} held-out pairs claim an accuracy of {claimed:.0%}, "
        f"and it is {share:.0%} (95% interval up to {high:.0%}): margins have exploded. Lower the "
        "learning rate, or take fewer steps."
    )


def prefers_by_length(history: History) -> str | None:
    """Length is the easiest thing to learn from human preferences (Singhal et al. 2023, "A long way
    to go"). Where it explains nearly all choices of the model and not the labels, RL on its scores
    is paid for length."""
    model = history.now("held_out/prefers_longer", 0.5)
    labels, count = history.now("held_out/longer_chosen", 0.5), history.now("held_out/lengths", 0.0)
    longer = model >= 0.5
    if not longer:
        model, labels = 1 - model, 1 - labels
    if count < 1 or model < ONE_SIDED or wilson(labels, count)[1] > model - GAP:
        return None
    word = "longer" if longer else "shorter"
    return (
        f"the model prefers the {word} side in {model:.0%} of {count:,.0f} held-out pairs, and "
        f"the labels in {labels:.0%}: it has learnt length. Balance the lengths of chosen and "
        "rejected, or train on more pairs."
    )


def one_label_only(history: History) -> str | None:
    """KTO learns from the difference between responses that are desirable and ones that are not
    (Ethayarajh et al. 2024). With one label only it makes all responses likelier, or all less
    likely."""
    shares = history.columns["labels/chosen"]
    if len(shares) < LABELS or min(shares) != max(shares) or shares[0] not in {0.0, 1.0}:
        return None
    label = "desirable" if shares[0] else "undesirable"
    return (
        f"all labels of {len(shares):,} steps say {label}: there is nothing to compare. Check the "
        "label column, or add rows with the other label."
    )


def chosen_becomes_unlikely(history: History) -> str | None:
    """Losses on differences are content if both sides become unlikely, the rejected one more. Then
    the probability goes to responses in no comparison: likelihood displacement (Razin et al. 2024;
    Pal et al. 2024 add a term to the loss that keeps the chosen side likely)."""
    before = history.columns["held_out/logprobs/chosen_before"][0]
    now = history.columns["held_out/logprobs/chosen"][-1]
    if not now < UNLIKELY * before:
        return None
    return (
        f"the mean log-probability of the held-out chosen responses fell from {before:.1f} to "
        f"{now:.1f}: the probability goes to other responses. Raise beta, lower the learning rate, "
        "or take ORPO, whose loss keeps the chosen side likely."
    )


def _accuracy(history: History) -> tuple[float, float, tuple[float, float]]:
    """Return the held-out accuracy, the number of pairs and the 95% confidence interval."""
    share, count = history.now("held_out/accuracy", 0.5), history.now("held_out/pairs", 0.0)
    return share, count, wilson(share, count) if count >= 1 else (0.0, 1.0)


def q_diverges(history: History) -> str | None:
    """The squared errors of a row's exact values add up to no more than the variance of its return:
    they are the steps of a martingale. Errors that are larger than the returns at every token are
    those of a Q that runs away, as its targets are its own values of later tokens (Snell et al.
    2022)."""
    errors, returns = history.recent("loss/q"), history.recent("return/rms")
    if errors is None or returns is None or not errors > returns**2 > 0:
        return None
    return (
        f"Q is wrong by {math.sqrt(errors):.3g} at each token over {RECENT} steps, and the returns "
        f"are of size {returns:.3g}: Q diverges. Lower ilql.lr, raise the warm-up, or lower "
        "ilql.loss.gamma."
    )


def q_prefers_unseen(history: History) -> str | None:
    """Before the first step Q is 0 for all tokens, and its conservative term is that of a uniform
    choice (Kumar et al. 2020). A higher one says that Q prefers tokens that the data do not have,
    and so does the policy that is made of it."""
    now, first = history.recent("loss/cql"), history.columns["loss/cql"][0]
    if now is None or not now > UNSEEN * first > 0:
        return None
    return (
        f"the conservative term is {now:.3g}, and {first:.3g} where Q prefers no token: Q is "
        "higher for tokens that the data do not have. Raise ilql.loss.cql, or add a constant to "
        "the scores so that none is below 0."
    )


RULES: dict[Rule, Terms] = {
    steps_are_skipped: Terms(("skipped",), steps=3),
    loss_explodes: Terms(("loss", "lr")),
    worse_on_held_out: Terms(("held_out/loss", "held_out/loss_before")),
    overfits: Terms(("held_out/loss", "loss")),
    worse_than_chance: Terms(("held_out/accuracy", "held_out/pairs")),
    no_better_than_chance: Terms(("held_out/accuracy", "held_out/pairs")),
    memorised: Terms(("held_out/accuracy", "held_out/pairs", "accuracy")),
    margins_explode: Terms(("held_out/confidence", "held_out/accuracy", "held_out/pairs")),
    prefers_by_length: Terms(("held_out/prefers_longer", "held_out/longer_chosen")),
    one_label_only: Terms(("labels/chosen",), first=True),
    chosen_becomes_unlikely: Terms(("held_out/logprobs/chosen", "held_out/logprobs/chosen_before")),
    q_diverges: Terms(("loss/q", "return/rms"), steps=3),
    q_prefers_unseen: Terms(("loss/cql",), steps=3),
}
"""What each of these rules reads."""
