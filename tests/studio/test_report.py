"""One file, from which a stranger understands what happened."""

import re

from quartet.runs.doctor import examine
from quartet.studio.report import chosen_rollouts, report, verdict, write_report


def test_it_needs_nothing_else(ppo_run):
    page = report(ppo_run)
    body = page.replace(
        page[page.index("<script>") : page.index('<script type="application/json"')], ""
    )  # without Plotly
    assert not re.search(r'(src|href)="(?!#)', body) and "url(" not in body
    assert "plotly" in page[:3_000_000].lower()


def test_it_tells_what_was_done_and_what_came_of_it(ppo_run, grpo_run):
    said = " ".join(verdict(ppo_run, examine(ppo_run)))
    assert said.startswith("sft → reward model → ppo → evaluation, on the embedded world reviews.")
    assert "of them by the gold reward" in said and "The doctor" in said
    page = report(ppo_run)
    for heading in (
        "Before and after",
        "Findings of the doctor",
        "reward model",
        "token by token",
        "Settings",
    ):
        assert heading in page
    assert len(chosen_rollouts(ppo_run)) == 10 and page.count('<p class="tokens"') == 10
    assert page.count('<p class="tokens"') == report(grpo_run).count('<p class="tokens"')


def test_it_is_in_the_folder_of_the_run(ppo_run):
    path = write_report(ppo_run)
    assert path == ppo_run.path / "report.html" and path.read_text(encoding="utf-8") == report(
        ppo_run
    )
