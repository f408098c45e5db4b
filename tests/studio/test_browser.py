"""The studio in a real browser. Needs Playwright and a Chromium: `apt install chromium`."""

import json
import shutil
import socket
import threading
import time

import pytest
import uvicorn

from quartet.studio.app import make_app
from quartet.studio.report import write_report
from tests.support.audits import made_audit, write_audit
from tests.support.tiny_run import copied, put_words_into_its_mouth

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

EVIL = "<script>document.title='owned'</script>\"'& \u202eאב"
PAGES = (
    "",
    "samples",
    "samples?kind=probes",
    "tokens?step=5&sample=2",
    "tokens?kind=probes&step=4&sample=1",
    "frontier",
    "answers",
    "labels",
    "reward-model",
    "critic",
    "doctor",
    "config",
)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def live(runs, two_rounds, tmp_path_factory):
    """The runs, one of them with evil text, one that is still going, and the studio over them."""
    root = tmp_path_factory.mktemp("served")
    for run in runs.iterdir():
        if not run.is_symlink():
            copied(run, root / run.name)
            shutil.copytree(run / "sft", root / run.name / "sft")
    copied(two_rounds.path, root / "rounds")
    ppo = next(root.glob("*reviews"))
    for step in (7, 14):
        write_audit(ppo, made_audit(step=step))
    evil = shutil.copytree(ppo, root / "evil")
    put_words_into_its_mouth(evil, EVIL)
    going = shutil.copytree(ppo, root / "going")
    lines = (going / "events.jsonl").read_text().splitlines()
    unfinished = [
        line
        for line in lines
        if json.loads(line)["event"] != "done" and json.loads(line).get("stage") != "evaluation"
    ]
    (going / "events.jsonl").write_text("\n".join(unfinished[:-4]) + "\n")
    (going / "rest").write_text("\n".join(unfinished[-4:]) + "\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(
        uvicorn.Config(make_app([root]), host="127.0.0.1", port=port, log_level="error")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}", root
    server.should_exit = True
    thread.join()


@pytest.fixture
def page(browser, live):
    """A page whose every error is one of the test's."""
    context = browser.new_context(viewport={"width": 1300, "height": 900}, base_url=live[0])
    made = context.new_page()
    errors = []
    made.on(
        "console", lambda message: errors.append(message.text) if message.type == "error" else None
    )
    made.on("pageerror", lambda error: errors.append(str(error)))
    yield made
    context.close()
    assert errors == []


