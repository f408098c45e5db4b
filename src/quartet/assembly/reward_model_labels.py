"""Labels of pairs by a reward model, in the same file as people's labels."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from quartet import files
from quartet.assembly.device import device
from quartet.assembly.serving import TextScorer
from quartet.labels.log import Label, Verdict
from quartet.labels.pairs import Pair, digest
from quartet.labels.session import NAME_CHARACTERS
from quartet.rewards.protocol import RewardError
from quartet.rewards.serve import BadRequest, ScoringRequest

HASH_CHARACTERS = 8


class RewardModelLabeller:
    """A reward model that prefers the answer with the higher score; equal scores are a tie.

    It scores each answer by itself, so its verdict cannot depend on the order of the two: a pair is
    scored once, not in both orders as a language model is asked. Each label records the model's
    folder, the hash of its weights, and both scores.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` is a reward model's, or that of a run that trained one. Raises `ModelError` for
        anything else."""
        self.scorer = TextScorer(folder, device("auto"))
        self.folder = self.scorer.path.resolve()
        self.weights = _hash_of_weights(self.folder)

    @property
    def labeller(self) -> str:
        """The name that stands with the labels: the run's or the folder's, and the beginning of the
        hash of the weights, so that a model that was trained again is another labeller."""
        is_of_run = self.folder.name == "reward_model"
        name = self.folder.parent.name if is_of_run else self.folder.name
        hash_ = self.weights[:HASH_CHARACTERS]
        start = f"reward model {name}"[: NAME_CHARACTERS - HASH_CHARACTERS - 1]
        return f"{start} {hash_}"

    def labels(self, pairs: Sequence[Pair]) -> Iterator[Label | RewardError]:
        """Yield the label of each pair; the error in place of one that could not be scored."""
        for pair in pairs:
            try:
                yield self._label(pair)
            except (BadRequest, RewardError) as error:
                yield RewardError(f"{pair.source or 'a pair'}: {error}")

    def _label(self, pair: Pair) -> Label:
        answers = [_only_text(answer) for answer in (pair.answer_a, pair.answer_b)]
        a, b = self.scorer(ScoringRequest([pair.prompt] * 2, answers, [True, True]))
        judge = {"folder": str(self.folder), "weights": self.weights, "scores": [a, b]}
        number = digest(self.labeller, pair.id)
        return Label(number, self.labeller, pair, higher(a, b), "ab", extra={"judge": judge})


def higher(a: float | None, b: float | None) -> Verdict:
    """Return which of two scores is higher; without one of them, the pair is skipped."""
    if a is None or b is None:
        return "skip"
    return "tie" if a == b else "a" if a > b else "b"


def _only_text(answer: Any) -> str:
    """Return an answer's text. Raises `RewardError` for a conversation of several messages."""
    if isinstance(answer, str):
        return answer
    if len(answer) != 1:
        raise RewardError(
            f"an answer has {len(answer)} messages, and a reward model scores one. Let a language "
            "model or people label such pairs."
        )
    return str(answer[0]["content"])


def _hash_of_weights(folder: Path) -> str:
    """Return the SHA-256 of the weights' files and the config."""
    total = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        total.update(files.fingerprint(path)["sha256"].encode())
    return total.hexdigest()
