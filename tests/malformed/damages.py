"""Ways to damage a run folder, each with the sentence that its readers have for it."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Change = Callable[[Path], Any]
EVENTS, CONFIG, ROLLOUTS = "events.jsonl", "config.resolved.toml", "rollouts/000001.parquet"
PAIRS, FINAL, ANSWERS = (
    "evaluation/pairs.parquet",
    "evaluation/final.json",
    "evaluation/answers.jsonl",
)
SECRET = "not-for-strangers"


def line(text: str | bytes) -> Change:
    """One more line in the middle of events.jsonl."""

    def change(run: Path) -> None:
        lines = (run / EVENTS).read_bytes().splitlines()
        lines.insert(2, text if isinstance(text, bytes) else text.encode())
        (run / EVENTS).write_bytes(b"\n".join(lines) + b"\n")

    return change


def event(kind: str = "metrics", **fields: Any) -> Change:
    """An event of the stage ppo with these fields; one that is None is not there."""
    whole = {
        "time": 1.0,
        "event": kind,
        "stage": "ppo",
        "step": 3,
        "metrics": {"reward": 1.0},
    } | fields
    return line(json.dumps({name: value for name, value in whole.items() if value is not None}))


def file(name: str, content: str | bytes) -> Change:
    return lambda run: (run / name).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def config(text: str) -> Change:
    """These tables alone."""
    return file(CONFIG, text)


def table(name: str, **fields: Any) -> Change:
    """A JSON file with other entries; one that is None is not there."""

    def change(run: Path) -> None:
        whole = json.loads((run / name).read_text()) | fields
        (run / name).write_text(
            json.dumps({name: value for name, value in whole.items() if value is not None})
        )

    return change


def answer(**fields: Any) -> Change:
    def change(run: Path) -> None:
        rows = [json.loads(row) for row in (run / ANSWERS).read_text().splitlines()]
        rows[1] |= fields
        (run / ANSWERS).write_text("\n".join(map(json.dumps, rows)) + "\n")

    return change


def column(file_name: str, name: str, values: Callable[[int], Any] | None) -> Change:
    """Another column in the place of one, or none."""

    def change(run: Path) -> None:
        stored = pq.read_table(run / file_name)
        place = (
            stored.column_names.index(name)
            if name in stored.column_names
            else len(stored.column_names)
        )
        stored = stored.drop_columns([name]) if name in stored.column_names else stored
        if values is not None:
            stored = stored.add_column(place, name, pa.array(values(stored.num_rows)))
        pq.write_table(stored, run / file_name)

    return change


def instead(name: str, put: Callable[[Path], Any]) -> Change:
    """Something else in the place of a file or folder."""

    def change(run: Path) -> None:
        path = run / name
        path.rename(run / "moved")
        put(path)

    return change


def listens(path: Path) -> None:
    """A socket, by a short address."""
    where = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{where}/{path.name}")
    os.close(where)


def link(to: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(to)


def secret(path: Path) -> None:
    """A link to a file outside."""
    outside = path.parents[2 if path.parent.name == "evaluation" else 1] / "secret.txt"
    outside.write_text(SECRET)
    path.symlink_to(outside)


def many_rows(count: int) -> Change:
    """A valid file of few bytes."""

    def change(run: Path) -> None:
        stored = pq.read_table(run / ROLLOUTS).take(pa.array(np.zeros(count, np.int32)))
        pq.write_table(stored, run / ROLLOUTS, compression="zstd")

    return change


def too_many_rows(run: Path) -> None:
    pq.write_table(pa.table({"sample": np.zeros(5_000_000, np.int8)}), run / ROLLOUTS)


def long_text(run: Path) -> None:
    """A million characters in a dictionary, and a thousand rows that have them: a few kilobytes."""
    stored = pq.read_table(run / ROLLOUTS).slice(0, 1).take(pa.array([0] * 1000))
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["x" * 10**6]))
    place = stored.column_names.index("text")
    pq.write_table(stored.set_column(place, "text", text), run / ROLLOUTS, compression="zstd")


def wrong_bytes(run: Path) -> None:
    """A text that is no UTF-8, written by a careless program."""
    stored = pq.read_table(run / ROLLOUTS)
    raw = pa.array([b"\xff\xfe"] * stored.num_rows, pa.binary()).view(pa.string())
    pq.write_table(
        stored.set_column(stored.column_names.index("text"), "text", raw), run / ROLLOUTS
    )


def two_of_one_name(run: Path) -> None:
    stored = pq.read_table(run / ROLLOUTS)
    pq.write_table(stored.append_column("kl", stored.column("kl")), run / ROLLOUTS)


def flipped_footer(run: Path) -> None:
    content = bytearray((run / ROLLOUTS).read_bytes())
    content[-200] ^= 0xFF
    (run / ROLLOUTS).write_bytes(content)


RECORD: dict[str, tuple[Change, str]] = {
    "a step of 10^30": (event(step=10**30), "line 3 is no event (step is a number of more than 64 bits)."),
    "a step below 0": (event(step=-3), "line 3 is no event (step should be greater than or equal to 0)."),
    "a step that is text": (event(step="6"), "line 3 is no event (step should be a valid integer)."),
    "half a step": (event(step=1.5), "line 3 is no event (step should be a valid integer)."),
    "a step that is true": (event(step=True), "line 3 is no event (step should be a valid integer)."),
    "no step": (event(step=None), "line 3 is no event (step is missing)."),
    "a stage that is a list": (event(stage=["ppo"]), "line 3 is no event (stage should be a valid string)."),
    "a stage that clears the screen": (event(stage="\x1b[2J"), "line 3 is no event (stage holds characters that cannot be printed)."),
    "a stage without a name": (event(stage=""), "line 3 is no event (stage "),
    "a stage of a megabyte": (event(stage="x" * 10**6), "line 3 is no event (stage "),
    "a time that is text": (event(time="now"), "line 3 is no event (time should be a valid number)."),
    "a time of 10^300": (event(time=1e300), "line 3 is no event (time should be less than 100000000000)."),
    "a time that is no number": (line('{"time": NaN, "event": "done"}'), "line 3 is no event (time "),
    "metrics that are a list": (event(metrics=[1]), "line 3 is no event (metrics should be a table)."),
    "a metric that is text": (event(metrics={"reward": "1", "kl": 1.0}), "in line 3, metrics.reward should be a valid number; it is left out."),
    "a metric that is true": (event(metrics={"reward": True}), "in line 3, metrics.reward should be a valid number"),
    "a metric of 10^400": (event(metrics={"reward": 10**400}), "in line 3, metrics.reward is a number of more than 64 bits"),
    "a metric that is a table": (event(metrics={"reward": {"a": 1}}), "in line 3, metrics.reward should be a valid number"),
    "a metric called step": (event(metrics={"step": 1.0}), "in line 3, step cannot be a metric's name"),
    "a metric that clears the screen": (event(metrics={"\x1b[2J": 1.0}), "holds characters that cannot be printed"),
    "three thousand metrics": (event(metrics={f"m{i}": 1.0 for i in range(3000)}), "is one metric too many"),
    "phases that are text": (event(phases="x"), "in line 3, phases should be a table"),
    "a phase that is text": (event(phases={"update": "x"}), "in line 3, phases.update should be a valid number"),
    "twenty phases": (event(phases={f"p{i}": 1.0 for i in range(20)}), ""),
    "metrics that are infinite": (event(metrics={"reward": float("inf"), "kl": float("nan"), "loss/value": -1e308}), ""),
    "a warning without a sentence": (event("warning"), "line 3 is no event (sentence is missing)."),
    "a warning whose step is text": (event("warning", sentence="x", step="x"), "line 3 is no event (step should be a valid integer)."),
    "a warning that clears the screen": (event("warning", sentence="\x1b[2J\u202e<script>"), ""),
    "a failure without an error": (event("failed"), "line 3 is no event (error is missing)."),
    "a failure whose error is a list": (event("failed", error=[1]), "line 3 is no event (error should be a valid string)."),
    "a summary that is a list": (event("finished", summary=[1]), "in line 3, summary should be a table"),
    "a summary with texts": (event("finished", summary={"a": "x", "b": [1], "c": {"d": 1}, "e": 1e400}), ""),
    "a ceiling that is text": (event("finished", stage="reward_model", summary={"ceiling": "x"}), "in line 3, summary.ceiling should be a valid number"),
    "a clip that is text": (event("definitions", clip={"low": "x"}), "in line 3, clip.low should be a valid number"),
    "a clip below 0": (event("definitions", clip={"low": -1.0}), "in line 3, clip.low should be greater than or equal to 0"),
    "a clip that is a list": (event("definitions", clip=[1]), "in line 3, clip should be a table"),
    "an infinite clip": (event("definitions", clip={"low": 0.8, "high": float("inf")}), "in line 3, clip.high should be a finite number"),
    "a metric of the user without a label": (event("definitions", metrics=[{"name": "a"}, {"name": "b", "label": "b"}]), "in line 3, metrics.0.label is missing"),
    "a metric of the user that is markup": (event("definitions", metrics=[{"name": "reward", "label": "<script>", "what": "<b>", "chart": "<script>"}]), ""),
    "a list": (line("[1, 2]"), "line 3 is no event"),
    "a million entries": (event(metrics={"reward": 1.0}, more=[0] * 1_000_000), "line 3 has more than 100,000 entries."),
    "a hundred warnings": (lambda run: [event("warning", sentence="x" * 10_000)(run) for _ in range(100)], ""),
    "an event without a kind": (line('{"time": 1.0}'), "line 3 is no event (event is missing)."),
    "nested a hundred thousand times": (line("[" * 100_000), "line 3 is not JSON (recursion limit exceeded"),
    "nested sixty times": (event(metrics={"reward": 1.0}, more=json.loads("[" * 60 + "]" * 60)), "is nested too deeply; it is left out."),
    "a line torn by a crash": (line('{"time": 1.0, "event": "metr'), "line 3 is not JSON"),
    "zeros where a crash left them": (line(b"\0" * 4096), "line 3 is not JSON"),
    "a line that is no UTF-8": (line(b'{"time": 1.0, "event": "\xff"}'), "line 3 is not JSON (invalid unicode code point"),
    "half a surrogate pair": (line('{"time": 1.0, "event": "warning", "stage": "ppo", "step": 1, "sentence": "\\ud800"}'), "line 3 is not JSON"),
    "a line of five megabytes": (line("x" * (5 << 20)), "line 3 is longer than 4 MB."),
    "five megabytes without an end": (lambda run: (run / EVENTS).write_bytes((run / EVENTS).read_bytes() + b"x" * (5 << 20)), "is longer than 4 MB."),
    "a hundred stages": (lambda run: [event(stage=f"s{i}")(run) for i in range(100)], "is of stage 65."),
    "nothing": (file(EVENTS, ""), ""),
    "nothing but damage": (file(EVENTS, "{nothing\n" * 1000), "1,000 lines were left out: the first, line 1 is not JSON"),
    "a program": (file(EVENTS, bytes(range(256)) * 100), "line 1 is not JSON"),
}  # fmt: skip

GONE: dict[str, tuple[Change, str]] = {
    "a folder": (instead(EVENTS, Path.mkdir), "events.jsonl is a folder."),
    "a named pipe": (instead(EVENTS, os.mkfifo), "events.jsonl is a named pipe."),
    "a socket": (instead(EVENTS, listens), "events.jsonl is a socket."),
    "a link to the record of another": (instead(EVENTS, link("../other-run/events.jsonl")), "events.jsonl is a link, and links in a run folder are not followed."),
    "a link to a device": (instead(EVENTS, link("/dev/zero")), "events.jsonl is a link"),
    "a link to itself": (instead(EVENTS, link("events.jsonl")), "events.jsonl is a link"),
    "a link to nowhere": (instead(EVENTS, link("nowhere")), "events.jsonl is a link"),
}  # fmt: skip
"""The record itself cannot be opened: the run is listed, with the reason in the place of its numbers."""

SETTINGS: dict[str, tuple[Change, str]] = {
    "not UTF-8": (file(CONFIG, b'recipe = ["ppo"]\nname = "\xff"\n'), "config.resolved.toml is not UTF-8 (byte 25)."),
    "not TOML": (config("recipe ="), "config.resolved.toml is not TOML (Invalid value"),
    "JSON": (config("{}"), "config.resolved.toml is not TOML"),
    "nested": (config("a = " + "[" * 100_000), "config.resolved.toml is nested too deeply."),
    "nested sixty times": (config("a = " + "[" * 60 + "]" * 60), "is nested too deeply; it is left out."),
    "a key of a hundred thousand parts": (config(".".join("a" * 100_000) + " = 1"), "config.resolved.toml has a key of more than twenty parts."),
    "a number of five thousand digits": (config("a = " + "1" * 5000), "config.resolved.toml is not TOML"),
    "a number of five thousand hexadecimal digits": (config("a = 0x" + "f" * 5000), "a is a number of more than 64 bits; it is left out."),
    "a megabyte": (config("#" * (1 << 20)), "config.resolved.toml is larger than 0.5 MB"),
    "recipe = 3": (config("recipe = 3"), "recipe should be a valid list; it is left out."),
    "recipe = [1]": (config("recipe = [1]"), "recipe.0 should be a valid string; it is left out."),
    "algorithm is text": (config('algorithm = "x"'), "algorithm should be a table"),
    "a target that is text": (config('[algorithm.kl.controller]\ntarget = "x"'), "algorithm.kl.controller.target should be a valid number"),
    "whiten is text": (config('[algorithm.rewards]\nwhiten = "no"'), "algorithm.rewards.whiten should be a valid boolean"),
    "answers of no token": (config("[rollout]\nmax_new_tokens = -1"), "rollout.max_new_tokens should be greater than or equal to 1"),
    "top_p is text": (config('[rollout]\ntop_p = "x"'), "rollout.top_p should be a valid number"),
    "data is a list": (config("data = []"), "data should be a table"),
    "train is a number": (config("[data]\ntrain = 3"), "data.train"),
    "a model with a null character": (config('[policy]\nmodel = "a\\u0000b"'), "policy.model holds characters"),
    "a model with a very long name": (config(f'[policy]\nmodel = "{"x" * 4000}"'), ""),
    "a link to a secret": (instead(CONFIG, secret), "config.resolved.toml is a link, and links in a run folder are not followed."),
    "a folder": (instead(CONFIG, Path.mkdir), "config.resolved.toml is a folder."),
    "a named pipe": (instead(CONFIG, os.mkfifo), "config.resolved.toml is a named pipe."),
    "missing": (lambda run: (run / CONFIG).unlink(), ""),
    "an env.json that is a list": (file("env.json", "[]"), "env.json: should be a table"),
    "an env.json that is no JSON": (file("env.json", "{"), "env.json is not JSON"),
    "an env.json with a deep nest": (file("env.json", '{"a": ' + "[" * 90 + "]" * 90 + "}"), "is nested too deeply"),
    "an env.json that is a secret": (instead("env.json", secret), "env.json is a link"),
    "an env.json that is a device": (instead("env.json", link("/dev/zero")), "env.json is a link"),
}  # fmt: skip

EVALUATION: dict[str, tuple[Change, str]] = {
    "final.json cut short": (file(FINAL, '{"judge": "go'), "evaluation/final.json is not JSON"),
    "final.json is a list": (file(FINAL, "[]"), "evaluation/final.json: should be a table"),
    "final.json is null": (file(FINAL, "null"), "evaluation/final.json: should be a table"),
    "no KL": (table(FINAL, kl=None), "evaluation/final.json: kl is missing; it is left out."),
    "a KL without an interval": (table(FINAL, kl={"mean": 1.0}), "kl.interval is missing"),
    "a win rate that is text": (table(FINAL, win_rate="high"), "win_rate should be a table"),
    "a win rate that is no number": (table(FINAL, win_rate={"mean": float("nan"), "interval": 0.1}), "win_rate.mean should be a finite number"),
    "a judge that is a list": (table(FINAL, judge=[1]), "judge should be a valid string"),
    "10^30 prompts": (table(FINAL, prompts=10**30), "prompts is a number of more than 64 bits"),
    "half a prompt": (table(FINAL, prompts=1.5), "prompts should be a valid integer"),
    "before is a list": (table(FINAL, before=[]), "before should be a table"),
    "a measure that is text": (table(FINAL, before={"reward": "x", "kl": 1.0}), "before.reward should be a valid number; it is left out."),
    "after has other measures": (table(FINAL, after={"other": 1.0}), ""),
    "a sample that is a number": (table(FINAL, samples=[1, {"prompt": "a", "before": "b", "after": "c"}]), "samples.0 should be a table"),
    "a sample without an answer": (table(FINAL, samples=[{"prompt": "a", "before": "b"}]), "samples.0.after is missing"),
    "a sample with a number for an answer": (table(FINAL, samples=[{"prompt": "a", "before": "b", "after": 3}]), "samples.0.after should be a valid string"),
    "a million samples of nothing": (file(FINAL, "[" + "1," * 1_000_000 + "1]"), "evaluation/final.json has more than 100,000 entries."),
    "no samples": (table(FINAL, samples=None), ""),
    "final.json is a secret": (instead(FINAL, secret), "evaluation/final.json is a link"),
    "best_of_n.json is a table": (file("evaluation/best_of_n.json", "{}"), "evaluation/best_of_n.json: should be a valid list"),
    "best of n with a KL below 0": (file("evaluation/best_of_n.json", '[{"n": 1, "kl": -1, "reward": 1.0}]'), "0.kl should be greater than or equal to 0"),
    "best of n with text": (file("evaluation/best_of_n.json", '[{"n": 1, "kl": 0.0, "reward": "x"}, {"n": "2", "kl": 1.0}]'), "0.reward should be a valid number; it is left out (2 more)."),
    "best of n is no JSON": (file("evaluation/best_of_n.json", "\xff"), "evaluation/best_of_n.json is not JSON"),
    "answers that are no JSON": (file(ANSWERS, "x\n" * 10), "evaluation/answers.jsonl: in line 1, is not JSON"),
    "answers that are no UTF-8": (file(ANSWERS, b"\xff\n"), "evaluation/answers.jsonl: in line 1, is not JSON"),
    "an answer without after": (answer(after=3), "evaluation/answers.jsonl: in line 2, after should be a table; it is left out (1 more)."),
    "an answer whose prompt is a list": (answer(prompt=["a"]), "in line 2, prompt should be a valid string"),
    "a response that is a number": (answer(before={"response": 3, "score": 1.0}), "in line 2, before.response should be a valid string"),
    "a score that is text": (answer(before={"response": "a", "score": "x"}), "in line 2, before.score should be a valid number"),
    "scores and KL that are no numbers": (answer(before={"response": "a", "score": float("nan")}, kl=float("inf")), ""),
    "a KL that is text": (answer(kl="x"), "in line 2, kl should be a valid number"),
    "an answer of five megabytes": (file(ANSWERS, "x" * (5 << 20)), "evaluation/answers.jsonl: in line 1, is"),
    "answers of 200 MB": (lambda run: os.truncate(run / ANSWERS, 200 << 20), "evaluation/answers.jsonl: in line 5, is not JSON"),
    "answers that are a secret": (instead(ANSWERS, secret), "evaluation/answers.jsonl is a link"),
    "answers that are a folder": (instead(ANSWERS, Path.mkdir), "evaluation/answers.jsonl is a folder."),
    "an evaluation that is a link": (instead("evaluation", link("moved")), "evaluation is a link"),
    "an evaluation that is a file": (instead("evaluation", Path.touch), "evaluation is a file"),
    "pairs that are no Parquet": (file(PAIRS, "PAR1 torn"), "evaluation/pairs.parquet is no whole Parquet file"),
    "pairs of nothing": (file(PAIRS, ""), "evaluation/pairs.parquet is no whole Parquet file"),
    "pairs without scores": (column(PAIRS, "chosen_score", None), "evaluation/pairs.parquet: has no column chosen_score"),
    "pairs whose scores are text": (column(PAIRS, "chosen_score", lambda n: ["x"] * n), "has something else than numbers in column chosen_score"),
    "pairs whose scores are no numbers": (column(PAIRS, "chosen_score", lambda n: [float("nan")] * 10 + [1.0] * (n - 10)), "10 of 50 pairs are too many or lack a value"),
    "pairs whose scores are enormous": (column(PAIRS, "chosen_score", lambda n: [1e308, -1e308] * (n // 2)), ""),
    "pairs whose lengths are empty": (column(PAIRS, "chosen_tokens", lambda n: pa.nulls(n, pa.int32())), "50 of 50 pairs are too many or lack a value"),
    "pairs whose texts are numbers": (column(PAIRS, "prompt", lambda n: [1] * n), "has something else than text in column prompt"),
    "pairs that are a secret": (instead(PAIRS, secret), "evaluation/pairs.parquet is a link"),
}  # fmt: skip

STEP = "rollouts of step 1 cannot be read: the file "
TOKENS: dict[str, tuple[Change, str]] = {
    "torn": (file(ROLLOUTS, "PAR1 torn"), STEP + "is no whole Parquet file ("),
    "of nothing": (file(ROLLOUTS, ""), STEP + "is no whole Parquet file ("),
    "half of it": (lambda run: os.truncate(run / ROLLOUTS, 3000), STEP + "is no whole Parquet file ("),
    "a damaged footer": (flipped_footer, ""),
    "named ²²": (lambda run: (run / "rollouts/²².parquet").touch(), "rollouts: ²².parquet left out: the name is no step's."),
    "named with one digit": (lambda run: (run / "rollouts/7.parquet").touch(), "rollouts: 7.parquet left out"),
    "named with thirty digits": (lambda run: (run / f"rollouts/{'9' * 30}.parquet").touch(), "left out: the name is no step's."),
    "named to clear the screen": (lambda run: (run / "rollouts/\x1b[2J.parquet").touch(), "rollouts: \\x1b[2J.parquet left out"),
    "named without UTF-8": (lambda run: (run / os.fsdecode(b"rollouts/\xff.parquet")).touch(), "rollouts: \\udcff.parquet left out"),
    "a folder for a file": (instead(ROLLOUTS, Path.mkdir), STEP + "is a folder."),
    "a named pipe for a file": (instead(ROLLOUTS, os.mkfifo), STEP + "is a named pipe."),
    "a link for a file": (instead(ROLLOUTS, link("../../other-run/rollouts/000001.parquet")), STEP + "is a link, and links in a run folder are not followed."),
    "a link out for the folder": (instead("rollouts", link("/etc")), "rollouts is a link, and links in a run folder are not followed."),
    "a link to another run's folder": (instead("rollouts", link("../other-run/rollouts")), "rollouts is a link"),
    "a file for the folder": (instead("rollouts", Path.touch), "rollouts is a file."),
    "no rows": (lambda run: pq.write_table(pq.read_table(run / ROLLOUTS)[:0], run / ROLLOUTS), ""),
    "two hundred thousand rows": (many_rows(200_000), ""),
    "five million rows": (too_many_rows, STEP + "says that it has 5,000,000 rows; 4,000,000 is the most that is read."),
    "a gigabyte of text": (long_text, STEP + "holds more than 256 MB of text."),
    "text that is no UTF-8": (wrong_bytes, STEP + "is no whole Parquet file ("),
    "two columns of one name": (two_of_one_name, STEP + "has two columns of one name."),
    "a column of lists": (column(ROLLOUTS, "more", lambda n: [[1]] * n), "has a column of an unknown type, more; it is left out."),
    "a column with a strange name": (column(ROLLOUTS, "score/\x1b[2J<script>", lambda n: [1.0] * n), "has a column whose name cannot be printed, score/\\x1b[2J<script>; it is left out."),
    "text for a component": (column(ROLLOUTS, "score/gold", lambda n: ["x"] * n), "has something else than numbers in column score/gold"),
    "a million samples": (column(ROLLOUTS, "sample", lambda n: list(range(n))), ""),
    "numbers of samples below 0": (column(ROLLOUTS, "sample", lambda n: [-1] * n), ""),
    "empty samples": (column(ROLLOUTS, "sample", lambda n: [None, *[1] * (n - 1)]), STEP + "column sample has empty places."),
    "scores that are no numbers": (column(ROLLOUTS, "score", lambda n: [float("nan")] * n), ""),
    "scores that are empty": (column(ROLLOUTS, "score", lambda n: pa.nulls(n, pa.float32())), ""),
    "ratios that are no numbers": (column(ROLLOUTS, "ratio", lambda n: [float("inf"), float("nan")] * (n // 2) + [1.0] * (n % 2)), ""),
    "advantages that are no numbers": (column(ROLLOUTS, "advantage", lambda n: [float("nan")] * n), ""),
}  # fmt: skip
REQUIRED = ("sample", "id", "group", "text", "is_response")
OPTIONAL = (
    "token_id",
    "score",
    "ended",
    "clipped",
    "logprob",
    "old_logprob",
    "ref_logprob",
    "kl",
    "reward",
    "penalty",
    "value",
)
OPTIONAL += ("td_error", "raw_advantage", "advantage", "return", "change", "ratio", "entropy")
for name in REQUIRED:
    TOKENS[f"without {name}"] = column(ROLLOUTS, name, None), f"{STEP}has no column {name}."
    TOKENS[f"lists for {name}"] = (
        column(ROLLOUTS, name, lambda n: [[1]] * n),
        f"{STEP}has something else than",
    )
for name, word in {
    "score": "numbers",
    "clipped": "true and false",
    "token_id": "whole numbers",
}.items():
    fault = f"{ROLLOUTS}: has something else than {word} in column {name}; it is left out."
    TOKENS[f"text for {name}"] = column(ROLLOUTS, name, lambda n: ["x"] * n), fault
for name in OPTIONAL:
    TOKENS[f"without {name}"] = (
        column(ROLLOUTS, name, None),
        f"{ROLLOUTS}: has no column {name}; it is left out.",
    )
