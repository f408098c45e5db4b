"""Make a release: set the version, close the changelog's open section, commit, tag.

    python scripts/release.py 0.2.0            # changes, commits and tags; pushes nothing
    python scripts/release.py 0.2.0 --check    # only says whether it could be done

It refuses a tree with changes or untracked files, a version that is not higher than the last tag,
and a changelog without an open section. Standard library only.
"""

import argparse
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSION = re.compile(r"\d+\.\d+\.\d+")
LINE = re.compile(r'^__version__ = "(.*)"$', re.MULTILINE)
OPEN = "## Unreleased\n"


def git(root: Path, *words: str) -> str:
    """Return what git prints. Raises `CalledProcessError`."""
    return subprocess.run(
        ["git", *words], cwd=root, check=True, capture_output=True, text=True
    ).stdout


def problem(root: Path, version: str) -> str | None:
    """Return why this version cannot be released, None if it can."""
    if not VERSION.fullmatch(version):
        return f"{version}: write three numbers, such as 0.2.0."
    if git(root, "status", "--porcelain"):
        return "The tree has changes or untracked files. Commit them, or put them away."
    tags = git(root, "tag", "--list", "v*").split()
    released = [_numbers(tag[1:]) for tag in tags if VERSION.fullmatch(tag[1:])]
    if released and _numbers(version) <= max(released):
        return (
            f"{version}: is not higher than the last release, {'.'.join(map(str, max(released)))}."
        )
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    _, heading, rest = changes.partition(OPEN)
    if not heading or not rest.partition("\n## ")[0].strip():
        return 'CHANGELOG.md has no section "Unreleased" with entries.'
    if not LINE.search(_init(root).read_text(encoding="utf-8")):
        return "src/quartet/__init__.py has no line __version__ = …."
    return None


def release(root: Path, version: str, today: date) -> None:
    """Write the version, the citation and the changelog, commit, and tag the commit as vX.Y.Z."""
    init, changes = _init(root), root / "CHANGELOG.md"
    code = LINE.sub(f'__version__ = "{version}"', init.read_text(encoding="utf-8"))
    init.write_text(code, encoding="utf-8")
    citation = root / "CITATION.cff"
    cited = re.sub(r"(?m)^version: .*$", f"version: {version}", citation.read_text("utf-8"))
    citation.write_text(cited, encoding="utf-8")
    text = changes.read_text(encoding="utf-8")
    heading = f"## {version} ({today.day} {today:%B %Y})\n"
    changes.write_text(text.replace(OPEN, f"{OPEN}\n{heading}", 1), encoding="utf-8")
    git(root, "commit", "--quiet", "--all", "--message", f"Release {version}")
    git(root, "tag", "--annotate", f"v{version}", "--message", f"Quartet {version}")


def _init(root: Path) -> Path:
    return root / "src" / "quartet" / "__init__.py"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def main() -> int:
    """Return 0 where the release was made, or could be, and 2 where it was refused."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("version", help="such as 0.2.0")
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    words = parser.parse_args()
    if why := problem(words.root, words.version):
        print(why, file=sys.stderr)
        return 2
    if not words.check:
        release(words.root, words.version, date.today())
        print(f"Tagged v{words.version}. To publish it: git push --follow-tags")
    return 0


if __name__ == "__main__":
    sys.exit(main())
