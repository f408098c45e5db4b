"""Pages over HTTP: what they hold, what is escaped, what is refused."""

import html
import json
import math
import os
import re
import shutil
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from starlette.testclient import TestClient

from quartet.io.texts import typed
from quartet.models.language_model import load_model, load_tokenizer
from quartet.runs.charts import CHARTS
from quartet.runs.definitions import definition
from quartet.runs.doctor import diagnose
from quartet.runs.reader import Run
from quartet.runs.rules import RULES
from quartet.runs.wording import aligned, number, stage_summary
from quartet.studio import app, views
from quartet.studio.app import make_app
from quartet.studio.rendering import breakable, templates
from quartet.studio.report import report
from quartet.studio.views import visible
from tests.support.audits import made_audit, write_audit
from tests.support.tiny_run import copied, put_words_into_its_mouth

EVIL = "<script>alert(1)</script>\"'&\u202eאב"
PAGES = [
    "",
    "samples",
    "samples?kind=probes",
    "tokens",
    "tokens?kind=probes",
    "frontier",
    "answers",
    "labels",
    "reward-model",
    "critic",
    "evaluations",
    "doctor",
    "config",
]


@pytest.fixture(scope="module")
def client(runs):
    return TestClient(make_app([runs]), base_url="http://127.0.0.1:8700")


@pytest.mark.parametrize("page", PAGES)
def test_every_page_of_every_kind_of_run(client, ppo_run, grpo_run, page):
    for run in (ppo_run, grpo_run):
        answer = client.get(f"/run/{run.name}/{page}")
        assert answer.status_code == 200 and "<main" in answer.text
        assert (
            "http://" not in answer.text and "https://" not in answer.text
        )  # nothing from elsewhere
        for stage in run.series:
            assert client.get(f"/run/{run.name}/?stage={stage}").status_code == 200


def test_no_page_has_the_id_of_a_metric(client, ppo_run, grpo_run):
    """Readers see labels. Ids such as `response/tokens` are left to the charts' data."""
    for run in (ppo_run, grpo_run):
        ids = {n for s in run.series.values() for n in s.columns if "/" in n} | {"reward/gold"}
        addresses = [f"/run/{run.name}/{page}" for page in PAGES if page != "config"]
        stages = [f"/run/{run.name}/?stage={stage}" for stage in run.series]
        compared = f"/compare?run={ppo_run.name}&run={grpo_run.name}"
        for address in ["/", *addresses, *stages, compared]:
            text = re.sub(r"<script.*?</script>|<[^>]*>", " ", client.get(address).text, flags=re.S)
            assert not ids & set(text.split()), address


def test_the_table_of_an_evaluation_has_gold_once_and_shares_in_percent():
    before = {"reward": 1.0, "response/ended": 0.5, "reward/model": 1.0, "reward/gold": 2.0}
    rows = views.evaluation_rows(
        {"before": before | {"gold": 2.0}, "after": before | {"gold": 3.0}}
    )
    assert rows == [
        ("reward (what was trained on)", "1.00", "1.00"),
        ("gold reward (what was meant)", "2.00", "3.00"),
        ("answers that end", "50.0%", "50.0%"),
    ]
    two = {"reward": 1.0, "reward/model": 2.0, "reward/brevity": -1.0, "response/turns": 2.0}
    labels = [label for label, *_ in views.evaluation_rows({"before": two, "after": two})]
    assert labels[1:] == ["reward model", "reward brevity", "mean turns"]


def test_a_stage_s_summary_is_in_sentences():
    summary = {"held_out_loss_before": 5.5, "held_out_loss": 3.0, "held_out_logratio/abs": 0.25}
    assert stage_summary(summary | {"ceiling": 0.9, "judge": "gold"}) == [
        "Loss on held-out data: 5.5 before, 3 after.",
        "Distance to the reference on held-out data: 0.25.",
        "The best possible accuracy, by the gold reward, is 0.9.",
    ]


def test_the_lengths_of_held_out_pairs_are_told_in_an_order_that_can_be_read():
    summary = {"held_out_prefers_longer": 0.4844, "held_out_pairs": 1000, "held_out_lengths": 964}
    assert stage_summary(summary | {"held_out_longer_chosen": 0.5083, "best_step": 40}) == [
        "The weights are those of step 40, the best evaluation.",
        "1,000 pairs are held out.",
        "964 of the held-out pairs have sides of different lengths.",
        "In 51% of those, the longer side is the chosen one.",
        "In 48% of those, the model prefers the longer side.",
    ]


