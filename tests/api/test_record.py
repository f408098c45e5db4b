"""A loop of one's own with the record, the doctor and the studio."""

import dataclasses

import numpy as np
import pytest
import torch

import quartet


def progress(number, **metrics):
    return quartet.Progress(number, {"loss": 1.0 / number, **metrics})


def test_any_loop_gets_a_run_folder(tmp_path):
    folder = tmp_path / "runs" / "mine"
    steps = quartet.record((progress(i) for i in (1, 2, 3)), folder, name="own")
    assert [step.number for step in steps] == [1, 2, 3]
    run = quartet.Run(folder)
    assert run.status == "done"
    assert run.metrics.to_pydict()["loss"] == [1.0, 0.5, pytest.approx(1 / 3)]
    assert (folder / "report.html").is_file()
    with pytest.raises(quartet.QuartetError, match="exists already"):
        next(quartet.record([progress(1)], folder))


def test_metrics_may_be_numbers_of_numpy_and_torch_and_nothing_else(tmp_path):
    step = quartet.Progress(1, {"c": 3.0})
    step.metrics.update(a=np.float32(0.5), b=torch.tensor(2))
    list(quartet.record([step], tmp_path / "run"))
    columns = quartet.Run(tmp_path / "run").series["rl"].columns
    assert {name: columns[name][0] for name in "abc"} == {"a": 0.5, "b": 2, "c": 3}
    for wrong in ("3", None):
        steps = [quartet.Progress(7, {})]
        steps[0].metrics["loss"] = wrong
        with pytest.raises(quartet.QuartetError, match="step 7: the metric loss is a .* not a num"):
            list(quartet.record(steps, tmp_path / f"wrong-{wrong}"))


def test_an_invariant_stops_the_loop_and_is_recorded(tmp_path):
    steps = (progress(i, **{"ratio/first_error": 0.5 * (i == 2)}) for i in (1, 2, 3))
    seen = []
    with pytest.raises(quartet.QuartetError, match="ratio"):
        for step in quartet.record(steps, tmp_path / "mine"):
            seen.append(step.number)
    assert seen == [1]
    assert quartet.Run(tmp_path / "mine").status == "failed"


def test_a_loop_that_is_left_is_interrupted(tmp_path):
    for step in quartet.record((progress(i) for i in (1, 2)), tmp_path / "mine"):
        assert step.number == 1
        break
    assert quartet.Run(tmp_path / "mine").status == "interrupted"


@pytest.mark.slow
def test_an_own_ppo_loop_is_recorded_with_its_rollouts(tmp_path):
    run = quartet.train(
        "sums",
        steps=1,
        folder=tmp_path,
        policy={"create": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}},
        data={"rows": 64},
        sft={"steps": 1, "batch_size": 8},
        rollout={"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 4},
    )
    tokenizer = run.tokenizer
    steps = [step for step in run if run.stage == "grpo"]
    copies = [dataclasses.replace(step, metrics=dict(step.metrics)) for step in steps]
    list(quartet.record(copies, tmp_path / "mine", tokenizer=tokenizer, name="grpo"))
    own, theirs = quartet.Run(tmp_path / "mine"), run.record
    assert own.rollouts(1).equals(theirs.rollouts(1))
