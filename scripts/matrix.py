"""Install the wheel with several Pythons and versions of torch and transformers; train with each.

    python scripts/matrix.py                          # every Python that is here, pinned and lowest
    python scripts/matrix.py --python 3.12 --versions lowest
    python scripts/matrix.py --versions no-torch      # what needs no torch, without it

`pinned` takes constraints.txt, `lowest` the lower bounds of torch and transformers in
pyproject.toml, `no-torch` neither: help, plan and explain must work without. Each cell is a virtual
environment in --folder that is removed after it; the exit code is 1 if a cell failed. TORCH_INDEX
is the index that torch is taken from, if it is set.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
VERSIONS = ("pinned", "lowest", "no-torch")
HEAVY = ("torch", "transformers")
TINY = (
    *("policy.create.hidden_size=16", "policy.create.num_layers=1", "policy.create.num_heads=2"),
    *("data.rows=64", "sft.steps=3", "sft.batch_size=8", "reward_model.steps=3"),
    *("reward_model.batch_size=8", "rollout.prompts_per_step=8", "rollout.max_new_tokens=8"),
    *("run.steps=2", "evaluation.prompts=8"),
)
LIGHT = (["--help"], ["plan", "reviews"], ["explain", "optim.lr"], ["run", "sums", "--plan"])


class Failed(Exception):
    """A step of a cell that ended with another exit code than 0."""


def call(log: Path, *words: str | Path, cwd: Path | None = None) -> None:
    """Run a command and append what it prints to a log. Raises `Failed`."""
    with log.open("ab") as file:
        code = subprocess.call([*map(str, words)], stdout=file, stderr=file, cwd=cwd)
    if code:
        raise Failed(f"{' '.join(map(str, words[:4]))} … ended with {code}; see {log}")


def lower_bounds() -> list[str]:
    """Return torch and transformers at their lower bounds, as pip reads them."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = [re.fullmatch(r"([\w-]+)>=([\d.]+)", line) for line in table["project"]["dependencies"]]
    return [f"{each[1]}=={each[2]}.*" for each in found if each and each[1] in HEAVY]


def constraints(folder: Path, versions: str) -> Path:
    """Write the constraints of a column. The lower bounds take the other pins away: they may not go
    together with them."""
    if versions == "lowest":
        lines = lower_bounds()
    else:
        lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    file = folder / f"{versions}.txt"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def install(pip: list[str | Path], wheel: Path, pins: Path, versions: str, log: Path) -> None:
    """Install the wheel and what it needs."""
    if versions == "no-torch":
        table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        light = [d for d in table["project"]["dependencies"] if not d.startswith(HEAVY)]
        call(log, *pip, "install", "-q", "-c", pins, *light)
        call(log, *pip, "install", "-q", "--no-deps", wheel)
        return
    if index := os.environ.get("TORCH_INDEX"):
        call(log, *pip, "install", "-q", "-c", pins, "--index-url", index, "torch")
    call(log, *pip, "install", "-q", "-c", pins, wheel)


def cell(python: str, versions: str, wheel: Path, folder: Path) -> str:
    """Install and run; return what came of it in words."""
    if shutil.which(f"python{python}") is None:
        return "no such interpreter here"
    place, log = folder / f"{python}-{versions}", folder / f"{python}-{versions}.log"
    environment, work = place / "venv", place / "work"
    work.mkdir(parents=True)
    start = time.monotonic()
    try:
        call(log, f"python{python}", "-m", "venv", environment)
        binaries = environment / ("Scripts" if os.name == "nt" else "bin")
        pins = constraints(place, versions)
        install([binaries / "python", "-m", "pip"], wheel, pins, versions, log)
        for words in LIGHT if versions == "no-torch" else (["run", "reviews", *TINY],):
            call(log, binaries / "quartet", *words, cwd=work)
    except Failed as error:
        return f"failed: {error}"
    finally:
        shutil.rmtree(place)
    return f"ok in {time.monotonic() - start:.0f} s"


def main() -> int:
    """Print a line for each cell; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", default=",".join(PYTHONS), help="comma-separated")
    parser.add_argument("--versions", default="pinned,lowest", help=f"of {', '.join(VERSIONS)}")
    parser.add_argument("--wheel", type=Path, help="a built wheel; built here if it is left out")
    parser.add_argument("--folder", type=Path, help="where environments and logs are put")
    given = parser.parse_args()
    folder = (given.folder or Path(tempfile.mkdtemp(prefix="quartet-matrix-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    wheel = given.wheel
    if wheel is None:
        words = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT)
        call(folder / "wheel.log", *words)
        wheel = max(folder.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    results = []
    for python in given.python.split(","):
        for versions in given.versions.split(","):
            results.append(cell(python, versions, wheel.absolute(), folder))
            print(f"{python:5} {versions:9} {results[-1]}", flush=True)
    return int(any(result.startswith("failed") for result in results))


if __name__ == "__main__":
    sys.exit(main())
