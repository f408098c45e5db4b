"""Heads for Q and V on the last hidden states of a language model, and the policy that they give.

Q is a linear layer to the vocabulary. So π(a | h) ∝ π_β(a | h) exp(β Q(h, a)) has the logits
h (W + β W_Q)ᵀ, where W is the head of π_β: the policy is a plain language model with another head.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from quartet.distributed.offload import MAIN_MEMORY
from quartet.files import readable_weights, sync
from quartet.models.forward import PositionOutputs, has_linear_head, logit_shape
from quartet.models.heads import ValueHead
from quartet.models.language_model import ModelError, first_line, load_model
from quartet.models.logprobs import at_least_float32, head_statistics
from quartet.models.protocols import CausalModel
from quartet.models.support import support_of
from quartet.tensors import Float, Int, Tensor


class QHeads(nn.Module):
    """Q(h, ·), its target network Q̂, and V(h). All weights start at 0.

    Q̂ reads the same hidden states as Q: of the target network only the head has weights of its
    own.
    """

    def __init__(self, model: CausalModel) -> None:
        """Raises ModelError for a model whose logits are not a linear function of its hidden
        states, or are capped."""
        super().__init__()
        if not has_linear_head(model) or logit_shape(model).cap is not None:
            raise ModelError(
                f"{model.config.model_type}: its logits are no linear function of the hidden "
                "states, so no head of the model gives ILQL's policy. Take another architecture."
            )
        rows, hidden_size = model.get_output_embeddings().weight.shape
        self.support = support_of(model) or rows
        self.q = nn.Linear(hidden_size, rows, bias=False)
        self.value = ValueHead(hidden_size)
        nn.init.zeros_(self.q.weight)
        self.register_buffer("target", torch.zeros(rows, hidden_size))
        self.target: Tensor
        self.to(model.device)

    def forward(
        self, outputs: PositionOutputs, tokens: Int[Tensor, "N"]
    ) -> tuple[Float[Tensor, "N"], ...]:
        """Return Q and Q̂ of the tokens, log softmax(Q) at them, and V, in float32."""
        hidden = at_least_float32(outputs.hidden)
        q = (hidden * self.q.weight[tokens]).sum(-1)
        with torch.no_grad():
            target_q = (hidden * self.target[tokens]).sum(-1)
        weight = self.q.weight[: self.support]
        logprobs, _ = head_statistics(hidden, weight, None, tokens, 1.0)
        return q, target_q, logprobs, self.value(hidden)

    @torch.no_grad()
    def follow(self, polyak: float) -> None:
        """Move the target network towards Q: Q̂ ← (1 − ρ) Q̂ + ρ Q."""
        self.target.lerp_(self.q.weight, polyak)

    def state(self) -> dict[str, Any]:
        """Return the target network; an optimizer saves what it trains."""
        return {"target": self.target}

    def load_state(self, state: Any) -> None:
        with torch.no_grad():
            self.target.copy_(state["target"])


HEADS = "q_heads.safetensors"
"""The file of the heads in the folder `q_heads` of a run."""


def save_heads(heads: QHeads, beta: float, folder: Path) -> None:
    """Write the heads, and the β of the policy that was extracted with them."""
    folder.mkdir(exist_ok=True)
    tensors = {
        name: tensor.to(MAIN_MEMORY).contiguous() for name, tensor in heads.state_dict().items()
    }
    save_file(tensors, folder / HEADS, {"beta": repr(beta)})
    readable_weights(folder / HEADS)
    sync(folder / HEADS)


def extracted_with(run: Path, beta: float) -> Any:
    """Return the policy of a run of ILQL with another β. Raises ModelError where the run has no
    heads."""
    file = run / "q_heads" / HEADS
    if not file.is_file():
        raise ModelError(f"{run}: has no q_heads/, so its policy has no beta. Take --beta out.")
    try:
        with safe_open(file, "pt") as opened:
            q, before = opened.get_tensor("q.weight"), float(opened.metadata()["beta"])
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise ModelError(f"{file}: cannot be read ({first_line(error)}).") from error
    model = load_model(run / "policy")
    if q.shape != model.get_output_embeddings().weight.shape:
        raise ModelError(f"{file}: is of another model than {run / 'policy'}.")
    extract_policy(model, q, beta - before)
    return model


@torch.no_grad()
def extract_policy(model: Any, q: Float[Tensor, "V H"], beta: float) -> None:
    """Replace the head of a model by that of π ∝ π_β exp(β Q). V(h) is the same for all tokens, so
    it cancels. Where embeddings and head were one matrix, they are two from now on."""
    head = model.get_output_embeddings()
    weight = head.weight.detach().float() + beta / logit_shape(model).scale * q
    bias = getattr(head, "bias", None)
    extracted = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    extracted.weight = nn.Parameter(weight)
    if bias is not None:
        extracted.bias = nn.Parameter(bias.detach().clone())
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.set_output_embeddings(extracted)
