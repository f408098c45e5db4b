"""Servers on loopback that answer well, badly, late or not at all; ours behind a real uvicorn."""

import dataclasses
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
import uvicorn

from quartet.assembly.serving import TextScorer
from quartet.models.heads import ScalarModel
from quartet.rewards import remote
from quartet.rewards.judge import JudgeReward, neighbours
from quartet.rewards.protocol import RewardError
from quartet.rewards.remote import Endpoint, ServerReward
from quartet.rewards.reward_model import ModelReward
from quartet.rewards.serve import BadRequest, app, understood
from tests.support.world import model, prompts, rollout, tokenizer


class Fake:
    """Answers each request with the next of a list of (status, body, seconds), the last for ever; a callable body is given the
    request."""

    def __init__(self, *answers):
        self.answers, self.requests, self.headers = list(answers), [], []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                fake.requests.append(body)
                fake.headers.append(dict(self.headers))
                answer = fake.answers.pop(0) if len(fake.answers) > 1 else fake.answers[0]
                status, text, seconds = answer
                time.sleep(seconds)
                text = text(body) if callable(text) else text
                data = text if isinstance(text, bytes) else json.dumps(text).encode()
                try:
                    self.send_response(status)
                    self.send_header("content-length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except BrokenPipeError:
                    pass

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)


def rollouts(count=3, **extra):
    made = []
    for i, prompt in enumerate(prompts(count)):
        made.append(
            rollout(dataclasses.replace(prompt, extra=extra), (5 + i, 6, 7)[: 1 + i % 3], 0.0, i, i)
        )
    return made


def ask(url, **more):
    endpoint = Endpoint("reward server", url, **more)
    try:
        return ServerReward("server", endpoint).score(rollouts(answer="44"))
    finally:
        endpoint.close()


def test_prompts_responses_and_columns_go_there_and_scores_come_back():
    with Fake((200, {"scores": [1, None, 2.5]}, 0)) as fake:
        assert ask(fake.url) == [1, None, 2.5]
        asked = rollouts()
        assert fake.requests == [
            {
                "prompts": [r.prompt.text for r in asked],
                "responses": [r.response for r in asked],
                "ended": [True] * 3,
                "columns": {"answer": ["44"] * 3},
            }
        ]


def test_conversations_go_along_as_they_are():
    messages = [{"role": "user", "content": "was it good"}]
    asked = [
        dataclasses.replace(r, prompt=dataclasses.replace(r.prompt, messages=messages))
        for r in rollouts(1)
    ]
    with Fake((200, {"scores": [1]}, 0)) as fake:
        endpoint = Endpoint("reward server", fake.url)
        ServerReward("server", endpoint).score(asked)
        endpoint.close()
        assert fake.requests[0]["messages"] == [messages]


def test_openrlhfs_protocol():
    with Fake((200, {"rewards": [1, 2, 3], "extra_logs": {}}, 0)) as fake:
        endpoint = Endpoint("reward server", fake.url)
        assert ServerReward("server", endpoint, "openrlhf").score(rollouts(answer="44")) == [
            1,
            2,
            3,
        ]
        endpoint.close()
        assert fake.requests[0] == {
            "query": [r.prompt.text + r.response for r in rollouts()],
            "prompts": [r.prompt.text for r in rollouts()],
            "labels": ["44"] * 3,
        }


def test_a_server_that_stumbles_is_asked_again():
    with Fake((503, b"busy", 0), (429, b"slow down", 0), (200, {"scores": [1, 2, 3]}, 0)) as fake:
        assert ask(fake.url) == [1, 2, 3] and len(fake.requests) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ((500, b"", 0), "answered 500 (3 tries)"),
        ((404, b"no such page", 0), "answered 404: no such page"),
        ((200, b"<html>", 0), "something that is not JSON: <html>"),
        ((200, {"score": [1]}, 0), 'without a list "scores"'),
        ((200, {"scores": [1]}, 0), "returned 1 value for 3 responses."),
        ((200, {"scores": [1, "2", 3]}, 0), "returned '2' for response 1, not a number or null."),
        ((200, {"scores": [1, True, 3]}, 0), "returned True for response 1"),
        ((200, b"x" * 2000, 0), "answered with more than 1,000 bytes."),
        ((302, b"", 0), "answered 302"),
    ],
)
def test_what_is_no_answer_is_an_error_and_never_zero(answer, sentence):
    with Fake(answer) as fake, pytest.raises(RewardError) as error:
        ask(fake.url, max_bytes=1000)
    assert sentence in str(error.value) and fake.url in str(error.value)


