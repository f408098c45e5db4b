"""Questions to the policy that RL started from: they wait for each other, and no page waits for them."""

import asyncio
import threading

import httpx
import pytest

from quartet.studio import first_policy
from quartet.studio.app import make_app
from quartet.studio.first_policy import WAITING
from tests.support.tiny_run import copied

QUESTIONS = 48


@pytest.fixture
def studio(ppo_run, tmp_path):
    run = copied(ppo_run.path, tmp_path / "run")
    (run / "sft").mkdir()
    (run / "sft" / "config.json").write_text("{}")
    return make_app([run])


@pytest.fixture
def model(monkeypatch):
    """One that thinks until it is told to answer; how many are asked at the same time is counted."""

    class Model:
        asked = at_once = 0
        most = 0
        answers = threading.Event()

        def __call__(self, folder, ids, length):
            self.asked += 1
            self.at_once += 1
            self.most = max(self.most, self.at_once)
            assert self.answers.wait(60)
            self.at_once -= 1
            return f"answer {self.asked}"

    made = Model()
    monkeypatch.setattr(first_policy, "_asked", made)
    yield made
    made.answers.set()


def test_pages_come_first_while_many_ask(studio, model):
    """48 questions hang; a page and the list come all the same. As many wait as may, the others are refused in a sentence."""

    async def scene():
        transport = httpx.ASGITransport(studio)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://127.0.0.1:8700", timeout=60
        ) as client:
            address = "/api/run/run/first-answer?step={}&sample={}"
            asked = [
                asyncio.ensure_future(client.post(address.format(1 + i // 8, i % 8)))
                for i in range(QUESTIONS)
            ]
            while sum(task.done() for task in asked) < QUESTIONS - WAITING:
                await asyncio.sleep(0.01)
            pages = [
                await asyncio.wait_for(client.get(page), 10)
                for page in ("/", "/run/run/", "/run/run/samples")
            ]
            assert not model.answers.is_set() and model.most == 1
            model.answers.set()
            return pages, await asyncio.gather(*asked)

    pages, answers = asyncio.run(scene())
    assert [page.status_code for page in pages] == [200, 200, 200]
    refused = [answer for answer in answers if answer.status_code == 503]
    assert len(refused) == QUESTIONS - WAITING and model.asked == WAITING and model.most == 1
    assert {answer.json()["error"] for answer in refused} == {
        "8 questions wait for the model already. Ask again in a minute."
    }
    assert all(
        answer.json()["answer"].startswith("answer")
        for answer in answers
        if answer.status_code == 200
    )


def test_what_was_answered_once_is_answered_while_others_wait(studio, model):
    async def scene():
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(studio), base_url="http://127.0.0.1:8700"
        ) as client:
            address = "/api/run/run/first-answer?step={}&sample={}"
            model.answers.set()
            first = await client.post(address.format(1, 0))
            model.answers.clear()
            others = [
                asyncio.ensure_future(client.post(address.format(2, i))) for i in range(WAITING)
            ]
            while model.at_once == 0:
                await asyncio.sleep(0.01)
            again = await asyncio.wait_for(client.post(address.format(1, 0)), 10)
            model.answers.set()
            await asyncio.gather(*others)
            return first.json(), again.json()

    first, again = asyncio.run(scene())
    assert first == again == {"answer": "answer 1"}


@pytest.mark.parametrize(
    ("config", "status", "sentence"),
    [
        ("", 404, "its config does not say how long an answer may be (rollout.max_new_tokens)."),
        (
            "[rollout]\nmax_new_tokens = -1",
            404,
            "its config does not say how long an answer may be",
        ),
        ("[", 404, "its config does not say how long an answer may be"),
    ],
)
def test_a_config_that_does_not_say_how_long(ppo_run, tmp_path, model, config, status, sentence):
    run = copied(ppo_run.path, tmp_path / "run")
    (run / "sft").mkdir()
    (run / "sft" / "config.json").write_text("{}")
    (run / "config.resolved.toml").write_text(config)

    async def ask():
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(make_app([run])), base_url="http://127.0.0.1"
        ) as client:
            return await client.post("/api/run/run/first-answer?step=1&sample=0")

    answer = asyncio.run(ask())
    assert answer.status_code == status and sentence in answer.json()["error"]
