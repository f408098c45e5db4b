"""What differs between the architectures that the fused forward computes, as a table.

A row says what the modules of an architecture are called, in which order a block puts its norms and
sums, and which keys of its config change the computation. `models/fused.py` and the decoders read
rows and know no architecture by name. To add one, add a row and a case to
`tests/models/test_families.py`. This file does not import torch, so that a run can say which path a
model will take before it loads the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

NormKind = Literal["rms", "rms + 1", "layer"]
"""RMSNorm; RMSNorm that multiplies by 1 + weight; LayerNorm."""


@dataclass(frozen=True)
class Architecture:
    """The traits of one architecture; by default those of Llama."""

    embedding: str = "embed_tokens"
    positions: str | None = None
    """The table of learned positions, if there is one, and how many of its rows come first."""
    position_offset: int = 0
    blocks: str = "layers"
    last_norm: str = "norm"

    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Three linear layers, or one that gives queries, keys and values."""
    by_head: bool = False
    """The one layer gives query, key and value of head 0, then those of head 1, and so on."""
    out: str = "o_proj"
    head_norms: tuple[str, str] | None = None
    """The norms of queries and keys."""
    norms_all_heads: bool = False
    """A norm of queries and keys is taken over all heads together."""

    mlp: str | None = "mlp"
    """The module of the multi-layer perceptron; None: the block has its layers itself."""
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    """Gate and up, one layer that gives both, or up alone where the MLP is not gated."""
    gated: bool = True
    down: str = "down_proj"
    activation: str = "act_fn"
    experts: str | None = None
    """What an MLP has that sends each token to a few of many experts. transformers' own forward of
    such an MLP is called; the other MLPs of the model, if it has any, are like those above."""

    norm: NormKind = "rms"
    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None

    # Keys of the config, where an architecture has them.
    embedding_scale: str | None = None
    residual_scale: str | None = None
    """What the outputs of attention and of the MLP are multiplied by before they are added."""
    score_cap: str | None = None
    """c of attention scores c · tanh(score / c)."""
    parallel: str | None = None
    """Attention and MLP read the same x, and both are added to it."""
    rotated_blocks: str | None = None
    """Whether each block rotates queries and keys."""
    requires: Mapping[str, Any] = field(default_factory=dict)
    """The values that the row describes; a config with others takes transformers' forward. A value
    "= key" means that of another key."""


LLAMA = Architecture()
OLMO = Architecture(
    before_attention=None,
    after_attention="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
    head_norms=("q_norm", "k_norm"),
    norms_all_heads=True,
)
GEMMA = Architecture(norm="rms + 1", requires={"use_bidirectional_attention": None})
GEMMA_2 = replace(
    GEMMA,
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
    score_cap="attn_logit_softcapping",
)
MIXTURE = replace(LLAMA, experts="experts")
ARCHITECTURES: dict[str, Architecture] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": replace(LLAMA, head_norms=("q_norm", "k_norm")),
    "mixtral": MIXTURE,
    "qwen2_moe": MIXTURE,
    "qwen3_moe": replace(MIXTURE, head_norms=("q_norm", "k_norm")),
    "olmoe": replace(
        MIXTURE,
        head_norms=("q_norm", "k_norm"),
        norms_all_heads=True,
        requires={"clip_qkv": None},
    ),
    "gemma": GEMMA,
    "gemma2": GEMMA_2,
    # transformers' Gemma 3 reads the key of the cap and does not apply it.
    "gemma3_text": replace(
        GEMMA_2,
        head_norms=("q_norm", "k_norm"),
        score_cap=None,
        requires={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
    ),
    "phi3": replace(LLAMA, qkv=("qkv_proj",), up=("gate_up_proj",), activation="activation_fn"),
    "olmo2": OLMO,
    "olmo3": OLMO,
    "granite": replace(
        LLAMA, embedding_scale="embedding_multiplier", residual_scale="residual_multiplier"
    ),
    "smollm3": replace(LLAMA, rotated_blocks="no_rope_layers"),
    "stablelm": replace(
        LLAMA, norm="layer", parallel="use_parallel_residual", requires={"qk_layernorm": False}
    ),
    "gpt_neox": Architecture(
        embedding="embed_in",
        last_norm="final_layer_norm",
        attention="attention",
        qkv=("query_key_value",),
        by_head=True,
        out="dense",
        up=("dense_h_to_4h",),
        gated=False,
        down="dense_4h_to_h",
        activation="act",
        norm="layer",
        parallel="use_parallel_residual",
    ),
    "gpt2": Architecture(
        embedding="wte",
        positions="wpe",
        blocks="h",
        last_norm="ln_f",
        attention="attn",
        qkv=("c_attn",),
        out="c_proj",
        up=("c_fc",),
        gated=False,
        down="c_proj",
        activation="act",
        norm="layer",
        before_attention="ln_1",
        before_mlp="ln_2",
        requires={"add_cross_attention": False},
    ),
    "opt": Architecture(
        embedding="decoder.embed_tokens",
        positions="decoder.embed_positions",
        position_offset=2,
        blocks="decoder.layers",
        last_norm="decoder.final_layer_norm",
        out="out_proj",
        mlp=None,
        up=("fc1",),
        gated=False,
        down="fc2",
        activation="activation_fn",
        norm="layer",
        before_attention="self_attn_layer_norm",
        before_mlp="final_layer_norm",
        requires={
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "word_embed_proj_dim": "= hidden_size",
        },
    ),
}
ATTENTION_KINDS = {"full_attention", "sliding_attention"}


