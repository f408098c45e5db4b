"""A language model as judge, behind any OpenAI-compatible endpoint."""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quartet.experience import Rollout
from quartet.io.activity import counted
from quartet.io.texts import excerpt
from quartet.rewards.judge_cache import JudgeCache
from quartet.rewards.protocol import RewardError, Score
from quartet.rewards.remote import Endpoint
from quartet.rewards.rubric import CRITERIA, RUBRIC_PROMPT, Rubric
from quartet.rewards.verdicts import SHARES, parse_preference, parse_score

log = logging.getLogger(__name__)

SCORE_PROMPT = """\
Rate the answer to the request below from 1 (useless or wrong) to 10 (could not be better). \
Judge what it says, not its
length.

<request>
{prompt}
</request>

<answer>
{response}
</answer>

End with one line of the form "Score: N"."""

PAIR_PROMPT = """\
Which of two answers to the request below is better? \
Judge what they say, not how long they are or which comes first.

<request>
{prompt}
</request>

<answer A>
{first}
</answer A>

<answer B>
{second}
</answer B>

End with one line: "Better: A", "Better: B" or "Better: tie"."""

NEEDED = {"score": ("{prompt}", "{response}"), "pairwise": ("{prompt}", "{first}", "{second}")}


@dataclass(frozen=True)
class WinShares:
    """How often each response wins, as a share of its comparisons; None where there is none."""

    scores: list[Score]
    """By the judge's verdict; with a rubric, by the weighted sum of its criteria."""
    criteria: dict[str, list[Score]]
    """By each criterion of a rubric alone, by its name."""


