"""The Python API makes the same runs as TOML files, holds objects that a file cannot, and resumes."""

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import quartet
from quartet.api.inputs import inputs_of
from quartet.config.toml import read_settings
from tests.support.tiny_run import make_run

TINY = {
    "policy": {"create": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_length": 32}},
    "data": {"rows": 64},
    "sft": {"steps": 3, "batch_size": 8},
    "rollout": {"prompts_per_step": 8, "max_new_tokens": 8, "samples_per_prompt": 4},
    "evaluation": {"prompts": 8},
}


def short(responses, **_):
    return [-float(len(response)) for response in responses]


def tiny(root, *, steps=2, **changes):
    settings = {**TINY, **changes}
    return quartet.train("sums", steps=steps, folder=root, **settings)


def grpo_alone(root, **changes):
    settings = {"policy": TINY["policy"], "rollout": TINY["rollout"], "reward": short, **changes}
    data = {"world": "sums", "rows": 64, "max_prompt_tokens": 16}
    return quartet.train("grpo", data=data, folder=root, **settings)


def recorded(folder, stage):
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [
        line["metrics"] for line in lines if line["event"] == "metrics" and line["stage"] == stage
    ]


@pytest.mark.slow
def test_it_makes_the_same_run_as_the_command_line(tmp_path):
    words = ("rollout.samples_per_prompt=4", "run.steps=2")
    expected = make_run(tmp_path / "toml", "sums", *words)
    run = tiny(tmp_path / "python").finish(progress=False)
    for stage in ("sft", "grpo"):
        assert recorded(run.folder, stage) == recorded(expected.path, stage)


@pytest.mark.slow
def test_steps_come_one_by_one_with_their_rollouts_and_the_rest_follows(tmp_path, capsys):
    run = tiny(tmp_path, steps=3)
    with pytest.raises(quartet.QuartetError, match="has not begun"):
        _ = run.folder
    for step in run:
        if run.stage == "grpo":
            assert step.number == 1
            assert isinstance(step.rollouts[0].response, str)
            assert step.metrics["reward"] == pytest.approx(
                sum(r.score for r in step.rollouts) / len(step.rollouts)
            )
            break
    assert not run.finished
    assert next(iter(run)).number == 2  # an iterator that was left goes on
    run.finish()
    assert run.finished
    assert [m["step"] for m in steps_of(run, "grpo")] == [1, 2, 3]
    assert run.report.is_file()
    assert run.policy.config.hidden_size == 16
    assert run.tokenizer.eos_token_id is not None
    assert run.summaries["evaluation"]["win_rate"]["mean"] >= 0
    assert "<svg" in run._repr_html_()
    assert list(run) == []
    assert "win rate by" in capsys.readouterr().out


def steps_of(run, stage):
    lines = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "metrics" and line["stage"] == stage]


@pytest.mark.slow
def test_a_function_is_a_reward_with_its_weight_and_is_asked_for_again(tmp_path):
    run = tiny(tmp_path, reward=[short, ("gold", 0.5)]).finish(progress=False)
    table = tomllib.loads((run.folder / "config.toml").read_text())
    assert table["reward"] == [
        {"type": "object", "object": "short"},
        {"type": "gold", "weight": 0.5},
    ]
    assert {"reward/short", "reward/gold"} <= set(recorded(run.folder, "grpo")[0])
    with pytest.raises(quartet.QuartetError, match="was given as a Python object"):
        quartet.train(resume=run.folder, steps=3)
    again = quartet.train(resume=run.folder, steps=3, reward=short).finish(progress=False)
    assert [m["step"] for m in steps_of(again, "grpo")] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, precision):
    settings = {"steps": 4, "reward": short}
    whole = tiny(tmp_path / "whole", **settings, run={"precision": precision})
    whole = whole.finish(progress=False)
    run = {"checkpoint_every": 100, "precision": precision}
    parts = tiny(tmp_path / "parts", **settings, run=run)
    for step in parts:
        if parts.stage == "grpo" and step.number == 2:
            break
    parts.close()
    changed = quartet.train(resume=parts.folder, reward=short, optim={"lr": 0.5})
    with pytest.raises(
        quartet.QuartetError, match=r'Pass accept=\["optim.lr"\], or change it back'
    ):
        changed.finish(progress=False)
    resumed = quartet.train(resume=parts.folder, reward=short, accept=["run.checkpoint_every"])
    assert [step.number for step in resumed] == [3, 4, 1, 2]  # GRPO goes on; then the evaluation
    assert recorded(resumed.folder, "grpo") == recorded(whole.folder, "grpo")


