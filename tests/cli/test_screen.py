import io
import re
import time
from collections.abc import Sequence

import pytest
from rich.console import Console

from quartet.cli.screen import Screen, now_in_words, sample_lines, shown_work
from quartet.data.encoding import Encoder
from quartet.data.examples import Example
from quartet.io.activity import activity, counted, progress
from quartet.loops.progress import Progress
from quartet.runtime.events import Advanced, Finished, Started, Warned
from quartet.stages.kinds import REWARD_MODEL
from quartet.stages.protocol import StageRun
from tests.support.world import tokenizer


class Quiet:
    name = title = "ppo"
    num_steps = 4

    def begin(self, folder):
        return StageRun(lambda done: iter(()), dict)


STAGE = Quiet()


def shown(*events, width=120, terminal=False):
    out = io.StringIO()
    screen = Screen(Console(file=out, width=width, force_terminal=terminal, color_system=None))
    for event in events:
        screen.show(event)
    screen.close()
    return out.getvalue()


def story(*rewards):
    steps = [
        Advanced(STAGE, Progress(i + 1, {"reward": r, "kl": 2.0, "policy/clip_fraction": 0.07}))
        for i, r in enumerate(rewards)
    ]
    return [Started(STAGE, 3, 4), *steps, Finished(STAGE, {}, 1.0)]


def test_a_finished_stage_is_one_line_with_its_bar_and_its_numbers():
    lines = shown(*story(-0.5, 0.5, 1.0, 2.0)).splitlines()
    assert len(lines) == 1
    assert "3/4 ppo" in lines[0] and "██████████" in lines[0] and "4/4" in lines[0]
    # from the first step to the mean of the latest: (−0.5 + 0.5 + 1 + 2) / 4 = 0.75
    assert "reward −0.50 → 0.75  KL 2.0  clip 7%" in lines[0]


def test_a_narrow_screen_gets_a_shorter_line_and_not_two():
    assert len(shown(*story(-0.5, 0.5), width=60).splitlines()) == 1


def test_a_warning_stands_on_its_own_line():
    assert "▲ step 3: too hot" in shown(Started(STAGE, 1, 1), Warned(STAGE, 3, "too hot"))


def test_what_the_reward_model_could_have_reached_is_said():
    words = REWARD_MODEL.closing({"held_out_accuracy": 0.84, "ceiling": 0.9})
    assert words == "(held out 0.84 of 0.90 possible)"


@pytest.mark.parametrize("text", ["a\x1b[31mb", "a\rb", "a\nb"])
def test_what_a_model_wrote_cannot_move_the_cursor(text):
    for line in sample_lines([{"prompt": text, "before": text, "after": text}]):
        assert line.plain.isprintable()


def test_what_takes_long_is_named_with_its_rate(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with activity("centring"), activity("sampling"):
        progress(0, 0, "tokens")
        assert now_in_words() == "", "it has just begun"
        now[0] += 10
        progress(3480, 0, "tokens")
        assert now_in_words() == "centring: sampling 3,480 tokens, 348/s"
    with activity("win rate"):
        for _ in counted([2, 3, 5], float, 10, "rows"):
            now[0] += 2
            words = now_in_words()
    assert words == "win rate 5/10 rows, 0.8/s" and now_in_words() == ""


def test_in_a_pipe_a_line_comes_though_no_step_ends(monkeypatch):
    monkeypatch.setattr("quartet.cli.screen.PLAIN_SECONDS", 0.05)
    monkeypatch.setattr("quartet.cli.screen.SHOWN_SECONDS", 0.0)
    out = io.StringIO()
    screen = Screen(Console(file=out, width=120))
    screen.show(Started(STAGE, 1, 1))
    with activity("merging"):
        while "merging" not in out.getvalue():
            time.sleep(0.01)
    screen.close()
    printed = out.getvalue()
    time.sleep(0.3)
    assert out.getvalue() == printed, "nothing is printed after the end"


@pytest.mark.parametrize("terminal", [False, True])
def test_work_that_is_of_no_stage_is_shown_while_it_lasts(monkeypatch, terminal):
    """Reading and tokenizing data, which comes before a run's first line."""
    monkeypatch.setattr("quartet.cli.screen.PLAIN_SECONDS", 0.05)
    monkeypatch.setattr("quartet.cli.screen.SHOWN_SECONDS", 0.0)
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=terminal, color_system=None)
    line = re.compile(r"preparing: tokenizing [\d,]+/3,000 rows, [\d,.]+/s")

    class Slow(Sequence):
        """Rows that come slowly until the line is there."""

        def __len__(self):
            return 3000

        def __getitem__(self, number):
            if number >= len(self):
                raise IndexError
            if not line.search(out.getvalue()):
                time.sleep(0.01)
            return Example(f"x:{number}", "the film")

    with shown_work(console), activity("preparing"):
        Encoder(tokenizer(), 8, 8).prompts(Slow())
    assert line.search(out.getvalue())
    printed = out.getvalue()
    time.sleep(0.2)
    assert out.getvalue() == printed, "nothing is printed after the end"


