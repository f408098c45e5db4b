"""Rollouts of several turns: the policy and an environment alternate, and only the policy's own
tokens are learned from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.experience import FinishReason, Prompt, Rollout
from quartet.generation.protocol import Generator, Weights
from quartet.generation.sampling import Sampling
from quartet.generation.stops import StopStrings
from quartet.models.chat import ChatError, after_reply, render, turn_end
from quartet.models.protocols import Tokenizer

Message = Mapping[str, Any]


@runtime_checkable
class Environment(Protocol):
    """The environment of one episode; each rollout has a new one. Messages have `role` and
    `content`."""

    def reset(self, prompt: Prompt) -> Sequence[Message]:
        """Return messages that follow the prompt before the policy's first turn; often none."""
        ...

    def step(self, response: str) -> tuple[Sequence[Message], float, bool]:
        """Return the messages that answer the policy's turn, the reward of that turn, and whether
        the episode is over."""
        ...


@dataclass
class _Episode:
    """A rollout that is not finished yet."""

    prompt: Prompt
    group: int
    number: int
    world: Environment | None
    """None where another rank has it."""
    history: list[Message]
    context: list[int]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    policy_mask: list[bool] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    finish: FinishReason | None = None
    version: int = 0

    def say(self, turn: Rollout) -> None:
        """Append the policy's tokens, as they were sampled."""
        self.ids += turn.response_ids
        self.logprobs += turn.logprobs
        self.entropies += turn.entropies or [0.0] * len(turn.response_ids)
        self.policy_mask += [True] * len(turn.response_ids)
        self.kept += turn.kept or [""] * len(turn.response_ids)
        self.rewards += [0.0] * len(turn.response_ids)
        self.version = turn.policy_version

    def hear(self, ids: Sequence[int]) -> None:
        """Append the environment's tokens, which have no log-probs and no rewards."""
        self.ids += ids
        self.policy_mask += [False] * len(ids)
        self.kept += [""] * len(ids)
        for numbers in (self.logprobs, self.entropies, self.rewards):
            numbers.extend([0.0] * len(ids))


_Answer = Sequence[Any]
"""An environment's answer to a turn, in the form that ranks exchange: messages, the reward, and
whether the episode is over."""


def _answers(episodes: Sequence[_Episode], turns: Sequence[Rollout]) -> list[_Answer]:
    """Return each environment's answer to its turn."""
    answers: list[_Answer] = []
    for episode, turn in zip(episodes, turns, strict=True):
        assert episode.world is not None
        messages, reward, is_over = episode.world.step(turn.response)
        answers.append((list(messages), float(reward), bool(is_over)))
    return answers


def check_second_turn(tokenizer: Tokenizer, prompt: Prompt) -> None:
    """Check, before anything is sampled, that the chat template can continue an answer to the
    prompt with a message of an environment. Raises ChatError."""
    message = {"role": "user", "content": "and then?"}
    try:
        after_reply(tokenizer, prompt.messages or (), [message], turn_end(tokenizer), prompt.extra)
    except ChatError as error:
        raise ChatError(
            f"{prompt.id}: an environment cannot answer the policy in this conversation: {error}"
        ) from error


