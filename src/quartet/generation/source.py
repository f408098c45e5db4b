"""What the `[generator]` table becomes: a source, which makes the generator when a stage begins."""

from dataclasses import dataclass
from typing import Literal

from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.generation.protocol import Generator
from quartet.models.protocols import CausalModel, Tokenizer
from quartet.parts import Family, Field


@dataclass(frozen=True)
class GeneratorContext:
    """What a source is given to make a generator."""

    model: CausalModel
    """The model to sample from."""
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    """The tokens after which a response is over."""
    seed: int
    copied: bool = False
    """Whether `model` is a copy of the one that learns, into which `load_weights` must read new
    weights. Otherwise it is the one that learns."""
    process_group: ProcessGroup = SINGLE_PROCESS
    """The ranks that sample together; every one of them needs all rollouts. A generator of a user's
    own is called on rank 0 alone, and has a group of one."""


class GeneratorSource(Family):
    """How responses are sampled: a member makes a `Generator`. The fields of a subclass are its
    settings."""

    def make(self, context: GeneratorContext) -> Generator:
        """Return a generator for the model in the context. Each stage makes its own, and one more
        for the held-out prompts that it answers now and then."""
        raise NotImplementedError(f"{type(self).__name__} has no make")


class Native(GeneratorSource):
    """Responses are sampled in the training process, by the weights that are trained."""

    type: Literal["native"] = "native"

    def make(self, context: GeneratorContext) -> Generator:
        from quartet.generation.native import NativeGenerator

        return NativeGenerator(
            context.model,
            context.tokenizer,
            context.stop_ids,
            context.seed,
            process_group=context.process_group,
            copied=context.copied,
        )


class Servers(GeneratorSource):
    """Responses are sampled by inference servers, which are given the new weights."""

    abstract = True
    urls: tuple[str, ...] = Field(
        min_length=1,
        description='The addresses that the servers listen on, such as ["http://127.0.0.1:8000"].',
    )
    shared: str | None = Field(
        default=None,
        description="A folder that this process writes new weights to and the servers read them "
        "from. Left out, it is in the run's.",
    )
    timeout: float = Field(
        default=600.0,
        gt=0,
        description="Seconds that one response may take, and that a lost server has to come back.",
    )
    adapter: bool = Field(
        default=False,
        description="Send the base model once and then the adapter alone. The servers must have "
        "been started with --enable-lora.",
    )

    @property
    def sleeps(self) -> bool:
        """Whether the servers sleep whenever they do not sample."""
        return False

    @property
    def sends_weights(self) -> bool:
        """Whether new weights are sent to the servers' GPUs, without a folder."""
        return False


class Vllm(Servers):
    """Servers that run vLLM."""

    type: Literal["vllm"] = "vllm"
    sleep: bool = Field(
        default=False,
        description="Put the servers to sleep whenever they do not sample, so that a run can train "
        "on their GPUs. They must have been started with --enable-sleep-mode.",
    )

    transfer: Literal["folder", "nccl"] = Field(
        default="folder",
        description='How new weights reach the servers: through a folder, or with "nccl" from GPU '
        "to GPU; then the servers must have been started with --weight-transfer-config "
        """'{"backend": "nccl"}', on GPUs of their own.""",
    )

    @property
    def sleeps(self) -> bool:
        return self.sleep

    @property
    def sends_weights(self) -> bool:
        return self.transfer == "nccl"


class SgLang(Servers):
    """Servers that run SGLang."""

    type: Literal["sglang"] = "sglang"


__all__ = ["GeneratorContext", "GeneratorSource", "Native", "Servers", "SgLang", "Vllm"]
