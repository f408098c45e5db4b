"""Where an objective has an optimum in closed form, the algorithms that claim it get there, and those that cannot do not."""

import pytest
import torch

from quartet.algorithms.preference import PREFERENCES
from tests.support import closed_form
from tests.support.closed_form import (
    BATCH_STATISTICS,
    EXACT_STEPS,
    PLACEMENTS,
    PRESETS,
    SAMPLES,
    WHY_NOT,
    exact,
    off_policy,
    optimum,
    sampled,
)
from tests.support.closed_form_tables import (
    GROUPS,
    REGIONS,
    WHY_NOT_PREFERENCES,
    WITH_GROUPS,
    natural,
    preference,
    published,
)

NAMES = [*PLACEMENTS, *PRESETS]
IN_EVERY_RUN = {
    *("ppo", "rloo", "reinforce", "remax", "grpo"),
    *(f"in the reward, {e}" for e in ("k1", "k3", "exact")),
    *(f"in the loss, {e}" for e in ("k1", "k2", "k3")),
    "in the loss, k3, weight sequence, baseline",
    *(
        f"in the loss, {e}"
        for e in ("k1, weight token", "k1, weight sequence", "exact, weight sequence")
    ),
    "in the loss, k1, weight sequence; leave one out",
}
SAMPLED_IN_EVERY_RUN = {
    *("ppo", "rloo", "in the reward, k1", "in the loss, k3"),
    "in the loss, k1, weight sequence; leave one out",
}
"""With a critic, with groups, with neither, one that gets elsewhere, and a KL in the loss that gets there. The rest, which takes
minutes, is in the long suite."""


def each(names, often=IN_EVERY_RUN):
    return [pytest.param(name, marks=[] if name in often else pytest.mark.long) for name in names]


def test_the_optimum_is_one():
    """π* has a higher E[score] − β KL than any policy near it."""
    p, ref = optimum(), closed_form.distribution(closed_form.REFERENCE)

    def objective(q):
        return float(q @ closed_form.SCORES - closed_form.BETA * (q * (q / ref).log()).sum())

    assert p.sum().item() == pytest.approx(1)
    for seed in range(20):
        other = (
            p
            * (
                0.1
                * torch.randn(
                    len(p), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
                )
            ).exp()
        )
        assert objective(other / other.sum()) < objective(p)


def test_the_tables_name_everything():
    assert list(published()) == NAMES
    assert set(WHY_NOT) <= set(NAMES)
    assert list(published("regions")) == list(REGIONS)
    assert list(published("groups")) == WITH_GROUPS
    assert list(published("comparisons")) == list(PREFERENCES)


@pytest.mark.parametrize("name", each(n for n in NAMES if n not in BATCH_STATISTICS))
@pytest.mark.slow
def test_with_exact_expectations(name):
    if name in WHY_NOT:
        distance = exact(name).distance
        assert distance > 0.005
    else:  # is there long before the end
        distance = exact(name, EXACT_STEPS // 2).distance
        assert distance < 1e-3
    assert distance == pytest.approx(published()[name][0], abs=2e-3)


@pytest.mark.parametrize("name", each(NAMES, SAMPLED_IN_EVERY_RUN))
@pytest.mark.slow
def test_with_samples(name):
    distance = sampled(name).distance
    if name not in WHY_NOT:
        assert distance < 0.02
    elif name not in {"a2c", "in the loss, k1, weight sequence; group mean"}:  # as near as noise
        assert distance > 0.02


@pytest.mark.parametrize("name", each(NAMES, {"ppo", "in the loss, k3, weight sequence, baseline"}))
@pytest.mark.slow
def test_with_four_updates_from_the_same_samples(name):
    distance = off_policy(name).distance
    if name not in WHY_NOT:
        assert distance < 0.02
    assert distance == pytest.approx(published()[name][2], abs=2e-3)


@pytest.mark.parametrize("size", GROUPS)
@pytest.mark.parametrize("name", each(WITH_GROUPS, {"rloo"}))
@pytest.mark.slow
def test_with_groups_of_several_sizes(name, size):
    distance = off_policy(name, size).distance
    if name not in WHY_NOT:
        assert distance < 0.02
    assert distance == pytest.approx(published("groups")[name][GROUPS.index(size)], abs=2e-3)


@pytest.mark.parametrize("name", each(PREFERENCES, {"dpo", "ipo"}))
@pytest.mark.slow
def test_losses_on_comparisons(name):
    distance, by_samples = preference(name).distance, preference(name, SAMPLES).distance
    assert [distance, by_samples] == pytest.approx(published("comparisons")[name], abs=2e-3)
    if name in WHY_NOT_PREFERENCES:
        assert distance > 0.03
    else:
        assert distance < 1e-3 and by_samples < 0.02


@pytest.mark.parametrize("name", REGIONS)
@pytest.mark.slow
def test_the_update_of_a_trust_region_gets_there_too(name):
    distance, by_samples = natural(name).distance, natural(name, SAMPLES).distance
    assert distance < 1e-3 and by_samples < 2e-3
    assert [distance, by_samples] == pytest.approx(published("regions")[name], abs=5e-4)
