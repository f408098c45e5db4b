"""From the config's tables to stages: one function per kind."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quartet.algorithms.preference import Kto
from quartet.assembly.assembler import Assembler, Comparisons
from quartet.assembly.components import load_components
from quartet.assembly.named import resolved_model
from quartet.config.tables import StageTraining
from quartet.data import DataError
from quartet.data.examples import Example, score_of
from quartet.data.sampler import Sampler
from quartet.data.shapes import Purpose
from quartet.distributed.sharding import GatheredWeights
from quartet.errors import PartError
from quartet.generation.protocol import Weights
from quartet.generation.source import Servers
from quartet.loops.held_out import Evaluating
from quartet.loops.preference import OnlinePairs
from quartet.loops.responses import Responses
from quartet.loops.rl import Loop, rl
from quartet.models.language_model import read_config
from quartet.models.precision import DTYPES
from quartet.models.q_heads import QHeads
from quartet.models.trunk import block_matrices
from quartet.parts import load_reference
from quartet.runs.rounds import in_round, round_of
from quartet.stages.custom import CustomStage
from quartet.stages.evaluation import EvaluationStage
from quartet.stages.ilql import IlqlStage
from quartet.stages.kinds import (
    CENTRING_PROMPTS,
    CUSTOM,
    EVALUATION,
    ILQL,
    LABEL,
    PREFERENCE,
    REWARD_MODEL,
    RL,
    SFT,
    kind_of,
    member_of,
)
from quartet.stages.label import LabelStage
from quartet.stages.preference import PreferenceStage
from quartet.stages.protocol import Stage
from quartet.stages.reward_model import RewardModelStage
from quartet.stages.rl import RLStage
from quartet.stages.sft import SftStage
from quartet.training.optim import Optimizer, OptimizerConfig

MEMBER_SEEDS = 1000
"""The distance between the seeds of an ensemble's members. It is not 1: runs with the seeds 0 and 1
would have all but one member in common."""


def stage(assembler: Assembler, name: str) -> Stage:
    """Return the stage that a recipe calls `name`. Raises KeyError for an unknown name."""
    kind = kind_of(name)
    if kind is None:
        raise KeyError(name)
    if kind in IN_ROUNDS and assembler.config.num_rounds > 1:
        assembler = assembler.in_round(round_of(name)[1])
    return STAGES[kind.name](assembler, name)


def sft_stage(assembler: Assembler, name: str) -> SftStage:
    """Return the stage of supervised fine-tuning."""
    settings, models, encoder = assembler.config.sft, assembler.models, assembler.encoder
    train, held_out = assembler.rows.read("demonstrations", settings.data)
    demonstrations = encoder.demonstrations(train)
    num_steps = _num_steps(assembler, name, settings, demonstrations)
    return SftStage(
        name=name,
        demonstrations=demonstrations,
        held_out=encoder.demonstrations(held_out),
        tokenizer=assembler.tokenizer,
        load_policy=lambda _: models.trainable_policy(None),
        optimizer=lambda model: _optimizer(model, settings, num_steps),
        num_steps=num_steps,
        batch_size=settings.batch_size,
        micro_batch_tokens=assembler.micro_batch_tokens,
        seed=assembler.config.seed,
        balance_coef=assembler.config.policy.router_aux_loss_coef,
        evaluating=_evaluating(settings),
        process_group=assembler.process_group,
    )


def reward_model_stage(assembler: Assembler, name: str) -> RewardModelStage:
    """Return the stage that trains a reward model, which may be a member of an ensemble."""
    settings, config, models = assembler.config.reward_model, assembler.config, assembler.models
    is_labelled, own, (_, number) = LABEL.name in config.recipe, assembler.round, member_of(name)
    comparisons = Comparisons((), (), (), None) if is_labelled else assembler.comparisons
    num_steps = _num_steps(assembler, name, settings, comparisons.train)
    title = in_round("reward model", own.number)
    if number is not None:
        title += f", member {number} of {settings.members}"
    return RewardModelStage(
        name=name,
        title=title,
        comparisons=comparisons.train,
        held_out=comparisons.held_out,
        shown=comparisons.shown,
        labelled=assembler.labelled if is_labelled else None,
        reader=models.text_reader,
        ceiling=comparisons.ceiling,
        prompts=assembler.prompts[0][:CENTRING_PROMPTS],
        sampling=config.rollout,
        tokenizer=assembler.tokenizer,
        load_models=lambda folder, seed: models.new_reward_model(folder, round_of(name)[0], seed),
        loss=settings.loss,
        optimizer=lambda model: _optimizer(model, settings, num_steps),
        num_steps=num_steps,
        batch_size=settings.batch_size,
        micro_batch_tokens=assembler.micro_batch_tokens,
        seed=config.seed + MEMBER_SEEDS * ((number or 1) - 1),
        balance_coef=assembler.config.policy.router_aux_loss_coef,
        evaluating=_evaluating(settings),
        process_group=assembler.process_group,
        round=own,
    )


def label_stage(assembler: Assembler, name: str) -> LabelStage:
    """Return the stage that waits for people's comparisons of the policy's answers."""
    settings, config = assembler.config.label, assembler.config
    earlier = None if settings.earlier is None else Path(settings.earlier)
    if earlier is not None and not earlier.exists():
        raise DataError(f"label.earlier = {earlier}: no such file or folder.")
    return LabelStage(
        name=name,
        prompts=assembler.prompts[0],
        num_pairs=settings.pairs,
        num_steps=settings.labels,
        earlier=earlier,
        simulated=settings.simulated,
        gold=assembler.rewards.context.gold,
        sampling=config.rollout,
        tokenizer=assembler.tokenizer,
        load_policy=assembler.models.initial_policy,
        seed=config.seed,
        round=assembler.round,
    )


def preference_stage(assembler: Assembler, name: str) -> PreferenceStage:
    """Return a stage of the DPO family. Online DPO samples its comparisons itself; the others read
    them from a file."""
    config, encoder = assembler.config, assembler.encoder
    settings = config.preference
    online = name == "online_dpo"
    purpose: Purpose = "preferences" if isinstance(settings.loss, Kto) else "comparisons"
    train, held_out = ([], []) if online else assembler.rows.read(purpose, settings.data)
    comparisons = encoder.comparisons(train) if train else []
    rows = assembler.prompts[0] if online else comparisons
    num_steps = _num_steps(assembler, name, settings, rows)
    return PreferenceStage(
        name=name,
        comparisons=comparisons,
        held_out=encoder.comparisons(held_out) if held_out else [],
        online=_online_pairs(assembler) if online else None,
        tokenizer=assembler.tokenizer,
        load_policy=assembler.models.trainable_policy,
        reference_of=assembler.models.reference_of,
        loss=settings.loss,
        optimizer=lambda model: _optimizer(model, settings, num_steps),
        num_steps=num_steps,
        batch_size=settings.batch_size,
        micro_batch_tokens=assembler.micro_batch_tokens,
        seed=assembler.config.seed,
        balance_coef=assembler.config.policy.router_aux_loss_coef,
        evaluating=_evaluating(settings),
        starts_at_reference=config.reference.model is None,
        process_group=assembler.process_group,
    )


def _online_pairs(assembler: Assembler) -> Callable[[Path, Any], OnlinePairs]:
    """Return a function that makes the source of the policy's own pairs."""
    config, prompts = assembler.config, assembler.prompts[0]
    responses = _responses(assembler)

    def pairs(folder: Path, model: Any) -> OnlinePairs:
        sampler = Sampler(prompts, config.preference.batch_size, config.seed)
        return OnlinePairs(sampler, responses(folder, model))

    return pairs


