"""A run folder as somebody else reads it."""

import json
import subprocess
import sys

import pytest

import quartet
from quartet.runs.reader import NoRun, Run, find_runs


def write(path, *events, end="\n"):
    with (path / "events.jsonl").open("a") as file:
        file.write("\n".join(json.dumps(e) if isinstance(e, dict) else e for e in events) + end)


def metrics(step, **values):
    return {
        "time": 1.0,
        "event": "metrics",
        "stage": "ppo",
        "step": step,
        "metrics": values,
        "seconds": 0.5,
    }


def test_a_run_is_read_without_torch(runs):
    code = "import sys, quartet; run = quartet.Run(sys.argv[1]); run.samples(1); run.figure('frontier'); print('torch' in sys.modules)"
    run = str(find_runs(runs)[0])
    done = subprocess.run(
        [sys.executable, "-c", code, run], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "False", done.stderr


def test_what_a_run_says(ppo_run):
    assert list(ppo_run.series) == ["sft", "reward_model", "ppo", "evaluation"]
    assert ppo_run.status == "done" and ppo_run.rl_stage == "ppo" and ppo_run.main_stage == "ppo"
    assert repr(ppo_run).endswith("done; sft 3, reward_model 3, ppo 14, evaluation 2)")
    assert "ppo" in ppo_run._repr_html_()
    table = ppo_run.metrics
    assert table.num_rows == 22
    rewards = [r["reward"] for r in table.to_pylist() if r["stage"] == "ppo"]
    assert rewards == list(ppo_run.series["ppo"].columns["reward"])
    assert table.to_pylist()[0]["reward"] is None
    assert ppo_run.config["algorithm"]["policy_loss"]["type"] == "clip"
    assert set(ppo_run.series["ppo"].phases) == {"rollouts", "scoring", "update"}


def test_samples_are_the_rows_in_short(ppo_run):
    for sample in ppo_run.samples(2):
        rows = ppo_run.sample(2, sample.number)
        own = rows["is_response"]
        assert sample.response == "".join(
            t for t, mine in zip(rows["text"], own, strict=True) if mine
        )
        assert sample.tokens == sum(own) and sample.score == rows["score"][0]
        assert sample.kl == pytest.approx(sum(k for k in rows["kl"] if k is not None))
        assert set(sample.components) == {"model", "gold"}


def test_groups_are_known(grpo_run):
    samples = grpo_run.samples(1)
    assert [s.group for s in samples] == [i // 4 for i in range(16)]


def test_a_run_grows_and_a_torn_line_waits(tmp_path):
    write(tmp_path, {"time": 1.0, "event": "started", "stage": "ppo"}, metrics(1, reward=1.0))
    run = quartet.Run(tmp_path)
    assert list(run.series["ppo"].columns["reward"]) == [1.0] and run.status == "running"
    whole = json.dumps(metrics(2, reward=2.0, kl=0.5))
    write(tmp_path, whole[:30], end="")
    assert not run.refresh() and len(run.series["ppo"].steps) == 1
    write(tmp_path, whole[30:], {"time": 2.0, "event": "failed", "error": "x"})
    assert run.refresh() and run.status == "failed"
    assert list(run.series["ppo"].columns["reward"]) == [1.0, 2.0]
    assert str(list(run.series["ppo"].columns["kl"])) == "[nan, 0.5]"
    assert not run.refresh()


def test_a_line_that_a_crash_has_torn_is_counted_and_left_out(tmp_path):
    write(tmp_path, metrics(1, reward=1.0), '{"time": 1.0, "event": "metr', metrics(3, reward=3.0))
    run = Run(tmp_path)
    assert list(run.series["ppo"].steps) == [1, 3] and run.damaged == 1


def test_a_run_that_was_cut_back_is_read_anew(tmp_path):
    write(tmp_path, metrics(1, reward=1.0), metrics(2, reward=2.0))
    run = Run(tmp_path)
    (tmp_path / "events.jsonl").write_text("")
    write(tmp_path, metrics(1, reward=1.0))
    run.refresh()
    assert list(run.series["ppo"].steps) == [1]


def test_what_is_not_there_is_said(tmp_path, ppo_run):
    with pytest.raises(NoRun, match="is no run folder, it has no events.jsonl"):
        Run(tmp_path)
    with pytest.raises(NoRun, match=r"has no rollouts of step 99\. There are 14, from 1 to 14\."):
        ppo_run.rollouts(99)
    with pytest.raises(NoRun, match="step 1 has no sample 99"):
        ppo_run.sample(1, 99)
    with pytest.raises(NoRun, match="ppo has no metric rewrd. Did you mean reward. It has "):
        ppo_run.figure("rewrd", "ppo")
    with pytest.raises(NoRun, match="no such folder"):
        find_runs(tmp_path / "gone")


def test_the_newest_run_comes_first_and_latest_is_no_other(runs):
    assert [p.name.split("-")[-1] for p in find_runs(runs)] == ["sums", "reviews"]
    [one] = find_runs(runs / "latest")
    assert one.name.endswith("sums")  # itself, not the link to it
