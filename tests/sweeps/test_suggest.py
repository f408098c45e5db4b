"""Suggestions are functions of the seed, the trial's number and the trials before it."""

import math

import pytest

from quartet.runs.sweeps import Trial, TrialRun
from quartet.sweeps.spec import spec_of
from quartet.sweeps.suggest import first_pruned, is_pruned, suggest

KEYS = {
    "optim.lr": {"min": 1e-5, "max": 1e-1, "log": True},
    "optim.epochs": {"min": 1, "max": 4},
    "recipe": {"values": ["ppo", "grpo"]},
}


def spec(method, keys=KEYS, **more):
    return spec_of({"objective": "gold", "method": method, "trials": 30, "keys": keys, **more}, {})


def done(number, values, mean, excess=0.0, bound=None):
    """A trial with one run that reached `mean`, and a KL that far above its bound."""
    run = TrialRun(
        0, "done", objective=float(mean), measures={} if bound is None else {"kl": bound + excess}
    )
    return Trial(number, values, {0: run}, {} if bound is None else {"kl": bound})


def pruned(number, values, curve):
    return Trial(number, values, {0: TrialRun(0, "pruned", curve=curve)})


def history(method, count, score, seed=0, bound=None):
    """The trials of a sweep whose objective is a function of the values."""
    trials = []
    for number in range(count):
        values = suggest(spec(method), seed, number, trials)
        mean, excess = score(values)
        trials.append(done(number, values, mean, excess, bound))
    return trials


@pytest.mark.parametrize("method", ["random", "tpe"])
def test_the_same_seed_suggests_the_same_and_another_does_not(method):
    if method == "tpe":
        pytest.importorskip("optuna")

    def score(values):
        return -abs(math.log10(values["optim.lr"]) + 3), 0.0

    first, again, other = (history(method, 8, score, seed) for seed in (0, 0, 1))
    assert [t.values for t in first] == [t.values for t in again]
    assert [t.values for t in first] != [t.values for t in other]
    for trial in first:
        assert 1e-5 <= trial.values["optim.lr"] <= 1e-1
        assert trial.values["optim.epochs"] in {1, 2, 3, 4}
        assert isinstance(trial.values["optim.epochs"], int)
        assert trial.values["recipe"] in {"ppo", "grpo"}


def test_random_logarithms_are_spread_evenly():
    """A tenth of four decades has a quarter of 400 draws, within three deviations."""
    draws = [suggest(spec("random"), 0, n, ())["optim.lr"] for n in range(400)]
    for low in (1e-5, 1e-4, 1e-3, 1e-2):
        share = sum(low <= x < 10 * low for x in draws) / 400
        assert abs(share - 0.25) < 3 * math.sqrt(0.25 * 0.75 / 400)


def test_tpe_is_fed_anew_from_the_trials_alone():
    """What is suggested after a stop is what would have been suggested without it: nothing but the list of trials is kept."""
    pytest.importorskip("optuna")
    trials = history("tpe", 9, lambda v: (-abs(math.log10(v["optim.lr"]) + 3), 0.0))
    later = [suggest(spec("tpe"), 0, number, trials[:number]) for number in range(9)]
    assert later == [t.values for t in trials]


def test_tpe_finds_the_better_half_more_often_than_chance():
    pytest.importorskip("optuna")
    trials = history("tpe", 30, lambda v: (-abs(math.log10(v["optim.lr"]) + 3), 0.0))
    near = [abs(math.log10(t.values["optim.lr"]) + 3) < 1 for t in trials[10:]]
    assert sum(near) >= 14  # of 20; at random half of them are


def test_tpe_keeps_away_from_what_exceeds_a_bound():
    """The objective grows with the learning rate, and above 1e-3 so does the KL, beyond its bound."""
    pytest.importorskip("optuna")

    def score(values):
        return math.log10(values["optim.lr"]), math.log10(values["optim.lr"]) + 3

    free = history("tpe", 30, lambda v: (score(v)[0], -1.0), bound=6.0)
    bounded = history("tpe", 30, score, bound=6.0)
    above = [sum(t.values["optim.lr"] > 1e-3 for t in trials[10:]) for trials in (free, bounded)]
    assert above[0] >= 15 and above[1] <= 10


def test_the_median_pruner_by_hand():
    """At step 2 the five trials had 1, 2, 3, 4, 5, whose median is 3. The best so far counts."""
    pytest.importorskip("optuna")
    table = spec("random", prune={"startup": 5})
    before = [done(n, {"recipe": "ppo"}, n) for n in range(5)]
    table = spec("random", {"recipe": {"values": ["ppo", "grpo"]}}, prune={"startup": 5})
    for number, trial in enumerate(before):
        trial.runs[0].curve = {1: 0.0, 2: number + 1.0}
    assert is_pruned(table, before, [(1, 0.0), (2, 2.9)])
    assert not is_pruned(table, before, [(1, 0.0), (2, 3.1)])
    assert not is_pruned(table, before, [(1, 3.5), (2, 2.9)])
    assert not is_pruned(table, before[:4], [(1, 0.0), (2, 0.5)])


def test_a_curve_is_judged_step_by_step_however_it_was_read():
    pytest.importorskip("optuna")
    table = spec(
        "random", {"recipe": {"values": ["ppo", "grpo"]}}, prune={"startup": 1, "warmup": 2}
    )
    before = [done(0, {"recipe": "ppo"}, 1.0)]
    before[0].runs[0].curve = {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0}
    curve = [(1, 0.1), (2, 1.5), (3, 0.2), (4, 0.3)]
    assert first_pruned(table, before, curve, 0) is None  # its best, 1.5, is above the median
    low = [(1, 0.1), (2, 0.5), (3, 0.2), (4, 0.3)]
    assert first_pruned(table, before, low, 0) == 2  # not in the warm-up
    assert [first_pruned(table, before, low[:n], 0) for n in (1, 2, 3)] == [None, 2, 2]
    assert first_pruned(spec("random"), before, low, 0) is None


def test_a_pruned_trial_is_known_to_tpe_and_a_failed_one_is_not():
    pytest.importorskip("optuna")
    values = {"optim.lr": 1e-3, "optim.epochs": 2, "recipe": "ppo"}
    failed = Trial(0, values, {0: TrialRun(0, "failed")})
    table = spec("tpe")
    assert suggest(table, 0, 1, [failed]) == suggest(table, 0, 1, [])
    many = [done(n, {**values, "optim.lr": 10.0 ** -(1 + n / 3)}, -n) for n in range(12)]
    worse = [pruned(12 + n, {**values, "optim.lr": 0.05}, {1: -99.0}) for n in range(6)]
    assert suggest(table, 0, 20, many) != suggest(table, 0, 20, many + worse)