def ilql_stage(assembler: Assembler, name: str) -> IlqlStage:
    """Return the stage of offline Q-learning. Raises DataError for rows without a score."""
    settings, encoder = assembler.config.ilql, assembler.encoder
    rows, held_out = (
        encoder.demonstrations(_scored(assembler, settings.data, part))
        for part in assembler.rows.read("demonstrations", settings.data)
    )
    num_steps = _num_steps(assembler, name, settings, rows)

    def optimizer(model: Any, heads: QHeads) -> Optimizer:
        parameters = [p for each in (model, heads) for p in each.parameters() if p.requires_grad]
        return Optimizer(parameters, settings, num_steps, block_matrices(model))

    return IlqlStage(
        name=name,
        rows=rows,
        held_out=held_out,
        tokenizer=assembler.tokenizer,
        load_policy=assembler.models.trainable_policy,
        loss=settings.loss,
        beta=settings.beta,
        optimizer=optimizer,
        num_steps=num_steps,
        batch_size=settings.batch_size,
        micro_batch_tokens=assembler.micro_batch_tokens,
        seed=assembler.config.seed,
        balance_coef=assembler.config.policy.router_aux_loss_coef,
        evaluating=_evaluating(settings),
        process_group=assembler.process_group,
    )


def _scored(assembler: Assembler, file: str | None, rows: Sequence[Example]) -> Sequence[Example]:
    """Return rows that all have a score; those of a world are scored by its gold reward."""
    if file is None and assembler.world is not None:
        gold = assembler.world.gold
        return [
            replace(row, extra={**row.extra, "score": gold(str(row.prompt), str(row.completion))})
            for row in rows
        ]
    for row in rows:
        if score_of(row) is None:
            raise DataError(
                f"{row.id}: has no number in a column score, and no label. ilql learns from rows "
                'with a score: name its column, such as data.columns = { score = "reward" }.'
            )
    return rows


