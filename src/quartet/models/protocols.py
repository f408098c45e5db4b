"""What Quartet uses of language models and tokenizers, for readers and type checkers.

Models are transformers' or of the same interface. At run time the names stand for any object: the
interface is a convention, and checking it at every call of the tests would cost more than it finds.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from os import PathLike
    from typing import Protocol

    import torch
    from torch import nn

    class Trunk(nn.Module):
        """A causal model without its head; `trunk(input_ids=…).last_hidden_state` is [B, T, H]."""

        config: Any
        # Of the Llama family, whose fused forward reads them:
        embed_tokens: nn.Embedding
        layers: Sequence[Any]
        norm: Any
        rotary_emb: Any

    class CausalModel(nn.Module):
        """A causal language model; `model(input_ids=…).logits` is [B, T, V]."""

        config: Any
        generation_config: Any
        name_or_path: str
        base_model_prefix: str

        @property
        def base_model(self) -> Trunk:
            """The model without its head."""

        @property
        def device(self) -> torch.device:
            """The device of its parameters."""

        @property
        def dtype(self) -> torch.dtype:
            """The precision of its parameters."""

        def get_input_embeddings(self) -> nn.Embedding:
            """Return the layer from token ids to vectors."""

        def get_output_embeddings(self) -> nn.Linear:
            """Return the layer from hidden states to logits."""

        def resize_token_embeddings(self, size: int, *, mean_resizing: bool = True) -> object:
            """Give the embeddings and the head so many rows."""

        def save_pretrained(
            self, folder: str | PathLike[str], state_dict: Mapping[str, torch.Tensor] | None = None
        ) -> None:
            """Write a folder that `from_pretrained` loads."""

    class Tokenizer(Protocol):
        """A tokenizer of transformers' interface."""

        bos_token_id: int | None
        eos_token_id: int
        pad_token_id: int | None
        vocab_size: int
        all_special_ids: list[int]
        all_special_tokens: list[str]
        added_tokens_decoder: Mapping[int, Any]
        bos_token: str | None
        chat_template: Any
        """A template, or templates by name."""

        def __len__(self) -> int: ...

        def __call__(self, *texts: Any, **options: Any) -> Any: ...

        def encode(
            self,
            text: str,
            add_special_tokens: bool = True,
            *,
            split_special_tokens: bool = False,
        ) -> list[int]: ...

        def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]: ...

        def convert_tokens_to_ids(self, token: str) -> int: ...

        def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str: ...

        def get_vocab(self) -> dict[str, int]: ...

        def apply_chat_template(
            self,
            messages: Sequence[Mapping[str, Any]],
            *,
            add_generation_prompt: bool = False,
            tokenize: bool = True,
            return_dict: bool = True,
            **variables: Any,
        ) -> Any: ...

        def save_pretrained(self, folder: str | PathLike[str]) -> object: ...

else:
    Trunk = CausalModel = Tokenizer = Any