class Episodes:
    """A generator of rollouts of several turns, on top of one that answers prompts.

    `max_tokens` bounds prompt and response together; `sampling.max_new_tokens` bounds a turn. An
    episode ends when the environment says so, after `max_turns`, or when a turn was cut off or the
    next one would not fit ("length"). The reward of a turn stands on its last token. Rank 0
    of a process group runs the environments, which may answer differently each time, and gives
    their messages to all ranks.
    """

    def __init__(
        self,
        turns: Generator,
        tokenizer: Tokenizer,
        make: Callable[[], Environment],
        max_turns: int,
        max_tokens: int,
        process_group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.turns = turns
        self.tokenizer = tokenizer
        self.make = make
        self.max_turns = max_turns
        self.max_tokens = max_tokens
        self.process_group = process_group

    def load_weights(self, weights: Weights) -> None:
        self.turns.load_weights(weights)

    def state(self) -> Any:
        return self.turns.state()

    def load_state(self, state: Any) -> None:
        self.turns.load_state(state)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, samples_per_prompt: int = 1
    ) -> list[Rollout]:
        for prompt in prompts:
            if prompt.messages is None:
                raise ChatError(
                    f"{prompt.id}: is plain text; an environment speaks in conversations. Give the "
                    f"row messages."
                )
        worlds = [
            (self.make(), p) if self.process_group.is_rank_zero else (None, p)
            for p in prompts
            for _ in range(samples_per_prompt)
        ]
        openings = self._heard(
            lambda: [list(world.reset(p)) for world, p in worlds if world is not None]
        )
        episodes = [
            self._begun(p, row // samples_per_prompt, row % samples_per_prompt, world, opening)
            for row, ((world, p), opening) in enumerate(zip(worlds, openings, strict=True))
        ]
        for number in range(1, self.max_turns + 1):
            going = [e for e in episodes if e.finish is None]
            if not going:
                break
            contexts = [replace(e.prompt, ids=(*e.context, *e.ids)) for e in going]
            turns = self.turns.generate(contexts, sampling, 1)
            answers = self._heard(partial(_answers, going, turns))
            for episode, turn, answer in zip(going, turns, answers, strict=True):
                self._take(episode, turn, answer, sampling, last=number == self.max_turns)
        return [self._rollout(episode) for episode in episodes]

    def _heard(self, say: Callable[[], list[Any]]) -> list[Any]:
        """Return what `say` returns on rank 0, on every rank."""
        messages: list[Any] = self.process_group.on_rank_zero(say)
        return messages

    def _begun(
        self,
        prompt: Prompt,
        group: int,
        number: int,
        world: Environment | None,
        opening: Sequence[Message],
    ) -> _Episode:
        history, context = list(prompt.messages or ()), list(prompt.ids)
        if opening:
            history += opening
            context = render(self.tokenizer, history, columns=prompt.extra)[0]
        return _Episode(prompt, group, number, world, history, context)

    def _take(
        self, episode: _Episode, turn: Rollout, answer: _Answer, sampling: Sampling, last: bool
    ) -> None:
        """Add a turn of the policy and the environment's answer, and end the episode where it is
        over or the next turn would not fit."""
        episode.say(turn)
        messages, reward, is_over = answer
        episode.rewards[-1] += reward
        if turn.finish_reason == "length":
            episode.finish = "length"
            return
        reply = {"role": "assistant", "content": turn.response}
        heard: list[int] = []
        if messages:
            stops = StopStrings(self.tokenizer, sampling.stop)
            has_stopped = stops.length(turn.prompt.ids, turn.response_ids) is not None
            end = None if has_stopped else turn.response_ids[-1]
            columns = episode.prompt.extra
            heard = after_reply(self.tokenizer, episode.history, messages, end, columns)
        episode.history += [reply, *messages]
        room = self.max_tokens - len(episode.context) - len(episode.ids) - len(heard)
        if is_over or last:
            episode.hear(heard if room >= 0 else [])
            episode.finish = "stop" if is_over else "length"
        elif room < sampling.max_new_tokens:
            episode.finish = "length"
        else:
            episode.hear(heard)

    def _rollout(self, episode: _Episode) -> Rollout:
        prompt = replace(episode.prompt, ids=tuple(episode.context))
        return Rollout(
            id=f"{prompt.id}/{episode.number}",
            prompt=prompt,
            group=episode.group,
            response_ids=tuple(episode.ids),
            response=self.tokenizer.decode(episode.ids, skip_special_tokens=True),
            logprobs=tuple(episode.logprobs),
            entropies=tuple(episode.entropies),
            finish_reason=episode.finish or "length",
            policy_version=episode.version,
            policy_mask=tuple(episode.policy_mask),
            turn_rewards=tuple(episode.rewards),
            kept=tuple(episode.kept) if any(episode.kept) else None,
        )