def custom_stage(assembler: Assembler, name: str) -> CustomStage:
    """Return the stage that the user has written."""
    config, encoder, source = assembler.config, assembler.encoder, assembler.config.stage_source
    assert source is not None
    rows: Sequence[Any]
    if source.reads == "prompts":
        rows = assembler.prompts[0]
    elif source.reads == "demonstrations":
        rows = encoder.demonstrations(assembler.rows.read("demonstrations")[0])
    else:
        rows = encoder.comparisons(assembler.rows.read("comparisons")[0])
    return CustomStage(
        name=name,
        source=source,
        rows=rows,
        tokenizer=assembler.tokenizer,
        load_policy=assembler.models.trainable_policy,
        reference_of=assembler.models.reference_of,
        responses=_responses(assembler) if source.reads == "prompts" else None,
        optimizer=lambda model, steps: _optimizer(model, source, steps),
        micro_batch_tokens=assembler.micro_batch_tokens,
        seed=config.seed,
        balance_coef=config.policy.router_aux_loss_coef,
        process_group=assembler.process_group,
    )


def _responses(assembler: Assembler) -> Callable[[Path, Any], Responses]:
    """Return a function that makes what samples the policy's own responses, and scores them."""
    config, group = assembler.config, assembler.process_group

    def responses(folder: Path, model: Any) -> Responses:
        sampled = assembler.models.sampled_policy(model, folder)
        is_copy = sampled is not model
        generator = assembler.generators.in_process(sampled, group, copied=is_copy)
        rewards = assembler.weighted_rewards(folder, process_group=group)
        weights = (lambda: Weights(0, GatheredWeights(model))) if is_copy else None
        return Responses(generator, config.rollout, rewards, weights)

    return responses


