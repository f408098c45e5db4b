"""The stage that a user has written."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartet.data.sampler import Sampler
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.loops.custom import StageContext, custom
from quartet.loops.progress import Progress
from quartet.loops.responses import Responses
from quartet.loops.source import StageSource
from quartet.models.language_model import save
from quartet.models.protocols import Tokenizer
from quartet.stages.protocol import StageRun, Summary
from quartet.training.budget import Budget
from quartet.training.checksum import ReferenceChecksum
from quartet.training.optim import Optimizer
from quartet.training.state_tree import Stateful


@dataclass(frozen=True)
class CustomStage:
    """Trains a policy as a `StageSource` says, and writes it to `policy/`."""

    source: StageSource
    rows: Sequence[Any]
    """What the source reads: prompts, demonstrations or comparisons."""
    tokenizer: Tokenizer
    load_policy: Callable[[Path], Any]
    reference_of: Callable[[Any, Path], Any]
    """Returns the frozen reference of the policy that the stage starts from."""
    responses: Callable[[Path, Any], Responses] | None
    """Returns what samples from the policy; None where the stage samples nothing."""
    optimizer: Callable[[Any, int], Optimizer]
    """Returns the optimizer of a model, for a number of optimizer steps."""
    micro_batch_tokens: int
    seed: int
    balance_coef: float = 0.0
    """What multiplies the load-balancing loss of a mixture of experts."""
    name: str = "custom"
    process_group: ProcessGroup = SINGLE_PROCESS

    @property
    def title(self) -> str:
        """The name of the source's class."""
        return type(self.source).__name__

    @property
    def samples(self) -> bool:
        """Whether its steps have rollouts."""
        return self.responses is not None

    @property
    def num_steps(self) -> int:
        return self.source.steps

    def begin(self, folder: Path) -> StageRun:
        policy = self.load_policy(folder)
        reference = self.reference_of(policy, folder) if self.source.needs_reference else None
        optimizer = self.optimizer(policy, self.source.steps * self.source.updates)
        budget = Budget(self.micro_batch_tokens, self.process_group)
        context = StageContext(
            self.source,
            policy,
            reference,
            self.tokenizer,
            Sampler(self.rows, self.source.batch_size, self.seed),
            None if self.responses is None else self.responses(folder, policy),
            optimizer,
            budget,
            self.balance_coef,
        )

        def steps(done: int) -> Iterator[Progress]:
            return custom(context, self.num_steps, done)

        def finish() -> Summary:
            save(policy, self.tokenizer, folder / "policy", self.process_group)
            return {}

        stateful: dict[str, Stateful] = {
            "reference": ReferenceChecksum(reference, self.process_group),
            "optimizer": optimizer,
            "context": context,
            "budget": budget,
        }
        return StageRun(steps, finish, stateful, [optimizer], budget)