def test_a_score_s_parts_do_not_repeat_it():
    assert views.score_parts({"model": 1.5, "gold": 2.0}, 1.5) == {"gold reward": "2"}
    assert views.score_parts({"model": 3.0}, 1.5) == {"model": "3"}, "its weight is one half"
    assert set(views.score_parts({"a": 1.0, "b": 1.0}, 1.0)) == {"a", "b"}


def test_a_comparison_smooths_all_lines_of_a_chart_or_none(client, ppo_run, grpo_run):
    """One run has 14 steps and can be smoothed, the other has 3 and cannot."""
    page = client.get(f"/compare?run={ppo_run.name}&run={grpo_run.name}").text
    charts = json.loads(re.search(r'id="charts-data">(.*?)</script>', page, re.S)[1])
    assert charts and all(len(chart["figure"]["data"]) == 2 for chart in charts)


def test_the_list_and_the_comparison(client, ppo_run, grpo_run):
    listed = client.get("/").text
    assert ppo_run.name in listed and grpo_run.name in listed
    compared = client.get(f"/compare?run={ppo_run.name}&run={grpo_run.name}").text
    assert "<code>data.<wbr>world</code>" in compared and "advantage" in compared


def test_the_numbers_of_a_token_are_those_of_its_row(client, ppo_run):
    made = client.get(f"/api/run/{ppo_run.name}/sample?step=5&sample=2").json()["inspector"]
    rows = ppo_run.sample(5, 2)
    for name, numbers in made["numbers"].items():
        assert numbers == [None if v is None else pytest.approx(v, abs=1e-6) for v in rows[name]]
    assert made["texts"] == rows["text"] and made["cases"] == ppo_run.cases(rows)


def test_the_glance_counts_what_the_rows_say(ppo_run):
    rows = ppo_run.sample(5, 2)
    up = sum(a > 0 for a in rows["advantage"] if a is not None)
    down = sum(a < 0 for a in rows["advantage"] if a is not None)
    said = " ".join(views.glance(rows))
    assert f"pushed {up} tokens up and {down} down" in said
    assert (
        f"The critic expected {number(next(v for v in rows['value'] if v is not None))} at the first token"
        in said
    )


def test_the_glance_at_a_group_says_that_responses_are_compared(grpo_run):
    scored = [s.number for s in grpo_run.samples(1) if s.advantage]
    for scored_sample in scored:
        assert "whole responses are compared" in views.glance(grpo_run.sample(1, scored_sample))[-1]


def test_a_token_of_a_probe_through_training(client, ppo_run):
    rows = ppo_run.sample(0, 1, "probes")
    position = rows["is_response"].index(True)
    made = client.get(f"/api/run/{ppo_run.name}/token?sample=1&position={position}").json()
    assert made["step"] == ppo_run.steps("probes")
    assert made["value"][0] == rows["value"][position]


@pytest.fixture
def evil(tmp_path, ppo_run):
    """A run in which a model wrote what would harm a careless page."""
    folder = copied(ppo_run.path, tmp_path / "evil")
    put_words_into_its_mouth(folder, EVIL)
    answers = folder / "evaluation" / "answers.jsonl"
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    rows[0]["after"]["response"] = EVIL
    answers.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return Run(folder)


@pytest.mark.parametrize(
    "page", ["samples?step=1", "tokens?step=1&sample=0", "answers", f"samples?step=1&q={EVIL}"]
)
def test_what_a_model_wrote_is_text(evil, page):
    answer = TestClient(make_app([evil.path]), base_url="http://127.0.0.1").get(f"/run/evil/{page}")
    assert answer.status_code == 200
    assert "<script>alert" not in answer.text
    assert "&lt;script&gt;alert" in answer.text or "\\u003cscript\\u003ealert" in answer.text
    assert "script-src" not in answer.headers["content-security-policy"]
    assert answer.headers["content-security-policy"].startswith("default-src 'self'")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "evil.example:8700"])
def test_other_hosts_are_refused(client, host):
    """A name that somebody has pointed at this machine."""
    assert client.get("/", headers={"host": host}).status_code == 400


