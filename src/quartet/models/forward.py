"""Forward passes of language models: the hidden states that predict masked tokens, and their
log-probs and entropies.

Rows are padded on the right. A head that is linear is computed in chunks of the vocabulary, so that
no logits of all tokens are kept.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from quartet.distributed.balance import Prefix
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.experience import KeptIds
from quartet.models.adapters import AdapterView, LanguageModel
from quartet.models.exact_kl import HeadInput, head_exact_kl, logits_exact_kl
from quartet.models.logprobs import (
    Filter,
    LogitShape,
    head_statistics,
    logits_statistics,
    predicting_positions,
    scatter_to_tokens,
)
from quartet.models.packing import prefixes
from quartet.models.protocols import CausalModel
from quartet.models.support import support_of
from quartet.models.trunk import checkpointing, hidden_states, rows_at
from quartet.tensors import Bool, Float, Int, Tensor


@dataclass(frozen=True)
class PositionOutputs:
    """The outputs of a model at the N positions that predict the masked tokens."""

    hidden: Float[Tensor, "N H"]
    """The last hidden states."""
    logits: Float[Tensor, "N V"] | None
    """Present only if the head is more than a linear layer with a scale and a cap; for others the
    logits are computed when they are needed, in chunks."""


_LINEAR_HEADS: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()
HALF_PRECISION_DIFFERENCE = 2.0**-6
"""How far apart two ways to round logits may leave them, relative to the largest."""


def logit_shape(model: LanguageModel) -> LogitShape:
    """Return what a model does to the outputs of its head, by the keys of its config: Cohere
    multiplies them, Granite divides them, and Gemma caps them."""
    config = (model.model if isinstance(model, AdapterView) else model).config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    divisor = float(getattr(config, "logits_scaling", None) or 1.0)
    return LogitShape(scale / divisor, getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def has_linear_head(model: CausalModel) -> bool:
    """Return whether the logits are the output embedding of the last hidden states under the
    model's `logit_shape`, and nothing else. The two are compared on four tokens, once per model."""
    if model not in _LINEAR_HEADS:
        tokens = (
            torch.arange(4, device=model.device)[None]
            % model.get_output_embeddings().weight.shape[0]
        )
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        logits = model(input_ids=tokens, use_cache=False).logits
        linear = logit_shape(model).applied_to(model.get_output_embeddings()(hidden))
        _LINEAR_HEADS[model] = linear.shape == logits.shape and _logits_agree(linear, logits)
    return _LINEAR_HEADS[model]


def _logits_agree(ours: Tensor, theirs: Tensor) -> bool:
    if ours.dtype in {torch.float32, torch.float64}:
        return torch.allclose(ours, theirs, atol=1e-5, rtol=1e-5)
    bound = HALF_PRECISION_DIFFERENCE * float(theirs.abs().max())
    return torch.allclose(ours, theirs, atol=bound, rtol=0)


