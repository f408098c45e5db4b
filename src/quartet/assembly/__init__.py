"""From a config to objects: the one folder that knows every implementation."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from quartet.assembly.assembler import Assembler
from quartet.assembly.data import fingerprints
from quartet.assembly.stages import stage
from quartet.config.tables import Config, json_ready
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.runtime.job import Job
from quartet.stages.kinds import kind_of
from quartet.training.random_state import GlobalRandom

__all__ = ["Assembler", "build", "stage"]


def build(
    config: Config,
    fault: str | None = None,
    process_group: ProcessGroup = SINGLE_PROCESS,
    objects: Mapping[str, Any] = MappingProxyType({}),
) -> Job:
    """Read and check the data, and make the stages of a run.

    Models are loaded when their stage begins; what they are loaded from is checked now. `fault` is
    a mistake to plant in the RL stage (`runtime/faults.py`), `process_group` the ranks of the run,
    `objects` the rewards that were given as Python objects, by name.
    """
    GlobalRandom().seed(config.seed)
    assembler = Assembler(config, fault, process_group, objects)
    stages = [stage(assembler, name) for name in config.stages]
    rollout = dataclasses.replace(config.rollout, staleness=config.staleness)
    run = dataclasses.replace(config.run, precision=assembler.models.chosen_precision())
    lengths: dict[str, Any] = {
        table: dataclasses.replace(settings, steps=one.num_steps, epochs=None)
        for table, settings in config.stage_trainings()
        for one in stages
        if (kind := kind_of(one.name)) is not None and kind.optim == table
    }
    complete = dataclasses.replace(config, rollout=rollout, run=run, **lengths)
    made_with = {
        "config": json_ready(complete),
        "data": fingerprints(config),
        "fault": fault,
    }
    return Job(
        stages,
        assembler.tokenizer,
        assembler.notes(),
        complete,
        made_with,
        assembler.device,
        assembler.models.precision(),
        process_group,
    )