@pytest.mark.slow
def test_rows_and_a_model_given_as_objects_become_files_that_the_config_names(tmp_path):
    first = tiny(tmp_path, steps=1).finish(progress=False)
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(40)]
    run = quartet.train(
        "grpo",
        policy=first.policy,
        tokenizer=first.tokenizer,
        prompts=rows,
        reward="exact",
        steps=1,
        folder=tmp_path,
        **{"rollout.samples_per_prompt": 2, "rollout.prompts_per_step": 4},
        rollout={"max_new_tokens": 4},
    ).finish(progress=False)
    config = read_settings(run.folder / "config.toml").config
    assert [json.loads(line) for line in Path(config.data.train).read_text().splitlines()] == rows
    assert config.policy.model.startswith(str(tmp_path / "inputs"))
    assert recorded(run.folder, "grpo")
    same = quartet.train(
        "sft",
        policy=first.policy,
        tokenizer=first.tokenizer,
        data=[{"prompt": "a", "completion": "b"}] * 4,
        steps=1,
        folder=tmp_path,
    )
    assert same.settings.config.policy.model == config.policy.model  # equal weights: stored once
    same.close()


def test_the_stages_before_rl_and_an_evaluation_of_two_folders(tmp_path):
    pairs = [{"prompt": f"{i}", "chosen": " good", "rejected": " bad"} for i in range(24)]
    create = {"create": TINY["policy"]["create"], "tokenizer": {"type": "train", "vocab_size": 300}}
    common = {"folder": tmp_path, "policy": create, "rollout": {"max_new_tokens": 4}}
    reward_model = quartet.train("reward_model", data=pairs, steps=2, **common)
    assert reward_model.finish(progress=False).reward_model.head is not None
    del common["rollout"]  # no stage of DPO reads it
    dpo = quartet.train("dpo", data=pairs, steps=2, seed=3, **common).finish(progress=False)
    result = quartet.evaluate(
        dpo.folder / "policy",
        dpo.folder / "policy",
        data=[row["prompt"] for row in pairs],
        reward=short,
        num_prompts=4,
        folder=tmp_path,
        rollout={"max_new_tokens": 4},
    )
    summary = result.summaries["evaluation"]
    assert summary["kl"]["mean"] == pytest.approx(0, abs=1e-5)
    assert summary["before"]["reward"] == pytest.approx(summary["after"]["reward"], abs=4)


class Broken(quartet.Advantage):
    type = "broken_on_purpose"
    way: str = quartet.Field(default="shape", description="What it gets wrong.")

    def __call__(self, token_rewards, batch):
        return {"shape": (token_rewards.sum(1), None), "pair": token_rewards}[self.way]


class Named:
    name = "named"

    def score(self, rollouts):
        return [0.0] * len(rollouts)


ROWS_OF_TWO_KINDS = (
    ["sft"],
    {
        "policy": {**TINY["policy"], "tokenizer": {"type": "train"}},
        "data": [*[{"prompt": "a b", "completion": " c"}] * 3, {"prompt": "a"}],
    },
)


def test_a_policy_takes_the_place_of_one_that_a_recipe_creates(tmp_path):
    """As --model does on the command line."""
    inputs = inputs_of("reviews", {"policy": "some/model"}, {})
    assert "create" not in inputs.table["policy"] and "tokenizer" not in inputs.table["policy"]
    smaller = inputs_of("reviews", {"policy": {"create": {"num_layers": 1}}}, {})
    assert smaller.table["policy"]["create"]["num_layers"] == 1
    assert smaller.table["policy"]["create"]["num_heads"] > 0


def test_numbers_of_numpy_and_torch_are_numbers_and_none_is_left_out(tmp_path):
    numbers = {"lr": np.float64(0.25), "epochs": torch.tensor(3), "betas": list(np.ones(2) / 2)}
    run = tiny(tmp_path, optim=numbers, launch=None)
    config = run.settings.config
    assert (config.optim.lr, config.optim.epochs, config.optim.betas) == (0.25, 3, (0.5, 0.5))
    run.close()


