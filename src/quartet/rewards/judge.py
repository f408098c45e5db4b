"""A language model as judge, behind any OpenAI-compatible endpoint."""

import hashlib
import json
import logging
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from quartet.experience import Rollout
from quartet.rewards.protocol import RewardError, Score
from quartet.rewards.remote import Endpoint

log = logging.getLogger(__name__)

SCORE_PROMPT = """\
Rate the answer to the request below from 1 (useless or wrong) to 10 (could not be better). Judge what it says, not its
length.

<request>
{prompt}
</request>

<answer>
{response}
</answer>

End with one line of the form "Score: N"."""

PAIR_PROMPT = """\
Which of two answers to the request below is better? Judge what they say, not how long they are or which comes first.

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
    """What a judge says of each response: a number from 1 to 10, or, pairwise, the share of comparisons it wins against its
    neighbours among the answers to the same prompt (a ring: each is compared with two).

    Every comparison is asked twice, with the sides swapped; a judge who changes its mind gives a tie. Answers are cached by the
    hash of the whole request, in a file that later runs may be given. What cannot be read as a verdict has no score; if nothing
    can, the run stops.
    """

    def __init__(
        self,
        name: str,
        endpoint: Endpoint,
        model: str,
        mode: Literal["score", "pairwise"],
        prompt: str | None,
        cache: Path,
        parallel: int = 8,
    ) -> None:
        self.name, self.endpoint, self.model, self.mode, self.parallel = name, endpoint, model, mode, parallel
        self.prompt = prompt or (SCORE_PROMPT if mode == "score" else PAIR_PROMPT)
        if missing := [field for field in NEEDED[mode] if field not in self.prompt]:
            raise RewardError(f"reward.prompt: the judge's prompt has no {missing[0]}; it is where the text is put in.")
        self.cache = Cache(cache)

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return self._scored(rollouts) if self.mode == "score" else self._compared(rollouts)

    def _scored(self, rollouts: Sequence[Rollout]) -> list[Score]:
        said = self._ask([self._filled(prompt=r.prompt.text, response=r.response) for r in rollouts])
        return [_last(r"score\s*:\s*\**\s*(-?\d+(?:\.\d+)?)", text, float) for text in said]

    def _compared(self, rollouts: Sequence[Rollout]) -> list[Score]:
        pairs = neighbours(rollouts)
        asked = [
            self._filled(prompt=rollouts[i].prompt.text, first=rollouts[a].response, second=rollouts[b].response)
            for i, j in pairs
            for a, b in ((i, j), (j, i))
        ]
        said = [
            None if text is None else _last(r"better\s*:\s*\**\s*(a|b|tie)\b", text, str.lower) for text in self._ask(asked)
        ]
        points: list[list[float]] = [[] for _ in rollouts]
        for (i, j), one, two in zip(pairs, said[::2], said[1::2], strict=True):
            if one is None or two is None:
                continue
            won = (_FIRST[one] + 1 - _FIRST[two]) / 2
            points[i].append(won)
            points[j].append(1 - won)
        return [sum(p) / len(p) if p else None for p in points]

    def _filled(self, **texts: str) -> str:
        """The prompt with the texts in it, whatever braces they have themselves."""
        return re.sub(r"\{(\w+)\}", lambda match: texts.get(match[1], match[0]), self.prompt)

    def _ask(self, prompts: Sequence[str]) -> list[str | None]:
        with ThreadPoolExecutor(self.parallel) as pool:
            answers = list(pool.map(self._answer, prompts))
        errors = [answer for answer in answers if isinstance(answer, RewardError)]
        if errors and len(errors) == len(answers):
            raise errors[0]
        for error in errors:
            log.warning("%s", error)
        return [None if isinstance(answer, RewardError) else answer for answer in answers]

    def _answer(self, prompt: str) -> str | RewardError:
        request = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
        key = hashlib.sha256(json.dumps([self.endpoint.url, request], sort_keys=True).encode()).hexdigest()
        if (known := self.cache.get(key)) is not None:
            return known
        try:
            answer = self.endpoint.ask(request)
            said = answer["choices"][0]["message"]["content"]
        except RewardError as error:
            return error
        except (KeyError, IndexError, TypeError):
            return RewardError(f"judge {self.endpoint.url} answered without choices[0].message.content.")
        self.cache.put(key, said or "")
        return said or ""


_FIRST = {"a": 1.0, "b": 0.0, "tie": 0.5}


def neighbours(rollouts: Sequence[Rollout]) -> list[tuple[int, int]]:
    """Pairs of answers to the same prompt, each with the next and the last with the first: a ring for three or more."""
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


class Cache:
    """Texts by key in a file of JSON lines that is only appended to."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.Lock()
        self.known: dict[str, str] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    self.known[row["key"]] = row["text"]
                except (ValueError, KeyError, TypeError):
                    continue  # a line that a kill cut short is asked again

    def get(self, key: str) -> str | None:
        return self.known.get(key)

    def put(self, key: str, text: str) -> None:
        with self.lock:
            self.known[key] = text
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "text": text}, ensure_ascii=False) + "\n")


def _last(pattern: str, text: str | None, convert: Any) -> Any:
    found = re.findall(pattern, text or "", re.IGNORECASE)
    return convert(found[-1]) if found else None
