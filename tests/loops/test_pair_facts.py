"""What a stage records of its pairs, for the doctor to compare the model with."""

import pytest
import torch

from quartet.algorithms.preference import Pairs
from quartet.data.records import Comparison
from quartet.loops.preference import _margins_of_longer, preference_metrics
from quartet.loops.reward_model import score_facts
from quartet.stages.pair_facts import pair_facts


def test_scores_say_what_they_claim_and_whether_length_decides():
    """Differences 2, −1, 0.5: the claim is (σ(2) + σ(1) + σ(0.5)) / 3. The chosen side is longer,
    shorter, and as long: of the two pairs that differ, the longer side scores higher in both."""
    pairs = [Comparison(str(i), (1,), (2,) * n, (3,) * 2) for i, n in enumerate((3, 1, 2))]
    facts = score_facts(torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.5, 0.0]]), pairs)
    assert facts["accuracy"] == pytest.approx(2 / 3)
    assert facts["confidence"] == pytest.approx((0.880797 + 0.731059 + 0.622459) / 3, abs=1e-5)
    assert facts["prefers_longer"] == 1.0
    assert "prefers_longer" not in score_facts(torch.zeros(1, 2), pairs[2:])


def test_facts_of_pairs_are_those_of_both_sides():
    pairs = [Comparison(str(i), (1,), (2,) * n, (3,) * 2) for i, n in enumerate((3, 1, 2, 4))]
    expected = {
        "held_out_pairs": 4,
        "held_out_lengths": 3,
        "held_out_longer_chosen": pytest.approx(2 / 3),
    }
    assert pair_facts(pairs) == expected
    assert pair_facts([*pairs, Comparison("unpaired", (1,), (2,), ())]) == {}


def test_unpaired_preferences_say_their_labels_and_pairs_their_lengths():
    """Log-ratios of two pairs: the shorter chosen side gained by 3, the longer one lost by 1, so
    the shorter side is preferred in both. One of three unpaired responses is desirable."""
    two = torch.tensor([0.0, 0.0])
    chosen, rejected = torch.tensor([2.0, -1.0]), torch.tensor([-1.0, 0.0])
    pairs = Pairs(chosen, rejected, torch.tensor([1.0, 4.0]), torch.tensor([2.0, 3.0]), two, two)
    assert "labels/chosen" not in preference_metrics([pairs])
    assert _margins_of_longer(pairs).tolist() == [-3.0, -1.0]
    three = torch.zeros(3)
    lengths = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 2.0])
    unpaired = Pairs(three, three, *lengths, three, three)
    assert preference_metrics([unpaired])["labels/chosen"] == pytest.approx(1 / 3)
    assert len(_margins_of_longer(unpaired)) == 0