class JudgeReward:
    """Scores that a language model gives each response: a number within `score_range`, or,
    pairwise, the share of comparisons that the response wins against its neighbours among the
    responses to the same prompt (a ring: each is compared with two).

    Every comparison is made twice, with the sides swapped; a judge that changes its mind gives a
    tie. With a rubric, both texts answer each of its criteria, and the weighted sum of the
    criteria's verdicts decides a comparison. Answers are cached by the hash of the whole request,
    in a file that later runs may be given. An answer of the judge that is not text, is empty or was
    cut off is an error and not cached; a text without a verdict is cached and gives no score. If
    there is no text at all, the run stops.
    """

    def __init__(
        self,
        name: str,
        endpoint: Endpoint,
        model: str,
        mode: Literal["score", "pairwise"],
        prompt: str | None,
        cache: Path | None,
        parallel: int = 8,
        score_range: tuple[float, float] = (1.0, 10.0),
        rubric: Rubric | None = None,
    ) -> None:
        """Raises `RewardError` for a prompt that lacks a place for a text. A rubric is for the mode
        pairwise."""
        self.name, self.endpoint, self.model, self.mode = name, endpoint, model, mode
        self.parallel, self.score_range, self.rubric = parallel, score_range, rubric
        own = SCORE_PROMPT if mode == "score" else PAIR_PROMPT if rubric is None else RUBRIC_PROMPT
        self.prompt = prompt or own
        needed = NEEDED[mode] if rubric is None else (*NEEDED[mode], CRITERIA)
        if missing := [field for field in needed if field not in self.prompt]:
            what = "the criteria of the rubric are" if missing[0] == CRITERIA else "the text is"
            raise RewardError(
                f"reward.prompt: the judge's prompt has no {missing[0]}; it is where {what} put in."
            )
        self.cache = JudgeCache(cache)

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return self._single(rollouts) if self.mode == "score" else self.compare(rollouts).scores

    def _single(self, rollouts: Sequence[Rollout]) -> list[Score]:
        texts = self._ask(
            [self._filled(prompt=r.prompt.text, response=r.response) for r in rollouts]
        )
        scores = [None if text is None else parse_score(text, *self.score_range) for text in texts]
        self._warn_of_missing(texts, scores)
        return scores

    def compare(self, rollouts: Sequence[Rollout]) -> WinShares:
        """Compare each response with its neighbours."""
        pairs = neighbours(rollouts)
        questions = [
            self._filled(
                prompt=rollouts[i].prompt.text,
                first=rollouts[a].response,
                second=rollouts[b].response,
            )
            for i, j in pairs
            for a, b in ((i, j), (j, i))
        ]
        texts = self._ask(questions)
        count = len(rollouts)
        if self.rubric is None:
            shares = [None if text is None else parse_preference(text) for text in texts]
            self._warn_of_missing(texts, shares)
            won = [_both(*each) for each in zip(shares[::2], shares[1::2], strict=True)]
            return WinShares(_means(pairs, won, count), {})
        answered = [text if text and self.rubric.is_answered_by(text) else None for text in texts]
        self._warn_of_missing(texts, answered)
        both = zip(texts[::2], texts[1::2], strict=True)
        verdicts = [self.rubric.verdicts([text or "" for text in each]) for each in both]
        total = [SHARES.get(self.rubric.weighted(each)[0]) for each in verdicts]
        criteria = {
            criterion.name: _means(pairs, [SHARES.get(each[i]) for each in verdicts], count)
            for i, criterion in enumerate(self.rubric.criteria)
        }
        return WinShares(_means(pairs, total, count), criteria)

    def _filled(self, **texts: str) -> str:
        """The prompt with the texts and the rubric in it, whatever braces they have themselves."""
        if self.rubric is not None:
            texts |= {"criteria": self.rubric.text, "example": self.rubric.criteria[0].name}
        return re.sub(r"\{(\w+)\}", lambda match: texts.get(match[1], match[0]), self.prompt)

    def _ask(self, prompts: Sequence[str]) -> list[str | None]:
        """Return the judge's text for each prompt, None where there is none. Each text is cached as
        it comes, so that a run that is stopped loses none."""
        requests = [self._request(prompt) for prompt in prompts]
        keys = [self._key(request) for request in requests]
        unknown = {
            key: r for key, r in zip(keys, requests, strict=True) if self.cache.get(key) is None
        }
        errors = {}
        try:
            with closing(self.endpoint.ask_each(list(unknown.values()), self.parallel)) as answers:
                for i, answer in counted(answers, lambda _: 1, len(unknown), "questions"):
                    key, text = list(unknown)[i], self._text(answer)
                    if isinstance(text, RewardError):
                        errors[key] = text
                    else:
                        self.cache.put(key, text)
        finally:
            self.cache.sync()
        if errors and len(errors) == len(set(keys)):
            raise next(iter(errors.values()))
        for sentence, count in Counter(map(str, errors.values())).items():
            log.warning("%s (%d of %d questions)", sentence, count, len(set(keys)))
        return [self.cache.get(key) for key in keys]

    def _request(self, prompt: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt}]
        return {"model": self.model, "messages": messages, "temperature": 0}

    def _key(self, request: dict[str, Any]) -> str:
        text = json.dumps([self.endpoint.url, request], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _text(self, answer: Any) -> str | RewardError:
        """The text of an answer; everything that is cached has passed here."""
        if isinstance(answer, RewardError):
            return answer
        name = f"judge {self.endpoint.url}"
        try:
            choice = answer["choices"][0]
            content, reason = choice["message"]["content"], choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError):
            return RewardError(f"{name} answered without choices[0].message.content.")
        if reason in ("length", "content_filter"):
            return RewardError(f'{name} was cut off before its end (finish_reason "{reason}").')
        if not isinstance(content, str):
            shown = excerpt(json.dumps(content), 60)
            return RewardError(
                f"{name} answered with {shown} for choices[0].message.content, not a text."
            )
        if not content.strip():
            return RewardError(f"{name} answered with an empty text.")
        return content

    def _warn_of_missing(
        self, texts: Sequence[str | None], verdicts: Sequence[float | str | None]
    ) -> None:
        unread = [t for t, v in zip(texts, verdicts, strict=True) if t is not None and v is None]
        if unread:
            log.warning(
                "reward %s: %d of %d answers of the judge have no verdict; one ends: %s",
                self.name,
                len(unread),
                len(texts),
                excerpt(unread[0][-200:].strip()),
            )


def _both(straight: float | None, swapped: float | None) -> float | None:
    """Return the share that a pair's first response wins of the two shares that the judge gave to
    the answer it read first."""
    return None if straight is None or swapped is None else (straight + 1 - swapped) / 2


def _means(
    pairs: Sequence[tuple[int, int]], won: Sequence[float | None], count: int
) -> list[Score]:
    """Return the mean share that each of `count` responses wins, from the share that the first one
    of each pair wins; None where it has no comparison."""
    points: list[list[float]] = [[] for _ in range(count)]
    for (i, j), share in zip(pairs, won, strict=True):
        if share is not None:
            points[i].append(share)
            points[j].append(1 - share)
    return [sum(each) / len(each) if each else None for each in points]


def neighbours(rollouts: Sequence[Rollout]) -> list[tuple[int, int]]:
    """Pairs of answers to the same prompt, each with the next and the last with the first: a ring
    for three or more."""
    groups: dict[tuple[int, str], list[int]] = {}
    for i, rollout in enumerate(rollouts):
        groups.setdefault((rollout.group, rollout.prompt.id), []).append(i)
    pairs = []
    for rows in groups.values():
        if len(rows) == 2:
            pairs.append((rows[0], rows[1]))
        elif len(rows) > 2:
            pairs += list(zip(rows, [*rows[1:], rows[0]], strict=True))
    return pairs
