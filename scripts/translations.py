"""Keep docs/zh/ in step with the English pages: name the sections that have changed since.

    python scripts/translations.py            # the sections that have changed; exit code 1
    python scripts/translations.py --accept   # after translating: all sections are up to date

Above each section of a translation stands a comment with the hash of the English section that it
translates. Sections are told apart by their headings, in order. Standard library only.
"""

import argparse
import hashlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "zh"
MARK = re.compile(r"^<!-- en: (\w*) -->\n", re.MULTILINE)


def original_of(page: Path) -> Path:
    """Return the English page of a translation."""
    return ROOT / "README.md" if page.name == "README.md" else ROOT / "docs" / page.name


def sections(text: str) -> list[str]:
    """Return the sections of a page, each from its heading on; headings in code are none."""
    found: list[list[str]] = []
    fenced = False
    for line in text.splitlines(keepends=True):
        fenced ^= line.startswith("```")
        if not fenced and re.match(r"#{1,3} ", line):
            found.append([])
        if found:
            found[-1].append(line)
    return ["".join(lines) for lines in found]


def hash_of(section: str) -> str:
    """Return the hash of a section; white space does not count."""
    return hashlib.sha256(" ".join(section.split()).encode()).hexdigest()[:12]


def changed(page: Path) -> Iterator[str]:
    """Yield a sentence for each section of a translation that is not up to date."""
    english = sections(original_of(page).read_text(encoding="utf-8"))
    text = page.read_text(encoding="utf-8")
    marks, translated = MARK.findall(text), sections(MARK.sub("", text))
    name = page.relative_to(ROOT)
    if len(translated) != len(english) or len(marks) != len(english):
        yield (
            f"{name}: has {len(translated)} sections and {len(marks)} hashes, "
            f"the English page {len(english)} sections."
        )
        return
    for mark, section in zip(marks, english, strict=True):
        if mark != hash_of(section):
            heading = section.partition("\n")[0]
            yield f'{name}: "{heading}" has changed in English. Translate it, then --accept.'


def accept(page: Path) -> None:
    """Write the hashes of the English sections into a translation. Raises `ValueError` where the
    numbers of sections differ."""
    english = sections(original_of(page).read_text(encoding="utf-8"))
    translated = sections(MARK.sub("", page.read_text(encoding="utf-8")))
    if len(english) != len(translated):
        raise ValueError(f"{page.name}: {len(translated)} sections, in English {len(english)}.")
    pairs = zip(english, translated, strict=True)
    text = "".join(f"<!-- en: {hash_of(one)} -->\n{other}" for one, other in pairs)
    page.write_text(text, encoding="utf-8")


def main() -> int:
    """Return 1 if a section is not up to date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--accept", action="store_true", help="note that all are up to date")
    pages = sorted(FOLDER.glob("*.md"))
    if parser.parse_args().accept:
        for page in pages:
            accept(page)
    sentences = [sentence for page in pages for sentence in changed(page)]
    print("\n".join(sentences) or f"{len(pages)} translations are up to date.")
    return int(bool(sentences))


if __name__ == "__main__":
    sys.exit(main())
