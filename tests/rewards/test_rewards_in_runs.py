"""Rewards of a person's own, from the file to the record of a run, and the verbs that try and serve them."""

import json
import os
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest

from quartet.assembly import build
from quartet.config.toml import ConfigError, read_settings
from quartet.data import DataError
from quartet.models.heads import ScalarModel
from quartet.models.language_model import ModelError
from quartet.recipes import recipe_path
from quartet.rewards.protocol import RewardError
from tests.runtime.test_runs import QUARTET, TINY, events, metrics
from tests.support.command import quartet
from tests.support.world import model, tokenizer, write_lines

CODE = """
def digits(responses, answer):
    return [sum(c.isdigit() for c in r) / max(len(r), 1) for r in responses]

def shaky(prompts, responses):
    return [None if i % 4 == 0 else 1.0 for i, _ in enumerate(responses)]

def per_token(tokens):
    return [[float(t.strip().isdigit()) for t in ts] for ts in tokens]

def nan(responses):
    return [float("nan")] * len(responses)

def longer(responses):
    return [len(r) for r in responses]
"""
SUMS = ["run", "sums", *TINY, "policy.create.max_length=32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "mine.py").write_text(CODE)
    return folder


def rewards(*tables: dict) -> str:
    return (
        "reward=["
        + ", ".join(
            "{" + ", ".join(f"{k}={json.dumps(v)}" for k, v in t.items()) + "}" for t in tables
        )
        + "]"
    )


@pytest.mark.slow
def test_two_functions_and_a_verifier_are_weighed_and_all_of_them_are_recorded(place):
    tables = [
        {"type": "number"},
        {"type": "function", "function": "mine.py:digits", "weight": 0.5, "processes": 2},
        {"type": "function", "function": "mine.py:shaky", "weight": 0.25, "name": "mood"},
        {"type": "length", "least": 1, "most": 3, "weight": 0.0},
    ]
    done = quartet(*SUMS, rewards(*tables), cwd=place)
    assert done.returncode == 0, done.stderr
    run = place / "runs" / "latest"
    steps = [m for m in metrics(run) if "reward/number" in m]
    assert len(steps) == 3
    for step in steps:
        parts = step["reward/number"] + 0.5 * step["reward/digits"] + 0.25 * step["reward/mood"]
        assert step["reward"] == pytest.approx(parts, abs=1e-6)
        assert (
            step["reward/mood"] == 1.0
            and step["reward/unscored"] == 0.25
            and "reward/length" in step
        )
    table = pq.read_table(run / "rollouts" / "000001.parquet").to_pylist()
    row = table[0]
    total = row["score/number"] + 0.5 * row["score/digits"] + 0.25 * row["score/mood"]
    assert row["score"] == pytest.approx(total, abs=1e-6) and 0 <= row["score/length"] <= 1
    warnings = [e["sentence"] for e in events(run) if e["event"] == "warning"]
    assert any("25% of responses got no score and were left out" in w for w in warnings)


@pytest.mark.slow
def test_dense_rewards_stand_on_their_tokens(place):
    done = quartet(
        *SUMS,
        'recipe=["sft","ppo","evaluation"]',
        "algorithm.preset=ppo",
        "rollout.samples_per_prompt=1",
        'algorithm.rewards.type="every_token"',
        "algorithm.kl.coef=0",
        "algorithm.scores=[]",
        rewards({"type": "function", "function": "mine.py:per_token", "weight": 2.0}),
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    rows = pq.read_table(place / "runs" / "latest" / "rollouts" / "000001.parquet").to_pylist()
    said = [row for row in rows if row["is_response"]]
    assert said and all(row["reward"] == 2.0 * row["text"].strip().isdigit() for row in said)


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (
            {"type": "function", "function": "mine.py:gone"},
            "mine.py has no gone. It defines digits, shaky",
        ),
        ({"type": "function", "function": "gone.py:f"}, "gone.py: no such file."),
        ({"type": "function"}, "reward.0.function: is missing."),
        ({"type": "pattern", "pattern": "("}, 'reward.pattern = "(": not a regular expression'),
        (
            {"type": "json", "schema_file": "gone.json"},
            'reward.schema_file = "gone.json": no such file.',
        ),
        (
            {"type": "exact", "answer": "solution"},
            'has no column solution, which reward.type = "exact" compares with.',
        ),
        ({"type": "length", "least": 5, "most": 2}, "least = 5 is more than most = 2"),
        ({"type": "server", "url": "ftp://x"}, "reward.0.url"),
        ({"type": "server", "url": "http://x", "token_env": "NO_TOKEN_HERE"}, "NO_TOKEN_HERE"),
        (
            {"type": "judge", "url": "http://x", "model": "m", "prompt": "gone.txt"},
            'reward.prompt = "gone.txt": no such file.',
        ),
        (
            {"type": "judge", "url": "http://x", "model": "m", "prompt": "mine.py"},
            "the judge's prompt has no {prompt}",
        ),
        (
            {"type": "judge", "url": "http://x", "model": "m", "token_env": "NO_TOKEN_HERE"},
            "no such environment variable",
        ),
        (
            {"type": "judge", "url": "http://x", "model": "m", "weight": 0},
            "weight: is 0 for every reward",
        ),
        ({"type": "ensemble", "models": ["a"]}, "reward.0.models"),
        (
            {"type": "ensemble", "models": ["./gone", "./too"]},
            'reward.models = "./gone": no such folder.',
        ),
        ({"type": "functoin", "function": "mine.py:digits"}, "Did you mean function?"),
    ],
)
def test_what_cannot_be_a_reward_is_said_before_anything_is_loaded(
    place, monkeypatch, table, sentence
):
    monkeypatch.chdir(place)
    assert sentence in refusal(*SUMS[1:], rewards(table))


