"""The Chinese pages are in step with the English ones, section by section."""

import re
from pathlib import Path

import pytest

import translations

PAGES = sorted(translations.FOLDER.glob("*.md"))
TERMS = {
    "演员": "actor", "评论家": "critic", "奖励模型": "reward model", "参考模型": "reference",
    "优势": "advantage", "回报": "return", "裁剪": "clip",
}  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_section_translates_the_english_one_as_it_is(page):
    assert list(translations.changed(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_and_commands_are_those_of_the_english_page(page):
    """Numbers of tables and the commands in blocks are the same on both pages."""

    def rows(text):
        numbers = [
            re.findall(r"[−-]?\d[\d.,]*", line)
            for line in text.splitlines()
            if line.startswith("|")
        ]
        return [row for row in numbers if row]

    def commands(text):
        found = re.findall(
            r"^    (quartet .*?|make \w+.*?|pip .*?)(?:  .*|#.*)?$", text, re.MULTILINE
        )
        return [" ".join(command.split()) for command in found]

    english = translations.original_of(page).read_text(encoding="utf-8")
    chinese = page.read_text(encoding="utf-8")
    assert rows(chinese) == rows(english) or page.name in {
        "README.md",
        "start.md",
        "four_models.md",
    }
    kept = [c for c in commands(english) if "·" not in c]
    assert [c for c in commands(chinese) if "·" not in c] == kept


def test_each_term_stands_with_the_english_beside_it_where_it_is_first_used():
    text = (translations.FOLDER / "four_models.md").read_text(encoding="utf-8")
    for term, english in TERMS.items():
        assert re.search(rf"{term}\**（{english}", text), term


def test_a_changed_section_is_named_and_a_new_one_is_counted(tmp_path, monkeypatch):
    (tmp_path / "docs" / "zh").mkdir(parents=True)
    english, page = tmp_path / "docs" / "a.md", tmp_path / "docs" / "zh" / "a.md"
    english.write_text("# One\n\ntext\n\n## Two\n\n```bash\n# no heading\n```\n")
    page.write_text("# 一\n\n文字\n\n## 二\n\n内容\n")
    monkeypatch.setattr(translations, "ROOT", tmp_path)
    assert "0 hashes" in next(translations.changed(page))
    translations.accept(page)
    assert list(translations.changed(page)) == []
    english.write_text(english.read_text().replace("text", "other  text"))
    assert list(translations.changed(page)) == [
        'docs/zh/a.md: "# One" has changed in English. Translate it, then --accept.'
    ]
    english.write_text(english.read_text() + "\n### Three\n")
    assert "has 2 sections and 2 hashes, the English page 3" in next(translations.changed(page))
    with pytest.raises(ValueError, match="2 sections, in English 3"):
        translations.accept(page)


def test_the_pages_that_are_translated_are_the_readme_start_and_concepts():
    assert {page.name for page in PAGES} == {
        "README.md",
        "start.md",
        "four_models.md",
        "batch_of_eight.md",
    }
    assert all(Path(translations.original_of(page)).is_file() for page in PAGES)
