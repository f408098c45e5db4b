"""Labelling in a real browser, by keyboard, in several tabs, with a server that is killed."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from starlette.testclient import TestClient

from quartet.labels.log import LabelLog, read_labels
from quartet.labels.pairs import Pair
from quartet.labels.session import LabelSession
from quartet.studio.labelling import make_label_app
from tests.support.fake_server import free_port

EVIL = "<script>document.title='owned'</script><img src=x onerror=alert(1)>\u202e&"
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


@pytest.fixture
def client(tmp_path):
    log = LabelLog(tmp_path / "labels.jsonl")
    session = LabelSession([Pair(f"q{i}", EVIL, "y") for i in range(3)], log, repeat=0.0)
    yield TestClient(make_label_app(session, EVIL), base_url="http://localhost")
    log.close()


def post(client, path, headers=None, **body):
    return client.post(path, json={"labeller": "ann", "tab": "t", **body}, headers=headers)


def test_the_page_is_protected_as_the_studio_is(client, tmp_path):
    page = client.get("/")
    assert (
        page.status_code == 200
        and "<script>document" not in page.text
        and "script-src" not in page.text
    )
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert post(client, "/api/next", {"origin": "http://evil.example"}).status_code == 403
    assert client.get("/api/next").status_code == 405
    assert (
        client.post("/api/next", content=b"{}", headers={"content-type": "text/plain"}).status_code
        == 400
    )
    assert (
        client.post(
            "/api/next",
            content=b'{"labeller": ' + b"[" * 70000,
            headers={"content-type": "application/json"},
        ).status_code
        == 400
    )
    assert (
        client.post("/api/next", json={"labeller": 3}).json()["error"]
        == "The request must be an object of texts."
    )
    assert (tmp_path / "labels.jsonl").read_text() == ""


def test_a_token_is_needed_where_other_machines_can_connect(tmp_path):
    log = LabelLog(tmp_path / "labels.jsonl")
    client = TestClient(make_label_app(LabelSession([], log), "x", ("*",), "secret"))
    assert client.get("/").status_code == 401 == post(client, "/api/next").status_code
    assert client.get("/?token=secret").status_code == 200 == post(client, "/api/next").status_code
    log.close()


def test_servers_on_two_ports_have_cookies_of_their_own(tmp_path):
    """A browser sends a host's cookies to all of its ports."""
    log = LabelLog(tmp_path / "labels.jsonl")
    session = LabelSession([], log)
    clients = [
        TestClient(make_label_app(session, "x", ("*",), token), base_url=f"http://host:{port}")
        for port, token in ((8700, "one"), (8701, "two"))
    ]
    first, second = (
        client.get(f"/?token={token}", follow_redirects=False).headers["set-cookie"]
        for client, token in zip(clients, ("one", "two"), strict=True)
    )
    kept = dict(cookie.split(";")[0].split("=") for cookie in (first, second))
    cookies = "; ".join(f"{name}={value}" for name, value in kept.items())
    for client in clients:
        assert client.get("/", headers={"cookie": cookies}).status_code == 200
    assert clients[0].get("/", headers={"host": "host:x", "cookie": cookies}).status_code == 401
    log.close()


def test_what_is_posted_is_on_the_disk_before_the_answer(client, tmp_path):
    state = post(client, "/api/next").json()
    assert state["total"] == 3 and state["done"] == 0
    body = {"id": "1", "task": state["task"]["id"], "choice": "first", "comment": " so "}
    assert (
        post(client, "/api/label", **body).json()
        == {"saved": "1"}
        == post(client, "/api/label", **body).json()
    )
    row = json.loads((tmp_path / "labels.jsonl").read_text())
    assert (
        row["chosen"] == state["task"]["first"][0]["content"]
        and row["comment"] == "so"
        and row["labeller"] == "ann"
    )
    refused = post(client, "/api/label", **body | {"id": "2"})
    assert (
        refused.status_code == 409
        and refused.json()["error"] == "This pair was labelled in another tab."
    )
    assert post(client, "/api/next").json()["last"] == "1"
    for _ in range(2):  # the page asks until it is answered
        undone = post(client, "/api/undo", label="1").json()
        assert undone["task"]["id"] == state["task"]["id"] and undone["last"] == ""
    assert post(client, "/api/undo", label="").json()["error"] == "This tab has no label to undo."


def test_a_full_disk_is_answered_and_leaves_no_torn_line(client, tmp_path, monkeypatch):
    task = post(client, "/api/next").json()["task"]["id"]
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:5]))
    refused = post(client, "/api/label", id="1", task=task, choice="tie")
    assert refused.status_code == 507 and "could not be written" in refused.json()["error"]
    monkeypatch.undo()
    assert (tmp_path / "labels.jsonl").read_text() == ""
    assert post(client, "/api/label", id="1", task=task, choice="tie").status_code == 200


