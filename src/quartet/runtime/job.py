"""A run that is ready to start: its stages and what they were made from."""

from dataclasses import dataclass
from typing import Any

import torch

from quartet.config.run import RunConfig
from quartet.config.tables import Config
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.models.protocols import Tokenizer
from quartet.runtime.saving import Saving
from quartet.stages.protocol import Stage


@dataclass(frozen=True)
class Job:
    """A run that is ready to start. No model has been loaded and no file written."""

    stages: list[Stage]
    tokenizer: Tokenizer
    notes: list[str]
    """Sentences about what the user should know before it starts."""
    config: Config
    """The config, with what is chosen for this machine and these rows: its precision, and the steps
    that epochs are."""
    made_with: dict[str, Any]
    """The config, fingerprints of the data, and the planted fault: what a resumed run must have in
    common with this one."""
    device: torch.device
    """Where the models are."""
    precision: str = "fp32"
    """What the policy computes in, for the reader."""
    process_group: ProcessGroup = SINGLE_PROCESS

    def saving(self, run: RunConfig) -> Saving:
        """Return what is written down, and how often, by the config's [run] table."""
        return Saving(
            run.rollouts_every,
            run.checkpoint_every,
            run.keep_last,
            run.keep_best,
            run.rollbacks,
            self.made_with,
            run.metrics,
        )
