"""The page of a sweep, over HTTP and in a real browser."""

import shutil
import socket
import threading
import time

import pytest
import uvicorn
from starlette.testclient import TestClient

from quartet.studio.app import make_app
from tests.studio.test_browser import CHROMIUM, sync_api, until
from tests.support.sweep_record import make_sweep
from tests.support.tiny_run import copied

EVIL = "<img src=x onerror=alert(1)>"
ROWS = [
    ({"epsilon": 0.05, "algorithm.kl.coef": 0.02}, [0.2, 0.4], [2.0, 3.0]),
    ({"epsilon": 0.05, "algorithm.kl.coef": 0.2}, [0.1, 0.2], [1.0, 1.0]),
    ({"epsilon": 0.2, "algorithm.kl.coef": 0.02}, [0.8, 0.9], [7.0, 8.0]),
    ({"epsilon": 0.2, "algorithm.kl.coef": 0.2}, [0.7, 0.7], [4.0, 4.0]),
    ({"epsilon": 0.8, "algorithm.kl.coef": EVIL}, None, None),
]


@pytest.fixture(scope="module")
def root(ppo_run, tmp_path_factory):
    """A run, and a sweep with the folder of one of its runs."""
    root = tmp_path_factory.mktemp("swept")
    copied(ppo_run.path, root / ppo_run.name)
    sweep = make_sweep(root, ROWS, {"kl": 6.0})
    copied(ppo_run.path, sweep / "1129-1000-trial-000-seed-0")
    return root


def test_the_page_has_the_table_and_escapes_what_it_shows(root):
    client = TestClient(make_app([root]), base_url="http://127.0.0.1:8700")
    page = client.get("/sweep/1129-1000-search")
    assert page.status_code == 200 and EVIL not in page.text and "&lt;img" in page.text
    assert "&lt;b&gt;Too low.&lt;/b&gt;" in page.text and "<b>Too low" not in page.text
    assert "0.7 ± 0" in page.text and "kl &gt; 6" in page.text
    assert "Best: epsilon 0.2 · algorithm.kl.coef 0.2: 0.7 ± 0" in page.text
    assert "http://" not in page.text and "https://" not in page.text


def test_runs_of_a_sweep_have_pages_and_are_not_listed_among_the_others(root, ppo_run):
    client = TestClient(make_app([root]), base_url="http://127.0.0.1:8700")
    listed = client.get("/").text
    assert "/sweep/1129-1000-search" in listed and ppo_run.name in listed
    assert "trial-000-seed-0" not in listed and "5 of 5" in listed
    address = "/run/1129-1000-search%201129-1000-trial-000-seed-0/"
    assert address in client.get("/sweep/1129-1000-search").text
    assert client.get(address).status_code == 200


def test_a_sweep_that_is_not_there_or_damaged_is_a_sentence(root, tmp_path):
    client = TestClient(make_app([root]), base_url="http://127.0.0.1:8700")
    missing = client.get("/sweep/no")
    assert missing.status_code == 404 and "there is no sweep called no" in missing.text
    damaged = tmp_path / "1129-1000-search"
    damaged.mkdir()
    (damaged / "sweep.jsonl").write_text("nothing\n")
    client = TestClient(make_app([tmp_path]), base_url="http://127.0.0.1:8700")
    assert client.get("/").status_code == 200 and "unreadable" in client.get("/").text
    assert client.get("/sweep/1129-1000-search").status_code == 404


@pytest.fixture
def page(root):
    """A page of the studio in a browser, whose every error is one of the test's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = uvicorn.Config(make_app([root]), host="127.0.0.1", port=port, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    errors = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(base_url=f"http://127.0.0.1:{port}")
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page
        browser.close()
    server.should_exit = True
    thread.join()
    assert errors == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium here")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_page_in_a_browser_in_light_dark_and_on_a_phone(page, tmp_path):
    """Three charts with a line per trial; nothing is wider than the screen; a trial's run is one click away."""
    for scheme, width in (("light", 1300), ("dark", 390)):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 850})
        page.goto("/")
        page.click("text=1129-1000-search")
        until(page, "document.querySelectorAll('.js-plotly-plot .main-svg').length >= 6")
        titles = page.eval_on_selector_all(".gtitle", "found => found.map(t => t.textContent)")
        assert titles == ["Trials", "Share of variance explained", "Objective against KL"]
        assert page.evaluate("document.querySelectorAll('.js-plotly-plot')[0].data.length") == 5
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        color = page.evaluate("getComputedStyle(document.querySelector('.gtitle')).fill")
        dark = int(color.strip("rgb()").split(",")[0]) > 128
        assert dark == (scheme == "dark")
    page.click("table a:has-text('seed 0')")
    assert "trial-000-seed-0" in page.title()
