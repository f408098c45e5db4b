"""A run of two rounds in the studio: probes, curves and reward models of each round."""

import json
import re
import shutil

import pytest
from starlette.testclient import TestClient

from quartet.runs.reader import Run
from quartet.runs.rounds import (
    in_round,
    num_rounds,
    place_of,
    probe_folders,
    rounds_of_reward_models,
)
from quartet.studio.app import make_app
from tests.support.tiny_run import copied

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client(two_rounds):
    return TestClient(make_app([two_rounds.path.parent]), base_url="http://127.0.0.1:8700")


@pytest.fixture
def page(client, two_rounds):
    return lambda address: client.get(f"/run/{two_rounds.name}/{address}")


def pills(text):
    """The pills of a page's selector, and the one that is chosen."""
    found = re.findall(r'<a class="pill" href="(.*?)" (aria-current="true")?>(.*?)</a>', text)
    return [(href, label) for href, _, label in found], [label for _, now, label in found if now]


def test_places_and_stages_of_rounds_by_hand(two_rounds, ppo_run):
    assert (num_rounds(two_rounds.config), num_rounds(ppo_run.config)) == (2, 1)
    assert [place_of(two_rounds.config, n, "probes") for n in (1, 2)] == [
        "round-1/probes",
        "probes",
    ]
    assert place_of(ppo_run.config, 1, "probes") == "probes"
    assert probe_folders(two_rounds) == {1: "round-1/probes", 2: "probes"}
    assert probe_folders(ppo_run) == {1: "probes"}
    assert rounds_of_reward_models(two_rounds) == {1: ["reward_model"], 2: ["reward_model.2"]}
    assert two_rounds.check() == []


def test_the_probes_of_each_round_are_a_click_away(page, two_rounds):
    newest = page("samples?kind=probes").text
    shown, now = pills(newest)
    assert shown == [("?kind=round-1/probes", "round 1"), ("?kind=probes", "round 2")]
    assert now == ["round 2"]
    first = page("samples?kind=round-1/probes").text
    assert pills(first)[1] == ["round 1"]
    assert re.findall(r"<option (?:selected)?>(\d+)</option>", first) == ["0", "1", "2"]
    assert re.findall(r"<option (?:selected)?>(\d+)</option>", newest) == ["2", "3", "4"]
    # Step 2 ends the first round and begins the second: the same step, and other probes.
    texts = {
        kind: [s.response for s in two_rounds.samples(2, kind)]
        for kind in probe_folders(two_rounds).values()
    }
    assert texts["probes"] != texts["round-1/probes"]
    address = "tokens?kind=round-1/probes&step=2&sample=1"
    assert f"/run/{two_rounds.name}/{address}" in page("samples?kind=round-1/probes&step=2").text
    tokens = page(address).text
    assert 'data-kind="round-1/probes"' in tokens and 'id="scrub"' in tokens


def test_a_token_of_an_earlier_rounds_probe_is_followed_through_that_round(client, two_rounds):
    def history(kind):
        address = f"/api/run/{two_rounds.name}/token?kind={kind}&sample=1&position=12"
        return client.get(address).json()

    assert history("round-1/probes")["step"] == [0, 1, 2]
    assert history("probes")["step"] == [2, 3, 4]
    first = two_rounds.sample(1, 1, "round-1/probes")["logprob"][12]
    assert history("round-1/probes")["logprob"][1] == first
    sample = f"/api/run/{two_rounds.name}/sample?kind=round-1/probes&step=1&sample=1"
    assert client.get(sample).json()["inspector"]["texts"]


def test_the_reward_model_of_each_round_has_its_own_pairs_and_summary(page, two_rounds):
    for number in (1, 2):
        text = page(f"reward-model?round={number}").text
        assert pills(text)[1] == [f"round {number}"]
        accuracy = two_rounds.summary(in_round("reward_model", number))["held_out_accuracy"]
        assert f"{100 * accuracy:.1f}%" in text
        assert f"accuracy on {len(two_rounds.pairs(number))} held-out pairs" in text
    assert pills(page("reward-model").text)[1] == ["round 2"]
    assert two_rounds.pairs() == two_rounds.pairs(2) != two_rounds.pairs(1)
    for wrong in ("0", "3", "999999999"):
        assert page(f"reward-model?round={wrong}").status_code == 404
    assert page("reward-model?round=x").status_code == 400


def test_every_rl_stage_has_its_frontier_and_opens_its_samples(page):
    for stage in ("ppo", "ppo.2"):
        text = page(f"frontier?stage={stage}").text
        assert pills(text)[1] == [stage]
        assert 'data-click="samples"' in page(f"?stage={stage}").text
    assert pills(page("frontier").text)[1] == ["ppo.2"]
    assert page("frontier").text != page("frontier?stage=ppo").text
    assert page("frontier?stage=sft").status_code == 404


def test_a_run_in_its_second_round_shows_the_first(two_rounds, tmp_path):
    going = Run(copied(two_rounds.path, tmp_path / "going"))
    lines = (going.path / "events.jsonl").read_text().splitlines()
    until = next(i for i, line in enumerate(lines) if json.loads(line).get("stage") == "label.2")
    (going.path / "events.jsonl").write_text("\n".join(lines[:until]) + "\n")
    for name in ("probes", "evaluation"):
        shutil.rmtree(going.path / name)
    client = TestClient(make_app([going.path]), base_url="http://127.0.0.1:8700")
    probes = client.get("/run/going/samples?kind=probes").text
    assert "round 1" not in probes and "kind=round-1/probes&step=2" in probes
    reward_model = client.get("/run/going/reward-model").text
    assert "held-out pairs" in reward_model and "round 2" not in reward_model


def test_a_round_that_is_a_link_is_not_followed(two_rounds, tmp_path):
    run = Run(copied(two_rounds.path, tmp_path / "linked"))
    (run.path / "round-1").rename(tmp_path / "elsewhere")
    (run.path / "round-1").symlink_to(tmp_path / "elsewhere")
    assert probe_folders(run) == {2: "probes"} and run.pairs(1) == []
    assert any("round-1" in sentence and "link" in sentence for sentence in run.check())
