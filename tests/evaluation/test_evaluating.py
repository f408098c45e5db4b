"""Policies on sets by measures: servers and folders, answers that are kept, what is refused."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from typer.testing import CliRunner

import quartet
from quartet.assembly.evaluation import EvaluationRequest, evaluate
from quartet.assembly.evaluation.answers import BLOCK, Answer, kept_answers
from quartet.assembly.evaluation.evaluate import ResolvedEvaluation
from quartet.assembly.evaluation.measures import measure_of, right_choices
from quartet.assembly.evaluation.policies import (
    EvaluationError,
    LoadedPolicy,
    ServedPolicy,
    policies_of,
)
from quartet.assembly.evaluation.reward_models import reward_models_of
from quartet.assembly.evaluation.sets import FileSet, choice_of
from quartet.cli.common import app
from quartet.data import DataError
from quartet.data.encoding import Encoder
from quartet.data.examples import Example
from quartet.errors import QuartetError
from quartet.evaluation.results import Measured
from quartet.models import hub
from quartet.models.language_model import create, save
from quartet.models.shape import Shape
from quartet.worlds.sums import Sums
from tests.support.chats import REASONING, byte_level
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
    assert asked == 8 and len(server.requests) == 16, "its weights may have changed"
    assert again == result
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


def test_of_answers_that_are_whole_all_are_asked_for_anew_where_that_is_wanted(tmp_path):
    examples, blocks = [Example(str(i), f"p{i}") for i in range(2 * BLOCK)], []

    def ask(block, number):
        blocks.append(number)
        return [Answer(e.prompt, True, 1) for e in block]

    file = tmp_path / "answers.jsonl"
    kept_answers(file, examples[:BLOCK], 1, ask)
    kept_answers(file, examples, 1, ask, reuse_whole=False)
    assert blocks == [0, 1], "half of the answers: the rest is asked for"
    kept_answers(file, examples, 1, ask, reuse_whole=False)
    assert blocks == [0, 1, 0, 1]


@pytest.fixture
def run(tmp_path, folders):
    """A run folder with a policy, whose rollouts end at a string and have a shortest length."""
    folder = tmp_path / "run"
    folder.mkdir()
    rollout = 'stop = [";"]\nmin_new_tokens = 3\nmax_new_tokens = 5\nkeep_mask = true\n'
    rollout += "samples_per_prompt = 2"
    reward = '[[reward]]\ntype = "exact"'
    policy = f'[policy]\nmodel = "{folders[0]}"'
    settings = ['recipe = ["grpo"]', '[data]\nworld = "sums"', policy, reward, "[rollout]", rollout]
    (folder / "config.resolved.toml").write_text("\n".join(settings))
    shutil.copytree(folders[0], folder / "policy")
    return folder


def test_answers_are_sampled_as_in_the_runs_rollouts(tmp_path, sums, run):
    reply = says({"choices": [{"message": {"content": "3"}, "finish_reason": "stop"}]})
    with FaultServer(reply) as server:
        words = (f"{server.url}/v1#some", str(run))
        request = EvaluationRequest(
            words, (f"sums={sums}",), ("exact",), temperature=0.5, folder=tmp_path / "out"
        )
        path, result = evaluate(request)
    wanted = {"stop": [";"], "min_new_tokens": 3, "max_new_tokens": 5, "temperature": 0.5}
    assert result["sampling"] == {**wanted, "top_k": 0, "top_p": 1.0, "keep_mask": False}
    assert json.loads(path.read_text()) == result
    body = json.loads(server.requests[0][2])
    assert [body[key] for key in ("stop", "min_tokens", "max_tokens")] == [[";"], 3, 5]
    answers = next(c for c in result["cells"] if (c["policy"], c["measure"]) == ("run", "tokens"))
    assert 3 <= answers["value"] <= 5


def test_a_temperature_of_zero_is_refused_and_not_the_default(sums, folders):
    with pytest.raises(EvaluationError, match="temperature = 0.0: Input should be greater than 0"):
        quartet.evaluate(folders, on=str(sums), measures="exact", temperature=0.0)


def test_the_tokens_of_a_prompts_samples_are_averaged_before_their_interval(tmp_path, sums):
    replies = [
        says({"choices": [{"text": "3"}], "usage": {"completion_tokens": count}})
        for count in (1, 7, 1, 7, 1, 7, 1, 7)
    ]
    with FaultServer(replies) as server:
        one_by_one = ServedPolicy("it", f"{server.url}/v1/completions", "some", parallel=1)
        request = EvaluationRequest(
            (f"it={one_by_one.url}#some",), (str(sums),), ("exact",), samples=2, folder=tmp_path
        )
        evaluation = ResolvedEvaluation(request, lambda _: None)
        evaluation.policies = [one_by_one]
        tokens = evaluation.result(list(evaluation.measured()))["cells"][-1]
    # each prompt has 1 and 7: four means of 4, which do not differ
    assert tokens == {
        **{"policy": "it", "set": "sums", "measure": "tokens", "n": 4, "missing": 0},
        **{"value": 4.0, "low": 4.0, "high": 4.0},
    }


def test_a_conversation_of_several_records_is_one_row_of_perplexity(tmp_path):
    tokenizer = byte_level(REASONING)
    shape = Shape(hidden_size=16, num_layers=1, num_heads=2, max_length=256)
    save(create(shape, tokenizer, 0), tokenizer, tmp_path / "m")
    policy = LoadedPolicy(str(tmp_path / "m"))
    ask = {"role": "user", "content": "why"}
    said = {"role": "assistant", "content": "<think>\nthink\n</think>\n\nthe answer"}
    rows = [
        Example("a", [ask], completion=[said]),
        Example("b", [ask], completion=[said, ask, said]),
        Example("c", "why", completion="because"),
    ]
    losses = policy.losses(rows)
    assert len(losses) == 3
    alone = [policy.losses([row])[0] for row in (rows[0], rows[2])]
    again = Encoder(policy.tokenizer, 256, 256).demonstrations(rows[1:2])
    assert losses[1][1] == sum(len(record.response_ids) for record in again)
    answers = [Answer("", True, 0, r.prompt_ids, r.response_ids) for r in again]
    assert losses[1][0] == pytest.approx(-sum(policy.logprobs(answers, 1.0)), rel=1e-3)
    assert [losses[0][1], losses[2][1]] == [alone[0][1], alone[1][1]]
    assert [losses[0][0], losses[2][0]] == pytest.approx([alone[0][0], alone[1][0]], rel=1e-3)


def test_the_commit_of_a_model_on_the_hub_tells_its_versions_apart(monkeypatch):
    places = iter(["/cache/snapshots/abc/config.json", "/cache/snapshots/def/config.json"])
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: next(places))
    [policy] = policies_of("owner/name")
    assert policy.identity == ["owner/name", "abc"] and policy.identity == ["owner/name", "def"]


def test_without_the_hub_there_is_no_commit(monkeypatch):
    def fail(*_, **__):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    assert policies_of("owner/name")[0].identity == ["owner/name", None]


def test_kl_between_different_tokenizers_is_refused_in_one_sentence(tmp_path, sums, folders):
    tokenizer = byte_level()
    shape = Shape(hidden_size=16, num_layers=1, num_heads=2, max_length=32)
    save(create(shape, tokenizer, 0), tokenizer, tmp_path / "other")
    words = (folders[0], folders[1], str(tmp_path / "other"))
    request = EvaluationRequest(words, (str(sums),), ("kl",), folder=tmp_path / "out")
    with pytest.raises(EvaluationError, match="other and model0 have tokenizers with different"):
        evaluate(request)
    assert not (tmp_path / "out").exists()


def test_the_form_with_on_refuses_what_belongs_to_the_other(sums):
    for words in ({"data": str(sums)}, {"num_prompts": 5}, {"tokenizer": "gpt2"}):
        with pytest.raises(QuartetError, match="belong to the form with against; use on= and rows"):
            quartet.evaluate("M", **words)


def test_two_reward_models_of_one_name_take_names_and_are_refused_without(tmp_path):
    for name in "ab":
        (tmp_path / name / "reward_model").mkdir(parents=True)
    first, second = (str(tmp_path / name / "reward_model") for name in "ab")
    with pytest.raises(EvaluationError, match="two reward models are called reward_model"):
        reward_models_of([first, second])
    found = reward_models_of([f"a={first}", second, second])
    assert {name: measure.source.model for name, measure in found.items()} == {
        "a": first,
        "reward_model": second,
    }


def test_reward_models_that_are_none_are_refused_before_anything_is_answered(tmp_path, sums, run):
    pairs = _lines(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    for spec, sentence in {
        "http://127.0.0.1:1/v1#m": "is a server, and accuracy is of reward models",
        f"{run}@all": "is a checkpoint or a model of a run, and accuracy is of reward models",
        str(run): "has trained no reward model",
    }.items():
        words = {"on": {"pairs": pairs}, "measures": ["accuracy"], "folder": tmp_path / "out"}
        with pytest.raises(EvaluationError, match=sentence):
            quartet.evaluate(spec, **words)
    assert not (tmp_path / "out").exists()


def test_comparing_two_evaluations_says_which_measures_are_left_out(tmp_path):
    def results(policy):
        measured = Measured(policy, "s", "judge", [1.0, 1.0], lengths=[1.0, 1.0], is_pairwise=True)
        exact = Measured(policy, "s", "exact", [1.0, 0.0], lengths=[1.0, 1.0])
        both = [asdict(measured), asdict(exact)]
        items = {"s": {"keys": {"prompts": ["a", "b"]}, "measured": both}}
        path = tmp_path / f"{policy}.json"
        path.write_text(json.dumps({"items": items}))
        return str(path)

    answer = CliRunner().invoke(app, ["eval", "--compare", "--json", results("x"), results("y")])
    assert [c["measure"] for c in json.loads(answer.stdout)] == ["exact"]
    assert answer.stderr.startswith("judge: left out, because a judge compared each policy")


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


def test_an_exported_model_has_the_settings_of_its_run_and_is_no_run(folders):
    """`quartet export` copies the settings that the model card names."""
    settings = Path(folders[0]) / "config.resolved.toml"
    settings.write_text('recipe = ["sft"]')
    [policy] = policies_of(folders[0], None)
    with policy.opened() as loaded:
        assert isinstance(loaded, LoadedPolicy)


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


JUDGE = '{ type = "judge", url = "http://127.0.0.1:1/v1", model = "m", prompt = "%s" }'
REFUSED = {
    "no measure": (["M"], "no measure was named"),
    "no such measure": (["M", "--measure", "nonsense"], "no such measure"),
    "no column": (["M", "--measure", "exact:x", "--on", "texts=T"], "no set has rows for it"),
    "no folder": (["./nowhere", "--measure", "exact"], "no such folder"),
    "no model of a server": (["http://127.0.0.1:1/v1", "--measure", "exact"], "#MODEL"),
    "weights of a server": (["http://127.0.0.1:1/v1#m", "--measure", "kl"], "needs the weights"),
    "no rival": (["M", "--measure", "kl"], "--against MODEL"),
    "two of a name": (["M", "M", "--measure", "exact"], "two policies are called M"),
    "gold without a world": (["M", "--measure", "gold"], "gold reward"),
    "a reward model that is none": (["M", "--measure", "model:M"], "M: has no config.json"),
    "a policy as a reward model": (["M", "--measure", "model:P"], "not a reward model"),
    "a member that is not there": (
        ["M", "--measure", '{ type = "ensemble", models = ["M", "P"] }'],
        "M: has no config.json",
    ),
    "no reward model here": (["M", "--measure", '{ type = "model" }'], "has trained a reward"),
    "a judge's prompt without the answer": (
        ["M", "--measure", JUDGE % "prompt.txt"],
        "reward.prompt: the judge's prompt has no {prompt}",
    ),
    "no prompt of a judge": (["M", "--measure", JUDGE % "none.txt"], "none.txt"),
    "no function": (["M", "--measure", "function:mine.py:score"], "mine.py"),
    "a step of a folder": (["M@3", "--measure", "exact"], "no run folder"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_a_wrong_request_is_one_sentence(case, tmp_path, sums, monkeypatch):
    words, sentence = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "M").mkdir()
    (tmp_path / "P").mkdir()
    (tmp_path / "P" / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
    )
    (tmp_path / "P" / "model.safetensors").touch()
    (tmp_path / "prompt.txt").write_text("Is it good?")
    _lines(tmp_path / "T", [{"text": "a"}]).rename(tmp_path / "T.jsonl")
    words = [word.replace("=T", "=T.jsonl") for word in words]
    on = [] if "--on" in words else ["--on", str(sums)]
    answer = CliRunner().invoke(app, ["eval", *words, *on])
    assert answer.exit_code == 2 and sentence in answer.output.replace("\n", " ")
    assert not (tmp_path / "evaluation").exists()


def test_a_folder_that_does_not_exist_is_named_before_what_it_would_have_given(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    answer = CliRunner().invoke(app, ["eval", "NOWHERE"])
    assert answer.exit_code == 2 and "NOWHERE: no such folder here" in answer.output


def test_a_run_without_a_run_folder_is_no_checkpoint():
    with pytest.raises(EvaluationError):
        policies_of("nowhere@4")
