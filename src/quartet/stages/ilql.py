"""The stage of offline Q-learning on text with rewards (ILQL)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartet.algorithms.ilql import Ilql
from quartet.data.records import Demonstration
from quartet.data.sampler import Sampler
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.io.activity import activity
from quartet.loops.held_out import NOT_EVALUATED, Evaluating, HeldOut
from quartet.loops.ilql import IlqlLearner, ilql
from quartet.loops.progress import Progress
from quartet.models.language_model import save
from quartet.models.protocols import Tokenizer
from quartet.models.q_heads import QHeads, extract_policy, save_heads
from quartet.stages.protocol import StageRun, Summary
from quartet.training.budget import Budget
from quartet.training.optim import Optimizer
from quartet.training.state_tree import Stateful


@dataclass(frozen=True)
class IlqlStage:
    """Learns π_β, Q and V from rows with scores, and writes π ∝ π_β exp(β Q) to `policy/`
    and the heads to `q_heads/`."""

    rows: Sequence[Demonstration]
    held_out: Sequence[Demonstration]
    tokenizer: Tokenizer
    load_policy: Callable[[Path], Any]
    loss: Ilql
    beta: float
    optimizer: Callable[[Any, QHeads], Optimizer]
    num_steps: int
    batch_size: int
    micro_batch_tokens: int
    seed: int
    balance_coef: float = 0.0
    """What multiplies the load-balancing loss of a mixture of experts."""
    evaluating: Evaluating = NOT_EVALUATED
    name: str = "ilql"
    title: str = "ilql"
    process_group: ProcessGroup = SINGLE_PROCESS

    def begin(self, folder: Path) -> StageRun:
        model = self.load_policy(folder)
        heads = QHeads(model)
        sampler = Sampler(self.rows, self.batch_size, self.seed)
        optimizer = self.optimizer(model, heads)
        budget = Budget(self.micro_batch_tokens, self.process_group)
        learner = IlqlLearner(model, heads, self.loss, self.process_group, self.balance_coef)

        def evaluate() -> dict[str, float]:
            with activity("held-out rows"):
                return learner.held_out(self.held_out, self.micro_batch_tokens)

        held_out = HeldOut(self.evaluating, self.num_steps, optimizer.parameters, evaluate)

        def steps(done: int) -> Iterator[Progress]:
            return held_out.during(ilql(learner, sampler, optimizer, self.num_steps, budget, done))

        def finish() -> Summary:
            held_out.restore_best()
            summary = {"held_out_loss": evaluate()["loss"], **held_out.summary()}
            if self.process_group.is_rank_zero:
                save_heads(heads, self.beta, folder / "q_heads")
            extract_policy(model, heads.q.weight, self.beta)
            save(model, self.tokenizer, folder / "policy", self.process_group)
            return summary

        stateful: dict[str, Stateful] = {
            "optimizer": optimizer,
            "heads": heads,
            "sampler": sampler,
            "budget": budget,
            "held_out": held_out,
        }
        return StageRun(steps, finish, stateful, [optimizer], budget)
