"""What the sentences call a critic's error, and what is read of files of results."""

import json

import pytest

from quartet.runs.critic_audits import (
    audit_history,
    audit_sentences,
    audit_tables,
    critic_audits,
    place,
)
from quartet.runs.critic_figures import audit_figures
from tests.support.audits import made_audit, write_audit


def words(value):
    return " ".join(audit_sentences(made_audit(value)))


def test_a_perfect_critic_is_called_right():
    said = words(lambda position, true, rng, first: true)
    assert "On average V is right" in said
    assert "At the first token its mean is right within the noise" in said
    assert "No error of V is left" in said
    assert "better than guessing" in said
    assert "closest to Monte Carlo at λ = 0:" in said
    assert "too high" not in said and "too low" not in said


@pytest.mark.parametrize(("offset", "side"), [(0.8, "0.8 too high"), (-0.8, "0.8 too low")])
def test_a_constant_offset_is_named_with_its_size_and_side(offset, side):
    said = words(lambda position, true, rng, first: true + offset)
    assert "mostly a constant offset" in said
    assert "On average the critic is 0." in said and side[-7:] in said
    assert "depends on the position" not in said and "noise, different" not in said


def test_noise_is_named():
    said = words(lambda position, true, rng, first: true + 0.9 * rng.standard_normal())
    assert "mostly noise, different from state to state" in said


def test_a_critic_that_sees_only_the_prompt_is_named():
    said = words(lambda position, true, rng, first: first)
    assert "it does not follow the answer" in said and "not distinguishable from guessing" in said


def test_an_error_of_the_first_tokens_is_one_of_position():
    said = words(lambda position, true, rng, first: true + (1.5 if position < 2 else 0.0))
    assert "depends on the position in the answer" in said
    assert "At the first token the critic is 1.5 too high" in said


def test_advantages_within_the_noise_have_no_deviation_of_zero():
    """The noise is subtracted from their variance; what is left of a small audit can be 0."""
    audit = made_audit(lambda position, true, rng, first: true)
    audit["advantages"]["true_deviation"] = 0.0
    said = " ".join(audit_sentences(audit))
    assert "the true advantages do not differ beyond the noise" in said
    assert "deviation of 0" not in said


def test_values_that_are_all_alike_are_no_error_of_the_program():
    audit = made_audit(lambda position, true, rng, first: 1.0)
    assert audit["calibration"]["slope"] is None
    assert audit_tables(audit) and audit_figures(audit)
    assert "it does not follow the answer" in " ".join(audit_sentences(audit))


def test_positions_are_counted_from_1_in_words():
    assert [place(0, 0), place(3, 3), place(8, 14)] == [
        "first token",
        "token 4",
        "tokens 9 to 15",
    ]


def test_files_are_read_by_step_and_damage_is_a_sentence(tmp_path):
    assert critic_audits(tmp_path) == ([], [])
    for step in (12, 8):
        write_audit(tmp_path, made_audit(step=step))
    whole = made_audit(step=4)
    write_audit(tmp_path, {**whole, "level": "high"})
    (tmp_path / "critic_audits" / "ppo-000001.json").write_text("{")
    audits, problems = critic_audits(tmp_path)
    assert [audit["step"] for audit in audits] == [8, 12]
    assert len(problems) == 2 and "is not JSON" in problems[0]
    assert "ppo-000004.json: level should be a table" in problems[1]
    _, columns, rows = audit_history(audits)
    assert [label for label, _ in rows] == ["step 8", "step 12"]
    assert all(len(values) == len(columns) for _, values in rows)
    assert audit_history(audits[:1]) is None


def test_every_table_has_a_value_for_each_column_and_charts_hold_numbers_only():
    audit = made_audit()
    for _, columns, rows in audit_tables(audit):
        assert rows and all(len(values) == len(columns) for _, values in rows)
    for chart in audit_figures(audit):
        json.dumps(chart, allow_nan=False)
        assert chart["meanings"][0]["text"].endswith(".")
