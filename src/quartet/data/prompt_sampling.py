"""How often each prompt is drawn: every prompt alike, or by its recent pass rate in this run."""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from quartet.data.sampler import Sampler
from quartet.experience import Prompt, Rollout
from quartet.parts import Family, Field

MIN_SHARE = 0.01
"""The smallest share of epochs in which a prompt is drawn, so that an epoch cannot stay empty."""

EARLIER_RESPONSES = 2
"""How many responses the rate of a prompt's earlier visits counts as."""


class PromptSampling(Family):
    """How often the prompts of an RL stage are drawn."""

    accepts_name = True

    @property
    def reads_rates(self) -> bool:
        """Whether pass rates are recorded."""
        return True

    def passes(self, score: float) -> bool:
        """Return whether a response with this score passes."""
        raise NotImplementedError

    def __call__(self, rate: float) -> float:
        """Return the share of epochs, from 0.01 to 1, in which a prompt with this recent pass rate
        is drawn. A prompt without a rate is drawn in every epoch."""
        raise NotImplementedError


class EveryPrompt(PromptSampling):
    """Each epoch has every prompt once."""

    type: Literal["every"] = "every"

    @property
    def reads_rates(self) -> bool:
        return False

    def __call__(self, rate: float) -> float:
        return 1.0


class PassRate(PromptSampling):
    """Each epoch has a prompt of pass rate p with probability max(least, 4 p (1 − p)).

    p (1 − p) is the variance of a pass, and 4 p (1 − p) times the number of responses bounds the
    signal-to-noise ratio of the gradient from one prompt (Zhang et al. 2025, SPEED-RL, arXiv
    2506.09016, theorem 3.1): nothing is learnt where all responses pass, or none. Kimi k1.5 (2025,
    arXiv 2501.12599) samples in proportion to 1 − p, Bae et al. (2025, online difficulty filtering,
    arXiv 2504.03380) keep prompts of intermediate p, and Jiang et al. (2021, prioritized level
    replay, arXiv 2010.03934) return to levels by what is left to learn on them, and to old ones
    besides, as `least` does.

    >>> [PassRate()(p) for p in (0.0, 0.25, 0.5, 1.0)]
    [0.2, 0.75, 1.0, 0.2]
    """

    type: Literal["pass_rate"] = "pass_rate"
    pass_score: float = Field(
        default=0.5,
        description="A response passes if its score is at least this. The score is the sum of the "
        "weighted rewards.",
    )
    least: float = Field(
        default=0.2,
        ge=MIN_SHARE,
        le=1,
        description="The share of epochs in which a prompt is drawn that all responses pass, or "
        "none: how often its rate is looked at again. 1 draws every prompt alike.",
    )

    def passes(self, score: float) -> bool:
        return score >= self.pass_score

    def __call__(self, rate: float) -> float:
        return max(self.least, 4 * rate * (1 - rate))


class PromptSampler(Sampler[Prompt]):
    """Batches of prompts that are drawn by their pass rates.

    The recent pass rate of a prompt is the share of its responses that passed at its last visit,
    together with the rate before it, which counts as two responses: r ← (2 r + passed) / (2 + n).
    Prompts are known by their ids. Which prompts a batch has depends on the seed, the epoch and the
    rates at the time of the draw, so all ranks draw the same.

    The state is the place in the epoch and, where rates are read, the rates.
    """

    def __init__(
        self, records: Sequence[Prompt], batch_size: int, seed: int, sampling: PromptSampling
    ) -> None:
        super().__init__(records, batch_size, seed)
        self.sampling = sampling
        self.rates: dict[str, float] = {}
        self._num_prompts = len({prompt.id for prompt in records}) if sampling.reads_rates else 0

    def observe(self, group: Sequence[Rollout]) -> None:
        """Record the scores of responses to one prompt."""
        if not self.sampling.reads_rates:
            return
        prompt = group[0].prompt.id
        passed = [self.sampling.passes(r.score) for r in group if r.score is not None]
        before = self.rates.get(prompt)
        weight = 0 if before is None else EARLIER_RESPONSES
        total = weight * (before or 0.0) + sum(passed)
        self.rates[prompt] = total / (weight + len(passed))

    def metrics(self) -> dict[str, float]:
        """Return the number of prompts in each pool, of different ids: `unseen` have no rate yet,
        `hard` and `easy` are drawn as seldom as those that never or always pass, and `learnable`
        are the others. Empty where no rates are read."""
        if not self.sampling.reads_rates:
            return {}
        pools = dict.fromkeys(("unseen", "hard", "learnable", "easy"), 0)
        pools["unseen"] = self._num_prompts - len(self.rates)
        for rate in self.rates.values():
            pools[self._pool(rate)] += 1
        return {f"prompts/{name}": float(count) for name, count in pools.items()}

    def _pool(self, rate: float) -> str:
        if rate < 0.5 and self._share(rate) <= self._share(0.0):
            return "hard"
        return "easy" if rate > 0.5 and self._share(rate) <= self._share(1.0) else "learnable"

    def _share(self, rate: float) -> float:
        share = self.sampling(rate)
        if not 0 <= share <= 1:
            raise ValueError(
                f"data.sampling gave {share} for the pass rate {rate}. Return a share from 0 to 1."
            )
        return max(MIN_SHARE, share)

    def _is_drawn(self, index: int) -> bool:
        rate = self.rates.get(self.records[index].id) if self.rates else None
        if rate is None or (share := self._share(rate)) == 1:
            return True
        return random.Random(f"{self.seed}/{self.epoch}/{index}").random() < share

    def state(self) -> dict[str, Any]:
        rates = {"rates": [list(row) for row in self.rates.items()]}
        return super().state() | (rates if self.sampling.reads_rates else {})

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        rates = dict(state.get("rates", ())) if self.sampling.reads_rates else {}
        for prompt, rate in rates.items():
            if not isinstance(rate, int | float) or math.isnan(rate) or not 0 <= rate <= 1:
                raise ValueError(f"pass rate {rate} of {prompt}")
        self.rates = rates
