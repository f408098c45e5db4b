"""What the package finds of Quartet itself, and that the published table is of these findings."""

import json
from pathlib import Path

from rl_conformance import CLAIMS, load
from rl_conformance.report import Report, as_markdown, judge_library
from tests.conformance.checkouts import CHECKOUTS

RESULTS = Path("conformance/results")
INSTALLED = ("quartet", "trl-1.16.0", "trl-1.10.0", "trl-ppo-1.10.0", "verl", "areal", "torchtune")
NAMES = (*INSTALLED, *CHECKOUTS)
CONVENTIONS = {
    "pairs/kto",
    "groups/small-scores",
    "ratios/far-above",
    "expectations/kl-loss-on-policy",
    "expectations/kl-loss-off-policy",
}


def published():
    """The stored reports in the order of the table."""
    files = [RESULTS / f"{name}.json" for name in NAMES]
    assert set(files) == set(RESULTS.glob("*.json"))
    return [
        Report.from_json(each) for file in files for each in json.loads(file.read_text("utf-8"))
    ]


def test_quartet_holds_every_claim_or_states_its_convention():
    report = judge_library(load("quartet"), "quartet")
    outcomes = {each.claim: each.outcome for each in report.verdicts}
    assert {name for name, outcome in outcomes.items() if outcome == "convention"} == CONVENTIONS
    assert {outcome for name, outcome in outcomes.items() if name not in CONVENTIONS} == {"holds"}
    assert outcomes == {each.claim: each.outcome for each in published()[0].verdicts}


def test_the_published_reports_are_of_these_claims():
    for report in published():
        assert [each.claim for each in report.verdicts] == [claim.name for claim in CLAIMS]


def test_the_page_has_the_table_of_the_stored_reports():
    page = Path("docs/conformance.md").read_text(encoding="utf-8")
    table = page.partition("<!-- table -->\n")[2].partition("<!-- end of table -->")[0]
    assert table == as_markdown(published())
