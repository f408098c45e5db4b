"""One update of a run, computed again: as it was, to the bit, or with a setting changed."""

import copy
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from quartet.algorithms.algorithm import Algorithm
from quartet.errors import QuartetError
from quartet.experience import Experience, Rollout
from quartet.loops.rl import Step
from quartet.stages.protocol import Stage, StageRun
from quartet.stages.rl import AlgorithmState, RLStage
from quartet.tensors import Bool, Float, Tensor
from quartet.training.checkpoint import Checkpoint, misfit
from quartet.training.checkpoints import Checkpoints
from quartet.training.learner import Learner
from quartet.training.metrics import rl_metrics
from quartet.training.random_state import GlobalRandom
from quartet.training.state_tree import Tree
from quartet.training.update import Update


class CannotReplay(QuartetError, ValueError):
    """The message says why, and what to do."""


@dataclass(frozen=True)
class Outcome:
    """What one update did."""

    metrics: Mapping[str, float]
    clipped: Bool[Tensor, "B T"]
    tokens: int
    """Tokens of responses: what there was to clip."""
    kl_after: float
    """Mean k3 of π_old to π per token, when the update was done."""
    moved: Float[Tensor, "P"]
    """The change of the actor's weights."""


def checkpoint_before(folder: Path, stage: str, step: int) -> Checkpoint:
    """The newest from which the step can be reached, be it that others have to be done again on the
    way."""
    for _, found in Checkpoints(folder / "checkpoints", {stage: 0}).usable(misfit):
        if isinstance(found, Checkpoint) and found.facts["step"] < step:
            return found
    raise CannotReplay(
        f"{folder.name}: has no checkpoint before step {step:,} of {stage}. Runs keep their last "
        f"ones: copy them, or set "
        "run.keep_last."
    )


def replay(
    stage: RLStage,
    folder: Path,
    since: Checkpoint,
    step: int,
    changed: RLStage | None = None,
    done: Callable[[Step], None] | None = None,
) -> tuple[Outcome, Outcome | None]:
    """The update of this step; and, of the same rollouts, the one that a changed stage would have
    made. Nothing is written. `done` is told of each step on the way."""
    work, state = _begun(stage, folder, since)
    before, weights = state, _weights(work)
    for made in cast(Iterator[Step], work.steps(since.facts["step"])):
        if done is not None:
            done(made)
        if made.number == step:
            break
        before, weights = copy.deepcopy(work.state()), _weights(work)
    outcome = _outcome(work, made.metrics, made.update, made.experience, weights)
    if changed is None:
        return outcome, None
    rollouts = made.rollouts
    del work, made  # two learners at once might not fit
    return outcome, _other(changed, stage.algorithm, folder, before, rollouts)


def _outcome(
    work: StageRun,
    metrics: Mapping[str, float],
    update: Update,
    experience: Experience,
    weights: Tensor,
) -> Outcome:
    """`weights`: the actor's before the update."""
    tokens, kl = int(experience.response_mask.sum()), _learner(work).kl_since(experience)
    return Outcome(metrics, update.clipped, tokens, kl, _weights(work) - weights)


def models_at(stage: Stage, folder: Path, found: Checkpoint, scratch: Path) -> None:
    """What the stage would have left, had it ended at this checkpoint, in another folder."""
    for name in ("sft", "reward_model"):
        if (folder / name).is_dir():
            (scratch / name).symlink_to((folder / name).resolve())
    for name in ("events.jsonl", "config.resolved.toml"):
        shutil.copyfile(folder / name, scratch / name)
    work = stage.begin(scratch)
    work.load_state(found.state()["work"])
    for link in scratch.iterdir():
        if link.is_symlink():  # what the stage reads it has read; what it writes is its own
            link.unlink()
    work.finish()


def _other(
    changed: RLStage, written: Algorithm, folder: Path, before: Tree, rollouts: Sequence[Rollout]
) -> Outcome:
    """The update with another algorithm or optimizer, from the same state and the same rollouts."""
    work = dataclasses.replace(changed, load_components=_without_probes(changed)).begin(folder)
    then, now = dataclasses.asdict(written), dataclasses.asdict(changed.algorithm)
    work.load_state({**before, "algorithm": merged(before["algorithm"], then, now)})
    adapting, learner = work.stateful["algorithm"], _learner(work)
    assert isinstance(adapting, AlgorithmState)
    algorithm, weights = adapting.now, _weights(work)
    batch = learner.score(rollouts, algorithm)
    experience = algorithm.experience(batch)
    update = learner.update(experience, algorithm)
    metrics = rl_metrics(rollouts, 0.0, batch, experience, update, algorithm)
    return _outcome(work, metrics, update, experience, weights)


def _begun(stage: RLStage, folder: Path, since: Checkpoint) -> tuple[StageRun, Tree]:
    """The stage as the checkpoint left it, and a copy of its state."""
    saved, shared = since.state(), GlobalRandom()
    if "work" not in saved:
        shared.load_state(saved["random"])
    work = dataclasses.replace(stage, load_components=_without_probes(stage)).begin(folder)
    if "work" in saved:
        work.load_state(saved["work"])
        shared.load_state(saved["random"])
    return work, copy.deepcopy(work.state())


def _without_probes(stage: RLStage) -> Any:
    """They would be looked at again, and written."""
    return lambda folder: dataclasses.replace(stage.load_components(folder), probes=())


def merged(now: Any, written: Any, changed: Any) -> Any:
    """The algorithm as it has adapted, with what the two configs have different."""
    if (
        isinstance(now, dict)
        and isinstance(changed, dict)
        and isinstance(written, dict)
        and now.keys() == changed.keys()
    ):
        return {key: merged(now[key], written[key], changed[key]) for key in now}
    return now if written == changed else changed


def _learner(work: StageRun) -> Learner:
    learner = work.stateful["learner"]
    assert isinstance(learner, Learner)
    return learner


def _weights(work: StageRun) -> Float[Tensor, "P"]:
    """The actor's, in one vector, on the CPU."""
    return torch.cat(
        [p.detach().flatten().float().cpu() for p in _learner(work).models.actor_parameters()]
    )


def differences(recorded: Mapping[str, float], again: Mapping[str, float]) -> list[str]:
    """Names of the metrics that are not the same to the bit."""
    return [name for name in recorded if recorded[name] != again.get(name)]


def cosine(a: Float[Tensor, "P"], b: Float[Tensor, "P"]) -> float:
    """Of the angle between two changes of the weights; 0 where one of them is none."""
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))
