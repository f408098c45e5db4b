"""The next setting of a sweep, and whether a trial is pruned: functions of what was recorded.

Nothing is kept between two calls. A suggestion depends on the seed, the number of the trial and the
trials before it, so a sweep that is resumed suggests what it would have suggested without the stop.
"""

import importlib.util
import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quartet.config.toml import ConfigError
from quartet.io.install import install_command
from quartet.runs.sweeps import Trial
from quartet.sweeps.spec import SearchedKey, SweepSpec

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

STARTUP = 5
"""Trials that TPE draws at random before it models them."""


def suggest(spec: SweepSpec, seed: int, number: int, before: Sequence[Trial]) -> dict[str, Any]:
    """Return the values of the searched keys of trial `number`, counted from 0.

    `before` are the trials that were suggested earlier. "grid" returns the combinations in order;
    "random" draws by (seed, number) alone; "tpe" fits densities to the finished trials of `before`
    (Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization"), where trials that exceed
    a bound count as worse than all that do not.
    """
    if spec.method == "grid":
        return next(values for i, values in enumerate(spec.grid()) if i == number)
    if spec.method == "random":
        rng = random.Random(f"{seed}/{number}")
        return {name: _draw(key, rng) for name, key in spec.keys.items()}
    return _tpe(spec, seed, number, before)


def is_pruned(spec: SweepSpec, before: Sequence[Trial], curve: Sequence[tuple[int, float]]) -> bool:
    """Return whether the median pruner stops a trial at the last point of its curve, which has the
    objective by step. `before` are the other trials."""
    if spec.prune is None or not curve:
        return False
    import optuna

    study = _study(spec, before)
    pruner = optuna.pruners.MedianPruner(
        n_startup_trials=spec.prune.startup, n_warmup_steps=spec.prune.warmup
    )
    trial = optuna.trial.create_trial(
        state=optuna.trial.TrialState.RUNNING, intermediate_values=dict(curve)
    )
    return bool(pruner.prune(study, trial))


def first_pruned(
    spec: SweepSpec,
    before: Sequence[Trial],
    curve: Sequence[tuple[int, float]],
    done: int,
) -> int | None:
    """Return the first step after `done` at which the median pruner stops a trial; None if it does
    at none. Steps are judged one by one, so it does not matter when the record was read."""
    if spec.prune is None:
        return None
    for count, (step, _) in enumerate(curve, 1):
        if step > done and is_pruned(spec, before, curve[:count]):
            return step
    return None


def require_optuna(spec: SweepSpec) -> None:
    """Raise `ConfigError` if the sweep needs optuna and it is not installed."""
    wanted = 'sweep.method = "tpe"' if spec.method == "tpe" else "sweep.prune"
    if (spec.method == "tpe" or spec.prune) and importlib.util.find_spec("optuna") is None:
        raise ConfigError(f"{wanted}: needs optuna. Install it: {install_command('sweep')}")


def _draw(key: SearchedKey, rng: random.Random) -> Any:
    """Draw a value: one of a list, or from a range, evenly or evenly in its logarithm."""
    if key.values is not None:
        return key.values[rng.randrange(len(key.values))]
    assert key.min is not None and key.max is not None
    if not key.log:
        low, high = key.min, key.max
        return rng.randint(int(low), int(high)) if key.is_integer else rng.uniform(low, high)
    if key.is_integer:  # each whole number has the width around it
        value = math.exp(rng.uniform(math.log(key.min - 0.5), math.log(key.max + 0.5)))
        return min(max(round(value), int(key.min)), int(key.max))
    value = math.exp(rng.uniform(math.log(key.min), math.log(key.max)))
    return min(max(value, key.min), key.max)


def _tpe(spec: SweepSpec, seed: int, number: int, before: Sequence[Trial]) -> dict[str, Any]:
    import optuna

    study = _study(spec, before)
    study.sampler = optuna.samplers.TPESampler(
        n_startup_trials=STARTUP, seed=random.Random(f"{seed}/{number}").randrange(2**31)
    )
    params = study.ask(fixed_distributions=_distributions(spec)).params
    return {name: _value(spec.keys[name], params[name]) for name in spec.keys}


def _study(spec: SweepSpec, before: Sequence[Trial]) -> "optuna.Study":
    """Return a study in memory that holds the trials."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction=spec.direction)
    for trial in before:
        if (past := _past(spec, trial)) is not None:
            study.add_trial(past)
    return study


def _past(spec: SweepSpec, trial: Trial) -> "optuna.trial.FrozenTrial | None":
    """Return a trial as optuna has it; None for one that failed, of which nothing is known."""
    from optuna.trial import TrialState, create_trial

    if trial.state == "failed":
        return None
    states = {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
    state = states.get(trial.state, TrialState.RUNNING)
    is_done = trial.state == "done"
    return create_trial(
        state=state,
        value=trial.mean if is_done else None,
        params={name: _index(spec.keys[name], value) for name, value in trial.values.items()},
        distributions=_distributions(spec),
        intermediate_values=next((run.curve for run in trial.runs.values() if run.curve), {}),
        constraints=trial.violations if is_done else None,
    )


def _distributions(spec: SweepSpec) -> "dict[str, BaseDistribution]":
    """Return the searched keys as optuna's distributions. A list is searched by its indices, since
    optuna compares choices by value and takes no lists or tables."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    found: dict[str, BaseDistribution] = {}
    for name, key in spec.keys.items():
        if key.values is not None:
            found[name] = CategoricalDistribution(range(len(key.values)))
        elif key.is_integer:
            found[name] = IntDistribution(int(key.min or 0), int(key.max or 0), log=key.log)
        else:
            found[name] = FloatDistribution(float(key.min or 0), float(key.max or 0), log=key.log)
    return found


def _index(key: SearchedKey, value: Any) -> Any:
    return value if key.values is None else key.values.index(value)


def _value(key: SearchedKey, param: Any) -> Any:
    return param if key.values is None else key.values[param]
