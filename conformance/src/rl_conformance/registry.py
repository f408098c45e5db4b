"""All claims, in the order of the table."""

from rl_conformance import comparisons, edges, expectations, formulas, invariances, losses
from rl_conformance.claims import Claim

CLAIMS: tuple[Claim, ...] = (
    *formulas.CLAIMS,
    *losses.CLAIMS,
    *comparisons.CLAIMS,
    *edges.CLAIMS,
    *invariances.CLAIMS,
    *expectations.CLAIMS,
)
