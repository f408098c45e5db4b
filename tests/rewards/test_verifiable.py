import dataclasses
import gzip
import json
from decimal import Decimal
from pathlib import Path

import pytest

from quartet.rewards.protocol import RewardError
from quartet.rewards.verifiable import (
    JsonMatch,
    LengthWithin,
    MathMatch,
    NumberMatch,
    PatternMatch,
    final_number,
)
from tests.support.world import prompts, rollout

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_train.jsonl.gz"


def answers(*texts, answer="72"):
    one = rollout(prompts(1)[0], (5, 6), 0.0)
    asked = dataclasses.replace(
        one, prompt=dataclasses.replace(one.prompt, extra={"answer": answer})
    )
    return [dataclasses.replace(asked, response=text) for text in texts]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", "72"),
        ("The answer is 72.", "72"),
        ("48 + 24 = 72 clips", "72"),
        ("$1,234.50", "1234.50"),
        ("It costs 1,000,000 dollars.", "1000000"),
        ("a list: 2,3", "3"),
        ("-5", "-5"),
        ("minus −5", "-5"),
        ("10-5", "5"),
        ("(3)-2", "2"),
        ("5e3", "5e3"),
        (".5", ".5"),
        ("0.50", "0.5"),
        ("He has 3 apples.\n#### 12", "12"),
        ("#### 12 because 12 is 3 times 4", "12"),
        ("#### 3\nno, wait\n#### 4", "4"),
        ("nothing at all", None),
        ("12 apples\n####", None),
        ("", None),
    ],
)
def test_final_numbers(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


@pytest.mark.skipif(not GSM8K.is_file(), reason="no GSM8K here")
@pytest.mark.slow
def test_all_answers_of_gsm8k_are_read():
    with gzip.open(GSM8K, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 7473
    for row in rows:
        marked = row["answer"].rpartition("#### ")[2]
        found = final_number(row["answer"])
        assert found == Decimal(marked.replace(",", "")), row["answer"]
        assert NumberMatch().score(answers(f"So it is {marked}.", answer=row["answer"])) == [1.0]
        assert NumberMatch().score(answers(f"So it is {found + 1}.", answer=row["answer"])) == [0.0]


def test_numbers_are_compared_as_numbers():
    assert NumberMatch().score(answers("72.0", "#### 72", "seventy-two", "72 or 73", "0.72e2")) == [
        1,
        1,
        0,
        0,
        1,
    ]
    with pytest.raises(RewardError, match="there is no number in its answer"):
        NumberMatch().score(answers("72", answer="many"))


def test_mathematics_is_compared_as_mathematics():
    made = MathMatch()
    assert made.score(
        answers(
            r"The result is $\frac{1}{2}$.",
            "$0.5$",
            "1/2",
            r"$\frac{2}{3}$",
            "",
            answer=r"\frac{1}{2}",
        )
    ) == [
        1,
        1,
        1,
        0,
        0,
    ]
    assert made.score(answers("$x^2+2x+1$", "$(x+1)^2$", "$x^2+1$", answer="$(x+1)^2$")) == [
        1,
        1,
        0,
    ]


def test_patterns():
    made = PatternMatch(r"\A<think>.*</think>\s*<answer>.*</answer>\s*\Z")
    assert made.score(
        answers("<think>a\nb</think>\n<answer>4</answer>", "<answer>4</answer>", "x<think></think>")
    ) == [1, 0, 0]
    with pytest.raises(RewardError, match="not a regular expression"):
        PatternMatch("(")


def test_json_with_and_without_a_schema():
    texts = answers('{"a": 1}', '```json\n{"a": "x"}\n```', "{a: 1}", "[" * 100_000)
    assert JsonMatch().score(texts) == [1, 1, 0, 0]
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert JsonMatch(schema).score(texts) == [1, 0, 0, 0]
    with pytest.raises(RewardError, match="not a JSON schema"):
        JsonMatch({"type": "objekt"})


def test_length_falls_off_in_straight_lines():
    made = LengthWithin(10, 20)
    one = answers("")[0]
    lengths = [dataclasses.replace(one, response_ids=(5,) * n) for n in (5, 10, 20, 25, 40, 60)]
    assert made.score(lengths) == [0.5, 1, 1, 0.75, 0, 0]
