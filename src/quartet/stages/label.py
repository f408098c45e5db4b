"""The stage that waits for people: it writes pairs of the policy's answers, and ends when enough of
them are labelled (the online data collection of Ziegler et al. 2019)."""

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartet import files
from quartet.data import DataError
from quartet.data.files import files_in
from quartet.data.label_pairs import read_pairs
from quartet.evaluation.compare import Gold
from quartet.experience import Prompt
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.io.activity import activity
from quartet.io.texts import well_formed_json
from quartet.labels.log import Label, LabelLog, Order, Verdict, read_labels
from quartet.labels.pairs import Pair, digest, distinct, in_order, share
from quartet.loops.progress import Progress
from quartet.models.language_model import stop_ids
from quartet.models.protocols import Tokenizer
from quartet.stages.protocol import StageRun, Summary
from quartet.stages.rounds import ONLY_ROUND, Round

POLL_SECONDS = 0.5
"""How often the file of labels is looked at."""
SIMULATED = "simulated"
"""The name of the labeller that is no person."""


@dataclass(frozen=True)
class LabelStage:
    """Samples two answers to each of some prompts and writes the pairs to `label/pairs.jsonl`.
    People label them with `quartet label RUN`, in `label/labels.jsonl`; each label is a step. At
    the end the labels, and earlier ones, are copied to `comparisons/`, which the next reward model
    is trained on. All three are in the folder of the stage's round; those of a later round have the
    comparisons of the rounds before.

    The stage has no state but these two files: a run that is stopped while it waits goes on where
    the labels are.
    """

    name: str
    prompts: Sequence[Prompt]
    num_pairs: int
    num_steps: int
    earlier: Path | None
    simulated: float | None
    """The share of wrong labels of a labeller who knows the gold reward; None: people label."""
    gold: Gold | None
    sampling: Sampling
    tokenizer: Tokenizer
    load_policy: Callable[[Path], Any]
    seed: int
    round: Round = ONLY_ROUND

    @property
    def title(self) -> str:
        return self.name

    def begin(self, folder: Path) -> StageRun:
        own, before = self.round.folder(folder), self.round.before(folder)
        earlier = self.earlier if before is None else before / "comparisons"
        place = own / "label" / "pairs.jsonl"
        if not place.is_file():
            self._write_pairs(folder, place)
        pairs = in_order(read_pairs(place), self.seed)
        if len(pairs) < self.num_steps:
            raise DataError(
                f"label.labels = {self.num_steps}: the policy gave two different answers to only "
                f"{len(pairs)} of {self.num_pairs} prompts. Raise label.pairs or "
                "rollout.temperature."
            )
        labels = place.with_name("labels.jsonl")

        def steps(done: int) -> Iterator[Progress]:
            if self.simulated is not None:
                self._label(pairs, labels)
            while done < self.num_steps:
                with activity(f"waiting for labels: quartet label {folder}"):
                    while (count := _count(labels)) <= done:
                        time.sleep(POLL_SECONDS)
                for number in range(done + 1, min(count, self.num_steps) + 1):
                    yield Progress(number, {})
                done = min(count, self.num_steps)

        def finish() -> Summary:
            kept = own / "comparisons"
            kept.mkdir(exist_ok=True)
            if earlier is not None:
                _copy_earlier(earlier, kept / "earlier")
            shutil.copyfile(labels, kept / "labels.jsonl")
            found = read_labels(labels)
            return {
                "labels": len(found.labels),
                "comparisons": len(found.comparisons()),
                "sentence": found.sentence(),
            }

        return StageRun(steps, finish)

    def _write_pairs(self, folder: Path, place: Path) -> None:
        """Sample two answers to each of the prompts, and write those that differ."""
        policy = self.load_policy(folder)
        count = min(self.num_pairs, len(self.prompts))
        chosen = random.Random(self.seed).sample(range(len(self.prompts)), count)
        prompts = [self.prompts[i] for i in chosen]
        generator = NativeGenerator(
            policy, self.tokenizer, stop_ids(policy, self.tokenizer), self.seed
        )
        with activity("sampling"):
            rollouts = generator.generate(prompts, self.sampling, 2)
        pairs = distinct(
            Pair(_text(one.prompt), one.response, two.response, f"{self.name}: {one.prompt.id}")
            for one, two in zip(rollouts[::2], rollouts[1::2], strict=True)
        )
        place.parent.mkdir(parents=True, exist_ok=True)
        rows = (
            {"prompt": p.prompt, "answer_a": p.answer_a, "answer_b": p.answer_b, "source": p.source}
            for p in pairs
        )
        files.replace(place, "".join(json.dumps(well_formed_json(row)) + "\n" for row in rows))

    def _label(self, pairs: Sequence[Pair], path: Path) -> None:
        """Label pairs by their gold reward, until there are enough labels."""
        assert self.gold is not None and self.simulated is not None
        log = LabelLog(path)
        try:
            labelled = {label.pair.id for _, label in log.labels.labels}
            for pair in [p for p in pairs if p.id not in labelled][
                : self.num_steps - len(labelled)
            ]:
                order: Order = "ab" if share("shown", self.seed, pair.id) < 0.5 else "ba"
                number = digest(SIMULATED, self.seed, pair.id)
                log.add(Label(number, SIMULATED, pair, self._verdict(pair), order))
        finally:
            log.close()

    def _verdict(self, pair: Pair) -> Verdict:
        """Return which answer has the higher gold reward, or, for the share of wrong labels, the
        other."""
        assert self.gold is not None and self.simulated is not None
        prompt = plain(pair.prompt)
        a, b = (self.gold(prompt, plain(answer)) for answer in (pair.answer_a, pair.answer_b))
        if a == b:
            return "tie"
        wrong = share("noise", self.seed, pair.id) < self.simulated
        return "a" if (a > b) != wrong else "b"


def plain(text: Any) -> str:
    """Return a text, or the last message of a conversation."""
    return text if isinstance(text, str) else str(text[-1]["content"])


def _text(prompt: Prompt) -> Any:
    return prompt.text if prompt.messages is None else [dict(turn) for turn in prompt.messages]


def _count(path: Path) -> int:
    """Return how many pairs were labelled; a repeated label is none of its own."""
    return sum(not label.repeat for _, label in read_labels(path).labels)


def _copy_earlier(earlier: Path, to: Path) -> None:
    """Copy a file, or the files of a folder, under numbered names."""
    found = files_in(earlier) if earlier.is_dir() else [earlier]
    to.mkdir(exist_ok=True)
    for number, file in enumerate(found, 1):
        shutil.copyfile(file, to / f"{number:03d}-{file.name}")
