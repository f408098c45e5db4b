"""The stage of supervised fine-tuning."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartet.data.records import Demonstration
from quartet.data.sampler import Sampler
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.io.activity import activity
from quartet.loops.held_out import NOT_EVALUATED, Evaluating, HeldOut
from quartet.loops.progress import Progress
from quartet.loops.sft import held_out_loss, sft
from quartet.models.language_model import save
from quartet.models.protocols import Tokenizer
from quartet.stages.protocol import StageRun, Summary
from quartet.training.budget import Budget
from quartet.training.optim import Optimizer
from quartet.training.state_tree import Stateful


@dataclass(frozen=True)
class SftStage:
    """Trains a policy on demonstrations and writes it to `sft/`."""

    demonstrations: Sequence[Demonstration]
    held_out: Sequence[Demonstration]
    tokenizer: Tokenizer
    load_policy: Callable[[Path], Any]
    optimizer: Callable[[Any], Optimizer]
    num_steps: int
    batch_size: int
    micro_batch_tokens: int
    seed: int
    balance_coef: float = 0.0
    """What multiplies the load-balancing loss of a mixture of experts."""
    evaluating: Evaluating = NOT_EVALUATED
    name: str = "sft"
    title: str = "sft"
    process_group: ProcessGroup = SINGLE_PROCESS

    def begin(self, folder: Path) -> StageRun:
        model = self.load_policy(folder)
        sampler = Sampler(self.demonstrations, self.batch_size, self.seed)
        optimizer = self.optimizer(model)
        budget = Budget(self.micro_batch_tokens, self.process_group)

        def evaluate() -> dict[str, float]:
            with activity("held-out texts"):
                loss = held_out_loss(
                    model, self.held_out, self.micro_batch_tokens, self.process_group
                )
            return {"loss": loss}

        held_out = HeldOut(self.evaluating, self.num_steps, optimizer.parameters, evaluate)

        def steps(done: int) -> Iterator[Progress]:
            if done == 0:
                held_out.before = evaluate()
            return held_out.during(
                sft(
                    model,
                    sampler,
                    optimizer,
                    self.num_steps,
                    budget,
                    done,
                    self.balance_coef,
                )
            )

        def finish() -> Summary:
            held_out.restore_best()
            save(model, self.tokenizer, folder / "sft", self.process_group)
            return held_out.numbers(evaluate()) | held_out.summary()

        stateful: dict[str, Stateful] = {
            "optimizer": optimizer,
            "sampler": sampler,
            "budget": budget,
            "held_out": held_out,
        }
        return StageRun(steps, finish, stateful, [optimizer], budget)
