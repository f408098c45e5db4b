"""The documentation site: built strictly, read from a folder, nothing from other hosts."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import site_pages
from quartet.config.other_libraries import answers
from quartet.config.suggestions import known_keys

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
pytest.importorskip("material")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
LOADED = re.compile(r"""<(?:script|img|iframe|source)[^>]*\bsrc=["']?(https?:[^"'> ]+)|<link[^>]*rel=["']?(?:stylesheet|preload|icon|preconnect)[^>]*href=["']?(https?:[^"'> ]+)""")  # fmt: skip


def built(project: Path, site: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "mkdocs", "build", "-d", str(site)]
    return subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = built(ROOT, folder)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr and "WARNING" not in done.stdout
    return folder


def test_no_page_loads_anything_from_another_host(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    assert not {found for page in pages for found in LOADED.findall(page.read_text())}
    assert not [
        css for css in site.rglob("*.css") if re.search(r"url\([\"']?https?:", css.read_text())
    ]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_search_finds_a_setting_in_a_site_that_is_opened_from_a_folder(site):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / "index.html").as_uri())
        page.locator("input.md-search__input").click()
        page.keyboard.type("max_prompt_tokens", delay=20)
        page.wait_for_selector(".md-search-result__item", timeout=30_000)
        hrefs = page.locator(".md-search-result__link").evaluate_all("all => all.map(a => a.href)")
        browser.close()
    assert any("configuration.html" in href for href in hrefs)
    assert all(url.startswith(("file:", "about:", "data:")) for url in asked)


@pytest.mark.slow
@pytest.mark.parametrize("link", ["[x](no_such_page.md)", "[x](data.md#no-such-heading)"])
def test_a_broken_link_fails_the_build(tmp_path, link):
    for name in ("docs", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", *site_pages.FILES):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "src").symlink_to(ROOT / "src")
    page = tmp_path / "docs" / "start.md"
    page.write_text(f"{page.read_text()}\n{link}\n")
    done = built(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert link[4:-1].partition("#")[2 if "#" in link else 0] in done.stdout + done.stderr


def test_the_reference_has_every_setting_with_its_text():
    page = site_pages.configuration()
    for key in known_keys():
        if "." in key and not key.endswith(".type"):
            assert f"\n### `{key}`\n" in page
    for heading, body in re.findall(r"\n### `([\w.]+)`\n(.*?)(?=\n##|\Z)", page, re.DOTALL):
        assert len(body.strip()) > 20, heading


def test_the_reference_has_every_command_and_every_public_name():
    import quartet

    page = site_pages.commands()
    for name in ("run", "plan", "data", "explain", "sweep", "critic", "eval", "label", "export"):
        assert f"\n## {name}\n" in page
    python = site_pages.python()
    for name in quartet.__all__:
        assert re.search(rf"(::: quartet\.[\w.]+\.{name}|## {name})$", python, re.MULTILINE), name


def test_the_page_of_other_libraries_has_every_option():
    page = site_pages.other_libraries()
    for name in answers():
        assert f"| `{name}` |" in page


def test_links_of_the_readme_are_links_of_the_site():
    page = site_pages.from_repository("README.md")
    assert "(docs/" not in page and "](data.md)" in page and "](images/frontier.png)" in page
    assert "[a dozen lines]" not in page and "a dozen lines" in page
