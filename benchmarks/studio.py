"""Is looking fast? A long run, a wide step and a large folder in the studio, and what writing
rollouts costs.

    python benchmarks/studio.py

Prints the table of docs/performance.md and writes benchmarks/results/studio.json. About two
minutes.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa

from quartet.assembly import build
from quartet.config.toml import read_settings
from quartet.recipes import recipe_path
from quartet.recording.run_folder import RunFolder
from quartet.recording.tokens import TokenTexts, write_tokens
from quartet.runs.reader import Run
from quartet.runtime import pipeline
from quartet.stages import rl as stages

RESULTS = Path(__file__).parent / "results" / "studio.json"
PORT = 8799
COLUMNS = (
    "logprob",
    "old_logprob",
    "ref_logprob",
    "kl",
    "reward",
    "penalty",
    "value",
    "td_error",
    "raw_advantage",
)
COLUMNS += ("advantage", "return", "ratio", "entropy")


def long_run(folder: Path, steps: int) -> None:
    """Twenty thousand steps with as many metrics as PPO has."""
    rng = np.random.default_rng(0)
    names = ["reward", "reward/gold", "kl", "policy/entropy", *(f"loss/{i}" for i in range(36))]
    folder.mkdir()
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


def wide_step(path: Path, rows: int, tokens: int) -> int:
    """One step of so many rollouts; its size in bytes."""
    rng = np.random.default_rng(0)
    count = rows * tokens
    sample = np.repeat(np.arange(rows, dtype=np.int32), tokens)
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
            "position": pa.array(np.tile(np.arange(tokens, dtype=np.int32), rows)),
            "token_id": pa.array(rng.integers(0, 50_000, count).astype(np.int32)),
            "text": words,
            "is_response": pa.array(np.tile(np.arange(tokens) >= 32, rows)),
            **numbers,
            "clipped": pa.array(rng.random(count) < 0.1),
        }
    )
    return write_tokens(table, path).stat().st_size


def writing_share(root: Path) -> dict[str, float]:
    """What part of a PPO step of `reviews` goes into the record: its rollouts, its line of events,
    its share of the probes."""
    spent = dict.fromkeys(("rollouts", "events", "probes"), 0.0)

    def measured(name: str, function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments, **named)
            spent[name] += time.perf_counter() - started
            return result

        return call

    words = ["sft.steps=5", "reward_model.steps=5", "run.steps=20", "evaluation.prompts=8"]
    settings = read_settings(recipe_path("reviews"), words, "recipe reviews")
    job = build(settings.config)
    folder = RunFolder.create(root, "writing", {})
    folder.event, folder.write_rollouts = (
        measured("events", folder.event),
        measured("rollouts", folder.write_rollouts),
    )
    stages.probe_table = measured("probes", stages.probe_table)
    steps = 0.0
    for event in pipeline.Pipeline(job.stages, folder, TokenTexts(job.tokenizer)).run():
        if isinstance(event, pipeline.Advanced) and event.stage.name == "ppo":
            steps += sum(event.progress.seconds.values())
        elif isinstance(event, pipeline.Started):
            spent.update(dict.fromkeys(spent, 0.0)) if event.stage.name == "ppo" else None
        elif isinstance(event, pipeline.Finished) and event.stage.name == "ppo":
            break
    return {name: round(seconds / steps, 4) for name, seconds in spent.items()}


def timed(client: httpx.Client, address: str, repeats: int = 5) -> dict[str, float]:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        client.get(address).raise_for_status()
        seconds.append(time.perf_counter() - started)
    return {"first": round(seconds[0], 3), "median": round(statistics.median(seconds), 3)}


def memory_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1000


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        long_run(root / "long", 20_000)
        long_run(root / "large", 2)
        bytes_of_step = wide_step(root / "large" / "rollouts" / "000001.parquet", 200, 512)
        copies = 5 * 10**9 // bytes_of_step
        for number in range(
            2, copies + 1
        ):  # as many names for the same bytes: nobody reads them all
            os.link(
                root / "large" / "rollouts" / "000001.parquet",
                root / "large" / "rollouts" / f"{number:06d}.parquet",
            )
        command = [
            str(Path(sys.executable).parent / "quartet"),
            "studio",
            str(root),
            "--port",
            str(PORT),
        ]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        client = httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=60)
        try:
            for _ in range(200):
                try:
                    client.get("/static/icon.svg")
                    break
                except httpx.ConnectError:
                    time.sleep(0.05)
            results: dict[str, Any] = {
                "overview of 20,000 steps": timed(client, "/run/long/"),
                "doctor on 20,000 steps": timed(client, "/run/long/doctor", 1),
                "list of runs": timed(client, "/"),
                f"samples, 200 × 512 tokens, one of {copies:,} files": timed(
                    client, "/run/large/samples?step=7"
                ),
                "inspector, 512 tokens": timed(client, "/run/large/tokens?step=7&sample=150"),
            }
            for step in range(1, 40):
                client.get(f"/run/large/samples?step={step}").raise_for_status()
            results["peak memory, MB"] = memory_mb(server.pid)
            results["folder, GB"] = copies * bytes_of_step / 1e9
        finally:
            server.terminate()
            server.wait()
        started = time.perf_counter()
        Run(root / "long")
        results["Run() of 20,000 steps"] = round(time.perf_counter() - started, 2)
        shutil.rmtree(root / "large")
        results["share of a PPO step that goes into the record"] = writing_share(root)
    for name, value in results.items():
        print(f"{name:<55} {value}")
    RESULTS.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
