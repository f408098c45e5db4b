"""A generator that returns prepared responses, for tests and for replaying a dialogue."""

from collections.abc import Iterable, Mapping, Sequence

from quartet.experience import Prompt, Rollout
from quartet.generation.protocol import Weights
from quartet.generation.sampling import Sampling
from quartet.models.chat import turn_end
from quartet.models.protocols import Tokenizer
from quartet.models.text import response_ids


class ScriptedGenerator:
    """Returns the responses of a list in order, again from the start after the last. Each ends as
    an answer to its prompt does, unless it is cut off at `max_new_tokens`."""

    def __init__(self, answers: Iterable[str], tokenizer: Tokenizer) -> None:
        self.answers, self.given = tuple(answers), 0
        self.tokenizer = tokenizer
        self.version = 0

    def load_weights(self, weights: Weights) -> None:
        self.version = weights.version

    def state(self) -> dict[str, int]:
        return {"given": self.given, "version": self.version}

    def load_state(self, state: Mapping[str, int]) -> None:
        self.given, self.version = state["given"], state["version"]

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, samples_per_prompt: int = 1
    ) -> list[Rollout]:
        return [
            self._rollout(prompt, group, sample, self._next(), sampling.max_new_tokens)
            for group, prompt in enumerate(prompts)
            for sample in range(samples_per_prompt)
        ]

    def _next(self) -> str:
        self.given += 1
        return self.answers[(self.given - 1) % len(self.answers)]

    def _rollout(self, prompt: Prompt, group: int, sample: int, answer: str, limit: int) -> Rollout:
        in_chat = prompt.messages is not None
        end = turn_end(self.tokenizer) if in_chat else self.tokenizer.eos_token_id
        ids = response_ids(self.tokenizer, answer, end)
        return Rollout(
            id=f"{prompt.id}/{sample}",
            prompt=prompt,
            group=group,
            response_ids=tuple(ids[:limit]),
            response=answer,
            logprobs=(0.0,) * min(len(ids), limit),
            finish_reason="stop" if len(ids) <= limit else "length",
            policy_version=self.version,
        )
