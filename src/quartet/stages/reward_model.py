"""The stage that trains a reward model from comparisons."""

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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
    held_out_pairs,
    pair_accuracy,
    pair_scores,
    reward_model,
    score_facts,
)
from quartet.models.heads import ScalarModel
from quartet.models.language_model import stop_ids
from quartet.models.protocols import Tokenizer
from quartet.models.text_classifier import TextReader
from quartet.recording.tokens import write_pairs
from quartet.rewards.protocol import Reward
from quartet.rewards.reward_model import ModelReward
from quartet.rewards.shared import shared
from quartet.rewards.text_models import TextModelReward
from quartet.runs.rounds import round_of
from quartet.stages.kinds import member_of
from quartet.stages.pair_facts import pair_facts
from quartet.stages.protocol import StageRun, Summary
from quartet.stages.rounds import ONLY_ROUND, Round
from quartet.training.budget import Budget
from quartet.training.optim import Optimizer
from quartet.training.state_tree import Stateful


class Labelled(Protocol):
    """Comparisons that are there only once a stage before has ended."""

    @property
    def train(self) -> Sequence[Comparison]: ...

    @property
    def held_out(self) -> Sequence[Comparison]: ...

    @property
    def shown(self) -> Sequence[Comparison]: ...


@dataclass(frozen=True)
class RewardModelStage:
    """Trains a reward model, writes it to the folder of the stage's name, and its scores of the
    held-out pairs to `evaluation/pairs.parquet`, both in the folder of its round; of an ensemble,
    each member does so in a stage and a file of its own.

    The scores are centred: responses of the policy that RL starts from score 0 on average (Ziegler
    et al. 2019).
    """

    comparisons: Sequence[Comparison]
    held_out: Sequence[Comparison]
    shown: Sequence[Comparison]
    """The held-out pairs in the policy's tokens, as they are written."""
    ceiling: float | None
    """The accuracy that the gold reward itself reaches on the held-out labels, which are noisy;
    None where there is no gold reward."""
    prompts: Sequence[Prompt]
    """The prompts of the responses that the scores are centred on."""
    sampling: Sampling
    tokenizer: Tokenizer
    load_models: Callable[[Path, int], tuple[ScalarModel, Any]]
    """Returns the reward model that is trained, with new weights of a seed or, in a later round,
    those of the round before, and the policy whose responses it is centred on."""
    loss: RewardModelLoss
    optimizer: Callable[[Any], Optimizer]
    num_steps: int
    batch_size: int
    micro_batch_tokens: int
    seed: int
    balance_coef: float = 0.0
    """What multiplies the load-balancing loss of a mixture of experts."""
    evaluating: Evaluating = NOT_EVALUATED
    name: str = "reward_model"
    title: str = "reward model"
    process_group: ProcessGroup = SINGLE_PROCESS
    labelled: Callable[[Path], Labelled] | None = None
    """Returns the comparisons that the stage `label` left in the run's folder, in place of those
    above; None where the recipe has no such stage."""
    reader: TextReader | None = None
    """How the reward model reads texts; None where it reads the policy's token ids."""
    round: Round = ONLY_ROUND

    def begin(self, folder: Path) -> StageRun:
        if self.labelled is not None:
            rows = self.labelled(folder)
            return dataclasses.replace(
                self,
                labelled=None,
                comparisons=rows.train,
                held_out=rows.held_out,
                shown=rows.shown,
            ).begin(folder)
        model, policy = self.load_models(folder, self.seed)
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
            if done == 0:
                tokens, group = self.micro_batch_tokens, self.process_group
                with activity("held-out pairs"):
                    accuracy = pair_accuracy(model, self.held_out, tokens, group)
                held_out.before = {"accuracy": accuracy}
            return held_out.during(
                reward_model(
                    model,
                    sampler,
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
            facts = self._save(model, policy, self.round.folder(folder))
            summary = held_out.numbers({}) | facts | held_out.summary()
            return summary | ({} if self.ceiling is None else {"ceiling": self.ceiling})

        stateful: dict[str, Stateful] = {
            "optimizer": optimizer,
            "sampler": sampler,
            "budget": budget,
            "held_out": held_out,
        }
        return StageRun(steps, finish, stateful, [optimizer], budget)

    def _save(self, model: ScalarModel, policy: Any, folder: Path) -> Summary:
        """Centre the reward model, and write it and its scores of the held-out pairs to the folder
        of its round. Return what the scores say."""
        with activity("held-out pairs"):
            scores = pair_scores(model, self.held_out, self.micro_batch_tokens, self.process_group)
        facts = score_facts(scores, self.held_out)
        with activity("centring"):
            mean = self._mean_score(model, policy)
        model.centre += mean
        tokenizer = self.tokenizer if self.reader is None else self.reader.tokenizer
        name, _ = round_of(self.name)
        model.save(folder / name, tokenizer, self.process_group)
        if self.process_group.is_rank_zero:
            _, number = member_of(name)
            file = "pairs.parquet" if number is None else f"pairs-{number}.parquet"
            write_pairs(folder / "evaluation" / file, self.shown, scores - mean, self.tokenizer)
        return {
            **{f"held_out_{name}": value for name, value in facts.items()},
            **pair_facts(self.held_out),
            "centre": model.centre,
        }

    def _mean_score(self, model: ScalarModel, policy: Any) -> float:
        """Return the mean score of the policy's own responses to `prompts`."""
        generator = NativeGenerator(
            policy,
            self.tokenizer,
            stop_ids(policy, self.tokenizer),
            self.seed,
            process_group=self.process_group,
        )
        with activity("sampling"):
            rollouts = generator.generate(self.prompts, self.sampling)
        with activity("scoring"):
            scores = self._as_reward(model).score(rollouts)
        return statistics.fmean(score for score in scores if score is not None)

    def _as_reward(self, model: ScalarModel) -> Reward:
        """Return the reward model as the RL stage asks it."""
        if self.reader is None:
            return ModelReward(model, self.micro_batch_tokens, process_group=self.process_group)
        reward = TextModelReward("model", model, self.reader, self.micro_batch_tokens)
        return shared(reward, self.process_group)
