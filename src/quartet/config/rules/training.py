"""Rules about the length of stages, their evaluations and their optimizers."""

from quartet.config.rules.base import rule
from quartet.config.tables import Config
from quartet.training.optimizer_types import TYPES


@rule
def length_is_given_once(config: Config) -> str | None:
    for table, settings in config.stage_trainings():
        if settings.steps is not None and settings.epochs is not None:
            return (
                f"{table}.epochs = {settings.epochs:g}: {table}.steps = {settings.steps} is there "
                "already. Take one of the two out."
            )
    return None


@rule
def choosing_needs_evaluations(config: Config) -> str | None:
    for table, settings in config.stage_trainings():
        if settings.eval_every:
            continue
        if settings.keep == "best":
            return f'{table}.keep = "best": chooses among evaluations. Set {table}.eval_every.'
        if settings.patience:
            return (
                f"{table}.patience = {settings.patience}: counts evaluations. Set "
                f"{table}.eval_every."
            )
    return None


@rule
def evaluations_need_held_out_rows(config: Config) -> str | None:
    every = config.preference.eval_every
    if not config.has_online_pairs or not every:
        return None
    return (
        f"preference.eval_every = {every}: online_dpo compares its own answers, and has no "
        "held-out comparisons. Take it out."
    )


@rule
def warmup_is_given_once(config: Config) -> str | None:
    for table, settings in config.optimizers():
        if settings.warmup_steps and settings.warmup_ratio:
            return (
                f"{table}.warmup_ratio = {settings.warmup_ratio:g}: {table}.warmup_steps = "
                f"{settings.warmup_steps} is there already. Set one of the two to 0."
            )
    return None


@rule
def constant_rate_falls_to_nothing(config: Config) -> str | None:
    for table, settings in config.optimizers():
        if settings.schedule == "constant" and settings.min_lr_ratio:
            return (
                f"{table}.min_lr_ratio = {settings.min_lr_ratio:g}: is where a falling rate ends, "
                f'and {table}.schedule = "constant". Use "linear" or "cosine", or take it out.'
            )
    return None


@rule
def moments_in_parts_need_a_type_that_takes_them(config: Config) -> str | None:
    whole = [
        (table, settings.optimizer)
        for table, settings in config.optimizers()
        if not TYPES[settings.optimizer].takes_sharded
    ]
    if not config.launch.shard or not whole:
        return None
    table, name = whole[0]
    return (
        f'{table}.optimizer = "{name}": does not step weights that launch.shard holds in parts. '
        'Use "adamw" or "muon", or launch.shard = false.'
    )


@rule
def adapters_need_a_type_that_takes_them(config: Config) -> str | None:
    for table, settings in config.optimizers():
        if config.policy.adapter is not None and not TYPES[settings.optimizer].takes_adapters:
            return (
                f'{table}.optimizer = "{settings.optimizer}": the thin matrices of policy.adapter '
                'learn more slowly under it. Use "adamw" or "adamw_8bit".'
            )
    return None