@pytest.mark.slow
def test_a_run_that_nobody_begins_is_spoken_of(tmp_path):
    """A script that calls `train` and does no more would end without a word."""
    with pytest.warns(RuntimeWarning, match=r"was not begun: iterate over it, or call finish\(\)"):
        tiny(tmp_path)
    for use in (repr, iter, quartet.TrainingRun.close):
        use(tiny(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (quartet.train, "recipe: name a stage"),
        (
            lambda: quartet.train("pppo", prompts=["a"]),
            'recipe: "pppo" is no stage. Did you mean ppo?',
        ),
        (lambda: quartet.train("GRPO", prompts=["a"]), '"GRPO" is no stage. Did you mean grpo?'),
        (lambda: quartet.train("sums", optim={"lrr": 1}), "quartet.train: optim.lrr: no such key"),
        (lambda: quartet.train("sums", prompts=["a"], data=["a"]), "Give one of the two"),
        (lambda: quartet.train("ppo", policy=3, prompts=["a"]), "policy: an int is no model"),
        (lambda: quartet.train("ppo", prompts=[3]), "data.train, row 1: an int is no text"),
        (lambda: quartet.train("ppo", prompts=[]), "data.train: is empty"),
        (lambda: quartet.train("sums", reward=short, launch={"processes": 2}), "launch: several"),
        (lambda: quartet.train("sums", reward=3), "reward: an int is no reward"),
        (lambda: quartet.train("sums", launch={"type": "torchrun"}), "launch.type = .torchrun."),
        (lambda: quartet.train("sums", reward=[(0.5, short)]), "a pair is .reward, weight."),
        (lambda: quartet.train("sums", reward="exac"), "Did you mean exact?"),
        (lambda: quartet.train("sums", algorithm={"advantage": Broken}), "Broken: is a class"),
        (lambda: quartet.train("evaluation", data={"world": "sums"}), "evaluation compares"),
        (lambda: quartet.train(resume="nowhere"), "nowhere"),
        (lambda: quartet.train("ppo", prompts=["a b"]), "^quartet.train: policy.model: name a"),
        (lambda: quartet.train("ppo", prompts=["word" * 200]), "policy.model: name a folder"),
        (lambda: quartet.train("ppo", prompts="Write it."), "Texts are given in a list"),
        (
            lambda: quartet.train("ppo", policy="short" * 100, prompts=["a", "b"], reward=short),
            "policy.model = .*: no such folder",
        ),
        (lambda: quartet.critic_audit("nowhere"), "nowhere: no such folder"),
        (lambda: quartet.train("sums", reward=Named), "Named is a class. Give an instance"),
        (lambda: quartet.train("sums", optim={"lr": short}), "optim.lr: a function is no setting"),
        (lambda: quartet.train("sums", run={"track": [short]}), "run.track: a function is no"),
        (
            lambda: quartet.train(*ROWS_OF_TWO_KINDS[0], **ROWS_OF_TWO_KINDS[1]),
            "^data.train, row 4",
        ),
    ],
)
def test_what_cannot_work_is_one_sentence(call, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(quartet.QuartetError, match=sentence.replace("?", r"\?")):
        call()
    assert not list(tmp_path.glob("runs/[0-9]*"))


class Unwritten(quartet.Advantage):
    def forward(self, token_rewards, batch):
        return token_rewards, None


def test_a_part_without_its_formula_is_named(tmp_path):
    run = grpo_alone(tmp_path, algorithm={"advantage": Unwritten()})
    with pytest.raises(quartet.QuartetError, match="grpo, step 1: Unwritten has no __call__"):
        run.finish(progress=False)


def test_a_failing_function_stops_the_run_with_its_own_error_as_the_cause(tmp_path):
    def broken(responses):
        raise KeyError("no such column")

    run = tiny(tmp_path, reward=broken)
    with pytest.raises(quartet.QuartetError, match="broken failed: KeyError"):
        run.finish(progress=False)
    assert run.record.status == "failed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "sentence"),
    [
        ("shape", r"broken_on_purpose: returned a tensor of shape \[8\], not a pair"),
        ("pair", "broken_on_purpose: returned a Tensor, not a pair"),
        ("else", r"KeyError, test_train.py, line \d+"),
    ],
)
def test_a_mistake_in_an_own_part_is_named(way, sentence, tmp_path):
    run = tiny(tmp_path, algorithm={"advantage": Broken(way=way)})
    with pytest.raises(quartet.QuartetError, match=sentence):
        run.finish(progress=False)


@pytest.mark.slow
def test_a_run_that_is_open_in_this_process_is_taken_over(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tiny("runs", steps=3, reward=short)
    held = iter(run)
    assert any(run.stage == "grpo" and step.number == 1 for step in held)  # left at this step
    other = quartet.train(resume=run.folder, reward=lambda responses, **_: [0.0] * len(responses))
    assert [step.number for step in other if other.stage == "grpo"] == [2, 3]
    run.finish()  # nothing is left
    assert run.finished


def test_a_run_that_was_taken_over_is_not_finished_and_takes_itself_back(tmp_path):
    """In a notebook: a step of a run, a step of the same run by `resume`, and the first again."""
    run = grpo_alone(tmp_path, steps=4, reward=short)
    held = iter(run)
    assert next(held).number == 1
    other = quartet.train(resume=run.folder, reward=short)
    assert next(iter(other)).number == 2
    with pytest.raises(quartet.QuartetError, match="another object of this process has resumed"):
        next(held)
    assert not run.finished
    assert [step.number for step in run] == [3, 4]
    assert run.finished and run.policy is not None
    assert list(other) == [] and other.finished


@pytest.mark.slow
def test_an_evaluation_answers_what_it_is_given(tmp_path):
    run = tiny(tmp_path, steps=1).finish(progress=False)
    prompts = [f"{i}+{i}=" for i in range(12)]
    result = quartet.evaluate(
        run.folder / "policy",
        (run.policy, run.tokenizer),
        data=prompts,
        reward=short,
        folder=tmp_path,
        rollout={"max_new_tokens": 4},
    )
    assert result.summaries["evaluation"]["prompts"] == 12


@pytest.mark.slow
def test_warnings_are_shown_where_nothing_else_shows_them(tmp_path, capsys):
    run = tiny(tmp_path, steps=4)
    for _ in run:
        pass
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("▲")]
    assert [line.removeprefix("▲ ") for line in shown] == run.warnings
