"""The check that numbers are finite, with the sample in which they are not."""

from collections.abc import Callable, Sequence

from quartet.errors import NonFinite
from quartet.tensors import Float, Tensor


def check_finite(
    what: str,
    values: Float[Tensor, "B *rest"],
    ids: Sequence[str],
    tokens: Callable[[int], Sequence[int]] | None = None,
) -> None:
    """Raise `NonFinite` with the id of the first row that holds an infinity or a NaN.

    `what` names the values in the error, and `tokens` returns the tokens of a row.
    """
    finite = values.isfinite()
    nonfinite_rows = ~(finite.flatten(1).all(dim=1) if values.ndim > 1 else finite)
    if nonfinite_rows.any():
        row = int(nonfinite_rows.nonzero()[0])
        raise NonFinite(what, ids[row], tokens(row) if tokens else ())