@pytest.mark.parametrize("method", ["post", "put", "delete", "patch"])
def test_nothing_can_be_written(client, ppo_run, method):
    for address in ("/", f"/run/{ppo_run.name}/", f"/api/run/{ppo_run.name}/sample"):
        assert getattr(client, method)(address).status_code == 405


@pytest.mark.slow
def test_the_first_policy_answers_in_a_process_of_its_own(client, ppo_run):
    """The same as its model says here: the SFT model's greedy response."""
    rows = ppo_run.sample(5, 2)
    prompt = rows["token_id"][: rows["is_response"].index(True)]
    model, tokenizer = load_model(ppo_run.path / "sft"), load_tokenizer(ppo_run.path / "sft")
    ids, said = list(prompt), []
    for _ in range(ppo_run.config["rollout"]["max_new_tokens"]):
        said.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        ids.append(said[-1])
        if said[-1] == tokenizer.eos_token_id:
            break
    address = f"/api/run/{ppo_run.name}/first-answer?step=5&sample=2"
    answer = client.post(address, headers={"origin": "http://127.0.0.1:8700"})
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    assert answer.json() == {
        "answer": tokenizer.decode([*prompt, *said], skip_special_tokens=True)[len(before) :]
    }


def test_who_may_ask_a_model(client, ppo_run, tmp_path):
    address = f"/api/run/{ppo_run.name}/first-answer?step=5&sample=2"
    assert client.get(address).status_code == 405
    assert client.post(address, headers={"origin": "https://evil.example"}).status_code == 403
    assert client.post(address.replace("sample=2", "sample=2000")).status_code == 404
    copied(ppo_run.path, tmp_path / "lean")
    lean = TestClient(make_app([tmp_path]), base_url="http://127.0.0.1")
    answer = lean.post("/api/run/lean/first-answer?step=5&sample=2")
    assert answer.json() == {
        "error": "lean: the model that RL started from is not on this machine."
    }
    assert "first-answer" not in lean.get("/run/lean/tokens?step=5&sample=2").text


@pytest.mark.parametrize(
    "address",
    [
        "/run/..%2f..%2fetc/",
        "/run/%2e%2e/config",
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2f..%2fcli/__init__.py",
        "/run/latest/config",
        "/run/nobody/",
        "/api/run/nobody/sample",
    ],
)
def test_only_runs_and_the_studio_s_own_files_are_served(client, address):
    answer = client.get(address)
    assert answer.status_code == 404
    assert "import" not in answer.text and "root:" not in answer.text


@pytest.mark.parametrize(
    ("query", "status", "sentence"),
    [
        ("step=99", 404, "has no rollouts of step 99"),
        ("step=-1", 400, "step=-1: must be a whole number."),
        ("step=1&sample=1e3", 400, "sample=1e3: must be a whole number."),
        ("step=1&sample=99", 404, "step 1 has no sample 99"),
        ("step=99999999999999999999", 400, "must be a whole number"),
    ],
)
def test_wrong_questions_get_a_sentence(client, ppo_run, query, status, sentence):
    page = client.get(f"/run/{ppo_run.name}/tokens?{query}")
    data = client.get(f"/api/run/{ppo_run.name}/sample?{query}")
    assert page.status_code == data.status_code == status
    assert sentence in page.text and sentence in data.json()["error"]


def test_a_step_that_was_not_kept_leads_to_the_nearest(client, ppo_run):
    page = client.get(f"/run/{ppo_run.name}/samples?step=99").text
    assert "Step 99 was not kept" in page and f"step={ppo_run.steps()[-1]}&" in page


def test_a_folder_that_cannot_be_read_does_not_hide_the_others(tmp_path, ppo_run):
    copied(ppo_run.path, tmp_path / "a#b ?%")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "events.jsonl").write_text("{nothing\n")
    (tmp_path / "a#b ?%" / "rollouts" / "000001.parquet").write_bytes(b"PAR1 torn")
    client = TestClient(make_app([tmp_path]), base_url="http://localhost")
    listed = client.get("/")
    assert listed.status_code == 200 and 'href="/run/a%23b%20%3F%25/"' in listed.text
    assert client.get("/run/a%23b%20%3F%25/").status_code == 200
    torn = client.get("/run/a%23b%20%3F%25/samples?step=1")
    assert torn.status_code == 200 and "rollouts of step 1 cannot be read" in torn.text
    assert "<option >2</option>" in torn.text, "other steps are a click away"
    shutil.rmtree(tmp_path / "bad")
    assert client.get("/").status_code == 200 and client.get("/run/bad/").status_code == 404


