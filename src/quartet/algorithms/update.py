"""How the actor follows the gradient: the optimizer of the run, or a step of its own inside a trust
region. The arithmetic is in training/trust_region.py; here are its settings."""

from typing import Literal

from quartet.parts import Family, Field


class ActorUpdate(Family):
    """How the actor's weights follow the gradient."""


class FirstOrder(ActorUpdate):
    """The run's optimizer (`[optim]`)."""

    type: Literal["first_order"] = "first_order"


class TrustRegion(ActorUpdate):
    """Step along F⁻¹g as far as KL(π_old ‖ π) = max_kl allows, F the Fisher matrix, F⁻¹g by
    conjugate gradients. With a line search that halves the step until the surrogate improves and
    the KL holds, TRPO (Schulman et al. 2015, appendix C); without (`line_search_steps = 0`), the
    natural policy gradient (Kakade 2001)."""

    type: Literal["trust_region"] = "trust_region"
    max_kl: float = Field(
        default=0.01, gt=0, description="KL(π_old ‖ π) per token that one step may reach."
    )
    conjugate_gradient_steps: int = Field(
        default=10,
        ge=1,
        description="Iterations that solve F x = g, each with one product with the Fisher "
        "matrix. Typical: 10.",
    )
    damping: float = Field(default=0.1, ge=0, description="Added to the Fisher matrix's diagonal.")
    line_search_steps: int = Field(
        default=10, ge=0, description="Halvings that may be tried; 0 takes the step as it is."
    )
