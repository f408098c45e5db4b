"""Losses on comparisons."""

from quartet.tensors import Float, Tensor, torch


def bradley_terry(chosen: Float[Tensor, "P"], rejected: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """−log σ(r_chosen − r_rejected), per pair (Bradley & Terry 1952; Stiennon et al. 2020, eq. 1).

    Scores 1 and −1: −log σ(2) = log(1 + e⁻²) = 0.1269. Equal scores: log 2. Exact for any margin: at −200 it is 200.
    """
    return -torch.nn.functional.logsigmoid(chosen - rejected)