def test_the_link_to_the_latest_run_is_that_run(runs):
    client = TestClient(make_app([runs / "latest"]), base_url="http://localhost")
    name = (runs / "latest").resolve().name
    assert (
        f"/run/{name}/" in client.get("/").text and client.get(f"/run/{name}/").status_code == 200
    )


def test_an_answer_without_a_token_of_the_policy_is_shown(tmp_path, ppo_run):
    folder = copied(ppo_run.path, tmp_path / "empty")
    file = folder / "rollouts" / "000001.parquet"
    table = pq.read_table(file)
    pq.write_table(
        table.filter(pc.or_(pc.not_equal(table["sample"], 0), pc.invert(table["is_response"]))),
        file,
    )
    client = TestClient(make_app([folder]), base_url="http://localhost")
    assert client.get("/run/empty/samples?step=1").status_code == 200
    assert "The response is empty." in client.get("/run/empty/tokens?step=1&sample=0").text


def test_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"time": 1.0, "event": "started", "stage": "sft"}\n')
    young = TestClient(make_app([tmp_path]), base_url="http://localhost")
    for page in PAGES[:-1]:
        status = young.get(f"/run/{tmp_path.name}/{page}").status_code
        assert status == (404 if page.startswith("tokens") else 200), page
    assert young.get("/").status_code == 200


def test_no_runs_at_all(tmp_path):
    assert (
        "There are no runs yet"
        in TestClient(make_app([tmp_path]), base_url="http://localhost").get("/").text
    )


def test_samples_are_sorted_and_searched(ppo_run):
    samples = ppo_run.samples(4)
    best = views.sorted_samples(samples, "best", "")
    assert [s.score for s in best] == sorted((s.score for s in samples), reverse=True)
    word = samples[3].response.split()[0]
    assert all(
        word in (s.prompt + s.response)
        for s in views.sorted_samples(samples, "number", word.upper())
    )


def test_a_reward_model_is_judged_by_its_held_out_pairs(ppo_run):
    pairs = ppo_run.pairs()
    made = views.judged(pairs)
    assert made["count"] == len(pairs) == 64
    assert made["accuracy"] == pytest.approx(ppo_run.summary("reward_model")["held_out_accuracy"])
    assert all(p["chosen_score"] < p["rejected_score"] for p in made["worst"])


def test_judging_by_hand():
    def pair(good, bad, long, short):
        return {
            "chosen_score": good,
            "rejected_score": bad,
            "chosen_tokens": long,
            "rejected_tokens": short,
        }

    made = views.judged(
        [pair(2.0, 1.0, 5, 3), pair(0.0, 1.0, 3, 5), pair(1.0, 1.0, 3, 5), pair(4.0, 0.0, 2, 2)]
    )
    assert (
        made["accuracy"] == 2.5 / 4
        and made["accuracy_longer"] == 1
        and made["accuracy_shorter"] == 0.25
    )
    assert made["longer"] == 0.25 and len(made["worst"]) == 1


def test_configs_differ_by_key():
    rows = views.differences(
        [{"a": {"b": 1, "c": 2}, "r": [{"t": "x"}]}, {"a": {"b": 1, "c": 3}, "r": [{"t": "y"}]}]
    )
    assert rows == [("a.c", ["2", "3"]), ("r.0.t", ["x", "y"])]


def test_a_table_that_a_config_does_not_have_is_one_row_of_the_comparison():
    sft = {"lr": 1, "steps": 2, "loss": {"type": "x"}}
    with_it, without = {"recipe": ["sft", "ppo"], "sft": sft}, {"recipe": ["ppo"]}
    assert views.differences([with_it, without, with_it]) == [
        ("recipe", ["sft, ppo", "ppo", "sft, ppo"]),
        ("sft.*", ["3 settings", "–", "3 settings"]),
    ]
    longer = with_it | {"sft": sft | {"steps": 9}}
    keys = [key for key, _ in views.differences([with_it, without, longer])]
    assert keys == ["recipe", "sft.loss.type", "sft.lr", "sft.steps"]