def rl_stage(assembler: Assembler, name: str) -> RLStage:
    """Return the RL stage."""
    config, own = assembler.config, assembler.round
    assert config.algorithm is not None
    return RLStage(
        name=name,
        prompts=assembler.prompts[0],
        tokenizer=assembler.tokenizer,
        load_components=lambda folder: load_components(assembler, folder),
        algorithm=config.algorithm,
        sampling=config.rollout,
        samples_per_prompt=config.rollout.samples_per_prompt,
        prompts_per_step=config.rollout.prompts_per_step,
        num_steps=config.run.steps * own.number,
        seed=config.seed,
        prompt_sampling=config.data.sampling,
        staleness=config.staleness,
        rounding=_rounding(assembler),
        starts_at_reference=config.reference.model is None and own.number == 1,
        loop=rl if config.run.loop is None else _own_loop(config.run.loop),
        first_step=config.run.steps * (own.number - 1),
        round=own,
    )


def _own_loop(reference: str) -> Loop:
    """Return the user's loop. Raises `PartError` where there is none of this name."""
    if ":" not in reference:
        raise PartError(f'run.loop = "{reference}": write file.py:name, or package.module:name.')
    try:
        loop = load_reference(reference)
    except ValueError as error:
        raise PartError(f'run.loop = "{reference}": {error}.') from None
    if not callable(loop):
        raise PartError(
            f'run.loop = "{reference}": is of type {type(loop).__name__}, and no function.'
        )
    own: Loop = loop
    return own


def _rounding(assembler: Assembler) -> str:
    """Return what samples in the RL stage, and what the learner computes in."""
    in_bf16 = assembler.models.dtype("policy") == DTYPES["bf16"]
    if isinstance(assembler.config.generator, Servers):
        return "engine, bf16" if in_bf16 else "engine"
    return "bf16" if in_bf16 else "fp32"


def evaluation_stage(assembler: Assembler, name: str) -> EvaluationStage:
    """Return the evaluation. The best-of-n curve needs hundreds of scores, so there is none where
    an LLM judge would be paid for them."""
    settings, models = assembler.config.evaluation, assembler.models
    policy = resolved_model("evaluation.policy", settings.policy)
    if policy is not None:
        read_config(policy)  # raises ModelError, before the other policy has answered
    return EvaluationStage(
        name=name,
        prompts=assembler.prompts[1][: settings.prompts],
        tokenizer=assembler.tokenizer,
        load_before=lambda folder: models.frozen_policy(models.initial_policy(folder)),
        load_after=lambda folder: models.trained_policy(policy or folder / "policy"),
        rewards=assembler.weighted_rewards,
        gold=assembler.rewards.context.gold,
        sampling=assembler.config.rollout,
        micro_batch_tokens=assembler.scoring_tokens,
        generator=assembler.generators.for_evaluation,
        best_of=0 if assembler.has_llm_judge else settings.best_of,
        process_group=assembler.process_group,
    )


STAGES: dict[str, Callable[[Assembler, str], Stage]] = {
    SFT.name: sft_stage,
    LABEL.name: label_stage,
    REWARD_MODEL.name: reward_model_stage,
    PREFERENCE.name: preference_stage,
    ILQL.name: ilql_stage,
    CUSTOM.name: custom_stage,
    RL.name: rl_stage,
    EVALUATION.name: evaluation_stage,
}
"""What makes a stage, by its kind."""
IN_ROUNDS = (LABEL, REWARD_MODEL, RL)
"""The kinds that a recipe of several rounds has in each of them."""


def _num_steps(
    assembler: Assembler, name: str, settings: StageTraining, rows: Sequence[Any]
) -> int:
    """Return the optimizer steps of a stage that trains on these rows. How many they are is noted
    for the user where they come from epochs."""
    num_steps = settings.num_steps(len(rows))
    if settings.epochs is not None:
        assembler.lengths.append(
            f"{name}: {settings.epochs:g} epoch{'s' * (settings.epochs != 1)} of {len(rows):,} "
            f"rows = {num_steps:,} steps of {settings.batch_size:,}"
        )
    return num_steps


def _evaluating(settings: StageTraining) -> Evaluating:
    return Evaluating(settings.eval_every, settings.keep == "best", settings.patience)


def _optimizer(model: Any, settings: OptimizerConfig, num_steps: int) -> Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return Optimizer(parameters, settings, num_steps, block_matrices(model))
