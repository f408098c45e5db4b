"""From prompts to rollouts, behind a protocol of two methods."""

from quartet.generation.protocol import Generator, Weights
from quartet.generation.sampling import Sampling

__all__ = ["Generator", "Sampling", "Weights"]
