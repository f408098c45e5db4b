"""How fast the studio shows a long run, a wide step and a large folder, and what writing rollouts
costs.

    python benchmarks/studio.py

Prints the table of docs/performance.md and writes benchmarks/results/studio.json. About two
minutes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import numpy as np
import pyarrow as pa

from quartet.assembly import build
from quartet.config.toml import read_settings
from quartet.recipes import recipe_path
from quartet.recording import tokens
from quartet.recording.run_folder import RunFolder
from quartet.recording.tokens import NUMBERS, TokenTexts, write_tokens
from quartet.runs.reader import Run
from quartet.runtime import events, pipeline
from quartet.stages import rl

RESULTS = Path(__file__).parent / "results" / "studio.json"
PORT = 8799
COLUMNS = tuple(name for name in NUMBERS if name not in {"change", "clipped"})


def long_run(folder: Path, steps: int) -> None:
    """Write a run of so many steps, with as many metrics as PPO has."""
    rng = np.random.default_rng(0)
    names = ["reward", "reward/gold", "kl", "policy/entropy", *(f"loss/{i}" for i in range(36))]
    folder.mkdir(parents=True)
    with (folder / "events.jsonl").open("w") as file:
        file.write(json.dumps({"time": 0.0, "event": "started", "stage": "ppo"}) + "\n")
        for step in range(1, steps + 1):
            metrics = dict(zip(names, rng.normal(size=len(names)).tolist(), strict=True))
            event = {
                "time": 1.0 * step,
                "event": "metrics",
                "stage": "ppo",
                "step": step,
                "metrics": metrics,
                "seconds": 1.0,
            }
            file.write(json.dumps(event) + "\n")


def wide_step(path: Path, rows: int, row_tokens: int) -> int:
    """Write one step of so many rollouts and return its size in bytes."""
    rng = np.random.default_rng(0)
    count = rows * row_tokens
    sample = np.repeat(np.arange(rows, dtype=np.int32), row_tokens)
    numbers = {
        name: pa.array(rng.normal(size=count).astype(np.float16).astype(np.float32))
        for name in COLUMNS
    }
    words = pa.array([f" word{i}" for i in rng.integers(0, 5000, count)])
    table = pa.table(
        {
            "step": pa.array(np.ones(count, np.int32)),
            "sample": pa.array(sample),
            "id": pa.array([f"prompts.jsonl:{i}/0" for i in sample]),
            "group": pa.array(sample),
            "score": pa.array(sample.astype(np.float32)),
            "score/model": pa.array(sample.astype(np.float32)),
            "ended": pa.array([True] * count),
            "position": pa.array(np.tile(np.arange(row_tokens, dtype=np.int32), rows)),
            "token_id": pa.array(rng.integers(0, 50_000, count).astype(np.int32)),
            "text": words,
            "is_response": pa.array(np.tile(np.arange(row_tokens) >= 32, rows)),
            **numbers,
            "clipped": pa.array(rng.random(count) < 0.1),
        }
    )
    return write_tokens(table, path).stat().st_size


def writing_share(root: Path, *settings: str) -> dict[str, float]:
    """Return which part of the PPO steps of `reviews` goes into the record: the rollouts, the lines
    of events, and the probes. `settings` come on top of the benchmark's own."""
    spent = dict.fromkeys(("rollouts", "events", "probes"), 0.0)

    def measured(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            spent[name] += time.perf_counter() - started
            return result

        return call

    words = ["sft.steps=5", "reward_model.steps=5", "run.steps=20", "evaluation.prompts=8"]
    recipe = recipe_path("reviews")
    assert recipe is not None
    config = read_settings(recipe, [*words, *settings], "recipe reviews").config
    job = build(config)
    folder = RunFolder.create(root, "writing", {})
    folder.event = measured("events", folder.event)  # type: ignore[method-assign]
    folder.write_rollouts = measured("rollouts", folder.write_rollouts)  # type: ignore[method-assign]
    steps = 0.0
    with mock.patch.object(rl, "probe_table", measured("probes", tokens.probe_table)):
        for event in pipeline.Pipeline(job.stages, folder, TokenTexts(job.tokenizer)).run():
            if isinstance(event, events.Advanced) and event.stage.name == "ppo":
                steps += sum(event.progress.seconds.values())
            elif isinstance(event, events.Started) and event.stage.name == "ppo":
                spent.update(dict.fromkeys(spent, 0.0))
            elif isinstance(event, events.Finished) and event.stage.name == "ppo":
                break
    folder.close()
    return {name: round(seconds / steps, 4) for name, seconds in spent.items()}


def timed(client: httpx.Client, address: str, repeats: int = 5) -> dict[str, float]:
    """Return the seconds of the first request and the median of all."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        client.get(address).raise_for_status()
        seconds.append(time.perf_counter() - started)
    return {"first": round(seconds[0], 3), "median": round(statistics.median(seconds), 3)}


def memory_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1000


@contextmanager
def studio(root: Path) -> Iterator[tuple[httpx.Client, int]]:
    """Serve the runs of a folder; yields a client of the studio and the server's process id."""
    quartet = str(Path(sys.executable).parent / "quartet")
    server = subprocess.Popen(
        [quartet, "studio", str(root), "--port", str(PORT)], stdout=subprocess.DEVNULL
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=60) as client:
            for _ in range(600):
                try:
                    client.get("/static/icon.svg")
                    break
                except httpx.ConnectError:
                    time.sleep(0.05)
            yield client, server.pid
    finally:
        server.terminate()
        server.wait()


@dataclass(frozen=True)
class Workload:
    """How much the studio is asked to show."""

    steps: int = 20_000
    rows: int = 200
    tokens: int = 512
    folder_bytes: int = 5 * 10**9


def looking(root: Path, load: Workload) -> dict[str, Any]:
    """Measure the studio's pages on a long run, a wide step and a large folder."""
    long_run(root / "long", load.steps)
    long_run(root / "large", 2)
    rollouts = root / "large" / "rollouts"
    bytes_of_step = wide_step(rollouts / "000001.parquet", load.rows, load.tokens)
    copies = load.folder_bytes // bytes_of_step
    for number in range(2, copies + 1):  # many names for the same bytes: no page reads all of them
        os.link(rollouts / "000001.parquet", rollouts / f"{number:06d}.parquet")
    wide = f"{load.rows} × {load.tokens} tokens"
    with studio(root) as (client, pid):
        results: dict[str, Any] = {
            f"overview of {load.steps:,} steps": timed(client, "/run/long/"),
            f"doctor on {load.steps:,} steps": timed(client, "/run/long/doctor", 1),
            "list of runs": timed(client, "/"),
            f"samples, {wide}, one of {copies:,} files": timed(client, "/run/large/samples?step=7"),
            f"inspector, {load.tokens} tokens": timed(
                client, f"/run/large/tokens?step=7&sample={3 * load.rows // 4}"
            ),
        }
        for step in range(1, min(copies, 40)):
            client.get(f"/run/large/samples?step={step}").raise_for_status()
        results["peak memory, MB"] = memory_mb(pid)
    results["folder, GB"] = copies * bytes_of_step / 1e9
    started = time.perf_counter()
    Run(root / "long")
    results[f"Run() of {load.steps:,} steps"] = round(time.perf_counter() - started, 2)
    return results


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = looking(Path(folder) / "looking", Workload())
    with tempfile.TemporaryDirectory() as folder:
        results["share of a PPO step that goes into the record"] = writing_share(Path(folder))
    for name, value in results.items():
        print(f"{name:<55} {value}")
    RESULTS.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
