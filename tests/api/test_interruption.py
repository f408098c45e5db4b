"""Ctrl-C in a program that trains: the step is saved, and the run goes on."""

import json
import signal
import subprocess
import sys
import textwrap

import pytest

import quartet
from quartet.api import run as api_run
from quartet.runtime.interruption import Interruption
from tests.api.test_train import tiny

PROGRAM = """
import signal, sys, time
import quartet

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

def short(responses, **_):
    return [-float(len(response)) for response in responses]

run = quartet.train(
    "sums",
    steps=200,
    folder=sys.argv[1],
    reward=short,
    policy={"create": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}},
    data={"rows": 64},
    sft={"steps": 1, "batch_size": 8},
    rollout={"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 4},
    run={"checkpoint_every": 1000},
)
try:
    for step in run:
        print(run.stage, step.number, flush=True)
        if run.stage == "grpo" and step.number == 3:
            print("now", flush=True)
except KeyboardInterrupt as error:  # RunInterrupted, or Python's own where it hits this program
    print("stopped", error, flush=True)
"""


def short(responses, **_):
    return [-float(len(response)) for response in responses]


@pytest.mark.slow
def test_ctrl_c_saves_the_step_and_the_run_goes_on_in_another_process(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            lines.append(line.strip())
            if line.strip() == "now":
                process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert lines[-1].startswith("stopped")
    last = max(int(line.split()[1]) for line in lines if line.startswith("grpo"))
    assert last < 200
    run = quartet.train(resume=tmp_path / "latest", reward=short, steps=last + 1)
    numbers = [step.number for step in run if run.stage == "grpo"]
    assert numbers == [last + 1], lines[-1]
    text = (run.folder / "events.jsonl").read_text()
    events = [json.loads(line)["event"] for line in text.splitlines()]
    assert "resumed" in events and events[-1] == "done"


@pytest.mark.slow
def test_a_signal_that_comes_when_all_is_done_stops_the_program(tmp_path, monkeypatch):
    """Kept for a step that does not come, it was lost, and the program trained its next run."""
    begun = []

    class Watched(Interruption):
        def __enter__(self):
            begun.append(self)
            return super().__enter__()

    monkeypatch.setattr(api_run, "Interruption", Watched)
    monkeypatch.setattr(
        api_run, "write_report", lambda folder: setattr(begun[-1], "reason", "Ctrl-C")
    )
    run = tiny(tmp_path, steps=1)
    with pytest.raises(KeyboardInterrupt):
        run.finish()
    assert run.finished