def forward_positions(
    model: LanguageModel, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> PositionOutputs:
    """Return the outputs of one forward pass over right-padded rows at the positions that predict
    the masked tokens."""
    if isinstance(model, AdapterView):
        with model.active():
            return forward_positions(model.model, tokens, mask)
    positions = predicting_positions(mask)
    if has_linear_head(model):
        return PositionOutputs(hidden_states(model.base_model, tokens, positions), None)
    with checkpointing(model):
        output = model(
            input_ids=tokens.to(model.device), use_cache=False, output_hidden_states=True
        )
    return PositionOutputs(
        rows_at(output.hidden_states[-1], positions), rows_at(output.logits, positions)
    )


def logits_of(model: LanguageModel, outputs: PositionOutputs) -> Float[Tensor, "N V"]:
    """Return the logits of all N positions at once; V is the size of the policy's support."""
    if outputs.logits is not None:
        return outputs.logits[:, : support_of(model)]
    return _input_of_head(model, outputs).logits()


def _input_of_head(model: LanguageModel, outputs: PositionOutputs) -> HeadInput:
    """Return what the logits of the policy's support are computed from."""
    head, support = model.get_output_embeddings(), support_of(model)
    weight, bias = head.weight, getattr(head, "bias", None)
    if support is not None:
        weight, bias = weight[:support], None if bias is None else bias[:support]
    return HeadInput(outputs.hidden, weight, bias, logit_shape(model))


def statistics(
    model: LanguageModel,
    outputs: PositionOutputs,
    tokens: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    temperature: float,
    entropy_gradient: bool = False,
    kept: KeptIds | None = None,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Return log-probs and entropies of the masked tokens, at their places; 0 elsewhere. `kept`
    limits the policy to the ids that the sampler's filter left."""
    limit = filter_of(kept, mask, outputs.hidden.device)
    targets = tokens[mask].to(outputs.hidden.device, non_blocking=True)
    if outputs.logits is None:
        of_head = _input_of_head(model, outputs)
        logprobs, entropy = head_statistics(
            of_head.hidden,
            of_head.weight,
            of_head.bias,
            targets,
            temperature,
            entropy_gradient,
            shape=of_head.shape,
            kept=limit,
        )
    else:
        logits = logits_of(model, outputs)
        logits = logits if limit is None else limit.applied_to(logits)
        logprobs, entropy = logits_statistics(logits, targets, temperature, entropy_gradient)
    return scatter_to_tokens(logprobs, mask), scatter_to_tokens(entropy, mask)


def exact_kl_to(
    reference: LanguageModel | None,
    actor: CausalModel,
    outputs: PositionOutputs,
    tokens: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    temperature: float,
    kept: KeptIds | None,
) -> Float[Tensor, "B T"] | None:
    """Return KL(π ‖ π_ref) before each masked token, at its place, or None without a reference.
    `outputs` are the actor's. Where both heads are linear, no logits of all tokens are kept."""
    if reference is None:
        return None
    with torch.no_grad():
        ref_outputs = forward_positions(reference, tokens, mask)
    limit = filter_of(kept, mask, outputs.hidden.device)
    if outputs.logits is None and ref_outputs.logits is None:
        policy, other = _input_of_head(actor, outputs), _input_of_head(reference, ref_outputs)
        return scatter_to_tokens(head_exact_kl(policy, other, temperature, limit), mask)
    logits = logits_of(actor, outputs)
    logits = logits if limit is None else limit.applied_to(logits)
    with torch.no_grad():
        ref_logits = logits_of(reference, ref_outputs)
    return scatter_to_tokens(logits_exact_kl(logits, ref_logits, temperature), mask)


def filter_of(
    kept: KeptIds | None, mask: Bool[Tensor, "B T"], device: torch.device
) -> Filter | None:
    """Return the filter at the positions that predict the masked tokens; None without one."""
    if kept is None:
        return None
    ids, positions = (x.to(device, non_blocking=True) for x in kept.at(mask))
    return Filter(positions, ids)


def masked_logprobs(
    model: LanguageModel,
    tokens: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    temperature: float = 1.0,
    kept: KeptIds | None = None,
) -> Float[Tensor, "B T"]:
    """Return the log-probs of the masked tokens of right-padded rows; 0 elsewhere."""
    outputs = forward_positions(model, tokens, mask)
    return statistics(model, outputs, tokens, mask, temperature, kept=kept)[0]


def prompts(tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> list[Prefix]:
    """Return what rows with these response tokens can share in a forward pass: their prompts but
    for the last token."""
    return prefixes(tokens, predicting_positions(mask))


@torch.no_grad()
def policy_logprobs(
    model: LanguageModel,
    tokens: Int[Tensor, "B T"],
    lengths: Int[Tensor, "B"],
    mask: Bool[Tensor, "B T"],
    temperature: float,
    micro_batch_tokens: int,
    process_group: ProcessGroup = SINGLE_PROCESS,
    kept: KeptIds | None = None,
) -> Float[Tensor, "B T"]:
    """Return the log-probs of the masked tokens of right-padded rows, without a gradient; 0
    elsewhere. Each rank computes its share of the rows, and all ranks return the whole."""
    logprobs = torch.zeros(
        tokens.shape, dtype=torch.promote_types(model.dtype, torch.float32), device=tokens.device
    )
    for piece in process_group.micro_batches(
        lengths.tolist(), micro_batch_tokens, prompts(tokens, mask)
    ):
        rows, width = piece.rows, int(lengths[piece.rows].max())
        left = None if kept is None else kept.rows(rows, width)
        piece_logprobs = masked_logprobs(
            model, tokens[rows, :width], mask[rows, :width], temperature, left
        )
        if piece.counts:
            logprobs[rows, :width] = piece_logprobs.to(logprobs.device)
    process_group.all_reduce(logprobs)
    return logprobs
