"""The stage that learns from comparisons directly: the DPO family."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartet.algorithms.preference import PreferenceLoss
from quartet.data.records import Comparison
from quartet.data.sampler import Sampler
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.io.activity import activity
from quartet.loops.held_out import NOT_EVALUATED, Evaluating, HeldOut
from quartet.loops.preference import ComparisonSource, held_out_preference, preference
from quartet.loops.progress import Progress
from quartet.models.language_model import save
from quartet.models.protocols import Tokenizer
from quartet.stages.pair_facts import pair_facts
from quartet.stages.protocol import StageRun, Summary
from quartet.training.budget import Budget
from quartet.training.checksum import ReferenceChecksum
from quartet.training.optim import Optimizer
from quartet.training.state_tree import Stateful


@dataclass(frozen=True)
class PreferenceStage:
    """Trains a policy on comparisons and writes it to `policy/`.

    The comparisons are those of a file or, with `online`, of pairs that the policy samples itself.
    """

    name: str
    comparisons: Sequence[Comparison]
    held_out: Sequence[Comparison]
    online: Callable[[Path, Any], ComparisonSource] | None
    tokenizer: Tokenizer
    load_policy: Callable[[Path], Any]
    reference_of: Callable[[Any, Path], Any]
    """Returns the frozen reference of the policy that the stage starts from."""
    loss: PreferenceLoss
    optimizer: Callable[[Any], Optimizer]
    num_steps: int
    batch_size: int
    micro_batch_tokens: int
    seed: int
    balance_coef: float = 0.0
    """What multiplies the load-balancing loss of a mixture of experts."""
    evaluating: Evaluating = NOT_EVALUATED
    starts_at_reference: bool = True
    """Whether the reference is the model that the stage starts from."""
    process_group: ProcessGroup = SINGLE_PROCESS

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")

    @property
    def samples(self) -> bool:
        """Whether its steps have rollouts."""
        return self.online is not None

    def begin(self, folder: Path) -> StageRun:
        model = self.load_policy(folder)
        if self.online is not None:
            source = self.online(folder, model)
        else:
            source = Sampler(self.comparisons, self.batch_size, self.seed)
        reference = self.reference_of(model, folder) if self.loss.needs_reference else None

        def evaluate() -> dict[str, float]:
            with activity("held-out pairs"):
                return held_out_preference(
                    model,
                    reference,
                    self.held_out,
                    self.loss,
                    self.micro_batch_tokens,
                    self.process_group,
                )

        optimizer, budget = (
            self.optimizer(model),
            Budget(self.micro_batch_tokens, self.process_group),
        )

        held_out = HeldOut(self.evaluating, self.num_steps, optimizer.parameters, evaluate)

        def steps(done: int) -> Iterator[Progress]:
            if done == 0 and self.held_out:
                held_out.before = evaluate()
            return held_out.during(
                preference(
                    model,
                    reference,
                    source,
                    self.loss,
                    optimizer,
                    self.num_steps,
                    budget,
                    done,
                    self.balance_coef,
                )
            )

        def finish() -> Summary:
            held_out.restore_best()
            save(model, self.tokenizer, folder / "policy", self.process_group)
            if not self.held_out:
                return {}
            return {
                **held_out.numbers(evaluate()),
                **pair_facts(self.held_out),
                **held_out.summary(),
            }

        stateful: dict[str, Stateful] = {
            "reference": ReferenceChecksum(reference, self.process_group),
            "optimizer": optimizer,
            "source": source,
            "budget": budget,
            "held_out": held_out,
        }
        return StageRun(steps, finish, stateful, [optimizer], budget)
