"""Texts with labels as a world: parts that share no text, a judge that knows good from bad, and a recipe that runs."""

import json
import math
import random

import pytest

from quartet.data import DataError
from quartet.worlds.labelled_texts import HEADING, LabelledTexts, NaiveBayes, read_texts
from tests.support.command import quartet

GOOD = ["bright", "moving", "warm", "brilliant", "tender", "funny"]
BAD = ["dull", "tedious", "empty", "clumsy", "stale", "noisy"]
PLAIN = ["the", "film", "is", "a", "story", "of", "two", "old", "friends", "and", "their", "town"]


def labelled(path, count: int = 700):
    """A file of texts of eight words, of which two say whether it is good."""
    rng = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            label = rng.randrange(2)
            words = rng.choices(PLAIN, k=7) + rng.choices(GOOD if label else BAD, k=2)
            rng.shuffle(words)
            file.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    return path


@pytest.fixture
def world(tmp_path):
    return LabelledTexts(0, str(labelled(tmp_path / "texts.jsonl")))


def test_no_text_is_in_two_parts_and_each_is_in_one(world):
    parts = [{text for text, _ in found} for found in world.parts.values()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(read_texts(world.file))
    shares = [len(part) / sum(map(len, parts)) for part in parts]
    assert shares == pytest.approx([0.6, 0.1, 0.3], abs=0.05)


def test_prompts_are_beginnings_and_pairs_are_good_and_bad(world):
    texts = dict(world.parts["training"])
    for row in world.demonstrations(20):
        assert row.prompt.removeprefix(HEADING + " ") + row.completion in texts
        assert len(row.prompt.split()) == 4
    for row in world.comparisons(20):
        assert row.prompt == HEADING
        assert texts[row.chosen.strip()] == 1 and texts[row.rejected.strip()] == 0
    held_out = {text for text, _ in world.parts["held out"]}
    for row in world.prompts(500, held_out=True):
        beginning = row.prompt.removeprefix(HEADING + " ")
        assert any(text.startswith(beginning) for text in held_out)


def test_the_seed_decides_the_order_and_not_the_parts(world):
    other = LabelledTexts(1, world.file)
    assert other.parts == world.parts and other.comparisons(9) != world.comparisons(9)
    assert LabelledTexts(0, world.file).comparisons(9) == world.comparisons(9)


def test_the_judge_counts_words_as_one_does_by_hand():
    judge = NaiveBayes([("warm film", 1), ("Warm, warm story", 1), ("dull film", 0)])
    # Good texts have 3 + 4 words and pairs, the bad one 3, and there are 8 different ones, with one
    # added to each count. Two texts in three are good.
    warm = math.log((2 + 1) / (7 + 8)) - math.log((0 + 1) / (3 + 8))
    dull = math.log((0 + 1) / (7 + 8)) - math.log((1 + 1) / (3 + 8))
    prior = math.log(2)
    assert judge.probability("warm") == pytest.approx(1 / (1 + math.exp(-prior - warm)))
    assert judge.probability("DULL. dull!") == pytest.approx(1 / (1 + math.exp(-prior - dull)))
    assert judge.probability("unheard") == pytest.approx(2 / 3)


def test_the_judge_reads_the_answer_only(world):
    assert world.accuracy() > 0.95
    assert world.gold(f"{HEADING} dull tedious stale", " warm and moving") > 0.9
    assert world.gold("", " dull and tedious") < 0.1


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "good"}], "texts.jsonl:1: needs text, and label 1 (good) or 0 (bad)"),
        ([{"text": "fine", "label": 1}, {"text": " ", "label": 1}], "texts.jsonl:2"),
        ([{"text": "fine", "label": "good"}], "label = 'good'"),
        ([{"text": f"fine {i}", "label": 1} for i in range(400)], "0 texts with label 0"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, rows, words):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as error:
        LabelledTexts(0, str(file))
    assert words in str(error.value)


@pytest.mark.slow
def test_the_recipe_runs_on_a_folder_and_a_file(tmp_path):
    """A model of a thousand weights that another run has made, by the words of the docs."""
    labelled(tmp_path / "texts.jsonl")
    small = ["data.texts=texts.jsonl", "sft.steps=3", "reward_model.steps=3", "run.steps=2"]
    created = ["policy={create={type='llama', hidden_size=32, num_layers=2, num_heads=2}}"]
    made = quartet(
        "run",
        "film-reviews",
        *small[:-1],
        *created,
        "recipe=['sft']",
        "run.name=made",
        cwd=tmp_path,
    )
    assert made.returncode == 0, made.stderr
    folder = next((tmp_path / "runs").glob("*-made")) / "sft"
    done = quartet(
        *("run", "film-reviews", "--model", str(folder), *small, "evaluation.prompts=8"),
        *("rollout.prompts_per_step=8", "policy.adapter.rank=2"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "win rate by gold" in done.stdout