def test_numbers_that_stand_together_have_the_same_decimals():
    assert aligned([0.00937, 1.54]) == ["0.01", "1.54"]
    assert aligned([-0.001, 12.34, None, math.nan]) == ["0.0", "12.3", "–", "–"]
    assert aligned([3, 1200]) == ["3", "1,200"] and aligned([2e-7, 0.0]) == ["2e−07", "0"]


def test_a_response_without_a_visible_character_is_said_to_be_empty():
    assert visible(" \n") == "(empty)" and visible(" a") == " a"
    template = "{{ text | shortened }}"
    assert templates().from_string(template).render(text="") == "(empty)"


def test_one_token_is_not_compared_as_a_whole_response(ppo_run):
    rows = {name: list(column) for name, column in ppo_run.sample(5, 2).items()}
    first = rows["is_response"].index(True)
    rows["is_response"] = [i == first for i in range(len(rows["is_response"]))]
    rows["advantage"] = [v if i == first else None for i, v in enumerate(rows["advantage"])]
    text = " ".join(views.glance(rows))
    assert "Every token" not in text and "1 tokens" not in text
    second = first + 1
    rows["is_response"][second], rows["advantage"][second] = True, rows["advantage"][first]
    assert "Every token has the advantage" in views.glance(rows)[-1]
    assert "whole responses" not in views.glance(rows)[-1]


def test_the_numbers_of_a_run_have_units_and_say_where_they_began(ppo_run):
    numbers = {label: (now, first) for label, now, first in views.headline(ppo_run)}
    series = ppo_run.series[ppo_run.rl_stage]
    assert {"KL, nats", "response length, tokens"} <= numbers.keys()
    first = float(numbers["reward"][1].replace("−", "-"))
    assert first == pytest.approx(series.columns["reward"][0], abs=0.01)


def test_the_reason_of_a_failed_run_is_on_its_first_page(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "events.jsonl").write_text('{"event": "failed", "time": 1.0, "error": "no <b>"}\n')
    client = TestClient(make_app([tmp_path]), base_url="http://127.0.0.1:8700")
    page = client.get("/run/run/").text
    assert "The run failed: no &lt;b&gt;" in page


def test_how_a_run_that_was_stopped_goes_on_is_on_its_first_page(tmp_path):
    events = tmp_path / "a run" / "events.jsonl"
    events.parent.mkdir()
    client = TestClient(make_app([tmp_path]), base_url="http://127.0.0.1:8700")
    events.write_text('{"event": "interrupted", "time": 1.0}\n')
    words = f"quartet run {typed(events.parent)} --resume"
    page = html.unescape(client.get("/run/a%20run/").text)
    assert f"The run was stopped, and nothing is lost: {words} goes on with it." in page
    events.write_text('{"event": "started", "time": 1.0}\n')
    assert words not in html.unescape(client.get("/run/a%20run/").text)
    os.utime(events, (1, 1))
    assert f"If the run has ended: {words}" in html.unescape(client.get("/run/a%20run/").text)


def test_a_setting_breaks_at_its_dots_and_is_escaped():
    assert breakable("a.b_c") == "a.<wbr>b_<wbr>c" and "<b>" not in breakable("<b>.c")


def test_the_results_of_an_evaluation_are_on_a_page_and_in_the_report(tmp_path):
    folder = tmp_path / "run"
    (folder / "evaluation").mkdir(parents=True)
    (folder / "events.jsonl").write_text('{"event": "done", "time": 1.0}\n')
    numbers = {"value": 0.75, "low": 0.5, "high": 0.875}
    place = {"set": "own", "n": 4}
    cells = [
        {"policy": "after", "measure": "kl", **place, "value": 4.0, "low": 3.0, "high": 5.0},
        *({"policy": p, "measure": EVIL, **place, **numbers} for p in ("before", "after")),
    ]
    compared = {"policy": "after", "against": "before", "measure": "gold", **place, "wins": 3}
    compared |= {"losses": 1, "ties": 0, "win_rate": numbers, "p": 0.625, "p_holm": 1.0}
    compared["mean_difference"] = {"value": 0.31, "low": -0.125, "high": 0.625}
    compared["length_difference"] = {"value": -12.0, "low": -15.0, "high": -9.0}
    result = {"policies": ["before", "after"], "against": "before", "cells": cells}
    result["cells"][1]["measure"] = result["cells"][2]["measure"] = "<script>x"
    file = folder / "evaluation" / "mine.json"
    file.write_text(json.dumps(result | {"comparisons": [compared]}))
    (folder / "evaluation" / "broken.json").write_text("{")
    pages = TestClient(make_app([tmp_path]), base_url="http://127.0.0.1:8700")
    page = pages.get("/run/run/evaluations").text
    for text in (page, report(Run(folder))):
        assert "0.75 [0.5, 0.875]" in text and "3–0–1" in text and "0.625" in text
        assert "0.31 [−0.125, 0.625]" in text and "−12 [−15, −9]" in text
        assert "<script>x" not in text and "evaluation/broken.json is not JSON" in text
    assert '"x": [0.0, 2.0]' in page  # √KL