def refusal(recipe: str, *words: str) -> str:
    """The one sentence with which a request is refused, without the seconds that a process of its own takes to start."""
    with pytest.raises((ConfigError, RewardError, ModelError, DataError)) as error:
        build(read_settings(recipe_path(recipe), words, f"recipe {recipe}").config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_refused_reward_ends_the_command_with_one_sentence(place):
    done = quartet(*SUMS, rewards({"type": "function", "function": "mine.py:gone"}), cwd=place)
    assert (
        done.returncode == 2
        and "mine.py has no gone" in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
    )


def test_two_rewards_of_one_name_and_pairs_without_pairs():
    twice = refusal(*SUMS[1:], rewards({"type": "exact"}, {"type": "exact", "answer": "question"}))
    assert "two rewards are called exact" in twice
    alone = refusal(
        "reviews", rewards({"type": "judge", "url": "http://x", "model": "m", "mode": "pairwise"})
    )
    assert 'reward.mode = "pairwise": compares answers to the same prompt' in alone


def test_a_reward_that_is_never_a_number_stops_the_run(place):
    done = quartet(*SUMS, rewards({"type": "function", "function": "mine.py:nan"}), cwd=place)
    assert (
        done.returncode == 1
        and "grpo, step 1: none of" in done.stderr
        and "responses has a score from" in done.stderr
    )
    log = (place / "runs" / "latest" / "run.log").read_text()
    assert "gave nan for sums:" in log and "which is left out" in log


def test_trying_a_reward(place):
    file = write_lines(
        place / "pairs.jsonl",
        *(
            json.dumps({"prompt": "p", "chosen": "x" * (i + 2), "rejected": "y" * (i + 1)})
            for i in range(20)
        ),
    )
    done = quartet("reward", "mine.py:longer", "--on", str(file), "--json", cwd=place)
    found = json.loads(done.stdout)
    assert (
        found["answers"] == 40
        and found["least"] == 1
        and found["most"] == 21
        and found["different"] == 21
    )
    assert found["accuracy"] == 1.0 and found["length_correlation"] == pytest.approx(1.0)
    assert any("longer answers score higher (r = 1.00)" in f for f in found["findings"])
    shown = quartet("reward", "mine.py:longer", "--on", str(file), cwd=place).stdout
    assert "scores    1 to 21" in shown and "the chosen side scores higher in 100%" in shown
    assert (
        "NaN or infinite" in quartet("reward", "mine.py:nan", "--on", str(file), cwd=place).stdout
    )
    assert (
        "has no column answer" in quartet("reward", "number", "--on", str(file), cwd=place).stderr
    )


@pytest.mark.slow
def test_serving_a_run(place, tmp_path):
    ScalarModel.from_trunk(model(), 0, seed=0).save(tmp_path / "reward_model", tokenizer())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = subprocess.Popen(
        [QUARTET, "serve-reward", str(tmp_path), "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=dict(os.environ),
    )
    try:
        for _ in range(300):
            try:
                answer = httpx.post(
                    f"http://127.0.0.1:{port}/", json={"prompts": ["the"], "responses": ["film"]}
                )
                break
            except httpx.TransportError:
                time.sleep(0.1)
        assert len(answer.json()["scores"]) == 1
    finally:
        started.terminate()
        started.communicate()
    gone = quartet("serve-reward", "nowhere", cwd=place)
    assert gone.returncode == 2 and "nowhere: no such folder." in gone.stderr


GAME = """
class Twice:
    def reset(self, prompt):
        self.turns = 0
        return []

    def step(self, response):
        self.turns += 1
        return [{"role": "user", "content": "<"}], float(len(response)), self.turns == 2

class Half:
    def reset(self, prompt): ...
"""
TINY_GUESS = [
    "run",
    "guess",
    "policy.create.hidden_size=16",
    "policy.create.num_layers=1",
    "policy.create.num_heads=2",
    "data.rows=200",
    "data.held_out_rows=64",
    "sft.steps=30",
    "rollout.prompts_per_step=8",
    "optim.minibatches=2",
    "run.steps=2",
    "evaluation.prompts=8",
]


@pytest.mark.slow
def test_an_environment_of_ones_own_answers_in_a_run(place):
    (place / "game.py").write_text(GAME)
    done = quartet(
        *TINY_GUESS, "environment.function=game.py:Twice", "environment.max_turns=3", cwd=place
    )
    assert done.returncode == 0, done.stderr
    run = place / "runs" / "latest"
    table = pq.read_table(run / "rollouts" / "000001.parquet").to_pylist()
    heard = [row for row in table if row["text"] == "<" and not row["is_response"]]
    assert heard and all(row["advantage"] is None and row["logprob"] is None for row in heard)
    first = next(m for m in metrics(run) if "reward/environment" in m)
    assert first["ratio/first_error"] < 1e-5 and first["kl"] == 0.0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["environment.function=game.py:Half"],
            'environment.function = "game.py:Half": has no method step.',
        ),
        (
            ["environment.function=game.py:None_"],
            'environment.function = "game.py:None_": game.py has no None_. It defines Twice, Half.',
        ),
        (
            ["environment.max_turns=0", "environment.function=game.py:Twice"],
            "environment.max_turns = 0: must be ≥ 1.",
        ),
    ],
)
def test_environments_that_cannot_work(place, monkeypatch, words, sentence):
    (place / "game.py").write_text(GAME)
    monkeypatch.chdir(place)
    assert sentence in refusal(*TINY_GUESS[1:], *words)


def test_an_environment_needs_conversations_and_its_reward_an_environment(place, monkeypatch):
    (place / "game.py").write_text(GAME)
    monkeypatch.chdir(place)
    plain = refusal(*SUMS[1:], "environment.function=game.py:Twice")
    assert "is plain text, and an environment speaks in conversations" in plain
    assert '"environment" needs an environment. Add [environment]' in refusal(
        *SUMS[1:], rewards({"type": "environment"})
    )
