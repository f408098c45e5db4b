"""The reward models whose accuracy an evaluation takes."""

from collections.abc import Sequence
from pathlib import Path

from quartet.assembly.evaluation.measures import Measure, measure_of
from quartet.assembly.evaluation.policies import EvaluationError, is_run, labelled
from quartet.assembly.named import resolved_model
from quartet.rewards.sources import EnsembleSource


def reward_models_of(words: Sequence[str]) -> dict[str, Measure]:
    """Return the reward models that words of the command name, by their names: folders, hub ids,
    and runs, of which the one that they trained is meant. Raises a QuartetError for what is none,
    and where two have one name."""
    found: dict[str, Measure] = {}
    for each in words:
        name, spec = labelled(each)
        path = Path(spec)
        measure = _reward_model(spec)
        name = name or (path.resolve().name if is_run(path) else path.name) or spec
        if found.setdefault(name, measure) != measure:
            raise EvaluationError(
                f"--measure accuracy: two reward models are called {name}. Write name=MODEL."
            )
    return found


def _reward_model(spec: str) -> Measure:
    """Return the measure that scores with a reward model, or with all of a run's."""
    path = Path(spec)
    if "://" in spec or ("@" in spec and not path.exists()):
        what = "a server" if "://" in spec else "a checkpoint or a model of a run"
        raise EvaluationError(
            f"--measure accuracy: {spec} is {what}, and accuracy is of reward models. Name a "
            "folder, a hub id or a run, and measure policies in another command."
        )
    if not is_run(path):
        return measure_of({"type": "model", "model": str(resolved_model("model", spec))}, False)
    folders = sorted(path.glob("reward_model-*"))
    if folders:
        source = EnsembleSource(models=tuple(str(folder) for folder in folders))
        return Measure("accuracy", "choices", source)
    if not (path / "reward_model").is_dir():
        raise EvaluationError(
            f"--measure accuracy: {spec} has trained no reward model. Name a run that has, or the "
            "folder of a reward model."
        )
    return measure_of({"type": "model", "model": spec}, False)