class Server:
    """`quartet label`, in a process of its own, on one port."""

    def __init__(self, file):
        self.file, self.port = file, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "quartet", "label", str(self.file), "--port", str(self.port)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert re.match(r"\d+ pairs( \(\d+ shown twice\))? on http", self.process.stdout.readline())
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.05)

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def server(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [
        {
            "prompt": f"question {i}",
            "answer_a": f"{EVIL} {i}",
            "answer_b": "long words " * (1 + i % 30),
        }
        for i in range(50)
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    server = Server(file)
    yield server
    server.kill()


@pytest.fixture
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def begin(page, url, name="ann"):
    page.goto(url)
    page.locator("#name").wait_for()
    page.keyboard.type(name)
    page.keyboard.press("Enter")
    page.locator("#pair").wait_for()


def press(page, key, expected):
    """Press a key and wait until the counter says so."""
    page.keyboard.press(key)
    page.locator("#count", has_text=re.compile(rf"^{expected} of")).wait_for(timeout=30000)
    page.locator("body:not([data-busy])").wait_for()


@pytest.mark.slow
@needs_browser
def test_fifty_pairs_by_keyboard_in_two_tabs_with_a_killed_server(browser, server, tmp_path):
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark")
    one, two = context.new_page(), context.new_page()
    begin(one, server.url)
    two.goto(server.url)  # the name is remembered
    two.locator("#pair").wait_for()
    assert one.locator("#first").inner_text() != two.locator("#first").inner_text()
    assert one.evaluate("document.documentElement.scrollWidth") <= 390 and one.title() != "owned"
    total = int(one.locator("#count").inner_text().split()[-1])
    keys, done = "1212t12s12b1", 0
    while done < 20:
        press((one, two)[done % 2], keys[done % len(keys)], done + 1)
        done += 1
    one.keyboard.press("c")
    one.keyboard.type("1 is a word here")
    one.keyboard.press("Enter")
    press(one, "1", 21)
    press(one, "u", 20)
    press(one, "2", 21)
    server.kill()
    one.keyboard.press("1")
    two.keyboard.press("2")
    for page in (one, two):
        page.locator("#notice", has_text="Nothing is lost").wait_for()
    time.sleep(1)
    server.start()
    for page in (one, two):
        page.locator("body:not([data-busy])").wait_for(timeout=30000)
    done = len(read_labels(tmp_path / "pairs.labels.jsonl").labels)
    assert done == 23
    # A server that was started again does not know what a tab shows until the tab asks: one tab may
    # have been given the pair that the other had just answered. It says so and shows the next one.
    # A page that is left frees its pair by a message, which may come after it has been opened again.
    for page in (one, two):
        page.goto("about:blank")
    time.sleep(1)
    for page in (one, two):
        page.goto(server.url)
        page.locator("body:not([data-busy]) #pair").wait_for(timeout=30000)
    while done < total:
        page = (one, two)[done % 2]
        if page.locator("#pair").is_hidden():
            page = (two, one)[done % 2]
        press(page, keys[done % len(keys)], done + 1)
        done += 1
    one.locator("#again").click()
    one.locator("#ended", has_text="All pairs are labelled").wait_for()
    labels = read_labels(tmp_path / "pairs.labels.jsonl")
    keys_of = [(entry.pair.id, entry.repeat) for _, entry in labels.labels]
    assert len(keys_of) == len(set(keys_of)) == total and len({i for i, _ in keys_of}) == 50
    assert len(labels.undone) == 1 and not labels.torn
    assert [e.comment for _, e in labels.labels if e.comment] == []  # it was undone with its label
    context.close()


@pytest.mark.slow
@needs_browser
def test_a_choice_that_was_not_confirmed_is_sent_when_the_page_opens_again(
    browser, server, tmp_path
):
    page = browser.new_context().new_page()
    begin(page, server.url)
    server.kill()
    page.keyboard.press("t")
    page.locator("#notice", has_text="Nothing is lost").wait_for()
    server.start()
    page.reload()
    page.locator("#count", has_text=re.compile("^1 of")).wait_for(timeout=30000)
    assert [entry.verdict for _, entry in read_labels(tmp_path / "pairs.labels.jsonl").labels] == [
        "tie"
    ]


@pytest.mark.slow
@needs_browser
def test_an_undo_whose_answer_is_lost_takes_one_label_back(browser, server, tmp_path):
    page = browser.new_context().new_page()
    asked = []

    def lose_the_first(route):
        asked.append(route.request)
        is_first = len(asked) == 1
        answer = route.fetch()
        if is_first:
            route.abort()
        else:
            route.fulfill(response=answer)

    page.route("**/api/undo", lose_the_first)  # a page that is open may send one request past it
    begin(page, server.url)
    for count in (1, 2):
        press(page, "t", count)
    press(page, "u", 1)
    assert len(asked) > 1, "the page asks again"
    labels = read_labels(tmp_path / "pairs.labels.jsonl")
    assert len(labels.labels) == len(labels.undone) == 1


@pytest.mark.slow
@needs_browser
def test_a_page_whose_token_is_old_says_what_to_open_and_keeps_the_choice(
    browser, server, tmp_path
):
    page = browser.new_context().new_page()
    refused = {"status": 401, "content_type": "text/html", "body": "<p>no</p>"}
    is_old = False
    page.route("**/api/*", lambda route: route.fulfill(**refused) if is_old else route.continue_())
    begin(page, server.url)
    is_old = True
    page.keyboard.press("t")
    page.locator("#notice", has_text="Open the address that the command printed").wait_for()
    page.locator("body:not([data-busy])").wait_for()
    is_old = False
    page.goto(server.url)
    page.locator("#count", has_text=re.compile("^1 of")).wait_for(timeout=30000)
    labels = read_labels(tmp_path / "pairs.labels.jsonl").labels
    assert [entry.verdict for _, entry in labels] == ["tie"]
