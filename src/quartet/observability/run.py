"""The run folder: everything a run leaves behind, in formats that anybody reads."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartet import __version__
from quartet.algorithms.kl import k1
from quartet.tensors import Tensor

if TYPE_CHECKING:
    from quartet.loops.rl import Step


class RunFolder:
    """One folder under `runs/`. events.jsonl has one writer, this; every line is complete when it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._events = (path / "events.jsonl").open("a", encoding="utf-8")

    @classmethod
    def create(cls, root: Path, name: str, files: Mapping[str, str]) -> "RunFolder":
        """A new folder named after the minute and the run, with these files in it; `latest` points at it."""
        stamp = f"{time.strftime('%m%d-%H%M')}-{name}"
        for number in range(1, 1000):
            path = root / (stamp if number == 1 else f"{stamp}-{number}")
            try:
                path.mkdir(parents=True)
                break
            except FileExistsError:
                continue
        for file, text in files.items():
            (path / file).write_text(text, encoding="utf-8")
        (path / "env.json").write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")
        point_latest(root, path)
        return cls(path)

    def event(self, kind: str, stage: str | None = None, step: int | None = None, **fields: Any) -> None:
        """Append one line to events.jsonl. Times are apart from metrics, so that the metrics of two runs can be compared."""
        line = {"time": round(time.time(), 3), "event": kind, "stage": stage, "step": step, **fields}
        self._events.write(json.dumps({k: v for k, v in line.items() if v is not None}, ensure_ascii=False) + "\n")
        self._events.flush()

    def write_rollouts(self, step: "Step", texts: "TokenTexts") -> Path:
        """`rollouts/000031.parquet`: a row per token of every prompt and response of the step."""
        import pyarrow.parquet as pq

        folder = self.path / "rollouts"
        folder.mkdir(exist_ok=True)
        path = folder / f"{step.number:06d}.parquet"
        beside = path.with_suffix(".tmp")
        pq.write_table(rollout_table(step, texts), beside, compression="zstd")
        beside.replace(path)
        return path

    def close(self) -> None:
        self._events.close()


class TokenTexts:
    """What each token id reads as inside a text, its leading space included."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.anchor = next(i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids)
        self.before = tokenizer.decode([self.anchor])
        self.known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self.known:
            self.known[token] = self.tokenizer.decode([self.anchor, token])[len(self.before) :]
        return self.known[token]


def rollout_table(step: "Step", texts: TokenTexts) -> Any:
    """The step as an Arrow table with a row per real token."""
    import pyarrow as pa
    import torch

    batch, experience, update = step.batch, step.experience, step.update
    real = torch.arange(batch.tokens.shape[1], device=batch.lengths.device) < batch.lengths[:, None]
    rows = torch.arange(len(batch.ids), device=real.device)[:, None].expand_as(real)[real].tolist()
    ids = batch.tokens[real].tolist()
    response = batch.response_mask[real]

    def column(values: Tensor | None) -> Any:
        """float32, null for prompt tokens and where there is no such model."""
        if values is None:
            return pa.nulls(len(ids), pa.float32())
        return pa.array(values[real].float().cpu().numpy(), pa.float32(), mask=(~response).cpu().numpy())

    kl = None if batch.ref_logprobs is None else k1(batch.old_logprobs, batch.ref_logprobs)
    positions = torch.arange(batch.tokens.shape[1], device=real.device).expand_as(real)[real].tolist()
    names = step.rollouts[0].components
    components = {f"score/{name}": [rollout.components[name] for rollout in step.rollouts] for name in names}
    return pa.table(
        {
            "step": pa.array([step.number] * len(ids), pa.int32()),
            "sample": pa.array(rows, pa.int32()),
            "id": pa.array([batch.ids[row] for row in rows]),
            "group": pa.array([int(batch.groups[row]) for row in rows], pa.int32()),
            "score": pa.array([float(batch.scores[row]) for row in rows], pa.float32()),
            **{name: pa.array([scores[row] for row in rows], pa.float32()) for name, scores in components.items()},
            "position": pa.array(positions, pa.int32()),
            "token_id": pa.array(ids, pa.int32()),
            "text": pa.array([texts[token] for token in ids]),
            "is_response": pa.array(response.tolist()),
            "logprob": column(update.logprobs),
            "old_logprob": column(batch.old_logprobs),
            "ref_logprob": column(batch.ref_logprobs),
            "kl": column(kl),
            "reward": column(experience.token_rewards),
            "value": column(batch.values),
            "advantage": column(experience.advantages),
            "return": column(experience.returns),
            "ratio": column((update.logprobs - batch.old_logprobs).exp()),
            "clipped": pa.array(update.clipped[real].tolist(), mask=(~response).cpu().numpy()),
            "entropy": column(update.entropy),
        }
    )


def point_latest(root: Path, path: Path) -> None:
    """`latest` points at the newest run; where the file system has no links, it is simply not there."""
    link, beside = root / "latest", root / f".latest-{os.getpid()}"
    try:
        beside.symlink_to(path.name)
        beside.replace(link)
    except OSError:
        beside.unlink(missing_ok=True)


def environment() -> dict[str, Any]:
    """Versions, hardware and the state of the code: what a later reader needs to know where the numbers came from."""
    packages = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pydantic", "pyarrow")
    return {
        "quartet": __version__,
        "python": sys.version.split()[0],
        "packages": {name: metadata.version(name) for name in packages},
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "git": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of the folder that the run was started in, where that is a checkout."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            timeout=5,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
