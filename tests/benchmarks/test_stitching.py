"""The benchmark of ILQL: its data, and its table by hand."""

import random
import statistics


def test_the_most_likely_answer_has_no_digit_right():
    import stitching

    rng = random.Random(0)
    rows = [stitching.logged(rng) for _ in range(3000)]
    for row in rows:
        digits = row["prompt"].removesuffix("=")
        right = [a == b for a, b in zip(digits, row["completion"], strict=True)]
        wrong = [
            (int(a) + 1) % 10 == int(b) for a, b in zip(digits, row["completion"], strict=True)
        ]
        assert sum(right) == row["score"] and all(r != w for r, w in zip(right, wrong, strict=True))
    share = statistics.fmean(row["score"] for row in rows) / stitching.DIGITS
    assert abs(share - stitching.RIGHT) < 0.01
    assert sum(row["score"] == stitching.DIGITS for row in rows) == 0


def test_the_table_has_the_mean_before_the_seeds():
    import stitching

    seeds = [
        {"shares": {"beta-4": {"1.0": one, "0.1": cold}}} for one, cold in ((0.2, 0.5), (0.4, 0.7))
    ]
    assert stitching.table(seeds).splitlines()[2] == (
        "| beta-4 | **0.30** (0.20, 0.40) | **0.60** (0.50, 0.70) |"
    )
