"""Likelihood beside reinforcement: of good answers of the policy's own, or of texts that are not
its own."""

from typing import Literal

from quartet.experience import Experience
from quartet.parts import Field, part
from quartet.tensors import Bool, Float, Tensor


@part
class PositiveExamples:
    """ℓ_t = −coef · log π(token t) on responses whose score is above the threshold (VAPO, Yue et
    al. 2025, eq. 12–13). Its mean is over those responses' tokens only. At the default of 0 there
    is no such term."""

    type: Literal["positive_examples"] = "positive_examples"
    coef: float = Field(default=0.0, ge=0, description="VAPO: 0.1.")
    threshold: float = Field(
        default=0.0,
        description="Responses with a score above this are imitated, in units of the score."
        " Typical: 0.",
    )

    def mask(self, experience: Experience) -> Bool[Tensor, "B T"]:
        return experience.response_mask & (experience.scores > self.threshold)[:, None]

    def __call__(self, logprobs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        return -self.coef * logprobs


@part
class Pretraining:
    """PTX: coef · the mean negative log-probability of texts that are not the policy's own, added
    to every optimizer step (Ouyang et al. 2022, InstructGPT, eq. 2: coef 27.8). At 0 no such texts
    are read.

    The texts are the run's demonstrations, or those of `data.pretraining`.
    """

    type: Literal["ptx"] = "ptx"
    coef: float = Field(default=0.0, ge=0, description="InstructGPT: 27.8.")
    batch_size: int = Field(default=8, ge=1, description="Texts in each optimizer step.")
