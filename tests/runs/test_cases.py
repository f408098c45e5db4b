"""The six cases of the clipped surrogate, in words, and what else clips."""

import dataclasses
import json
import math

import pytest
import torch

from quartet.algorithms.policy_loss import (
    Cispo,
    Clip,
    DualClip,
    Gmpo,
    Reinforce,
    SequenceClip,
    Surrogate,
)
from quartet.runs.cases import Clipping, clip_case
from quartet.runtime.pipeline import clip_bounds

CLIP = Clipping(0.8, 1.3)


@pytest.mark.parametrize(
    ("advantage", "ratio", "sentence"),
    [
        (
            1.0,
            0.7,
            "advantage > 0, ratio 0.7 < 0.8: not clipped, pushed back up: it moved against its advantage.",
        ),
        (1.0, 1.1, "advantage > 0, ratio 1.1 within 0.8 to 1.3: pushed up."),
        (
            1.0,
            1.4,
            "advantage > 0, ratio 1.4 > 1.3: clipped, no gradient. The token has risen as far as one update may take it.",
        ),
        (
            -1.0,
            0.7,
            "advantage < 0, ratio 0.7 < 0.8: clipped, no gradient. The token has fallen as far as one update may take it.",
        ),
        (-1.0, 1.1, "advantage < 0, ratio 1.1 within 0.8 to 1.3: pushed down."),
        (
            -1.0,
            1.4,
            "advantage < 0, ratio 1.4 > 1.3: not clipped, pushed back down: it moved against its advantage.",
        ),
    ],
)
def test_the_six_cases_are_those_of_the_loss(advantage, ratio, sentence):
    loss = Clip(low=0.2, high=0.3)
    new = torch.tensor([[ratio]]).log()
    mask = torch.ones(1, 1, dtype=torch.bool)
    clipped = bool(
        loss.clipped(Surrogate(new, torch.zeros(1, 1), torch.tensor([[advantage]]), mask))
    )
    assert Clipping(**dataclasses.asdict(loss.clip_range)) == CLIP
    assert clip_case(CLIP, advantage, ratio, clipped) == sentence


def test_at_the_edge_what_the_loss_did_decides():
    """Ratios are stored rounded: 1.2001 and 1.1999 may both read 1.2."""
    assert clip_case(Clipping(0.8, 1.2), 1.0, 1.1992, True).startswith(
        "advantage > 0, ratio 1.199 > 1.2: clipped"
    )
    assert (
        clip_case(Clipping(0.8, 1.2), -1.0, 0.7998, False)
        == "advantage < 0, ratio 0.7998 within 0.8 to 1.2: pushed down."
    )


def test_the_dual_clip_is_named():
    loss = DualClip(low=0.2, high=0.2, cap=3.0)
    arguments = (
        torch.tensor([[5.0]]).log(),
        torch.zeros(1, 1),
        torch.tensor([[-1.0]]),
        torch.ones(1, 1, dtype=torch.bool),
    )
    assert bool(loss.clipped(Surrogate(*arguments)))
    said = clip_case(Clipping(**dataclasses.asdict(loss.clip_range)), -1.0, 5.0, True)
    assert said == "advantage < 0, ratio 5 > 1.2: clipped by the dual clip (cap 3), no gradient."


@pytest.mark.parametrize(
    ("loss", "clipped", "sentence"),
    [
        (Reinforce(), False, "advantage > 0, ratio 1.05: pushed up."),
        (Cispo(), True, "advantage > 0, ratio 1.05: clipped, no gradient."),
        (
            SequenceClip(low=0.1, high=0.1),
            True,
            "advantage > 0: clipped by the whole response's ratio, no gradient.",
        ),
        (
            Gmpo(window=0.4),
            False,
            "advantage > 0, ratio 1.05 within 0.67032 to 1.49182: pushed up.",
        ),
        (Clip(high=math.inf), False, "advantage > 0, ratio 1.05 above 0.8: pushed up."),
    ],
)
def test_what_clips_and_where_is_said_by_the_loss(loss, clipped, sentence):
    """A loss without a range has the recorded column alone."""
    bounds = clip_bounds(loss)
    clipping = None if bounds is None else Clipping.read(json.loads(json.dumps(bounds)))
    assert clip_case(clipping, 1.0, 1.05, clipped) == sentence


def test_a_run_records_how_its_loss_clips(ppo_run, grpo_run):
    assert ppo_run.clipping == Clipping(0.8, 1.2)
    assert grpo_run.clipping == Clipping(0.8, 1.2)


def test_no_advantage_no_gradient():
    assert clip_case(CLIP, 0.0, 1.0, False) == "advantage 0: no gradient from the policy loss."
