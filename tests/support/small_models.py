"""Small models of any architecture, with weights that leave nothing at its initial value."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def small_model(kind, shape, noise):
    """A causal model of this architecture in float32; `noise` is added to what initialization leaves of each matrix."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **shape), dtype=torch.float32
    )
    with torch.no_grad():
        for p in made.parameters():
            if p.ndim > 1:
                p.add_(noise * torch.randn_like(p))
    return made.eval()
