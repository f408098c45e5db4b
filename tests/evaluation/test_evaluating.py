"""Policies on sets by measures: servers and folders, answers that are kept, what is refused."""

import json

import pytest
from typer.testing import CliRunner

import quartet
from quartet.assembly.evaluation import EvaluationRequest, evaluate
from quartet.assembly.evaluation.answers import BLOCK, Answer, kept_answers
from quartet.assembly.evaluation.measures import measure_of, right_choices
from quartet.assembly.evaluation.policies import EvaluationError, policies_of
from quartet.assembly.evaluation.sets import FileSet, choice_of
from quartet.cli.common import app
from quartet.data import DataError
from quartet.data.examples import Example
from quartet.models.language_model import create, save
from quartet.models.shape import Shape
from quartet.worlds.sums import Sums
from tests.support.fault_server import FaultServer, says


def _lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def sums(tmp_path):
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(4)]
    return _lines(tmp_path / "sums.jsonl", rows)


@pytest.fixture
def folders(tmp_path):
    tokenizer, found = Sums(0).tokenizer(), []
    for seed in (0, 1):
        shape = Shape(hidden_size=16, num_layers=1, num_heads=2, max_length=32)
        save(create(shape, tokenizer, seed), tokenizer, tmp_path / f"model{seed}")
        found.append(str(tmp_path / f"model{seed}"))
    return found


def _cells(result):
    return {(c["policy"], c["measure"]): c["value"] for c in result["cells"]}


def test_a_server_is_asked_for_each_sample_and_its_answers_are_verified(tmp_path, sums):
    reply = says(
        {
            "choices": [{"message": {"content": "It is 3."}, "finish_reason": "stop"}],
            "usage": {"completion_tokens": 4},
        }
    )
    with FaultServer(reply) as server:
        request = EvaluationRequest(
            (f"it={server.url}/v1#some",),
            (f"sums={sums}",),
            ("number",),
            samples=2,
            folder=tmp_path / "out",
        )
        path, result = evaluate(request)
        asked = len(server.requests)
        again = evaluate(request)[1]
    # only 2 + 1 is 3: one prompt of four, whichever sample
    assert _cells(result) == {
        ("it", "number"): 0.25,
        ("it", "number pass@2"): 0.25,
        ("it", "number maj@2"): 0.25,
        ("it", "tokens"): 4.0,
    }
    assert asked == 8 and len(server.requests) == 8 and again == result
    body = json.loads(server.requests[0][2])
    assert body["model"] == "some" and body["messages"][0]["role"] == "user"
    assert json.loads(path.read_text()) == result


def test_the_same_request_gives_the_same_numbers_also_without_kept_answers(tmp_path, sums, folders):
    def numbers(out):
        return quartet.evaluate(
            folders,
            on={"sums": sums},
            measures=["exact", "kl"],
            max_new_tokens=4,
            folder=tmp_path / out,
        )

    first, second = numbers("a"), numbers("b")
    assert first["cells"] == second["cells"] and first["comparisons"] == second["comparisons"]
    assert first["against"] == "model0" and ("model1", "kl") in _cells(first)
    assert _cells(first)["model1", "kl"] != 0


def test_answers_that_were_kept_are_not_asked_for_again_and_half_a_block_is(tmp_path):
    examples = [Example(str(i), f"p{i}") for i in range(2 * BLOCK + 3)]
    blocks = []

    def ask(block, number):
        blocks.append(number)
        return [Answer(f"{e.prompt}!{s}", True, 1) for e in block for s in range(2)]

    file = tmp_path / "answers.jsonl"
    whole = kept_answers(file, examples, 2, ask)
    assert blocks == [0, 1, 2] and len(whole) == 2 * len(examples)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[: 2 * BLOCK + 5]) + lines[2 * BLOCK + 5][:20])
    blocks.clear()
    assert kept_answers(file, examples, 2, ask) == whole and blocks == [1, 2]
    assert file.read_text().splitlines(keepends=True) == lines


class Lengths:
    name = "lengths"

    def score(self, rollouts):
        return [float(len(r.response)) for r in rollouts]


def test_a_chosen_answer_among_three_rejected_ones_is_right_where_it_scores_highest():
    rows = [
        {"prompt": "p", "chosen": ["long one"], "rejected": ["a", "bb", "ccc"]},
        {"prompt": "p", "chosen": ["aa"], "rejected": ["b", "cc", "d"]},
        {"prompt": "p", "chosen": "a", "rejected": "bb"},
    ]
    choices = [choice_of(f"f:{i}", row) for i, row in enumerate(rows)]
    assert [len(choice.rejected) for choice in choices] == [3, 3, 1]
    assert right_choices(Lengths(), choices) == [1.0, 0.5, 0.0]
    with pytest.raises(DataError, match=r"f:9: has 2 chosen and 1 rejected"):
        choice_of("f:9", {"prompt": "p", "chosen": ["a", "b"], "rejected": ["c"]})


def test_what_a_set_can_be_used_for(tmp_path, sums):
    four = _lines(tmp_path / "four.jsonl", [{"prompt": "p", "chosen": ["a"], "rejected": ["b"]}])
    texts = _lines(tmp_path / "texts.jsonl", [{"text": "a b"}])
    needs = ("prompts", "choices", "texts")
    kinds = {
        path.stem: [FileSet("x", path, {}, 9).has(n) for n in needs] for path in (sums, four, texts)
    }
    assert kinds == {
        "sums": [True, False, False],
        "four": [True, True, False],
        "texts": [False, False, True],
    }


def test_a_judge_compares_where_there_is_a_rival_and_else_scores():
    words = "judge:http://127.0.0.1:1/v1#m"
    assert measure_of(words, True).is_pairwise and not measure_of(words, False).is_pairwise
    assert measure_of('{ type = "pattern", pattern = "a" }', False).source.pattern == "a"


REFUSED = {
    "no measure": (["M"], "no measure was named"),
    "no such measure": (["M", "--measure", "nonsense"], "no such measure"),
    "no column": (["M", "--measure", "exact:x", "--on", "texts=T"], "no set has rows for it"),
    "no folder": (["./nowhere", "--measure", "exact"], "no such folder"),
    "no model of a server": (["http://127.0.0.1:1/v1", "--measure", "exact"], "#MODEL"),
    "weights of a server": (["http://127.0.0.1:1/v1#m", "--measure", "kl"], "needs the weights"),
    "no rival": (["M", "--measure", "kl"], "--against MODEL"),
    "two of a name": (["M", "M", "--measure", "exact"], "two policies are called M"),
    "a step of a folder": (["M@3", "--measure", "exact"], "no run folder"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_a_wrong_request_is_one_sentence(case, tmp_path, sums, monkeypatch):
    words, sentence = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "M").mkdir()
    _lines(tmp_path / "T", [{"text": "a"}]).rename(tmp_path / "T.jsonl")
    words = [word.replace("=T", "=T.jsonl") for word in words]
    on = [] if "--on" in words else ["--on", str(sums)]
    answer = CliRunner().invoke(app, ["eval", *words, *on])
    assert answer.exit_code == 2 and sentence in answer.output.replace("\n", " ")
    assert not (tmp_path / "evaluation").exists()


def test_a_run_without_a_run_folder_is_no_checkpoint():
    with pytest.raises(EvaluationError):
        policies_of("nowhere@4")
