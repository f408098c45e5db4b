"""Rubrics: each criterion in both orders, the weighted sum, and files that are none."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from quartet.cli.common import app
from quartet.labels.log import read_labels
from quartet.rewards.pair_judge import PairJudge
from quartet.rewards.protocol import RewardError
from quartet.rewards.remote import Endpoint
from quartet.rewards.rubric import Criterion, Rubric, read_rubric
from quartet.rewards.source import RewardContext
from quartet.rewards.sources import JudgeSource
from tests.support.fault_server import FaultServer, says
from tests.support.world import prompts, rollout

FILE = """\
[[criterion]]
name = "correct"
question = "Which answer has fewer errors?"
weight = 3

[[criterion]]
name = "polite"
question = "Which answer is kinder, and has {prompt} in it?"
weight = 2

[[criterion]]
name = "short"
question = "Which answer says it in fewer words?"
weight = 2
"""


@pytest.fixture
def rubric(tmp_path):
    path = tmp_path / "rubric.toml"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize(
    ("verdicts", "result"),
    [
        (["a", "b", "b"], ("b", -1 / 7)),  # (3 − 2 − 2) / 7, though the heaviest one says a
        (["a", "b", "tie"], ("a", 1 / 7)),
        (["b", "tie", "tie"], ("b", -3 / 7)),
        (["tie", "a", "b"], ("tie", 0.0)),
        (["a", "a", "skip"], ("skip", None)),
    ],
)
def test_the_weighted_sum_by_hand(rubric, verdicts, result):
    verdict, mean = read_rubric(rubric).weighted(verdicts)
    assert (verdict, mean) == (result[0], None if result[1] is None else pytest.approx(result[1]))


def test_a_sum_that_is_zero_but_for_rounding_is_a_tie():
    weights = {"one": 0.1, "two": 0.2, "three": 0.3}
    three = [Criterion(name=name, question="?", weight=w) for name, w in weights.items()]
    assert Rubric(three).weighted(["a", "a", "b"]) == ("tie", 0.0)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("correct: A", 1.0),
        ("It is not correct: B is.\n- **Correct**: tie.", 0.5),
        ("correct: A\ncorrect: B", 0.0),
        ("2. correct: **B**", 0.0),
        ("incorrect: A", None),
        ("more correct: A", None),
        ("correct: A or B", None),
        ("Better: A", None),
    ],
)
def test_what_is_a_criterions_verdict(text, share):
    assert Criterion(name="correct", question="?").share(text) == share


def reply(body):
    """Prefers "right" by `correct`, always the first answer by `polite`, the shorter by `short`."""
    text = json.loads(body)["messages"][0]["content"]
    first, second = (text.split(f"<answer {s}>\n")[1].split("\n</answer")[0] for s in "AB")
    lines = [
        f"correct: {'A' if first == 'right' else 'B'}",
        "polite: A",
        f"short: {'A' if len(first) < len(second) else 'B'}",
    ]
    if "mute" in text:
        lines.pop()
    usage = {"prompt_tokens": 5, "completion_tokens": 2}
    return says({"choices": [{"message": {"content": "\n".join(lines)}}], "usage": usage})


def label(tmp_path, url, *more, model="m"):
    pairs = tmp_path / "pairs.jsonl"
    rows = [("ask", "no", "right"), ("ask", "all wrong", "right"), ("mute", "x", "right")]
    lines = [dict(zip(("prompt", "answer_a", "answer_b"), row, strict=True)) for row in rows]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["label", str(pairs), "--judge", url, "--judge-model", model, *map(str, more)]
    answer = CliRunner().invoke(app, words)
    labels = read_labels(tmp_path / "pairs.labels.jsonl").labels
    return answer, {entry.pair.answer_a: entry for _, entry in labels}


def test_each_criterion_is_asked_in_both_orders_and_recorded_and_the_sum_decides(tmp_path, rubric):
    with FaultServer(choose=reply) as server:
        answer, labels = label(tmp_path, f"{server.url}/v1", "--rubric", rubric)
        asked = json.loads(server.requests[0][2])["messages"][0]["content"]
    assert answer.exit_code == 0 and len(server.requests) == 6, answer.output
    assert "has {prompt} in it?" in asked and '"correct: A"' in asked and "{criteria}" not in asked
    noted = {a: entry.extra["judge"] for a, entry in labels.items()}
    # "no" is wrong (−3) and shorter (+2); the judge changes its mind about polite, a tie
    assert [each["verdict"] for each in noted["no"]["criteria"]] == ["b", "tie", "a"]
    assert labels["no"].verdict == "b" and noted["no"]["weighted"] == pytest.approx(-1 / 7)
    assert noted["all wrong"]["weighted"] == pytest.approx(-5 / 7)
    assert labels["x"].verdict == "skip" and noted["x"]["criteria"][2]["verdict"] == "skip"
    assert noted["no"]["criteria"][0]["weight"] == 3 and noted["no"]["calls"] == 2


def test_another_weight_is_another_labeller(tmp_path, rubric):
    with FaultServer(choose=reply) as server:
        first = label(tmp_path, f"{server.url}/v1", "--rubric", rubric)[1]["no"]
        rubric.write_text(FILE.replace("weight = 3", "weight = 1"))
        output = label(tmp_path, f"{server.url}/v1", "--rubric", rubric)[0].output
        second = label(tmp_path, f"{server.url}/v1", "--rubric", rubric)[1]["no"]
    assert "3 labels, 6 calls" in output and len(server.requests) == 12, "nothing is asked twice"
    assert first.labeller != second.labeller and (first.verdict, second.verdict) == ("b", "a")


BAD = {
    "no file": (None, "cannot be read"),
    "no TOML": ("[[criterion]", "is no TOML file"),
    "nothing": ("", "needs one to twenty tables [[criterion]]"),
    "an empty list": ("criterion = []", "needs one to twenty tables [[criterion]]"),
    "another key": ("name = 1\n" + FILE, "needs one to twenty tables [[criterion]]"),
    "a typo": (FILE.replace("weight = 3", "wieght = 3"), "criterion 1 wieght: no such key"),
    "no question": ('[[criterion]]\nname = "ab"', "criterion 1 question: Field required"),
    "a negative weight": (FILE.replace("weight = 3", "weight = -3"), "criterion 1 weight: "),
    "no finite weight": (FILE.replace("weight = 3", "weight = inf"), "criterion 1 weight: "),
    "a weight in quotes": (FILE.replace("weight = 3", 'weight = "3"'), "criterion 1 weight: "),
    "a colon in a name": (FILE.replace('"polite"', '"be: kind"'), "criterion 2 name: must be 2 to"),
    "two of a name": (FILE.replace('"polite"', '"Correct"'), "two criteria are called correct"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_a_bad_rubric_is_one_sentence_and_nothing_is_asked(case, tmp_path):
    text, sentence = BAD[case]
    path = tmp_path / "rubric.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RewardError) as caught:
        read_rubric(path)
    assert sentence in str(caught.value) and str(caught.value).startswith(f"rubric {path}: ")
    assert "\n" not in str(caught.value)
    with FaultServer(choose=reply) as server:
        answer, labels = label(tmp_path, f"{server.url}/v1", "--rubric", path)
    assert answer.exit_code == 2 and not labels and not server.requests


def test_a_prompt_without_a_place_for_the_criteria_and_a_rubric_without_a_judge(rubric, tmp_path):
    with pytest.raises(RewardError, match="has no {criteria}"):
        PairJudge(
            Endpoint("judge", "http://j"), "m", "{prompt}{first}{second}", read_rubric(rubric)
        )
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "answer_a": "a", "answer_b": "b"}\n')
    words = ["label", str(tmp_path / "pairs.jsonl"), "--rubric", str(rubric)]
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 2 and "is for a language model" in answer.output


def either(body):
    """Answers as the policies new and old, and judges as `reply` does."""
    asked = json.loads(body)
    if asked["model"] == "judge":
        return reply(body)
    worse = {"one": "no", "two": "all wrong", "mute": "x"}[asked["messages"][0]["content"]]
    answer = "right" if asked["model"] == "new" else worse
    choice = {"message": {"content": answer}, "finish_reason": "stop"}
    return says({"choices": [choice], "usage": {"completion_tokens": 1}})


def judged(tmp_path, server, *more, judge="judge:{url}/v1#judge"):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("one", "two", "mute")))
    models = [f"{name}={server.url}/v1#{name}" for name in ("old", "new")]
    words = ["eval", *models, "--on", f"set={prompts}", "--to", str(tmp_path / "out"), "--json"]
    words += ["--measure", judge.format(url=server.url), *map(str, more)]
    before = len(server.requests)
    answer = CliRunner().invoke(app, words)
    asked = [json.loads(body)["model"] for *_, body in server.requests[before:]]
    return answer, asked.count("judge")


def test_an_evaluation_reports_each_criterion_beside_the_weighted_sum(tmp_path, rubric):
    with FaultServer(choose=either) as server:
        answer, asked = judged(tmp_path, server, "--rubric", rubric)
        result = json.loads(answer.stdout)
        rubric.write_text(FILE.replace("weight = 3", "weight = 1"))
        lighter, asked_again = judged(tmp_path, server, "--rubric", rubric)
    cells = {c["measure"]: (c["value"], c["n"], c["missing"]) for c in result["cells"]}
    del cells["tokens"]
    assert cells == {  # "no" is shorter than "right"; about "mute" the judge says nothing of short
        "judge": (1.0, 2, 1),
        "judge correct": (1.0, 3, 0),
        "judge polite": (0.5, 3, 0),
        "judge short": (0.5, 2, 1),
    }
    wins = {c["measure"]: (c["wins"], c["ties"], c["losses"]) for c in result["comparisons"]}
    assert wins["judge"] == (2, 0, 0) and wins["judge short"] == (1, 0, 1)
    assert wins["judge polite"] == (0, 3, 0), "a judge that prefers what it reads first ties"
    assert {c["against"] for c in result["comparisons"]} == {"old"}
    assert [(c["name"], c["weight"]) for c in result["rubrics"]["judge"]] == [
        ("correct", 3.0),
        ("polite", 2.0),
        ("short", 2.0),
    ]
    total = {c["measure"]: c["value"] for c in json.loads(lighter.stdout)["cells"]}["judge"]
    assert total == 0.5, "of “no” against “right”, (1 + 0 − 2) / 5 is a loss"
    assert (asked, asked_again) == (6, 0), "another weight asks nothing anew"


def test_an_evaluation_and_a_label_decide_alike(tmp_path, rubric):
    table = '{{ type = "judge", url = "{url}/v1", model = "judge", name = "j", rubric = "RUBRIC" }}'
    with FaultServer(choose=either) as server:
        table = table.replace("RUBRIC", str(rubric))
        result = json.loads(judged(tmp_path, server, judge=table)[0].stdout)
        labels = label(tmp_path, f"{server.url}/v1", "--rubric", rubric, model="judge")[1]
    won = {"a": 0.0, "tie": 0.5, "b": 1.0, "skip": None}  # "right" is answer b
    by_label = [won[labels[worse].verdict] for worse in ("no", "all wrong", "x")]
    [values] = [m["values"] for m in result["items"]["set"]["measured"] if m["measure"] == "j"]
    assert values == by_label == [1.0, 1.0, None]


REFUSED = {
    "no judge": (["--rubric", "RUBRIC"], "pattern:x", "is for a language model that compares"),
    "a bad file": (["--rubric", "BAD"], "judge:{url}/v1#judge", "criterion 1 wieght: no such key"),
    "scores": (
        [],
        '{{ type = "judge", url = "{url}/v1", model = "m", mode = "score", rubric = "RUBRIC" }}',
        'Set mode = "pairwise"',
    ),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_a_rubric_that_cannot_be_used_is_refused_before_anything_is_asked(case, tmp_path, rubric):
    more, judge, sentence = REFUSED[case]
    bad = tmp_path / "bad.toml"
    bad.write_text(BAD["a typo"][0])
    files = {"RUBRIC": str(rubric), "BAD": str(bad)}
    with FaultServer(choose=either) as server:
        measure = judge.replace("RUBRIC", str(rubric))
        answer, _ = judged(tmp_path, server, *(files.get(w, w) for w in more), judge=measure)
        assert not server.requests
    assert answer.exit_code == 2 and sentence in answer.output.replace("\n", " ")


def test_one_policy_alone_cannot_be_judged_by_a_rubric(tmp_path, rubric):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n')
    words = ["eval", "http://127.0.0.1:1/v1#m", "--on", str(prompts), "--rubric", str(rubric)]
    answer = CliRunner().invoke(app, [*words, "--measure", "judge:http://127.0.0.1:1/v1#j"])
    assert answer.exit_code == 2 and "--against MODEL" in answer.output


def test_a_runs_reward_compares_by_a_rubric(tmp_path, rubric):
    """Three answers, a ring: each is compared with both others."""
    answers = ["right", "no", "all wrong"]
    [prompt] = prompts(1)
    rollouts = [
        replace(rollout(prompt, (1,), 0.0, number=i), response=answer)
        for i, answer in enumerate(answers)
    ]
    with FaultServer(choose=reply) as server:
        source = JudgeSource(f"{server.url}/v1", "m", mode="pairwise", rubric=str(rubric))
        context = RewardContext(None, list, 64, None, folder=tmp_path)
        scores = source.make(context).score(rollouts)
    # "no" and "all wrong" are both no "right": the judge says B of either order, and short decides
    assert scores == [1.0, 0.5, 0.0]
    assert "correct: Which answer" in (tmp_path / "judge" / "judge.rubric.txt").read_text()
