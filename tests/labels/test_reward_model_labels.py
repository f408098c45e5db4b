"""Labels by the reward model of a folder: by its scores, whatever the order, and only once."""

import json

import pytest
from typer.testing import CliRunner

from quartet.assembly.reward_model_labels import higher
from quartet.assembly.serving import TextScorer
from quartet.cli.common import app
from quartet.labels.log import Label, LabelLog, read_labels
from quartet.models.heads import ScalarModel
from quartet.models.language_model import create
from quartet.models.shape import Shape
from quartet.rewards.serve import ScoringRequest
from quartet.worlds.sums import Sums

ROWS = [(f"{i}+1=", str(i + 1), str(i + 3)) for i in range(6)]


def reward_model(folder, seed=0):
    tokenizer = Sums(0).tokenizer()
    shape = Shape(hidden_size=16, num_layers=1, num_heads=2, max_length=32)
    trunk = create(shape, tokenizer, seed)
    ScalarModel.from_trunk(trunk, tokenizer.pad_token_id, seed).save(folder, tokenizer)
    return folder


def pairs_file(path, rows=ROWS):
    lines = [dict(zip(("prompt", "answer_a", "answer_b"), row, strict=True)) for row in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def labelled(pairs, judge, *more):
    answer = CliRunner().invoke(app, ["label", str(pairs), "--judge", str(judge), *more])
    return answer, read_labels(pairs.with_name("pairs.labels.jsonl")).labels


def test_the_answer_with_the_higher_score_is_preferred_and_both_scores_are_kept(tmp_path):
    judge = reward_model(tmp_path / "judge")
    answer, labels = labelled(pairs_file(tmp_path / "pairs.jsonl"), judge)
    assert answer.exit_code == 0 and "6 labels\n" in answer.output, answer.output
    scorer = TextScorer(judge, None)
    for _, label in labels:
        texts = [label.pair.answer_a, label.pair.answer_b]
        alone = [scorer(ScoringRequest([label.pair.prompt], [t], [True]))[0] for t in texts]
        assert label.extra["judge"]["scores"] == pytest.approx(alone, abs=1e-5)
        assert label.verdict == ("a" if alone[0] > alone[1] else "b") and label.order == "ab"
    assert len({label.verdict for _, label in labels}) == 2, "both sides are preferred somewhere"


def test_swapping_the_answers_of_a_pair_swaps_the_verdict(tmp_path):
    judge = reward_model(tmp_path / "judge")
    chosen = []
    for place, rows in (("x", ROWS), ("y", [(p, b, a) for p, a, b in ROWS])):
        (tmp_path / place).mkdir()
        _, labels = labelled(pairs_file(tmp_path / place / "pairs.jsonl", rows), judge)
        chosen.append({x.pair.prompt: x.row()["chosen"] for _, x in labels})
    assert len(chosen[0]) == 6 and chosen[0] == chosen[1]


def test_equal_scores_are_a_tie_and_a_missing_one_skips():
    assert [higher(1.0, 0.5), higher(-2.0, -1.0), higher(1.0, 1.0)] == ["a", "b", "tie"]
    assert higher(None, 1.0) == "skip"


def test_the_same_command_labels_nothing_twice_and_other_weights_label_anew(tmp_path):
    judge, pairs = tmp_path / "judge", pairs_file(tmp_path / "pairs.jsonl")
    reward_model(judge)
    assert len(labelled(pairs, judge, "--pairs", "2")[1]) == 2
    assert len(labelled(pairs, judge)[1]) == 6 == len(labelled(pairs, judge)[1])
    reward_model(judge, seed=1)
    labels = labelled(pairs, judge)[1]
    assert len(labels) == 12 and len({label.labeller for _, label in labels}) == 2


def test_the_summary_shows_the_agreement_with_people(tmp_path):
    judge, pairs = reward_model(tmp_path / "judge"), pairs_file(tmp_path / "pairs.jsonl")
    _, labels = labelled(pairs, judge)
    log = LabelLog(tmp_path / "pairs.labels.jsonl")
    for i, (_, label) in enumerate(labels):
        verdict = {"a": "b", "b": "a"}[label.verdict] if i == 0 else label.verdict
        log.add(Label(str(i), "ann", label.pair, verdict, "ba"))
    log.close()
    output, _ = labelled(pairs, judge)
    assert "ann and reward model judge " in output.stdout
    assert "6 pairs, 83% equal, κ 0." in output.stdout


REFUSED = {
    "nothing": (["nowhere"], "is neither an address"),
    "a folder without a model": (["empty"], "empty"),
    "a server's option": (["judge", "--judge-model", "m"], "--judge-model: is for a language"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_a_judge_that_is_none_is_one_sentence_and_labels_nothing(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reward_model(tmp_path / "judge")
    (tmp_path / "empty").mkdir()
    words, sentence = REFUSED[case]
    answer, labels = labelled(pairs_file(tmp_path / "pairs.jsonl"), *words)
    assert answer.exit_code == 2 and sentence in answer.output.replace("\n", " ")
    assert "Traceback" not in answer.output and not labels


def test_a_pair_that_cannot_be_scored_stays_without_a_label_and_the_others_get_theirs(tmp_path):
    pairs = pairs_file(tmp_path / "pairs.jsonl", [*ROWS, ("1+1=", "2" * 40, "3")])
    answer, labels = labelled(pairs, reward_model(tmp_path / "judge"))
    assert answer.exit_code == 2 and len(labels) == 6
    said = answer.output.replace("\n", " ")
    assert "more than 32 tokens" in said and "1 pair is not labelled" in said
