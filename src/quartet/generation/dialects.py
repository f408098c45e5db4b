"""The HTTP interfaces of vLLM and SGLang, as one protocol.

Both servers take token ids and return ids with log-probs, can abort running requests and return
what was generated so far, load new weights from a folder, and load adapters by name. They differ
in the names of these things, and in two facts:

- vLLM's log-probs are of the distribution it samples from (`--logprobs-mode processed_logprobs`),
  SGLang's of the distribution before top-k and top-p.
- vLLM uses the seed of a request; SGLang does so only with `--enable-deterministic-inference`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from quartet.generation.sampling import Sampling
from quartet.io.texts import excerpt

LOWEST = -1e9
"""A number below this is not accepted as a log-prob. vLLM reports −9,999 for probability 0."""
ROUNDING = 1e-3
"""A log-prob may exceed 0 by this much, from rounding."""


@dataclass(frozen=True)
class Order:
    """A POST request: its path and its JSON body."""

    path: str
    body: Any = None


@dataclass(frozen=True)
class Piece:
    """The part of a response that one request generated."""

    ids: list[int]
    logprobs: list[float]
    versions: list[int]
    """The version of the weights that each token was sampled from, under the name that the server
    was given with them."""
    finish: Literal["stop", "length", "abort"]


@runtime_checkable
class Dialect(Protocol):
    pause: Order
    """Abort running requests, which return what they have; later requests wait."""
    resume: Order
    sleep: Order | None
    """Release the memory of the GPU and keep the weights; None where this is not supported."""
    wake: Order | None
    """End `sleep`; nothing happens to a server that is awake."""

    def write(
        self,
        ids: Sequence[int],
        tokens: int,
        sampling: Sampling,
        stops: list[int],
        seed: int,
        name: str | None,
        excluded: Sequence[int] = (),
    ) -> Order:
        """Return the request that continues `ids` by at most `tokens` tokens, with the adapter
        `name` where there is one. Ids in `excluded` are not to be sampled."""
        ...

    def written(self, reply: Mapping[str, Any]) -> Piece:
        """Return what a reply contains. Raises KeyError, TypeError, IndexError or ValueError for a
        reply that is not an answer."""
        ...

    def read(self, folder: Path, version: int) -> list[Order]:
        """Return the requests that load weights from a model folder and set their version."""
        ...

    def put_on(self, name: str, folder: Path) -> Order:
        """Return the request that loads an adapter."""
        ...

    def take_off(self, name: str) -> Order:
        """Return the request that unloads an adapter."""
        ...


class _Adapters:
    """The adapter requests, which vLLM and SGLang have under different path prefixes."""

    below = ""

    def put_on(self, name: str, folder: Path) -> Order:
        return Order(
            f"{self.below}/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}
        )

    def take_off(self, name: str) -> Order:
        return Order(f"{self.below}/unload_lora_adapter", {"lora_name": name})


class VllmDialect(_Adapters):
    """vLLM 0.32 or later, the first that reports the version of the weights of each token. It must
    be started with VLLM_SERVER_DEV_MODE=1 and `--enable-scale-out`; for adapters also with
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and `--enable-lora`; to sleep with `--enable-sleep-mode`.
    """

    pause, resume = Order("/pause?mode=abort"), Order("/resume")
    sleep: Order | None = Order("/sleep?level=1")
    wake: Order | None = Order("/wake_up")
    below = "/v1"

    def write(
        self,
        ids: Sequence[int],
        tokens: int,
        sampling: Sampling,
        stops: list[int],
        seed: int,
        name: str | None,
        excluded: Sequence[int] = (),
    ) -> Order:
        drawing = {
            "max_tokens": tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_tokens": sampling.min_new_tokens,
            **NEUTRAL,
            "seed": seed,
            "logprobs": 0,
            "stop_token_ids": stops,
            **_stopping(sampling),
            "detokenize": bool(sampling.stop),
            **_without(excluded),
        }
        body = {"token_ids": list(ids), "sampling_params": drawing}
        return Order("/inference/v1/generate", body if name is None else {"model": name, **body})

    def written(self, reply: Mapping[str, Any]) -> Piece:
        choice = reply["choices"][0]
        content = choice["logprobs"]["content"] or []
        logprobs, ids = [token["logprob"] for token in content], choice["token_ids"]
        return _piece(ids, logprobs, choice.get("weight_versions"), choice["finish_reason"])

    def read(self, folder: Path, version: int) -> list[Order]:
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        return [
            Order("/collective_rpc", reload),
            Order("/update_weight_version", {"new_version": str(version)}),
        ]


class Sglang(_Adapters):
    """SGLang's own endpoints. For adapters it must be started with `--enable-lora --max-lora-rank …
    --lora-target-modules all`."""

    pause, resume = Order("/pause_generation", {"mode": "abort"}), Order("/continue_generation", {})
    sleep: Order | None = None
    wake: Order | None = None

    def write(
        self,
        ids: Sequence[int],
        tokens: int,
        sampling: Sampling,
        stops: list[int],
        seed: int,
        name: str | None,
        excluded: Sequence[int] = (),
    ) -> Order:
        drawing = {
            "max_new_tokens": tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_new_tokens": sampling.min_new_tokens,
            **NEUTRAL,
            "sampling_seed": seed,
            "stop_token_ids": stops,
            **_stopping(sampling),
            "skip_special_tokens": False,
            **_without(excluded),
        }
        body = {"input_ids": list(ids), "sampling_params": drawing, "return_logprob": True}
        return Order("/generate", body if name is None else {"lora_path": name, **body})

    def written(self, reply: Mapping[str, Any]) -> Piece:
        meta = reply["meta_info"]
        rows = meta.get("output_token_logprobs") or []  # aborted before it was begun
        ids, logprobs = [row[1] for row in rows], [row[0] for row in rows]
        whole = [{"version": meta["weight_version"], "start": 0, "end": len(ids)}]
        return _piece(
            ids, logprobs, meta.get("weight_versions") or whole, meta["finish_reason"]["type"]
        )

    def read(self, folder: Path, version: int) -> list[Order]:
        body = {"model_path": str(folder), "weight_version": str(version), "flush_cache": True}
        return [Order("/update_weights_from_disk", body)]


DIALECTS: dict[str, Dialect] = {"vllm": VllmDialect(), "sglang": Sglang()}


NEUTRAL = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""What would change the distribution and is left out of it by name: what a request does not say, a
server may take from the model's generation_config.json, such as Gemma's top_k = 64."""


def _stopping(sampling: Sampling) -> dict[str, Any]:
    """Return the setting that ends responses at strings, which both servers leave in the ids."""
    return {"stop": list(sampling.stop)} if sampling.stop else {}


def _without(excluded: Sequence[int]) -> dict[str, Any]:
    """Return the setting that takes ids out of the distribution, which both servers apply before
    they sample and before they compute log-probs. A bias of −100 is the lowest that vLLM takes: it
    leaves a probability below e⁻⁵⁰ where logits differ by less than 50."""
    return {"logit_bias": {str(token): -100.0 for token in excluded}} if excluded else {}


def _piece(ids: Any, logprobs: Any, spans: Any, finish: Any) -> Piece:
    """Return a checked piece. `spans` has the version of the tokens from `start` to before `end`.
    Raises ValueError for values of another type or range and converts nothing, because the policy
    is trained on them."""
    if not all(isinstance(values, list) for values in (ids, logprobs, spans or [])):
        raise ValueError("token ids, log-probs or versions are no list")
    if len(ids) != len(logprobs):
        raise ValueError(f"{len(ids)} token ids came with {len(logprobs)} log-probs")
    for token in ids:
        if type(token) is not int or not 0 <= token < 2**31:
            raise ValueError(f"{excerpt(repr(token), 40)} is no token id")
    for logprob in logprobs:
        if type(logprob) not in (int, float) or not LOWEST <= logprob <= ROUNDING:
            raise ValueError(f"{excerpt(repr(logprob), 40)} is no log-prob")
    if finish not in ("stop", "length", "abort"):
        raise ValueError(f"finish_reason {excerpt(repr(finish), 40)}")
    if not ids and finish != "abort":
        raise ValueError("an answer came without a token")
    return Piece(
        ids, [float(logprob) for logprob in logprobs], _versions(spans or [], len(ids)), finish
    )


def _versions(spans: Sequence[Any], length: int) -> list[int]:
    """Return the version of each token. Spans must follow each other and cover all tokens."""
    versions: list[int] = []
    for span in spans:
        version, start, end = str(span["version"]), span["start"], span["end"]
        follows = (
            type(start) is int and type(end) is int and start == len(versions) <= end <= length
        )
        if not follows or not (version.isascii() and version.isdecimal() and len(version) < 10):
            raise ValueError(
                f"{excerpt(repr(span), 80)} does not say which weights the next tokens are from"
            )
        versions += [int(version)] * (end - start)
    if len(versions) != length:
        raise ValueError(
            "it does not say which weights each token is from: is it as new as docs/scaling.md "
            "asks?"
        )
    return versions