def until(page, expression):
    """Asked from here: the studio's pages evaluate no text as a script, not even a test's."""
    for _ in range(200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never came true: {expression}")


def name_of(live, ending):
    return next(p.name for p in live[1].iterdir() if p.name.endswith(ending))


@pytest.mark.parametrize("ending", ["reviews", pytest.param("sums", marks=pytest.mark.long)])
def test_every_page_opens_in_light_dark_and_on_a_phone(page, live, ending):
    name = name_of(live, ending)
    shown = [p for p in PAGES if ending == "reviews" or "step=" not in p] + (
        ["tokens?step=1&sample=0"] if ending == "sums" else []
    )
    for number, address in enumerate(
        ["/", *(f"/run/{name}/{p}" for p in shown), f"/compare?run={name}&run=evil"]
    ):
        page.emulate_media(color_scheme="dark" if number % 2 else "light")
        for width in (1300, 390):
            page.set_viewport_size({"width": width, "height": 844})
            page.goto(address)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, address
            assert page.locator("main h1").is_visible()


AUDIT = """() => {
  const faults = document.documentElement.scrollWidth > innerWidth ? ["the page is wider than the screen"] : [], shown = (e) => e.getClientRects().length && getComputedStyle(e).visibility !== "hidden";
  const label = (e) => `${e.tagName}.${e.className?.baseVal ?? e.className} “${e.textContent.trim().slice(0, 40)}”`;
  for (const card of document.querySelectorAll("figure, .table-wrap, .pair, .finding, .reading, .detail, .sibling, .glance, .warnings, .problems")) {
    const box = card.getBoundingClientRect();
    for (const e of card.querySelectorAll("*:not(svg *), .legend, .xtitle, .ytitle, .y2title, .gtitle")) {
      if (!shown(e) || e.closest(".sr, .config, .hoverlayer, .js-plotly-tester")) continue;
      const rect = e.getBoundingClientRect();
      if (rect.width && (rect.right > box.right + 1 || rect.left < box.left - 1)) faults.push(`outside its card: ${label(e)}`);
    }
  }
  for (const plot of document.querySelectorAll(".js-plotly-plot")) {
    const legend = plot.querySelector(".legend")?.getBoundingClientRect();
    for (const e of plot.querySelectorAll(".xtitle, .ytitle, .y2title, .xtick text, .ytick text, .gtitle")) {
      const r = e.getBoundingClientRect();
      if (legend && r.left < legend.right && legend.left < r.right && r.top < legend.bottom - 1 && legend.top < r.bottom - 1)
        faults.push(`under the legend: ${label(e)}`);
    }
    for (const x of plot.querySelectorAll(".xtick text")) for (const y of plot.querySelectorAll(".ytick text")) {
      const [a, b] = [x.getBoundingClientRect(), y.getBoundingClientRect()];
      if (a.left < b.right && b.left < a.right && a.top < b.bottom - 2 && b.top < a.bottom - 2) faults.push(`on each other: ${label(x)}, ${label(y)}`);
    }
    if (!plot.querySelector(".xtitle")) faults.push(`no name on the axis: ${label(plot)}`);
  }
  const rgba = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const over = (top, under) => top.slice(0, 3).map((v, i) => v * top[3] + under[i] * (1 - top[3]));
  const light = (c) => { const [r, g, b] = c.map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (e) => { const own = rgba(getComputedStyle(e).backgroundColor); return own[3] === 1 ? own : over(own, e.parentElement ? behind(e.parentElement) : [255, 255, 255]); };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !shown(e) || e.closest("script, svg, .skip, .js-plotly-plot")) continue;
    const back = behind(e), [a, b] = [light(over(rgba(getComputedStyle(e).color), back)), light(back)].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) faults.push(`contrast ${((a + 0.05) / (b + 0.05)).toFixed(2)}: ${label(e)}`);
  }
  return [...new Set(faults)];
}"""
"""What a page's layout has wrong: elements outside their card, titles under a legend, axes without a
name, and text with a contrast below 4.5 (WCAG AA)."""


@pytest.mark.slow
@pytest.mark.parametrize(("width", "theme"), [(390, "light"), (390, "dark"), (900, "light")])
def test_nothing_is_cut_off_covered_or_pale(page, live, width, theme):
    name, group = name_of(live, "reviews"), name_of(live, "sums")
    page.set_viewport_size({"width": width, "height": 844})
    page.emulate_media(color_scheme=theme)
    addresses = [f"/run/{name}/{p}" for p in PAGES] + [f"/run/{group}/", f"/run/{group}/frontier"]
    faults = {}
    for address in ["/", *addresses, "/compare?run=evil&run=" + name]:
        page.goto(address)
        if "kind=probes&step" in address:
            page.wait_for_selector("#history .main-svg")
        page.wait_for_timeout(100)
        if found := page.evaluate(AUDIT):
            faults[address] = found
    assert faults == {}


def test_a_token_shows_the_numbers_of_its_row(page, live, ppo_run):
    page.goto(f"/run/{name_of(live, 'reviews')}/tokens?step=5&sample=2")
    rows = ppo_run.sample(5, 2)
    own = [i for i, mine in enumerate(rows["is_response"]) if mine]
    for i in (own[0], own[-1]):
        page.locator(f"#token-{i}").click()
        for column in (
            "advantage",
            "reward",
            "value",
            "ratio",
            "kl",
            "logprob",
            "td_error",
            "entropy",
        ):
            said = (
                page.locator(f"#detail tr[data-column={column}] td").inner_text().replace("−", "-")
            )
            assert float(said) == pytest.approx(rows[column][i], rel=1e-3, abs=1e-6)
        assert page.locator("#case").inner_text() == ppo_run.cases(rows)[i]
    page.locator("#token-0").click()
    assert "Given, not written by the policy" in page.locator("#case").inner_text()


def test_colours_say_which_way_a_number_goes(page, live, ppo_run):
    page.goto(f"/run/{name_of(live, 'reviews')}/tokens?step=5&sample=2")
    rows = ppo_run.sample(5, 2)
    strongest = max(range(len(rows["text"])), key=lambda i: abs(rows["advantage"][i] or 0))
    blue = "59, 130, 246" if rows["advantage"][strongest] > 0 else "245, 158, 11"
    assert blue in page.locator(f"#token-{strongest}").evaluate(
        "e => getComputedStyle(e).backgroundColor"
    )
    page.locator("#column").select_option("entropy")
    highest = max(range(len(rows["text"])), key=lambda i: rows["entropy"][i] or 0)
    assert "59, 130, 246" in page.locator(f"#token-{highest}").evaluate(
        "e => getComputedStyle(e).backgroundColor"
    )


@pytest.mark.slow
def test_the_keyboard_alone_is_enough(page, live):
    name = name_of(live, "reviews")
    page.goto(f"/run/{name}/tokens?step=5&sample=2")
    chosen = int(page.locator(".token.chosen").get_attribute("data-i"))
    page.keyboard.press("ArrowRight")
    assert page.locator(".token.chosen").get_attribute("data-i") == str(chosen + 1)
    page.keyboard.press("Home")
    assert page.locator(".token.chosen").get_attribute("data-i") == "0"
    colour = page.locator("#column").input_value()
    page.keyboard.press("ArrowDown")
    assert page.locator("#column").input_value() != colour
    page.keyboard.press("n")
    page.wait_for_url("**sample=3")
    page.keyboard.press("p")
    page.wait_for_url("**sample=2")
    page.goto(f"/run/{name}/samples?step=5")
    page.keyboard.press("]")
    page.wait_for_url("**step=6**")
    page.goto("/")
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent.trim()") == name:
            break
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/run/{name}/")


def test_what_a_model_wrote_is_shown_as_text(page, live):
    for address in ("samples?step=1", "tokens?step=1&sample=0"):
        page.goto(f"/run/evil/{address}")
        assert "owned" not in page.title() and EVIL in page.locator("main").inner_text()


def test_long_tokens_do_not_widen_a_page_and_parts_of_characters_are_named(page, live):
    wide = shutil.copytree(live[1] / "evil", live[1] / "wide")
    try:
        put_words_into_its_mouth(wide, "a" * 300 + "\ufffd")
        page.set_viewport_size({"width": 900, "height": 844})
        for address in ("samples?step=1", "tokens?step=1&sample=0"):
            page.goto(f"/run/wide/{address}")
            assert page.evaluate("document.documentElement.scrollWidth") <= 900, address
        assert "has a part of a character" in page.locator("#token-name").inner_text()
        glance = page.locator("#glance").inner_text()
        assert "a" * 40 + "…" in glance and "a" * 41 not in glance
    finally:
        shutil.rmtree(wide)


@pytest.mark.slow
def test_a_run_that_is_going_grows_on_the_page(page, live):
    going = live[1] / "going"
    page.goto("/run/going/?stage=ppo")
    drawn = "document.querySelector('#charts figure div').data[0].x.length"
    until(page, f"{drawn} > 0")
    before = page.evaluate(drawn)
    with (going / "events.jsonl").open("a") as file:
        file.write((going / "rest").read_text())
    until(page, f"{drawn} > {before}")


@pytest.mark.slow
def test_a_page_follows_its_run_to_the_next_stage(page, live):
    """Warnings, stages and numbers come without a reload; a tick in the list of runs stays."""
    young = live[1] / "young"
    young.mkdir()

    def write(*events):
        with (young / "events.jsonl").open("a") as file:
            for event in events:
                file.write(json.dumps({"time": time.time(), **event}) + "\n")

    def step(stage, number, **metrics):
        return {"event": "metrics", "stage": stage, "step": number, "metrics": metrics}

    try:
        write({"event": "started"}, step("sft", 1, loss=2.0))
        page.goto("/run/young/")
        assert page.locator(".stages [aria-current]").inner_text() == "sft 1 step"
        other = page.context.new_page()
        other.goto("/")
        other.locator("input[value=young]").check()
        sentence = "a <b> is wrong"
        warning = {"event": "warning", "stage": "ppo", "step": 2, "rule": "x", "sentence": sentence}
        write(step("ppo", 1, reward=0.0, kl=0.0), step("ppo", 2, reward=1.0, kl=0.5), warning)
        until(page, "document.querySelector('.stages [aria-current]').textContent.includes('ppo')")
        assert sentence in page.locator(".warnings").inner_text()
        assert "from 0.00" in page.locator("#numbers").inner_text()
        until(page, "document.querySelectorAll('#charts .js-plotly-plot').length === 2")
        until(other, "document.querySelector('#runs').textContent.includes('ppo, step 2')")
        assert other.locator("input[value=young]").is_checked()
        other.close()
        write({"event": "done"})
        until(page, "document.getElementById('status').textContent === 'done'")
        assert not page.evaluate("document.body.dataset.every")
    finally:
        shutil.rmtree(young)


def test_a_point_leads_to_its_rollouts(page, live):
    page.goto(f"/run/{name_of(live, 'reviews')}/?stage=ppo")
    until(page, "document.querySelectorAll('#charts .js-plotly-plot').length > 3")
    page.evaluate(
        "document.querySelector('#charts .js-plotly-plot').emit('plotly_click', {points: [{x: 7}]})"
    )
    page.wait_for_url("**/samples?step=7")


def test_a_group_is_side_by_side(page, live):
    page.goto(f"/run/{name_of(live, 'sums')}/tokens?step=1&sample=0")
    assert page.locator(".sibling").count() == 3
    page.locator(".sibling").first.click()
    page.wait_for_url("**sample=1")


@pytest.mark.slow
def test_the_sft_answer_is_one_key_away(page, live):
    page.goto(f"/run/{name_of(live, 'reviews')}/tokens?step=5&sample=2")
    page.wait_for_selector("#inspector[data-ready]")
    page.keyboard.press("a")
    page.locator("#first-answer").wait_for(timeout=60_000)
    assert page.locator("#asked").inner_text() == "Greedy response:"
    assert page.locator("#first-answer").inner_text()


def test_a_probe_is_scrubbed_through_training(page, live, ppo_run):
    page.goto(f"/run/{name_of(live, 'reviews')}/tokens?kind=probes&step=0&sample=1")
    rows = ppo_run.sample(14, 1, "probes")
    i = rows["is_response"].index(True)
    page.locator("#scrub").focus()
    page.keyboard.press("End")
    until(page, "document.getElementById('step').textContent === '14'")
    page.locator(f"#token-{i}").click()
    said = page.locator("#detail tr[data-column=value] td").inner_text().replace("−", "-")
    assert float(said) == pytest.approx(rows["value"][i], rel=1e-3)
    until(page, "document.querySelector('#history').data?.[0].x.length > 2")


def test_the_theme_is_kept(page, live):
    page.emulate_media(color_scheme="light")
    page.goto("/")
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    page.locator("#theme").click()
    assert page.evaluate(colour) != light
    page.reload()
    assert page.evaluate(colour) != light


def test_the_report_opens_from_disk(page, ppo_run):
    page.goto(write_report(ppo_run).as_uri())
    until(page, "document.querySelectorAll('.js-plotly-plot').length > 5")
    assert page.locator("h1").inner_text().startswith(ppo_run.name)


def test_the_critic_s_charts_are_drawn_and_another_step_is_a_click_away(page, live):
    page.goto(f"/run/{name_of(live, 'reviews')}/critic")
    until(page, "document.querySelectorAll('#charts .main-svg').length >= 3")
    assert "at step 14" in page.inner_text("h1")
    page.get_by_role("link", name="7", exact=True).click()
    until(page, "document.querySelectorAll('#charts .main-svg').length >= 3")
    assert "at step 7" in page.inner_text("h1")
    page.set_viewport_size({"width": 390, "height": 800})
    until(page, "document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.slow
def test_the_rounds_of_a_run_are_chosen_on_a_phone(page, live):
    page.set_viewport_size({"width": 390, "height": 844})
    faults = {}
    for address in ("samples?kind=probes", "reward-model", "frontier", ""):
        page.goto(f"/run/rounds/{address}")
        assert page.locator(".stages [aria-current]").inner_text() in {
            "round 2",
            "ppo.2",
            "ppo.2 2 steps",
        }
        faults[address] = page.evaluate(AUDIT)
    page.goto("/run/rounds/samples?kind=probes")
    page.get_by_role("link", name="round 1").click()
    page.locator("table.samples a").first.click()
    page.wait_for_selector("#history .main-svg")
    assert "kind=round-1/probes" in page.url
    faults["tokens"] = page.evaluate(AUDIT)
    page.locator("#scrub").fill("0")
    until(page, "document.getElementById('step').textContent === '0'")
    assert {address: found for address, found in faults.items() if found} == {}
