"""The audit of a run's critic: the models of a checkpoint, and the file of results."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from quartet.assembly.assembler import Assembler
from quartet.assembly.checkpoint_models import CONFIG, NoCheckpoint, checkpoint_path
from quartet.assembly.components import load_components
from quartet.assembly.stages import stage as stage_of
from quartet.config.tables import Config
from quartet.config.toml import read_settings
from quartet.errors import QuartetError
from quartet.evaluation.critic_numbers import audit_numbers
from quartet.evaluation.critic_samples import (
    CANDIDATES,
    Audited,
    AuditSizes,
    Report,
    sample,
)
from quartet.experience import Batch, Prompt, Rollout
from quartet.files import replace
from quartet.generation.native import NativeGenerator
from quartet.generation.source import Native
from quartet.rewards.protocol import Weighted, rewarded
from quartet.runs.critic_audits import FOLDER
from quartet.runs.rounds import in_round
from quartet.stages.rl import AlgorithmState, RLComponents, RLStage
from quartet.training.checkpoint import Checkpoint, DamagedCheckpoint, read_checkpoint

FORMAT = 1


class CannotAudit(QuartetError, ValueError):
    """A run whose critic cannot be audited. The message is a sentence for the user."""


def audit_critic(
    run: Path,
    step: int | None,
    num_prompts: int,
    sizes: AuditSizes,
    report: Report,
    objects: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Path, dict[str, Any]]:
    """Compare the critic of a run with Monte Carlo returns, at the checkpoint of a step or at the
    newest one. Return the file of results, which is written into the run's folder, and the results.
    `objects` are the rewards that the run was given as Python objects, by name.

    Nothing else in the folder changes. Raises a QuartetError if the run has no critic, no
    checkpoint or no held-out prompts, or if continuations cannot be sampled or scored here.
    """
    config = read_settings(run / CONFIG).config
    _check(run, config)
    path = _checkpoint(run, config, step)
    try:
        checkpoint = read_checkpoint(path)
    except DamagedCheckpoint as error:
        raise NoCheckpoint(f"{path}: {error}.") from None
    assembler = Assembler(config, checkpoint.facts["fault"], objects=objects)
    _check_rewards(run, assembler)
    held_out = assembler.prompts[1]
    if not held_out:
        raise CannotAudit(
            f"{run.name}: has held out no prompts. The audit samples on prompts that the critic "
            "was not trained on: train with data.eval, or with more rows."
        )
    report(f"loading {path.name}")
    audited = _audited(assembler, run, checkpoint)
    prompts = _chosen(held_out, num_prompts)
    samples = sample(audited, prompts, sizes, report)
    if len({state.prompt for state in samples.states}) < 2:
        raise CannotAudit(
            f"{run.name}: the reward scored answers to fewer than two prompts, so there is nothing "
            "to compare the critic with. See run.log for what the reward said."
        )
    stage, _, number = path.name.rpartition("-")
    advantage = audited.algorithm.advantage
    result = {
        "format": FORMAT,
        "stage": stage,
        "step": int(number),
        "seed": sizes.seed,
        "prefixes": sizes.prefixes,
        "continuations": sizes.continuations,
        "candidates": CANDIDATES,
        "compared": compared(audited),
        "gamma": samples.gamma,
        "lam": getattr(advantage, "lam", None),
        **audit_numbers(samples),
    }
    file = run / FOLDER / f"{path.name}.json"
    file.parent.mkdir(exist_ok=True)
    replace(file, json.dumps(result, indent=1, allow_nan=False) + "\n")
    return file, result


def _check(run: Path, config: Config) -> None:
    """Raise CannotAudit for a run whose settings rule an audit out."""
    if config.rl_stage is None or config.algorithm is None:
        raise CannotAudit(f"{run.name}: has no RL stage, so it has no critic.")
    if not config.algorithm.needs_critic:
        raise CannotAudit(
            f"{run.name}: {config.rl_stage} trains no critic (algorithm.advantage.type = "
            f'"{config.algorithm.advantage.type}"). Runs of ppo and its relatives have one.'
        )
    if not isinstance(config.generator, Native):
        raise CannotAudit(
            f'{run.name}: samples with generator.type = "{config.generator.type}". The audit goes '
            "on from the middle of responses, which it can only do with the native generator."
        )


def _checkpoint(run: Path, config: Config, step: int | None) -> Path:
    """Return the checkpoint of a step of the RL stage; the newest if no step is named."""
    stage = _last_rl_stage(config)
    name = None if step is None else f"{stage}-{step:06d}"
    own = sorted((run / "checkpoints").glob(f"{stage}-[0-9]*"))
    newest = next((p.name for p in reversed(own) if not p.name.endswith("-000000")), None)
    if name is None and newest is None:
        raise CannotAudit(
            f"{run.name}: has no checkpoint of {stage}, so there is no critic to load. "
            "Checkpoints are written by run.checkpoint_every and at the end of a stage."
        )
    return checkpoint_path(run, name or str(newest))


def _last_rl_stage(config: Config) -> str:
    """Return the RL stage of the last round."""
    return in_round(str(config.rl_stage), config.num_rounds)


def _check_rewards(run: Path, assembler: Assembler) -> None:
    """Raise CannotAudit where continuations of a response cannot be sampled or scored here."""
    if assembler.generators.environment is not None:
        raise CannotAudit(
            f"{run.name}: is a run with an environment. The audit cannot bring an environment into "
            "the state in the middle of an episode."
        )
    if assembler.has_llm_judge:
        raise CannotAudit(
            f"{run.name}: its reward asks an LLM judge, which would have to score every "
            "continuation. The audit is for rewards that this machine computes."
        )


def _audited(assembler: Assembler, run: Path, checkpoint: Checkpoint) -> Audited:
    """Return the models of the checkpoint, with which nothing is trained and nothing written."""
    parts: list[RLComponents] = []

    def load(folder: Path) -> RLComponents:
        parts.append(load_components(assembler, folder))
        return parts[0]

    stage = dataclasses.replace(
        cast(RLStage, stage_of(assembler, _last_rl_stage(assembler.config))), load_components=load
    )
    stage_run = stage.begin(run)
    stage_run.load_state(checkpoint.state()["work"])
    [components] = parts
    state = stage_run.stateful["algorithm"]
    assert isinstance(state, AlgorithmState)
    return audited_from(components, state, assembler)


def audited_from(components: RLComponents, state: AlgorithmState, assembler: Assembler) -> Audited:
    learner, algorithm = components.learner, state.now
    generator = assembler.generators.in_process(learner.models.actor)
    assert isinstance(generator, NativeGenerator)
    counted = [Weighted(w.reward, w.weight) for w in components.rewards if w.weight != 0]

    def score(rollouts: Sequence[Rollout]) -> Batch:
        # Version −1 is never current, so the learner computes all log-probs itself.
        old = [dataclasses.replace(rollout, policy_version=-1) for rollout in rollouts]
        return learner.score(old, algorithm)

    return Audited(
        generator,
        learner.sampling,
        score,
        partial(rewarded, rewards=counted, per_token=algorithm.needs_token_scores),
        algorithm,
    )


def _chosen(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Return `count` prompts at equal distances, or all if there are fewer."""
    if count >= len(prompts):
        return list(prompts)
    return [prompts[i * len(prompts) // count] for i in range(count)]


def compared(audited: Audited) -> list[str]:
    """Return what a return is made of in this run, a phrase for each part."""
    algorithm = audited.algorithm
    phrases = [f"the score of the reward, given to tokens by {algorithm.rewards.type}"]
    phrases += [f"shaped by {shape.type}" for shape in algorithm.scores]
    coef = algorithm.kl.coefficients().get("kl/coef")
    if coef and algorithm.kl.type != "in_loss":
        phrases.append(f"a KL penalty of {coef:.3g} per nat at every token")
    if algorithm.rewards.whiten:
        phrases.append("rewards whitened by the moments of the answers to the prompts")
    if algorithm.needs_final_values:
        phrases.append("the critic's own value after a response that was cut off")
    return phrases