def test_silence_and_absence():
    with (
        Fake((200, {"scores": [1, 2, 3]}, 2)) as fake,
        pytest.raises(RewardError, match=r"did not answer in 0.1 s \(2 tries\)"),
    ):
        ask(fake.url, timeout=0.1, tries=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RewardError, match="cannot be reached"):
        ask(f"http://127.0.0.1:{port}/")


def test_the_token_comes_from_the_environment_and_is_in_no_message(monkeypatch):
    with pytest.raises(
        RewardError, match='reward.token_env = "NO_SUCH_TOKEN": no such environment variable'
    ):
        ask("http://127.0.0.1:1/", token_env="NO_SUCH_TOKEN")
    monkeypatch.setenv("REWARD_TOKEN", "s3cret")
    with Fake((403, b"not you", 0)) as fake, pytest.raises(RewardError) as error:
        ask(fake.url, token_env="REWARD_TOKEN")
    assert fake.headers[0]["Authorization"] == "Bearer s3cret" and "s3cret" not in str(error.value)


# --- ours ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "reward_model"
    scalar = ScalarModel.from_trunk(model(), 0, seed=0)
    scalar.centre = 0.5
    scalar.save(folder, tokenizer())
    return folder


class Served:
    def __init__(self, application):
        self.server = uvicorn.Server(uvicorn.Config(application, port=0, log_level="error"))
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}/"

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join()


def test_a_served_reward_model_scores_as_in_process(reward_model):
    end = tokenizer().eos_token_id
    asked = [dataclasses.replace(r, response_ids=(*r.response_ids, end)) for r in rollouts(5)]
    asked[1] = dataclasses.replace(
        rollouts(5)[1], finish_reason="length"
    )  # cut off: no end for the model to read
    expected = ModelReward(ScalarModel.load(reward_model), 4096).score(asked)
    with Served(app(TextScorer(reward_model.parent, None))) as url:
        endpoint = Endpoint("reward server", url)
        assert ServerReward("server", endpoint).score(asked) == pytest.approx(expected, abs=1e-5)
        others = ServerReward("server", endpoint, "openrlhf").score(
            asked
        )  # which cannot say that one was cut off
        endpoint.close()
        assert others[:1] + others[2:] == pytest.approx(expected[:1] + expected[2:], abs=1e-5)
        assert abs(others[1] - expected[1]) > 1e-4


def test_what_a_server_refuses(reward_model, monkeypatch):
    monkeypatch.setenv("TOKEN", "s3cret")
    with Served(app(TextScorer(reward_model, None), "TOKEN")) as url:
        good, token = (
            {"prompts": ["the film"], "responses": ["was good"]},
            {"authorization": "Bearer s3cret"},
        )
        assert httpx.post(url, json=good, headers=token).status_code == 200
        assert httpx.post(url, json=good).status_code == 401
        assert (
            httpx.post(url, json=good, headers={"authorization": "Bearer s3cre"}).status_code == 401
        )
        assert httpx.post(url, content=json.dumps(good), headers=token).status_code == 415
        assert (
            httpx.post(url, json=good, headers=token | {"host": "evil.example"}).status_code == 400
        )
        assert httpx.get(url, headers=token).status_code == 405
        assert httpx.get(url + "health").json() == {"status": "ok"}
        long = httpx.post(
            url, json={"prompts": ["the"], "responses": ["film " * 200]}, headers=token
        )
        assert long.status_code == 400 and "more than 64 tokens" in long.json()["error"]


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ([], "must be an object"),
        ({"prompts": ["a"]}, '"responses" must be a list of texts'),
        ({"prompts": ["a"], "responses": [1]}, '"responses" must be a list of texts'),
        ({"prompts": ["a", "b"], "responses": ["c"]}, "2 prompts, 1 responses"),
        ({"prompts": ["a"], "query": ["b"]}, "query 0 does not begin with its prompt"),
        (
            {"prompts": ["a"], "responses": ["b"], "messages": [[{"role": 1}]]},
            "messages 0 is no list",
        ),
        ({"prompts": ["a"] * 5000, "responses": ["b"] * 5000}, "4,096 at most"),
    ],
)
def test_requests_that_cannot_be_understood(table, sentence):
    with pytest.raises(BadRequest, match=sentence):
        understood(table)


