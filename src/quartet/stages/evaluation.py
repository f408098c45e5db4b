"""The evaluation stage: the trained policy against the one that it started from."""

import dataclasses
import gc
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartet import files
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.evaluation.best_of_n import BestOf, best_of_n
from quartet.evaluation.compare import Gold, compare
from quartet.experience import Prompt, Rollout
from quartet.generation.protocol import Generator
from quartet.generation.sampling import Sampling
from quartet.io.activity import activity
from quartet.io.texts import well_formed_json
from quartet.loops.progress import Progress
from quartet.models.forward import policy_logprobs
from quartet.models.protocols import Tokenizer
from quartet.rewards.protocol import Weighted, rewarded
from quartet.stages.kinds import BEST_OF_RESPONSES
from quartet.stages.protocol import StageRun, Summary
from quartet.tensors import Float, Tensor
from quartet.training.batch import collate


@dataclass(frozen=True)
class EvaluationStage:
    """Compares two policies on held-out prompts.

    Writes to `evaluation/`: `final.json`, the comparison; `answers.jsonl`, both responses to each
    prompt; and `best_of_n.json`, what the first policy reaches when the best of n responses is
    chosen by the reward.
    """

    prompts: Sequence[Prompt]
    tokenizer: Tokenizer
    load_before: Callable[[Path], Any]
    load_after: Callable[[Path], Any]
    rewards: Callable[[Path], Sequence[Weighted]]
    gold: Gold | None
    sampling: Sampling
    micro_batch_tokens: int
    generator: Callable[[Any, Path], Generator]
    """Returns a generator that samples from a model."""
    best_of: int = 0
    num_steps: int = 2
    name: str = "evaluation"
    title: str = "evaluation"
    process_group: ProcessGroup = SINGLE_PROCESS

    def begin(self, folder: Path) -> StageRun:
        if (
            not self.process_group.is_rank_zero
        ):  # one rank loads the models and writes; the others only count steps
            return StageRun(self._empty_steps, dict)
        rewards = self.rewards(folder)
        responses: list[list[Rollout]] = []
        logprobs: list[Tensor] = []

        def steps(done: int) -> Iterator[Progress]:
            for number, load in enumerate((self.load_before, self.load_after)[done:], done + 1):
                # One policy at a time is in memory.
                model = _loaded(load, folder)
                responses.append(self._responses(model, folder, rewards, self.prompts))
                if number == self.num_steps:
                    logprobs.append(self._logprobs(model, responses[-1]))
                del model
                yield Progress(number, {})

        def finish() -> Summary:
            old, new = responses
            before = _loaded(self.load_before, folder)
            kl: list[float] = (logprobs[0] - self._logprobs(before, new)).sum(dim=1).tolist()
            summary = dataclasses.asdict(compare(old, new, kl, self.gold))
            if not any(w.weight for w in rewards):  # a preference stage: no reward was trained on
                del summary["before"]["reward"], summary["after"]["reward"]
            with activity("best of n"):
                points = self._best_of(before, folder, rewards)
            best = [dataclasses.asdict(point) for point in points]
            _write(folder / "evaluation", summary, best, zip(old, new, kl, strict=True))
            return summary

        return StageRun(steps, finish)

    def _empty_steps(self, done: int) -> Iterator[Progress]:
        return iter([Progress(number, {}) for number in range(done + 1, self.num_steps + 1)])

    def _responses(
        self,
        model: Any,
        folder: Path,
        rewards: Sequence[Weighted],
        prompts: Sequence[Prompt],
        samples: int = 1,
    ) -> list[Rollout]:
        generator = self.generator(model, folder)
        with activity("sampling"):
            rollouts = generator.generate(prompts, self.sampling, samples)
        return rewarded(rollouts, rewards)

    def _best_of(self, model: Any, folder: Path, rewards: Sequence[Weighted]) -> list[BestOf]:
        """Return the points of the best-of-n curve; empty if nothing is rewarded or no prompt has
        a score for each of its responses."""
        if self.best_of < 2 or not any(w.weight for w in rewards):
            return []
        prompts = self.prompts[: max(1, BEST_OF_RESPONSES // self.best_of)]
        rollouts = self._responses(model, folder, rewards, prompts, self.best_of)
        by_prompt = [list(group) for _, group in itertools.groupby(rollouts, key=lambda r: r.group)]
        complete = [group for group in by_prompt if all(r.score is not None for r in group)]
        if not complete:
            return []
        gold = None
        if self.gold is not None:
            gold = [[self.gold(r.prompt.text, r.response) for r in group] for group in complete]
        return best_of_n([[r.score or 0.0 for r in group] for group in complete], gold)

    def _logprobs(self, model: Any, rollouts: Sequence[Rollout]) -> Float[Tensor, "B T"]:
        """Return a policy's log-prob of each token of the responses, 0 elsewhere. The difference of
        two policies', summed over a response, is its KL: Σ_t log π_after(t) − log π_before(t)."""
        batch = collate(rollouts)
        with activity("KL"):
            return policy_logprobs(
                model,
                batch.tokens,
                batch.lengths,
                batch.response_mask,
                self.sampling.temperature,
                self.micro_batch_tokens,
            )


def _loaded(load: Callable[[Path], Any], folder: Path) -> Any:
    """Return the policy that `load` loads, after the memory of one before it was freed."""
    gc.collect()
    with activity("loading"):
        return load(folder)


def _write(
    folder: Path,
    summary: Summary,
    best: Sequence[dict[str, Any]],
    rows: Iterator[tuple[Rollout, Rollout, float]],
) -> None:
    """Write the three files of an evaluation."""
    folder.mkdir(exist_ok=True)
    _write_json(folder / "final.json", summary)
    _write_json(folder / "best_of_n.json", best)
    lines = [json.dumps(well_formed_json(_row(*row)), ensure_ascii=False) + "\n" for row in rows]
    files.replace(folder / "answers.jsonl", "".join(lines))


def _row(before: Rollout, after: Rollout, kl: float) -> dict[str, Any]:
    """Return a line of `answers.jsonl`: a prompt with both responses."""
    sides = {
        side: {
            "response": rollout.response,
            "score": rollout.score,
            "components": dict(rollout.components),
            "tokens": len(rollout.response_ids),
        }
        for side, rollout in (("before", before), ("after", after))
    }
    return {"id": before.prompt.id, "prompt": before.prompt.text, "kl": kl, **sides}


def _write_json(path: Path, value: Any) -> None:
    files.replace(path, json.dumps(well_formed_json(value), indent=2, ensure_ascii=False) + "\n")
