"""Releases of a small repository, and what a wheel is built from."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import matrix
import release

ROOT = Path(__file__).parents[2]


def git(root, *words):
    return subprocess.run(
        ["git", *words], cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def project(tmp_path):
    package = tmp_path / "src" / "quartet"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('"""A package."""\n\n__version__ = "0.1.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(
        "# Changes\n\n## Unreleased\n\n- It is faster.\n\n## 0.1.0\n\n- All.\n"
    )
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 0.1.0\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "config", "user.name", "A Person")
    git(tmp_path, "config", "user.email", "person@example.org")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "All")
    return tmp_path


def run(project, *words):
    command = [sys.executable, ROOT / "scripts" / "release.py", *words, "--root", project]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_release_is_a_tagged_commit_with_the_version_and_a_closed_section(project):
    done = run(project, "0.2.0")
    assert done.returncode == 0, done.stderr
    assert '__version__ = "0.2.0"' in (project / "src/quartet/__init__.py").read_text()
    assert (project / "CITATION.cff").read_text() == "cff-version: 1.2.0\nversion: 0.2.0\n"
    changes = (project / "CHANGELOG.md").read_text()
    open_section, _, closed = changes.partition("## 0.2.0 (")
    assert open_section == "# Changes\n\n## Unreleased\n\n"
    assert closed.split("## 0.1.0")[0].rstrip().endswith("- It is faster.")
    assert git(project, "tag", "--points-at", "HEAD") == "v0.2.0"
    assert git(project, "status", "--porcelain") == ""


@pytest.mark.parametrize(
    ("spoil", "version", "sentence"),
    [
        (lambda root: (root / "new.txt").write_text("x"), "0.2.0", "The tree has changes or untracked files."),
        (lambda root: (root / "CHANGELOG.md").write_text("x"), "0.2.0", "The tree has changes or untracked files."),
        (lambda root: git(root, "tag", "v0.2.0"), "0.2.0", "0.2.0: is not higher than the last release, 0.2.0."),
        (lambda root: git(root, "tag", "v0.10.0"), "0.9.0", "is not higher than the last release, 0.10.0."),
        (lambda root: None, "0.2", "0.2: write three numbers"),
    ],
)  # fmt: skip
def test_a_release_is_refused_and_nothing_is_changed(project, spoil, version, sentence):
    spoil(project)
    before = git(project, "rev-parse", "HEAD"), git(project, "tag")
    done = run(project, version)
    assert done.returncode == 2 and sentence in done.stderr
    assert (git(project, "rev-parse", "HEAD"), git(project, "tag")) == before
    assert '__version__ = "0.1.0"' in (project / "src/quartet/__init__.py").read_text()


def test_an_empty_section_is_no_release(project):
    git(project, "tag", "v0.1.0")
    assert run(project, "0.2.0").returncode == 0
    assert 'no section "Unreleased" with entries' in run(project, "0.3.0").stderr


def test_this_project_could_be_released_once_its_tree_is_clean():
    for problem in (release.problem(ROOT, "99.0.0"),):
        assert problem is None or problem.startswith("The tree has changes")


def test_the_lower_bounds_of_the_matrix_are_those_of_the_project():
    bounds = matrix.lower_bounds()
    assert [line.partition("==")[0] for line in bounds] == ["torch", "transformers"]
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for line in bounds:
        assert line.replace("==", ">=").removesuffix(".*") in needs


def test_every_data_file_of_the_package_is_in_the_wheel():
    """A file that is neither Python nor named in pyproject.toml is missing after `pip install`."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    package = ROOT / "src" / "quartet"
    given = {
        path for pattern in table["tool"]["setuptools"]["package-data"]["quartet"] for path in package.glob(pattern)
    }  # fmt: skip
    there = {
        path for path in package.rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"}
    }
    assert there - given == set()


@pytest.mark.slow
def test_a_wheel_holds_what_git_holds(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(
        ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    backend = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", backend, tmp_path],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and "No module named 'setuptools'" in done.stderr:
        pytest.skip("no setuptools in this environment")
    assert done.returncode == 0, done.stderr[-2000:]
    import zipfile

    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    ours = {
        f"quartet/{path.relative_to(source / 'src' / 'quartet').as_posix()}"
        for path in (source / "src/quartet").rglob("*")
        if path.is_file()
    }
    assert ours <= names
    metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
    text = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).read(metadata).decode()
    assert "Author: The Quartet authors" in text and "Keywords: RLHF" in text
