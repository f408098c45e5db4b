import io
import time

import pytest
from rich.console import Console

from quartet.cli.screen import Screen, now_in_words, sample_lines
from quartet.io.activity import activity, counted, progress
from quartet.loops.progress import Progress
from quartet.runtime.events import Advanced, Finished, Started, Warned
from quartet.stages.kinds import REWARD_MODEL
from quartet.stages.protocol import StageRun


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