# --- judges --------------------------------------------------------------------------------------------------------------------


def says(text):
    return {"choices": [{"message": {"content": text}}]}


def judge(url, folder, mode="score", prompt=None):
    return JudgeReward(
        "judge", Endpoint("judge", url), "judge-1", mode, prompt, folder / "judge.jsonl"
    )


def test_a_judges_number_is_read_and_asked_for_once(tmp_path):
    with Fake((200, says("It is fine. Score: 3 … no.\n**Score:** 7.5"), 0)) as fake:
        made = judge(fake.url, tmp_path)
        assert made.score(rollouts()) == [7.5] * 3 and len(fake.requests) == 3
        again = judge(fake.url, tmp_path)  # a new process would read the same file
        assert again.score(rollouts()) == [7.5] * 3 and len(fake.requests) == 3
        made.endpoint.close(), again.endpoint.close()


def test_a_judge_without_a_verdict_gives_no_score_and_one_that_never_answers_stops_the_run(
    tmp_path,
):
    with Fake((200, says("I would rather not."), 0)) as fake:
        made = judge(fake.url, tmp_path)
        assert made.score(rollouts()) == [None] * 3
        made.endpoint.close()
    with Fake((400, b"bad model", 0)) as fake:
        made = judge(fake.url, tmp_path)
        with pytest.raises(RewardError, match="answered 400: bad model"):
            made.score(rollouts())
        made.endpoint.close()


def test_one_failing_answer_is_none_and_the_others_stay(tmp_path):
    def picky(request):
        return (
            says("Score: 4")
            if "a film" not in request["messages"][0]["content"]
            else {"error": "no"}
        )

    with Fake((200, picky, 0)) as fake:
        made = judge(fake.url, tmp_path)
        asked = rollouts()
        asked[1] = dataclasses.replace(asked[1], response="a film")
        assert made.score(asked) == [4, None, 4]
        made.endpoint.close()


def test_pairs_are_asked_both_ways_round_and_a_judge_of_positions_gives_ties(tmp_path):
    def longer(request):
        text = request["messages"][0]["content"]
        first, second = (
            text.partition(f"<answer {side}>")[2].partition(f"</answer {side}>")[0] for side in "AB"
        )
        return says(
            f"Better: {'A' if len(first) > len(second) else 'B' if len(second) > len(first) else 'tie'}"
        )

    asked = [
        dataclasses.replace(r, group=0, prompt=rollouts()[0].prompt, response="x" * (3 - i))
        for i, r in enumerate(rollouts())
    ]
    with Fake((200, longer, 0)) as fake:
        made = judge(fake.url, tmp_path, "pairwise")
        assert made.score(asked) == [1, 0.5, 0] and len(fake.requests) == 6
        made.endpoint.close()
    with Fake((200, says("Better: A"), 0)) as fake:
        made = judge(fake.url, tmp_path, "pairwise")
        made.cache._texts.clear()
        assert made.score(asked) == [0.5, 0.5, 0.5]
        made.endpoint.close()


def test_rings():
    asked = [
        dataclasses.replace(r, group=g)
        for r, g in zip(rollouts(6), (0, 0, 1, 2, 2, 2), strict=True)
    ]
    asked = [dataclasses.replace(r, prompt=rollouts()[0].prompt) for r in asked]
    assert neighbours(asked) == [(0, 1), (3, 4), (4, 5), (5, 3)]


def test_braces_in_texts_stay_and_a_prompt_without_its_places_is_refused(tmp_path):
    with Fake((200, says("Score: 1"), 0)) as fake:
        made = judge(fake.url, tmp_path, prompt="{prompt}|{response}")
        asked = [dataclasses.replace(rollouts()[0], response="{prompt} {0} {}")]
        assert made.score(asked) == [1]
        assert (
            fake.requests[0]["messages"][0]["content"]
            == f"{asked[0].prompt.text}|{{prompt}} {{0}} {{}}"
        )
        made.endpoint.close()
    with pytest.raises(RewardError, match=r"has no \{response\}"):
        judge("http://127.0.0.1:1/", tmp_path, prompt="{prompt}")
