"""What a critic says of states, and what the policy earns from there: Monte Carlo returns of
continuations, for an audit of the critic.

All numbers are those that the critic was trained on: rewards of tokens as `Algorithm.token_rewards`
gives them (shaped score, KL penalty, scaling), discounted as the algorithm's advantage does, and
with the critic's value after a response that was cut off where the algorithm bootstraps.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from quartet.algorithms.advantages import critic_values, gae
from quartet.algorithms.algorithm import Algorithm
from quartet.algorithms.masked import masked
from quartet.algorithms.rewards import RunningScale
from quartet.experience import Batch, Prompt, Rollout
from quartet.generation.continuations import continued, cut
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.tensors import Bool, Float, Tensor

LAMBDAS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0)
"""The λ at which advantages are estimated."""
CANDIDATES = 3
"""The most next tokens that are compared at one state: the one that was sampled, and others."""
ROWS = 1024
"""Responses that are scored at once. It bounds memory and changes no result."""
Report = Callable[[str], None]


@dataclass(frozen=True)
class AuditSizes:
    """How much is sampled."""

    prefixes: int = 4
    """States of each response."""
    continuations: int = 32
    """Continuations from each state, and from each of its next tokens."""
    seed: int = 0


@dataclass(frozen=True)
class Audited:
    """A policy, its critic and its rewards at one step of a run."""

    generator: NativeGenerator
    sampling: Sampling
    score: Callable[[Sequence[Rollout]], Batch]
    """Returns rollouts as a batch, with log-probs, reference log-probs and values."""
    reward: Callable[[Sequence[Rollout]], list[Rollout]]
    """Returns rollouts with their scores."""
    algorithm: Algorithm


@dataclass(frozen=True)
class Action:
    """A next token at a state, and what was sampled after it."""

    token: int
    is_sampled: bool
    """Whether the response that the state belongs to went on with it."""
    ends: bool
    """Whether the response ends with it."""
    critic: float
    """r_t + γ V(s_{t+1}): what the critic expects of it."""
    returns: np.ndarray
    """[M] returns from the state on, that begin with this token; [1] where it ends the response."""
    advantages: np.ndarray
    """[M, 7] GAE of this token in each of those responses, at each of LAMBDAS."""


@dataclass(frozen=True)
class State:
    """The place before token `position` of a response to a prompt, counted from 0."""

    prompt: int
    tokens: tuple[int, ...]
    """The tokens of the response so far."""
    length: int
    """Tokens of the response that the state was taken from."""
    value: float
    returns: np.ndarray
    """[M] returns of continuations from here."""
    actions: list[Action] = field(default_factory=list)

    @property
    def position(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Samples:
    states: list[State]
    gamma: float
    responses: int
    """Responses that were scored."""
    unscored: int
    """Responses among them that the reward gave no score."""
    tokens: int
    """Tokens that were sampled."""


class TokenRewards:
    """The rewards of tokens, on a scale that does not depend on which responses are scored
    together.

    Two settings do: a running scale counts the responses of a step in, and whitening takes the mean
    and deviation of a step's tokens. The first stays as it was after the step that is audited; the
    second is that of the policy's answers to the prompts.
    """

    def __init__(self, algorithm: Algorithm, answers: Batch) -> None:
        shapes = tuple(map(_frozen, algorithm.scores))
        self.algorithm = dataclasses.replace(algorithm, scores=shapes)
        self.scale, self.shift = 1.0, 0.0
        if not algorithm.rewards.whiten:
            return
        whitened = self.algorithm.token_rewards(answers)[answers.response_mask].double()
        rewards: Any = dataclasses.replace(algorithm.rewards, whiten=False)  # type: ignore[call-arg]
        self.algorithm = dataclasses.replace(self.algorithm, rewards=rewards)
        plain = self.algorithm.token_rewards(answers)[answers.response_mask].double()
        low, high = int(plain.argmin()), int(plain.argmax())
        if plain[high] > plain[low]:
            self.scale = float((whitened[high] - whitened[low]) / (plain[high] - plain[low]))
        self.shift = float(whitened[low] - self.scale * plain[low])

    def __call__(self, batch: Batch) -> Float[Tensor, "B T"]:
        rewards = self.algorithm.token_rewards(batch).double()
        return masked(self.scale * rewards + self.shift, batch.response_mask)


def _frozen(shape: Any) -> Any:
    """Return a running scale to which a batch adds nothing: its moments weigh as many scores as no
    batch has. Other parts are returned as they are."""
    if not isinstance(shape, RunningScale) or shape.count == 0:
        return shape
    heavy = 1e12
    return dataclasses.replace(
        shape,
        count=shape.count * heavy,
        squares=shape.squares * heavy * shape.count / max(shape.count - 1, 1),
    )


def sample(
    audited: Audited,
    prompts: Sequence[Prompt],
    sizes: AuditSizes,
    report: Report,
) -> Samples:
    """Return states of the policy's answers to the prompts, with the critic's values and the
    returns of continuations from each.

    Every answer is divided into `prefixes` states: the one before its first token, and others at
    random places, each in its part of the answer. From each state, `continuations` are sampled; and
    as many after each of at most CANDIDATES next tokens: the answer's own, and those that the
    continuations began with most often.
    """
    sampler = _Sampler(audited, sizes, report)
    answers = sampler.rewarded(audited.generator.generate(prompts, audited.sampling))
    kept = [answer for answer in answers if answer.score is not None]
    if not kept:
        return Samples([], sampler.gamma, sampler.responses, sampler.unscored, sampler.tokens)
    sampler.tokens += sum(len(answer.response_ids) for answer in answers)
    sampler.rewards_of = TokenRewards(audited.algorithm, audited.score(kept))
    rng = np.random.default_rng(sizes.seed)
    places = [(a, t) for a in kept for t in positions(len(a.response_ids), sizes.prefixes, rng)]
    whole = sampler.continued([cut(answer, t) for answer, t in places], "states")
    begun = [candidates(answer, t, own) for (answer, t), own in zip(places, whole, strict=True)]
    after = sampler.after_actions(begun)
    rows = sampler.numbers(
        [(r, t) for (_, t), own in zip(places, whole, strict=True) for r in own]
        + [(r, t) for (_, t), sets in zip(places, after, strict=True) for own in sets for r in own]
    )
    states = []
    for (answer, t), own, first, sets in zip(places, whole, begun, after, strict=True):
        numbers = _known(rows, own)
        if len(numbers) < 2:  # no reward scored the others
            continue
        state = State(
            prompt=answer.group,
            tokens=answer.response_ids[:t],
            length=len(answer.response_ids),
            value=float(numbers[0, 0]),
            returns=numbers[:, 1],
        )
        for number, (start, ends) in enumerate(zip(first, sets, strict=True)):
            found = _known(rows, ends)
            if len(found) >= min(len(ends), 2):
                state.actions.append(_action(start, t, number == 0, ends, found))
        states.append(state)
    return Samples(states, sampler.gamma, sampler.responses, sampler.unscored, sampler.tokens)


def positions(length: int, count: int, rng: np.random.Generator) -> list[int]:
    """Return at most `count` places in a response of `length` tokens, in order: 0, and a random one
    in each of `count` − 1 equal parts of the rest."""
    edges = np.linspace(1, length, count)
    chosen = {0} | {int(rng.uniform(a, b)) for a, b in itertools.pairwise(edges)}
    return sorted(t for t in chosen if t < length)


def candidates(answer: Rollout, t: int, continuations: Sequence[Rollout]) -> list[Rollout]:
    """Return responses up to and with token t, one for each next token that is compared: the
    answer's own first, then those of the continuations, the most frequent first."""
    firsts: dict[int, list[Rollout]] = {answer.response_ids[t]: [answer]}
    for rollout in continuations:
        firsts.setdefault(rollout.response_ids[t], []).append(rollout)
    own, *others = firsts.values()
    others.sort(key=len, reverse=True)  # stable: ties stay in the order of the samples
    chosen = [own, *others[: CANDIDATES - 1]]
    return [r if len(r.response_ids) == t + 1 else cut(r, t + 1) for r, *_ in chosen]