def test_a_warning_that_repeats_is_printed_once_and_counted():
    warned = [
        Warned(STAGE, step, f"{step} of 64 rows, {step / 7:.2f} of them") for step in range(1, 52)
    ]
    lines = shown(Started(STAGE, 1, 1), *warned, Finished(STAGE, {}, 1.0)).splitlines()
    assert [line for line in lines if "▲" in line] == [
        "     ▲ step 1: 1 of 64 rows, 0.14 of them",
        "     ▲ the warning of step 1 came 50 more times",
    ]
    other = [Warned(STAGE, 1, "too hot"), Warned(STAGE, 2, "too cold")]
    assert shown(Started(STAGE, 1, 1), *other, Finished(STAGE, {}, 1.0)).count("▲") == 2


def test_a_warning_of_an_evaluation_has_no_step():
    class Evaluation(Quiet):
        name = title = "evaluation"

    stage = Evaluation()
    lines = shown(Started(stage, 1, 1), Warned(stage, 2, "answers are worse")).splitlines()
    assert "     ▲ answers are worse" in lines


def test_in_a_pipe_lines_become_rarer_and_the_last_comes_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("quartet.cli.screen.threading.Thread.start", lambda self: None)
    monkeypatch.setattr("quartet.cli.screen.threading.Thread.join", lambda self: None)
    stage = Quiet()
    stage.num_steps = 3600
    out = io.StringIO()
    screen = Screen(Console(file=out, width=120))
    screen.show(Started(stage, 1, 1))
    for step in range(1, 3601):  # an hour, a step each second
        now[0] += 1
        screen.show(Advanced(stage, Progress(step, {"reward": 0.0})))
        screen._print_if_due()  # what the ticker does; nothing has changed since
    screen.show(Finished(stage, {}, 3600.0))
    lines = out.getvalue().splitlines()
    assert lines[0].split()[-1] == "0:05" and lines[1].split()[-1] == "0:20"
    assert len(lines) == 10 and len(set(lines)) == len(lines)
    assert sum("3600/3600" in line for line in lines) == 1


def test_in_a_pipe_a_line_says_what_is_done_and_a_waiting_last_step_is_silent(monkeypatch):
    """At its last step a stage may still be merged and written, but its line comes at its end."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("quartet.cli.screen.threading.Thread.start", lambda self: None)
    monkeypatch.setattr("quartet.cli.screen.threading.Thread.join", lambda self: None)
    out = io.StringIO()
    screen = Screen(Console(file=out, width=120))
    screen.show(Started(STAGE, 1, 1))
    with activity("sampling"):
        now[0] += 6
        screen._print_if_due()
    screen.show(Advanced(STAGE, Progress(4, {"reward": -0.001})))
    now[0] += 100
    screen._print_if_due()
    screen.show(Finished(STAGE, {}, 106.0))
    lines = out.getvalue().splitlines()
    assert len(lines) == 2 and lines[0].endswith("0:06  sampling") and "4/4" in lines[1]
    assert "reward 0.00 → 0.00" in lines[1], "no sign before 0"


def test_the_warnings_of_a_stage_that_was_stopped_are_counted_too():
    warned = [Warned(STAGE, step, "too hot") for step in range(1, 5)]
    assert "the warning of step 1 came 3 more times" in shown(Started(STAGE, 1, 1), *warned)
