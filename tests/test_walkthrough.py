"""The walk-through of a batch: its numbers satisfy the equations that it prints."""

import math
import re
from pathlib import Path

import pytest

import quartet
from quartet.errors import QuartetError
from quartet.walkthrough import FUNCTIONS

PAGE = Path(__file__).parents[1] / "docs" / "batch_of_eight.md"
ROUNDING = 0.0016
"""Numbers are printed with three places; three of them are added up."""


def tables(text):
    """Return the tables of a Markdown text, each as columns by name."""
    found = []
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.strip().splitlines()]
        names = [cell.strip() for cell in rows[0]]
        columns = zip(*rows[2:], strict=True)
        found.append({n: [c.strip() for c in col] for n, col in zip(names, columns, strict=True)})
    return found


def with_column(text, name):
    [table] = [table for table in tables(text) if name in table]
    return {key: [_number(x) for x in column] for key, column in table.items()}


def _number(text):
    return float(text) if re.fullmatch(r"-?\d[\d.]*", text) else text


def check_clipped_loss(text):
    table = with_column(text, "loss")
    for a, ratio, loss, clipped in zip(
        table["A"], table["ρ"], table["loss"], table[""], strict=True
    ):
        held = min(max(ratio, 0.8), 1.2)
        assert loss == pytest.approx(-min(ratio * a, held * a), abs=5e-3)
        near_bound = min(abs(ratio - 0.8), abs(ratio - 1.2)) < 1e-3
        assert near_bound or (clipped == "clipped") == (held * a < ratio * a)


def check_ppo(text):
    said, given = with_column(text, "V"), with_column(text, "penalty")
    returns = with_column(text, "R = A + V")
    length, after = len(said["V"]), 0.0
    assert given["score"][:-1] == [0.0] * (length - 1)
    for t in reversed(range(length)):
        penalty = -0.05 * (said["log π_old"][t] - said["log π_ref"][t])
        assert given["penalty"][t] == pytest.approx(penalty, abs=ROUNDING)
        reward = given["penalty"][t] + given["score"][t]
        assert given["r"][t] == pytest.approx(reward, abs=ROUNDING)
        later = said["V"][t + 1] if t + 1 < length else 0.0
        delta = given["r"][t] + later - said["V"][t]
        assert returns["δ"][t] == pytest.approx(delta, abs=ROUNDING)
        assert returns["A"][t] == pytest.approx(returns["δ"][t] + 0.95 * after, abs=ROUNDING)
        total = returns["A"][t] + said["V"][t]
        assert returns["R = A + V"][t] == pytest.approx(total, abs=ROUNDING)
        after = returns["A"][t]
    check_clipped_loss(text)


def check_grpo(text):
    group, kl = with_column(text, "score"), with_column(text, "k3")
    scores = group["score"]
    mean = sum(scores) / 8
    std = math.sqrt(sum((x - mean) ** 2 for x in scores) / 7)
    assert group["A"] == pytest.approx([(x - mean) / std for x in scores], abs=5e-3)
    for now, reference, k3, weighted in zip(*list(kl.values())[1:], strict=True):
        difference = reference - now
        assert k3 == pytest.approx(math.exp(difference) - 1 - difference, abs=5e-3)
        assert weighted == pytest.approx(0.04 * k3, abs=ROUNDING)
    check_clipped_loss(text)


CHECKS = {"ppo": check_ppo, "grpo": check_grpo}


@pytest.mark.parametrize("preset", CHECKS)
def test_the_numbers_on_the_page_satisfy_its_equations(preset):
    text = PAGE.read_text(encoding="utf-8")
    ppo, grpo = text.split("## One batch of eight responses through a step of ")[1:]
    CHECKS[preset]({"ppo": ppo, "grpo": grpo}[preset])


@pytest.mark.slow
@pytest.mark.parametrize("preset", CHECKS)
def test_a_walk_through_of_another_seed_satisfies_them_too(preset, capfd):
    stages = []
    text = quartet.explain(preset, seed=5, on_stage=stages.append)
    assert stages == ["sft", "reward_model", preset]
    CHECKS[preset](text)
    shape = re.compile(r"^#+ .*$", re.MULTILINE)
    page = PAGE.read_text(encoding="utf-8").replace("##", "#")
    assert {line.lstrip("# ") for line in shape.findall(text)} <= {
        line.lstrip("# ") for line in shape.findall(page)
    }


def test_the_functions_that_are_named_exist():
    from quartet.assembly import assembler

    for _, here, _ in FUNCTIONS:
        owner, _, name = here.partition(".")
        known = getattr(assembler, owner) if owner == "Assembler" else getattr(quartet, owner)
        assert not name or hasattr(known, name) or name in known.__pydantic_fields__, here


def test_another_preset_is_refused():
    with pytest.raises(QuartetError, match="no walk-through; there is one of ppo and of grpo"):
        quartet.explain("dapo")
