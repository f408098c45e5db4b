"""The data that flow: Prompt -> Rollout -> Batch -> Experience. Each is frozen; a stage takes one
and returns the next.

Everywhere, entry t of a per-token tensor is about token t: `logprobs[:, t] = log p(tokens[:, t] |
tokens[:, :t])`, and `values[:, t]` is the value before token t is chosen. Rows are padded on the
right; what is real is known from lengths and from the response mask, never from comparing ids with
a pad id.

Batches and experience are in main memory, also where the models are on a GPU: advantages, metrics
and the record are computed there without a wait for the device, and in float64 where that matters.
Models take tokens and masks from main memory; the learner brings their outputs back, and sends the
rows of a micro-batch to the device where its loss needs them.

Two policies that are easily confused have two names: *old* is the actor when it sampled,
*reference* the frozen model that the KL penalty holds the actor to.
"""

import base64
import dataclasses
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from quartet.tensors import Bool, Float, Int, Tensor, torch

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """What the policy is asked to continue.

    >>> Prompt(id="sums:17", ids=(6, 3, 14, 5, 15), text="41+3=").text
    '41+3='
    """

    id: str
    ids: tuple[int, ...]
    text: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What a verifier needs: the other columns of the prompt's row."""
    messages: Sequence[Mapping[str, Any]] | None = None
    """The conversation that the ids are, where the row had one."""


@dataclass(frozen=True)
class Rollout:
    """One answer of the policy to one prompt.

    >>> Rollout(id="sums:17/2", prompt=..., group=0, response_ids=(7, 7, 1), response="44",
    ...         logprobs=(-0.11, -0.36, -0.01), finish_reason="stop", policy_version=3,
    ...         score=1.0, components={"exact": 1.0})  # doctest: +SKIP

    `logprobs` are those of the distribution that was sampled from, temperature included; the
    end-of-sequence token, where the policy chose it, is part of `response_ids`.
    """

    id: str
    prompt: Prompt
    group: int
    response_ids: tuple[int, ...]
    response: str
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    policy_version: int
    score: float | None = None
    components: Mapping[str, float | None] = field(default_factory=dict)
    """The score of each reward by name; None where it gave none."""
    entropies: tuple[float, ...] | None = None
    """The entropy of the distribution that each token was drawn from, where the sampler gives
    it."""
    token_scores: tuple[float, ...] | None = None
    """A score for each token of the response, where the reward gives one and the algorithm reads
    it."""
    policy_mask: tuple[bool, ...] | None = None
    """True for the response's tokens that the policy sampled, False for those that an environment
    added, whose log-probs are 0. None: the policy sampled all."""
    turn_rewards: tuple[float, ...] | None = None
    """The rewards of an environment, on the last token of each turn; 0 elsewhere."""
    greedy_score: float | None = None
    """The score of the greedy response to the same prompt, where the algorithm compares with it."""
    state_values: tuple[float | None, ...] | None = None
    """Before each token that begins at a state, the mean score of the continuations that were
    sampled from there, where the algorithm needs it; None before other tokens."""
    continuation_tokens: int = 0
    """The tokens that were sampled for `state_values`."""
    versions: tuple[int, ...] | None = None
    """The version of the weights that sampled each token, where they may differ; None:
    `policy_version` for all."""
    logged_metrics: Mapping[str, float] = field(default_factory=dict)
    """What reward functions logged in the call that scored this response, as REWARD/NAME."""
    logged_columns: Mapping[str, Any] = field(default_factory=dict)
    """What reward functions logged of this response, a text, number or None as REWARD/COLUMN."""
    kept: tuple[str, ...] | None = None
    """The ids that top-k and top-p left before each token, as `pack_ids` writes them; "" for tokens
    that an environment added. None where the sampler keeps none."""


def pack_ids(ids: bytes | Iterable[int]) -> str:
    """Return token ids as text: four bytes each, in base64. They may be given as those bytes."""
    return base64.b64encode(ids if isinstance(ids, bytes) else array("i", ids)).decode()


