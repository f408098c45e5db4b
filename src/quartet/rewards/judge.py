"""A language model as judge, behind any OpenAI-compatible endpoint."""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from quartet.experience import Rollout
from quartet.io.activity import counted
from quartet.io.texts import excerpt
from quartet.rewards.judge_cache import JudgeCache
from quartet.rewards.protocol import RewardError, Score
from quartet.rewards.remote import Endpoint

log = logging.getLogger(__name__)
VERDICT = re.compile(r"(?<![a-z])(score|better)[*_`]*[ \t]*:([^\n]*)", re.IGNORECASE | re.ASCII)
NUMBER = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(?:\s*/\s*([0-9]{1,9}))?", re.ASCII)

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


class JudgeReward:
    """Scores that a language model gives each response: a number within `score_range`, or,
    pairwise, the share of comparisons that the response wins against its neighbours among the
    responses to the same prompt (a ring: each is compared with two).

    Every comparison is made twice, with the sides swapped; a judge that changes its mind gives a
    tie. Answers are cached by the hash of the whole request, in a file that later runs may be
    given. An answer of the judge that is not text, is empty or was cut off is an error and not
    cached; a text without a verdict is cached and gives no score. If there is no text at all, the
    run stops.
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
    ) -> None:
        self.name, self.endpoint, self.model, self.mode = name, endpoint, model, mode
        self.parallel, self.score_range = parallel, score_range
        self.prompt = prompt or (SCORE_PROMPT if mode == "score" else PAIR_PROMPT)
        if missing := [field for field in NEEDED[mode] if field not in self.prompt]:
            raise RewardError(
                f"reward.prompt: the judge's prompt has no {missing[0]}; it is where the text is "
                f"put in."
            )
        self.cache = JudgeCache(cache)

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return self._single(rollouts) if self.mode == "score" else self._pairwise(rollouts)

    def _single(self, rollouts: Sequence[Rollout]) -> list[Score]:
        texts = self._ask(
            [self._filled(prompt=r.prompt.text, response=r.response) for r in rollouts]
        )
        scores = [None if text is None else parse_score(text, *self.score_range) for text in texts]
        self._warn_of_missing(texts, scores)
        return scores

    def _pairwise(self, rollouts: Sequence[Rollout]) -> list[Score]:
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
        shares = [None if text is None else parse_preference(text) for text in texts]
        self._warn_of_missing(texts, shares)
        points: list[list[float]] = [[] for _ in rollouts]
        for (i, j), straight, swapped in zip(pairs, shares[::2], shares[1::2], strict=True):
            if straight is None or swapped is None:
                continue
            share = (straight + 1 - swapped) / 2
            points[i].append(share)
            points[j].append(1 - share)
        return [sum(p) / len(p) if p else None for p in points]

    def _filled(self, **texts: str) -> str:
        """The prompt with the texts in it, whatever braces they have themselves."""
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
        self, texts: Sequence[str | None], verdicts: Sequence[float | None]
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


def parse_score(text: str, low: float, high: float) -> Score:
    """Return the number N of the last "Score: N" in a judge's text, None where it is no number
    between `low` and `high`. Behind N may stand "/" and the highest score; nothing else but marks
    of bold type and a full stop. "Score: 8,5", "Score: 11" of 10 and "Score: 8 or 9" are no
    scores."""
    match = NUMBER.fullmatch(_verdict(text, "score"))
    if match is None or (match[2] is not None and float(match[2]) != high):
        return None
    score = float(match[1])
    return score if low <= score <= high else None


def parse_preference(text: str) -> float | None:
    """Return 1 for a last "Better: A" in a judge's text, 0 for B, 0.5 for tie, None for anything
    else."""
    return {"a": 1.0, "b": 0.0, "tie": 0.5}.get(_verdict(text, "better").lower())


def _verdict(text: str, word: str) -> str:
    """What the last line with `word:` says behind it, without marks of bold type and a full
    stop."""
    lines = [match[2] for match in VERDICT.finditer(text) if match[1].lower() == word]
    return lines[-1].strip("*_` \t\r").removesuffix(".").strip("*_` \t\r") if lines else ""


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
