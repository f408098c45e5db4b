"""Labels of pairs by a language model: AI feedback, in the same file as people's labels."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

from quartet.labels.log import Label, Verdict
from quartet.labels.pairs import Pair, digest
from quartet.labels.session import NAME_CHARACTERS
from quartet.rewards.judge import JudgeReward
from quartet.rewards.protocol import RewardError
from quartet.rewards.remote import Endpoint
from quartet.rewards.rubric import Rubric
from quartet.rewards.verdicts import parse_preference, reconciled


class PairJudge(JudgeReward):
    """A language model that compares the two answers of a pair twice, in both orders. Where it
    changes its mind with the order, the label is a tie; where one of its texts has no verdict, the
    pair is skipped. Each label records the prompt, both texts, and the tokens that they took.

    With a rubric, both texts answer each of its criteria, each criterion's two answers give its
    verdict in the same way, and the weighted sum of the verdicts decides.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        prompt: str | None = None,
        rubric: Rubric | None = None,
        parallel: int = 8,
    ) -> None:
        """Raises `RewardError` for a prompt without {prompt}, {first} and {second}, or, with a
        rubric, without {criteria}."""
        super().__init__(
            "judge", endpoint, model, "pairwise", prompt, None, parallel, rubric=rubric
        )

    @property
    def labeller(self) -> str:
        """The name that stands with the judge's labels."""
        if self.rubric is None:
            return f"judge {self.model}"[:NAME_CHARACTERS]
        end = f" rubric {self.rubric.key[:8]}"
        return f"judge {self.model}"[: NAME_CHARACTERS - len(end)] + end

    def labels(self, pairs: Sequence[Pair]) -> Iterator[Label | RewardError]:
        """Yield the label of each pair as soon as both of its questions are answered, in any
        order; the error in place of one that could not be asked."""
        requests = [
            self._request(self._filled(prompt=_plain(pair.prompt), first=first, second=second))
            for pair in pairs
            for first, second in _both_orders(pair)
        ]
        answers: dict[int, Any] = {}
        with closing(self.endpoint.ask_each(requests, self.parallel)) as replies:
            for i, answer in replies:
                answers[i] = answer
                straight, swapped = i - i % 2, i - i % 2 + 1
                if straight in answers and swapped in answers:
                    both = answers.pop(straight), answers.pop(swapped)
                    yield self._label(pairs[i // 2], both)

    def _label(self, pair: Pair, answers: tuple[Any, Any]) -> Label | RewardError:
        texts = [self._text(answer) for answer in answers]
        for text in texts:
            if isinstance(text, RewardError):
                return text
        judge = {
            "url": self.endpoint.url,
            "model": self.model,
            "prompt": self.prompt,
            "answers": texts,
            "calls": len(answers),
            "tokens": {kind: _tokens(answers, kind) for kind in ("prompt", "completion")},
        }
        verdict = reconciled(*(parse_preference(str(text)) for text in texts))
        if self.rubric is not None:
            verdict, of_criteria = self._by_criteria(self.rubric, [str(text) for text in texts])
            judge |= of_criteria
        number = digest(self.labeller, self.prompt, pair.id)
        return Label(number, self.labeller, pair, verdict, "ab", extra={"judge": judge})

    def _by_criteria(self, rubric: Rubric, texts: Sequence[str]) -> tuple[Verdict, dict[str, Any]]:
        """Return the verdict of a rubric, and what is recorded of it."""
        verdicts = rubric.verdicts(texts)
        verdict, mean = rubric.weighted(verdicts)
        criteria = [
            criterion.model_dump() | {"verdict": each}
            for criterion, each in zip(rubric.criteria, verdicts, strict=True)
        ]
        return verdict, {"criteria": criteria, "weighted": mean}


def _both_orders(pair: Pair) -> tuple[tuple[str, str], tuple[str, str]]:
    a, b = _plain(pair.answer_a), _plain(pair.answer_b)
    return (a, b), (b, a)


def _plain(text: Any) -> str:
    """Return a text, or the messages of a conversation, each behind its role if there are more."""
    if isinstance(text, str):
        return text
    if len(text) == 1:
        return str(text[0]["content"])
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in text)


def _tokens(answers: Sequence[Any], kind: str) -> int | None:
    """Return how many tokens the server counted; None where it does not say."""
    counts = [(answer.get("usage") or {}).get(f"{kind}_tokens") for answer in answers]
    known = [count for count in counts if isinstance(count, int)]
    return sum(known) if len(known) == len(counts) else None