def why_not_fused(config: Any) -> str | None:
    """Return why the table does not describe a model's config, as the end of a sentence; None where
    it does."""
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        return f"the architecture {kind} is not in Quartet's table"
    for key, required in ARCHITECTURES[kind].requires.items():
        other = isinstance(required, str) and required.startswith("= ")
        wanted = getattr(config, required.removeprefix("= ")) if other else required
        value = getattr(config, key, None)
        if value != wanted and not (wanted in {None, False} and not value):
            return f"{kind} with {key} = {value} is not in Quartet's table"
    others = set(getattr(config, "layer_types", None) or ()) - ATTENTION_KINDS
    if others:
        return f"{kind} with layers of {sorted(others)[0]} is not in Quartet's table"
    if "dynamic" in (kinds := rope_kinds(config)):
        return f"the rotation of {kind} changes with the length of the text (rope_type = dynamic)"
    unknown = kinds - {"default", "linear", "llama3", "yarn", "longrope"}
    return f"rope_type = {sorted(unknown)[0]} is not in Quartet's table" if unknown else None


def longest_fused(config: Any) -> int | None:
    """Return the most tokens for which the fused forward is that of the model; None: any number.
    LongRoPE rotates longer texts by other frequencies."""
    limits = [
        table["original_max_position_embeddings"]
        for table in _rope_tables(config)
        if table.get("rope_type") == "longrope"
    ]
    return min(limits, default=None)


def rope_kinds(config: Any) -> set[str]:
    """Return the kinds of rotation in a model's config."""
    return {table.get("rope_type", "default") for table in _rope_tables(config)}


def _rope_tables(config: Any) -> list[dict[str, Any]]:
    """Return the tables of rope_parameters: one, or one per kind of attention layer."""
    table = getattr(config, "rope_parameters", None) or {}
    nested = [each for each in table.values() if isinstance(each, dict)]
    return nested or [table]


@dataclass(frozen=True)
class Layer:
    """One block as the fused forward computes it: the row of its architecture and its numbers. It
    is plain data, so that torch.compile can build it into a program."""

    row: Architecture
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    rotation: str | None
    """The key of its rotation among those of the model; None: positions are not rotated."""
    window: int | None
    """How many tokens a token attends to, itself included; None: all before it."""
    cap: float | None
    residual: float
    parallel: bool


def describe(config: Any, scales: list[float], rotates: bool) -> tuple[Layer, ...]:
    """Return the blocks of a model, given the scale of each block's attention scores, and whether
    the model rotates positions at all."""
    row = ARCHITECTURES[config.model_type]
    heads = config.num_attention_heads
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    rotated = getattr(config, row.rotated_blocks) if row.rotated_blocks else None
    # Architectures with two rotations have a table for each kind of layer.
    by_kind = len(_rope_tables(config)) > 1

    def layer(number: int, scale: float) -> Layer:
        kind = kinds[number] if kinds else None
        turns = rotates and (rotated is None or rotated[number])
        return Layer(
            row=row,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
            scale=scale,
            rotation=(kind if by_kind and kind else "") if turns else None,
            window=window if kind in {None, "sliding_attention"} else None,
            cap=getattr(config, row.score_cap) if row.score_cap else None,
            residual=getattr(config, row.residual_scale) if row.residual_scale else 1.0,
            parallel=bool(row.parallel and getattr(config, row.parallel)),
        )

    return tuple(layer(number, scale) for number, scale in enumerate(scales))
