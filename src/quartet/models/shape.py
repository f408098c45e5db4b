"""The shape of a model that is created from scratch. This file does not import torch, so that
`quartet plan` can count parameters without it."""

from typing import Any, Literal

from quartet.parts import Field, part


@part
class Shape:
    """A small causal transformer: `policy.create` in a run's file."""

    type: Literal["llama", "qwen2", "gpt2"] = "llama"
    hidden_size: int = Field(
        default=128,
        ge=8,
        description="The width of the residual stream. Typical: 128 for the embedded worlds.",
    )
    num_layers: int = Field(
        default=4,
        ge=1,
        description="The number of transformer blocks. Typical: 4 for the embedded worlds.",
    )
    num_heads: int = Field(default=4, ge=1, description="It must divide hidden_size.")
    intermediate_size: int | None = Field(
        default=None, ge=8, description="Left out, it is three times hidden_size."
    )
    max_length: int = Field(
        default=1024, ge=8, description="The longest prompt and response together, in tokens."
    )

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size = {self.hidden_size} is not a multiple of num_heads = "
                f"{self.num_heads}"
            )

    @property
    def intermediate(self) -> int:
        return self.intermediate_size or 3 * self.hidden_size

    def hugging_face(self, vocabulary: int) -> dict[str, Any]:
        """Return the same shape as the keys of the architecture's Hugging Face config. Embedding
        and head are tied."""
        if self.type == "gpt2":
            return {
                "vocab_size": vocabulary,
                "n_embd": self.hidden_size,
                "n_layer": self.num_layers,
                "n_head": self.num_heads,
                "n_inner": self.intermediate,
                "n_positions": self.max_length,
                "tie_word_embeddings": True,
                "initializer_range": 0.5 / self.hidden_size**0.5,
            }
        return {
            "vocab_size": vocabulary,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.max_length,
            "tie_word_embeddings": True,
            "initializer_range": 0.5 / self.hidden_size**0.5,
        }

    def parameters(self, vocabulary: int) -> int:
        """Return the number of parameters of the model."""
        hidden, inner = self.hidden_size, self.intermediate
        if self.type == "gpt2":
            attention = 4 * hidden * hidden + 4 * hidden
            layer = attention + 2 * hidden * inner + inner + hidden + 4 * hidden
            return (vocabulary + self.max_length) * hidden + self.num_layers * layer + 2 * hidden
        biases = 3 * hidden if self.type == "qwen2" else 0
        layer = 4 * hidden * hidden + biases + 3 * hidden * inner + 2 * hidden
        return vocabulary * hidden + self.num_layers * layer + hidden
