"""The table with a row per token says what the models said."""

import math

import pyarrow.parquet as pq
import pytest
import torch

from quartet.algorithms.presets import ALGORITHMS
from quartet.recording.tokens import TokenTexts, rounded, td_errors, token_table, write_tokens
from tests.support.world import prompts, ragged_batch, rollout

CLOSE = 2**-9


class Texts(TokenTexts):
    def __init__(self):
        pass

    def __getitem__(self, token):
        return f" t{token}"


def test_rounding_errs_by_two_in_a_thousand_whatever_the_size_and_sign():
    values = torch.cat([torch.randn(1000) * 10.0**power for power in range(-8, 9)])
    assert ((rounded(values) - values).abs() <= CLOSE * values.abs()).all()
    exact = torch.tensor([0.0, 1.0, -1.0, 0.5, -3.0, math.inf, -math.inf])
    assert torch.equal(rounded(exact), exact)
    assert rounded(torch.tensor([math.nan])).isnan().all()


def test_what_a_token_earned_adds_up(ppo_run):
    """The reward is the KL penalty and, on the last token, the score; the return is advantage and value; the TD error is
    reward + next value − value (γ = 1)."""
    for sample in range(4):
        rows = ppo_run.sample(3, sample)
        own = [i for i, mine in enumerate(rows["is_response"]) if mine]
        for i in own:
            score = min(5.0, max(-5.0, rows["score"][i])) if i == own[-1] else 0.0
            assert rows["reward"][i] == pytest.approx(rows["penalty"][i] + score, abs=5e-3)
            assert rows["penalty"][i] == pytest.approx(-0.12 * rows["kl"][i], rel=8e-3, abs=1e-6)
            assert rows["return"][i] == pytest.approx(
                rows["raw_advantage"][i] + rows["value"][i], abs=2e-2
            )
            later = rows["value"][i + 1] if i != own[-1] else 0.0
            assert rows["td_error"][i] == pytest.approx(
                rows["reward"][i] + later - rows["value"][i], abs=2e-2
            )
            assert rows["ratio"][i] - 1 == pytest.approx(
                math.expm1(rows["change"][i]), rel=1e-2, abs=1e-7
            )
        assert all(rows["reward"][i] is None for i in range(len(rows["text"])) if i not in own)


def test_without_a_critic_there_is_no_value_and_no_surprise(grpo_run):
    rows = grpo_run.sample(1, 0)
    assert not any(v is not None for name in ("value", "td_error", "return") for v in rows[name])
    assert any(v is not None for v in rows["advantage"])


def test_td_errors_by_hand():
    # rewards 0, 1; values 0.5, 0.6: δ = 0 + 0.6 − 0.5 and 1 + 0 − 0.6
    batch = ragged_batch([2], [1.0])
    ppo = ALGORITHMS["ppo"]
    values = torch.zeros_like(batch.old_logprobs)
    values[batch.response_mask] = torch.tensor([0.5, 0.6], dtype=values.dtype)
    batch = batch.__class__(
        **{**batch.__dict__, "values": values, "ref_logprobs": batch.old_logprobs}
    )
    made = td_errors(batch, ppo.experience(batch), ppo)
    assert made[batch.response_mask].tolist() == pytest.approx([0.1, 0.4])


def test_a_step_of_64_responses_of_512_tokens_is_less_than_a_megabyte(tmp_path):
    """Of noise, which compresses worst."""
    noise = torch.Generator().manual_seed(0)

    def normal(scale=1.0):
        return torch.randn(64, 512, generator=noise) * scale

    old = -torch.rand(64, 512, generator=noise).pow(3) * 6
    batch = ragged_batch([511] * 64, [0.1] * 64, dtype=torch.float32)
    mask = torch.ones(64, 512, dtype=torch.bool)
    tokens = (torch.rand(64, 512, generator=noise).pow(4) * 50_000).long()
    changed = {
        "tokens": tokens,
        "lengths": torch.full((64,), 512),
        "response_mask": mask,
        "rollout_logprobs": old,
    }
    changed |= {
        "old_logprobs": old,
        "ref_logprobs": old + normal(0.2),
        "values": normal(),
        "entropy": None,
    }
    batch = batch.__class__(**{**batch.__dict__, **changed})
    seen = {
        "logprob": old + normal(0.05),
        "ratio": normal(0.05).exp(),
        "clipped": normal() > 1.8,
        "entropy": normal().abs(),
    }
    rollouts = [rollout(prompts(1)[0], (5,), 0.1)] * 64
    ppo = ALGORITHMS["ppo"]
    path = write_tokens(
        token_table(1, rollouts, batch, ppo.experience(batch), ppo, Texts(), seen),
        tmp_path / "r" / "000001.parquet",
    )
    assert path.stat().st_size < 1_000_000
    read = pq.read_table(path)
    assert read.num_rows == 64 * 512 and read.column("text")[7].as_py() == f" t{tokens[0, 7]}"


def test_probes_are_the_same_answers_and_other_numbers(ppo_run):
    steps = ppo_run.steps("probes")
    assert steps[0] == 0 and steps[-1] == 14
    first, last = ppo_run.sample(0, 2, "probes"), ppo_run.sample(14, 2, "probes")
    assert first["token_id"] == last["token_id"] and first["id"] == last["id"]
    own = first["is_response"].index(True)
    assert (
        first["logprob"][own] != last["logprob"][own] and first["value"][own] != last["value"][own]
    )
    assert (
        first["ref_logprob"] == last["ref_logprob"]
        and first["logprob"][own] == first["ref_logprob"][own]
    )
