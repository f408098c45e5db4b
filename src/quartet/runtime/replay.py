"""Replay of one update of a run: with the same settings, to the bit, or with settings changed."""

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
from quartet.stages.rounds import ONLY_ROUND
from quartet.tensors import Bool, Float, Tensor
from quartet.training.checkpoint import Checkpoint, misfit
from quartet.training.checkpoints import Checkpoints
from quartet.training.learner import Learner
from quartet.training.metrics import rl_metrics
from quartet.training.random_state import GlobalRandom
from quartet.training.state_tree import Tree
from quartet.training.update import Update


class CannotReplay(QuartetError, ValueError):
    """An update that cannot be computed again. The message says why, and what to do."""


@dataclass(frozen=True)
class Outcome:
    """The effect of one update."""

    metrics: Mapping[str, float]
    clipped: Bool[Tensor, "B T"]
    """True for each token whose ratio was clipped."""
    tokens: int
    """The number of response tokens."""
    kl_after: float
    """KL(π_old ‖ π) after the update: the mean of the k3 estimator over the response tokens."""
    weight_change: Float[Tensor, "P"]
    """The change of the actor's weights, in one vector."""


def checkpoint_before(folder: Path, stage: str, step: int) -> Checkpoint:
    """Return the newest checkpoint of the stage that was written before the step. The steps between
    the two have to be computed again. Raises `CannotReplay` if there is none."""
    for _, checkpoint in Checkpoints(folder / "checkpoints", {stage: 0}).usable(misfit):
        if isinstance(checkpoint, Checkpoint) and checkpoint.facts["step"] < step:
            return checkpoint
    raise CannotReplay(
        f"{folder.name}: has no checkpoint before step {step:,} of {stage}. A run deletes old "
        "checkpoints: raise run.keep_last to keep more of them."
    )


def replay(
    stage: RLStage,
    folder: Path,
    since: Checkpoint,
    step: int,
    changed: RLStage | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> tuple[Outcome, Outcome | None]:
    """Compute the update of a step again, starting from the checkpoint `since`.

    If a `changed` stage is given, the second outcome is that of its update, computed from the same
    weights and the same rollouts. `on_step` is called with each step on the way. Nothing is written
    to the run folder.
    """
    run, state_before = _restored(stage, folder, since)
    weights_before = _weights(run)
    for replayed in cast(Iterator[Step], run.steps(since.facts["step"])):
        if on_step is not None:
            on_step(replayed)
        if replayed.number == step:
            break
        state_before, weights_before = run.copy_state(), _weights(run)
    outcome = _outcome(run, replayed.metrics, replayed.update, replayed.experience, weights_before)
    if changed is None:
        return outcome, None
    rollouts = replayed.rollouts
    del run, replayed  # two learners at once might not fit into memory
    return outcome, _changed_outcome(changed, stage.algorithm, folder, state_before, rollouts)


def _outcome(
    run: StageRun,
    metrics: Mapping[str, float],
    update: Update,
    experience: Experience,
    weights_before: Tensor,
) -> Outcome:
    """Return the outcome of an update. `weights_before` are the actor's, before the update."""
    tokens, kl = int(experience.response_mask.sum()), _learner(run).kl_since(experience)
    return Outcome(metrics, update.clipped, tokens, kl, _weights(run) - weights_before)


def models_at(stage: Stage, folder: Path, checkpoint: Checkpoint, scratch: Path) -> None:
    """Write to the folder `scratch` the models that the stage would have written if it had ended at
    this checkpoint. `folder` is the run's, which is only read."""
    place = getattr(stage, "round", ONLY_ROUND).folder(scratch)
    for path in (folder / "sft", *sorted(folder.glob("reward_model*")), *folder.glob("round-*")):
        if path.is_dir():
            (scratch / path.name).symlink_to(path.resolve())
    for name in ("events.jsonl", "config.resolved.toml"):
        shutil.copyfile(folder / name, scratch / name)
    run = stage.begin(scratch)
    run.load_state(checkpoint.state()["work"])
    for link in scratch.iterdir():
        if link.is_symlink():  # the stage has read it, and must not write through it to the run
            link.unlink()
    run.finish()
    if place != scratch:  # that of an earlier round
        for path in place.iterdir():
            path.rename(scratch / path.name)
        place.rmdir()


def _changed_outcome(
    changed: RLStage,
    configured: Algorithm,
    folder: Path,
    state: Tree,
    rollouts: Sequence[Rollout],
) -> Outcome:
    """Return the outcome of an update with another algorithm or optimizer. `configured` is the
    original algorithm as the config has it, `state` the stage's before the step."""
    run = dataclasses.replace(changed, writes_probes=False).begin(folder)
    original, other = dataclasses.asdict(configured), dataclasses.asdict(changed.algorithm)
    run.load_state({**state, "algorithm": merged(state["algorithm"], original, other)})
    algorithm_state, learner = run.stateful["algorithm"], _learner(run)
    assert isinstance(algorithm_state, AlgorithmState)
    algorithm, weights = algorithm_state.now, _weights(run)
    batch = learner.score(rollouts, algorithm)
    experience = algorithm.experience(batch)
    update = learner.update(experience, algorithm)
    metrics = rl_metrics(rollouts, 0.0, batch, experience, update, algorithm)
    return _outcome(run, metrics, update, experience, weights)


def _restored(stage: RLStage, folder: Path, checkpoint: Checkpoint) -> tuple[StageRun, Tree]:
    """Return the stage as it was when the checkpoint was written, and a copy of its state."""
    state, random = checkpoint.state(), GlobalRandom()
    has_stage_state = "work" in state  # not at step 0, before which only random numbers are drawn
    if not has_stage_state:
        random.load_state(state["random"])
    run = dataclasses.replace(stage, writes_probes=False).begin(folder)
    if has_stage_state:
        run.load_state(state["work"])
        random.load_state(state["random"])
    return run, run.copy_state()


def merged(adapted: Any, configured: Any, changed: Any) -> Any:
    """Return the state of an algorithm with some settings changed.

    `adapted` is the state as it is at the step, with coefficients that have adapted; `configured`
    and `changed` are the algorithm by the original and by the changed config. A value that is equal
    in both configs stays as it had adapted; any other comes from `changed`.
    """
    if (
        isinstance(adapted, dict)
        and isinstance(changed, dict)
        and isinstance(configured, dict)
        and adapted.keys() == changed.keys()
    ):
        return {key: merged(adapted[key], configured[key], changed[key]) for key in adapted}
    return adapted if configured == changed else changed


def _learner(run: StageRun) -> Learner:
    learner = run.stateful["learner"]
    assert isinstance(learner, Learner)
    return learner


def _weights(run: StageRun) -> Float[Tensor, "P"]:
    """Return a copy of the actor's weights, in one vector on the CPU."""
    parameters = _learner(run).models.actor_parameters()
    return torch.cat([p.detach().flatten().float().cpu() for p in parameters])


def differences(recorded: Mapping[str, float], replayed: Mapping[str, float]) -> list[str]:
    """Return the names of the recorded metrics that are not the same to the bit."""
    return [name for name in recorded if recorded[name] != replayed.get(name)]


def cosine(a: Float[Tensor, "P"], b: Float[Tensor, "P"]) -> float:
    """Return the cosine of the angle between two weight changes; 0 if one of them is zero."""
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))