def _known(rows: dict[int, np.ndarray], rollouts: Sequence[Rollout]) -> np.ndarray:
    """Return the numbers of those rollouts that have a score, a row for each."""
    found = [rows[id(rollout)] for rollout in rollouts if id(rollout) in rows]
    return np.stack(found) if found else np.zeros((0, 2 + len(LAMBDAS)))


def _action(
    start: Rollout, t: int, is_sampled: bool, ends: Sequence[Rollout], numbers: np.ndarray
) -> Action:
    value, td_error = numbers[0, 0], numbers[:, 2]  # LAMBDAS[0] is 0: r_t + γ V_{t+1} − V_t
    return Action(
        token=start.response_ids[t],
        is_sampled=is_sampled,
        ends=len(ends) == 1 and ends[0] is start,
        critic=float(td_error[0] + value),
        returns=numbers[:, 1],
        advantages=numbers[:, 2:],
    )


class _Sampler:
    """Samples and scores, and counts both."""

    rewards_of: TokenRewards

    def __init__(self, audited: Audited, sizes: AuditSizes, report: Report) -> None:
        self.audited, self.sizes, self.report = audited, sizes, report
        self.gamma = float(getattr(audited.algorithm.advantage, "gamma", 1.0))
        self.responses = self.unscored = self.tokens = 0

    def rewarded(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        scored = self.audited.reward(rollouts)
        self.responses += len(scored)
        self.unscored += sum(rollout.score is None for rollout in scored)
        return scored

    def continued(self, beginnings: Sequence[Rollout], what: str) -> list[list[Rollout]]:
        """Return the continuations of each beginning."""
        sets = continued(
            self.audited.generator,
            beginnings,
            self.audited.sampling,
            self.sizes.continuations,
            lambda done, of: self.report(f"sampling from {done} of {of} {what}"),
        )
        for beginning, own in zip(beginnings, sets, strict=True):
            self.tokens += sum(len(r.response_ids) - len(beginning.response_ids) for r in own)
        return sets

    def after_actions(self, begun: Sequence[Sequence[Rollout]]) -> list[list[list[Rollout]]]:
        """Return what is sampled after each next token of each state. A response that ends with its
        next token is alone."""
        flat = [start for own in begun for start in own]
        limit = self.audited.sampling.max_new_tokens
        is_over = [r.finish_reason == "stop" or len(r.response_ids) == limit for r in flat]
        open_ones = [start for start, over in zip(flat, is_over, strict=True) if not over]
        sets = iter(self.continued(open_ones, "next tokens"))
        results = iter(
            [[start] if over else next(sets) for start, over in zip(flat, is_over, strict=True)]
        )
        return [[next(results) for _ in own] for own in begun]

    def numbers(self, rows: Sequence[tuple[Rollout, int]]) -> dict[int, np.ndarray]:
        """Return for each response with a score, by its identity: V(s_t), the return from token t
        on, and the advantage of token t at each of LAMBDAS."""
        found: dict[int, np.ndarray] = {}
        for start in range(0, len(rows), ROWS):
            self.report(f"scoring {start + 1:,} of {len(rows):,} responses")
            part = rows[start : start + ROWS]
            scored = self.rewarded([rollout for rollout, _ in part])
            known = [
                (new, old, t)
                for new, (old, t) in zip(scored, part, strict=True)
                if new.score is not None
            ]
            if known:
                batch = self.audited.score([new for new, _, _ in known])
                starts = [len(new.prompt.ids) + t for new, _, t in known]
                columns = self._columns(batch)[:, range(len(known)), starts].T.numpy()
                found |= {id(old): c for (_, old, _), c in zip(known, columns, strict=True)}
        return found

    @torch.no_grad()
    def _columns(self, batch: Batch) -> Float[Tensor, "N B T"]:
        """Return the value, the return and the advantages of every token."""
        rewards, mask = self.rewards_of(batch), batch.response_mask
        algorithm = self.audited.algorithm
        values, final = critic_values(batch, algorithm.needs_final_values)
        values, final = values.double(), None if final is None else final.double()
        return torch.stack(
            [
                values,
                _gae(rewards, torch.zeros_like(values), mask, (self.gamma, 1.0), final),
                *(_gae(rewards, values, mask, (self.gamma, lam), final) for lam in LAMBDAS),
            ]
        )


def _gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    discounts: tuple[float, float],
    final: Float[Tensor, "B"] | None,
) -> Float[Tensor, "B T"]:
    gamma, lam = discounts
    return gae(rewards, values, mask, gamma, lam, final)
