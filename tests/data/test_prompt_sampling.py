"""Prompts that are drawn by their recent pass rate."""

import json
from collections import Counter

import pytest

from quartet.data.prompt_sampling import EveryPrompt, PassRate, PromptSampler, PromptSampling
from quartet.data.sampler import Sampler
from tests.support.world import prompts, rollout

PROMPTS = prompts(8)


def sampler(sampling=None, batch_size=8, seed=0):
    return PromptSampler(PROMPTS, batch_size, seed, sampling or PassRate())


def visit(made, number, *scores):
    made.observe([rollout(PROMPTS[number], (4, 1), score) for score in scores])


def pools(made):
    return {name.removeprefix("prompts/"): count for name, count in made.metrics().items()}


def test_the_share_is_the_variance_of_a_pass_and_never_below_the_least():
    shares = [PassRate()(rate) for rate in (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)]
    assert shares == [0.2, 0.4375, 0.75, 1.0, 0.75, 0.2]
    assert {PassRate(least=1.0)(rate / 8) for rate in range(9)} == {1.0}


def test_prompts_are_drawn_as_often_as_their_shares_say():
    made = sampler(batch_size=1)
    visit(made, 0, 0.0, 0.0)  # rate 0: in a fifth of the epochs
    visit(made, 1, 0.0, 0.0, 0.0, 1.0)  # 4 · ¼ · ¾ = ¾ of them
    visit(made, 2, 1.0, 1.0)  # rate 1: a fifth; the other five have no rate: all
    drawn = Counter()
    while made.epoch < 2000:
        drawn[made.next()[0].id] += 1
    shares = [drawn[prompt.id] / 2000 for prompt in PROMPTS]
    assert shares[:3] == pytest.approx([0.2, 0.75, 0.2], abs=0.03)  # three standard errors
    assert shares[3:] == pytest.approx([1.0] * 5, abs=1e-3)


def test_the_rate_before_a_visit_counts_as_two_responses():
    made = sampler()
    for scores in ((0.0, 0.0, 0.0, 1.0), (1.0, 1.0), (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)):
        visit(made, 0, *scores)
    # ¼, then (½ + 2) / 4 = ⅝, then (5/4 + 1) / 8 = 9/32
    assert made.rates == {PROMPTS[0].id: 0.28125}


def test_a_response_passes_from_the_score_that_is_set():
    made = sampler(PassRate(pass_score=2.0))
    visit(made, 0, 1.9, 2.0, 3.0, -1.0)
    assert made.rates == {PROMPTS[0].id: 0.5}


def test_the_pools_are_those_of_the_draw():
    made = sampler()
    assert pools(made) == {"unseen": 8, "hard": 0, "learnable": 0, "easy": 0}
    visit(made, 0, 0.0, 0.0)
    visit(made, 1, 0.0, 1.0)
    visit(made, 2, 1.0, 1.0)
    visit(made, 3, *[0.0] * 7, 1.0)  # 4 · ⅛ · ⅞ = 0.44, above the least
    visit(made, 4, *[0.0] * 19, 1.0)  # 4 · 0.05 · 0.95 = 0.19, below it
    assert pools(made) == {"unseen": 3, "hard": 2, "learnable": 2, "easy": 1}


def test_it_goes_on_from_its_state_as_if_it_had_not_stopped():
    one, two = sampler(), sampler()
    for made in (one, two):
        for number in range(6):
            visit(made, number, 0.0, 0.0)
    one.next()
    saved = json.loads(json.dumps(one.state()))
    later = [one.next() for _ in range(5)]
    fresh = sampler()
    fresh.load_state(saved)
    assert [fresh.next() for _ in range(5)] == later
    assert later[0] != sampler(EveryPrompt()).next(), "the rates have no effect on this draw"
    two.next()
    visit(two, 0, 1.0, 1.0)
    assert saved["rates"] == [[p.id, 0.0] for p in PROMPTS[:6]], (
        "a state changes after it was taken"
    )


def test_a_state_with_rates_that_are_no_shares_is_refused():
    made = sampler()
    for rate in (1.5, float("nan"), "much"):
        with pytest.raises(ValueError, match="pass rate"):
            made.load_state({"epoch": 0, "position": 0, "rates": [["tiny:0", rate]]})


def test_every_prompt_alike_is_the_plain_sampler_with_its_state():
    made, plain = sampler(EveryPrompt(), 3), Sampler(PROMPTS, 3, 0)
    visit(made, 0, 1.0)
    assert [made.next() for _ in range(9)] == [plain.next() for _ in range(9)]
    assert made.state() == plain.state() and made.metrics() == {}


def test_a_share_that_is_none_is_refused_and_one_of_0_ends():
    class Fixed(PromptSampling):
        share: float

        def passes(self, score):
            return score > 0

        def __call__(self, rate):
            return self.share

    wrong, never = sampler(Fixed(share=2.0)), sampler(Fixed(share=0.0))
    visit(wrong, 0, 1.0)
    with pytest.raises(ValueError, match=r"gave 2\.0 for the pass rate 1\.0"):
        wrong.next()
    for number in range(8):
        visit(never, number, 1.0)
    assert len(never.next()) == 8