def test_the_page_of_the_critic_has_the_audit_of_a_step(ppo_run, tmp_path):
    run = copied(ppo_run.path, tmp_path / "audited")
    client = TestClient(make_app([tmp_path]), base_url="http://127.0.0.1:8700")
    assert "was not audited" in client.get("/run/audited/critic").text
    write_audit(run, made_audit(lambda position, true, rng, first: true + 0.8, step=8))
    evil = {**made_audit(step=12), "compared": [EVIL]}
    write_audit(run, evil)
    newest = client.get("/run/audited/critic").text
    assert "at step 12" in newest and "On average V is right" in newest
    assert "&lt;script&gt;alert(1)" in newest and "<script>alert(1)" not in newest
    earlier = client.get("/run/audited/critic?step=8").text
    assert "mostly a constant offset" in earlier and "the audited steps" in earlier
    missing = client.get("/run/audited/critic?step=9")
    assert missing.status_code == 404 and "was not audited at step 9" in missing.text
    (run / "critic_audits" / "ppo-000012.json").write_text("[]")
    assert "should be a table" in client.get("/run/audited/critic").text


def test_the_report_has_the_last_audit_of_the_critic_and_its_charts(ppo_run, tmp_path):
    path = copied(ppo_run.path, tmp_path / "audited")
    without = report(Run(path))
    assert "against Monte Carlo returns" not in without
    write_audit(path, made_audit(step=8))
    page = report(Run(path))
    assert "The critic against Monte Carlo returns, at step 8" in page
    assert "On average V is right" in page
    assert page.count('class="plot"') == without.count('class="plot"') + 3
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', page, re.DOTALL)[1])
    places = [int(place) for place in re.findall(r'data-figure="(\d+)"', page)]
    assert places == list(range(len(figures)))
    titles = [figures[place]["layout"]["title"]["text"] for place in places[-3:]]
    assert titles == ["Calibration", "Error by position", "Advantage estimates by λ"]


def test_a_page_without_evaluations_names_a_command_that_finds_the_run(client, ppo_run):
    page = client.get(f"/run/{ppo_run.name}/evaluations").text
    command = re.search(r"<code>quartet eval (.*?)</code>", page)
    assert command and Run(Path(command[1])).name == ppo_run.name


def test_the_distance_of_a_preference_stage_is_no_invariant():
    """It must be 0 at the first step only."""
    shown = {chart.title: chart.metrics for chart in CHARTS}
    assert shown["Distance to the reference, nats"] == ("logratio/abs",)
    assert "logratio/abs" not in shown["Invariants"]


def test_every_metric_that_a_rule_looks_at_has_a_plain_name():
    """The doctor's page lists the rules by it."""
    unnamed = {t.reads[0] for t in RULES.values() if not definition(t.reads[0]).what}
    assert unnamed == set()


def test_the_doctor_looks_at_a_run_again_only_where_it_has_grown(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(app, "diagnose", lambda run: looked.append(run.name) or diagnose(run))
    folder = tmp_path / "run"
    folder.mkdir()
    step = {"event": "metrics", "time": 1.0, "stage": "ppo", "metrics": {"reward": 0.5}}
    client = TestClient(make_app([tmp_path]), base_url="http://127.0.0.1:8700")
    for last, count in ((1, 1), (2, 2)):
        with (folder / "events.jsonl").open("a") as file:
            file.write(json.dumps(step | {"step": last}) + "\n")
        for _ in range(2):
            assert client.get("/run/run/doctor").status_code == 200
        assert len(looked) == count