@dataclass(frozen=True)
class KeptIds:
    """The ids that the sampler's filter left before each token of B rows. The token was drawn from
    them, and the policy is the softmax over them alone."""

    counts: Int[Tensor, "B T"]
    """How many ids were left; 0 for tokens that the policy did not sample."""
    ids: tuple[Int[Tensor, "_"], ...]
    """Those of each row, one token after the other."""

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], width: int) -> "KeptIds | None":
        """Return the ids that the filter left for rows of prompt and response, padded to a width;
        None if a rollout has none. Raises ValueError for a token that is not among its own."""
        counts, ids = torch.zeros(len(rollouts), width, dtype=torch.long), []
        for row, rollout in enumerate(rollouts):
            if rollout.kept is None:
                return None
            packed = [base64.b64decode(each) for each in rollout.kept]
            some = torch.tensor([len(each) // 4 for each in packed])
            start = len(rollout.prompt.ids)
            counts[row, start : start + len(some)] = some
            joined = bytearray(b"".join(packed))
            left = torch.frombuffer(joined, dtype=torch.int32) if joined else some.new_empty(0)
            drawn = torch.tensor(rollout.response_ids).repeat_interleave(some)
            if int((left == drawn).sum()) != int((some > 0).sum()):
                raise ValueError(f"{rollout.id}: a token is not among the ids that its filter left")
            ids.append(left)
        return cls(counts, tuple(ids))

    def rows(self, indices: Sequence[int], width: int) -> "KeptIds":
        """Return these rows only, in `width` columns."""
        return KeptIds(self.counts[list(indices), :width], tuple(self.ids[i] for i in indices))

    def at(self, mask: Bool[Tensor, "B T"]) -> tuple[Int[Tensor, "_"], Int[Tensor, "_"]]:
        """Return the ids left at the N masked tokens, and for each the number of its token, from 0
        to N − 1. The mask has all tokens that the policy sampled, and may have more columns."""
        counts = torch.nn.functional.pad(self.counts, (0, mask.shape[1] - self.counts.shape[1]))
        some = counts[mask.cpu()]
        return torch.cat(self.ids).long(), torch.arange(len(some)).repeat_interleave(some)


@dataclass(frozen=True)
class Batch:
    """The rollouts of one step, scored by every model that the algorithm needs.

    For the prompt "41+3=" and the answer "44<eos>" a row of `tokens` is [6 3 14 5 15 | 7 7 1 | 0],
    of `response_mask` [0 0 0 0 0 | 1 1 1 | 0], and of `old_logprobs` [0 0 0 0 0 | -0.11 -0.36 -0.01
    | 0].
    """

    ids: tuple[str, ...]
    tokens: Int[Tensor, "B T"]
    lengths: Int[Tensor, "B"]
    response_mask: Bool[Tensor, "B T"]
    scores: Float[Tensor, "B"]
    ended: Bool[Tensor, "B"]
    """Whether the policy ended the response itself; False where it was cut off."""
    groups: Int[Tensor, "B"]
    """Rows that answer the same prompt share a number."""
    rollout_logprobs: Float[Tensor, "B T"]
    """The sampler's own; `old_logprobs` are the learner's for the same weights."""
    old_logprobs: Float[Tensor, "B T"]
    ref_logprobs: Float[Tensor, "B T"] | None = None
    exact_kl: Float[Tensor, "B T"] | None = None
    """KL(π_old ‖ π_ref) over the whole vocabulary, before each token."""
    entropy: Float[Tensor, "B T"] | None = None
    """The entropy of π_old before each token."""
    values: Float[Tensor, "B T"] | None = None
    final_values: Float[Tensor, "B"] | None = None
    """The value after the last token of each row: what a response that was cut off could still have
    earned."""
    token_scores: Float[Tensor, "B T"] | None = None
    """A score for every response token: a reward model read at each of them, or a dense reward."""
    greedy_scores: Float[Tensor, "B"] | None = None
    """The score of the greedy response to the same prompt."""
    state_values: Float[Tensor, "B T"] | None = None
    """The mean score of continuations from the state before a token; NaN where there is none."""
    kept: KeptIds | None = None
    """The ids that the sampler's filter left, where the policy is the filtered one."""


@dataclass(frozen=True)
class Experience:
    """What the learner learns from: a batch with its token rewards, advantages and returns.

    For the row above with score 1, no KL penalty, λ = γ = 1 and values of 0.5, `token_rewards` are
    [… | 0 0 1 | 0], `returns` [… | 1 1 1 | 0] and `advantages` (before whitening) [… | 0.5 0.5 0.5
    | 0].
    """

    ids: tuple[str, ...]
    tokens: Int[Tensor, "B T"]
    lengths: Int[Tensor, "B"]
    response_mask: Bool[Tensor, "B T"]
    old_logprobs: Float[Tensor, "B T"]
    token_rewards: Float[Tensor, "B T"]
    advantages: Float[Tensor, "B T"]
    scores: Float[Tensor, "B"]
    ref_logprobs: Float[Tensor, "B T"] | None = None
    values: Float[Tensor, "B T"] | None = None
    returns: Float[Tensor, "B T"] | None = None
    penalties: Float[Tensor, "B T"] | None = None
    """The part of `token_rewards` that is the KL penalty, before they are whitened, where they
    are."""
    raw_advantages: Float[Tensor, "B T"] | None = None
    """`advantages` before they were whitened."""
    weights: Float[Tensor, "B T"] | None = None
    """Importance weights that correct for a sampler that was not π_old; they multiply the policy
    loss."""
    mean_entropy: Float[Tensor, "B"] | None = None
    """The mean entropy of π_old over the tokens of the step: the same number in every row."""
    kept: KeptIds | None = None
    """The ids that the sampler's filter left, where the policy is the filtered one. They stay in
    main memory."""
    sampler_logprobs: Float[Tensor, "B T"] | None = None
    """The sampler's own log-probs, where the KL in the loss is weighted by ratios to them."""
    kl_baselines: Float[Tensor, "B T"] | None = None
    """What lowers the variance of the gradient of a KL in the loss (`KL.token_baselines`)."""
    is_learnt: Bool[Tensor, "B"] | None = None
    """Which responses enter the actor's loss; None: all."""

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: Any) -> "Experience":
        """Return the experience with its tensors on a `torch.device`."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(
            self,
            **{
                name: value.to(device, non_blocking=True)
                for name, value in tensors.items()
                if name not in {"ids", "kept"} and value is not None
            },
        )

    def rows(self, indices: Sequence[int]) -> "Experience":
        """Return these rows only, without the columns in which all of them are padding."""
        index = torch.as_tensor(indices, device=self.tokens.device)
        width = int(self.lengths[index].max())

        def take(value: Any) -> Any:
            if value is None:
                return None
            if isinstance(value, KeptIds):
                return value.rows(indices, width)
            return value[index] if value.ndim == 1 else value[index, :width]

        tensors = {
            f.name: take(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "ids"
        }
        return Experience(ids=tuple(self.ids[i] for i in indices), **tensors)


def rollout_to_row(rollout: Rollout) -> dict[str, Any]:
    """Return the rollout as a table that JSON takes, and that shares the rollout's values."""
    return dict(vars(rollout)) | {"prompt": dict(vars(rollout.prompt))}


def rollout_from_row(row: Mapping[str, Any] | Rollout) -> Rollout:
    """Return the rollout of a table that came through JSON, which has lists for tuples; a rollout,
    of a state that was only copied, as it is."""
    if isinstance(row, Rollout):
        return row
    prompt: dict[str, Any] = {
        name: tuple(value) if name == "ids" else value for name, value in row["prompt"].items()
    }
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in row.items()
    }
    if "written" in values:  # what checkpoints before version 0.2 call the policy mask
        values["policy_mask"] = values.pop("written")
    return Rollout(**values | {"prompt": Prompt(**prompt)})


def row_tokens(rows: Batch | Experience, row: int) -> list[int]:
    """Return the tokens of one row, prompt and response."""
    tokens: list[int] = rows.tokens[row, : rows.lengths[row]].tolist()
    return tokens
