"""The stage that trains a reward model from comparisons."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartet.algorithms.preference import RewardModelLoss
from quartet.data.records import Comparison
from quartet.data.sampler import Sampler
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.experience import Prompt
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.io.activity import activity
from quartet.loops.held_out import NOT_EVALUATED, Evaluating, HeldOut
from quartet.loops.progress import Progress
from quartet.loops.reward_model import (
    accuracy_of,
    held_out_pairs,
    pair_accuracy,
    pair_scores,
    reward_model,
)
from quartet.models.heads import ScalarModel
from quartet.models.language_model import stop_ids
from quartet.models.protocols import Tokenizer
from quartet.recording.tokens import write_pairs
from quartet.rewards.reward_model import ModelReward
from quartet.stages.protocol import StageRun, Summary
from quartet.training.budget import Budget
from quartet.training.optim import Optimizer
from quartet.training.state_tree import Stateful


@dataclass(frozen=True)
class RewardModelStage:
    """Trains a reward model, writes it to `reward_model/`, and its scores of the held-out pairs to
    `evaluation/pairs.parquet`.

    The scores are centred: responses of the policy that RL starts from score 0 on average (Ziegler
    et al. 2019).
    """

    comparisons: Sequence[Comparison]
    held_out: Sequence[Comparison]
    ceiling: float | None
    """The accuracy that the gold reward itself reaches on the held-out labels, which are noisy;
    None where there is no gold reward."""
    prompts: Sequence[Prompt]
    """The prompts of the responses that the scores are centred on."""
    sampling: Sampling
    tokenizer: Tokenizer
    load_models: Callable[[Path], tuple[ScalarModel, Any]]
    """Returns the reward model that is trained, and the policy whose responses it is centred on."""
    loss: RewardModelLoss
    optimizer: Callable[[Any], Optimizer]
    num_steps: int
    batch_size: int
    micro_batch_tokens: int
    seed: int
    evaluating: Evaluating = NOT_EVALUATED
    name: str = "reward_model"
    title: str = "reward model"
    process_group: ProcessGroup = SINGLE_PROCESS

    def begin(self, folder: Path) -> StageRun:
        model, policy = self.load_models(folder)
        with activity("held-out pairs"):
            before = pair_accuracy(
                model, self.held_out, self.micro_batch_tokens, self.process_group
            )
        sampler = Sampler(self.comparisons, self.batch_size, self.seed)
        optimizer = self.optimizer(model)
        budget = Budget(self.micro_batch_tokens, self.process_group)

        def evaluate() -> dict[str, float]:
            with activity("held-out pairs"):
                return held_out_pairs(
                    model, self.held_out, self.loss, self.micro_batch_tokens, self.process_group
                )

        held_out = HeldOut(self.evaluating, self.num_steps, optimizer.parameters, evaluate)

        def steps(done: int) -> Iterator[Progress]:
            return held_out.during(
                reward_model(model, sampler, self.loss, optimizer, self.num_steps, budget, done)
            )

        def finish() -> Summary:
            held_out.restore_best()
            with activity("held-out pairs"):
                scores = pair_scores(
                    model, self.held_out, self.micro_batch_tokens, self.process_group
                )
            accuracy = accuracy_of(scores[:, 0] - scores[:, 1])
            with activity("centring"):
                mean = self._mean_score(model, policy)
            model.centre += mean
            model.save(folder / "reward_model", self.tokenizer, self.process_group)
            if self.process_group.is_rank_zero:
                file = folder / "evaluation" / "pairs.parquet"
                write_pairs(file, self.held_out, scores - mean, self.tokenizer)
            summary = {
                "held_out_accuracy_before": before,
                "held_out_accuracy": accuracy,
                "centre": model.centre,
                **held_out.summary(),
            }
            return summary | ({} if self.ceiling is None else {"ceiling": self.ceiling})

        stateful: dict[str, Stateful] = {
            "optimizer": optimizer,
            "sampler": sampler,
            "budget": budget,
            "held_out": held_out,
        }
        return StageRun(steps, finish, stateful, [optimizer], budget)

    def _mean_score(self, model: ScalarModel, policy: Any) -> float:
        """Return the mean score of the policy's own responses to `prompts`."""
        generator = NativeGenerator(
            policy,
            self.tokenizer,
            stop_ids(policy, self.tokenizer),
            self.seed,
            process_group=self.process_group,
        )
        reward = ModelReward(model, self.micro_batch_tokens, process_group=self.process_group)
        with activity("sampling"):
            rollouts = generator.generate(self.prompts, self.sampling)
        with activity("scoring"):
            scores = reward.score(rollouts)
        return statistics.fmean(score for score in scores if score is not None)
