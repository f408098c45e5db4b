"""What a critic learns in PPO: `quartet critic` over five seeds, on two embedded worlds.

    python benchmarks/critic.py [--folder runs-critic] [--seeds 5] [--figure critic.html]

Trains short runs of PPO on `sums` and `reviews`, with a policy of 0.1 M parameters, and audits the
critic of an early and of the last step. Prints the tables of docs/critic.md and writes
benchmarks/results/critic.json. Runs and audits that are in the folder already are not made again.
Takes about 35 minutes on one core.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "critic.json"
SMALL = ["policy.create.hidden_size=64", "policy.create.num_layers=2"]
KEPT = ["run.keep_last=8", "run.rollouts_every=1000"]
WORLDS: dict[str, tuple[list[str], tuple[int, int]]] = {
    "sums": (
        [
            'recipe=["sft", "ppo"]',
            "algorithm.preset=ppo",
            "algorithm.kl.coef=0.01",
            "sft.steps=500",
            "rollout.samples_per_prompt=1",
            "rollout.prompts_per_step=256",
            "optim.critic_lr=1e-3",
            "optim.epochs=2",
            "run.steps=40",
            "run.checkpoint_every=5",
        ],
        (5, 40),
    ),
    "reviews": (['recipe=["sft", "reward_model", "ppo"]', "run.checkpoint_every=4"], (4, 32)),
}
"""The settings of each world, and the steps that are audited."""
Audit = dict[str, Any]

NUMBERS: dict[str, Callable[[Audit], float | None]] = {
    "V − mean return, all states": lambda a: a["level"]["value"],
    "V − mean return, first token": lambda a: a["positions"][0]["bias"]["value"],
    "RMS error of V": lambda a: a["rmse"]["value"],
    "slope of the mean return on V": lambda a: a["calibration"]["slope"]["value"],
    "V follows the answer by": lambda a: a["follows"]["value"] if a["follows"] else None,
    "explains of single returns": lambda a: a["variance"]["explained"],
    "a perfect critic would": lambda a: a["variance"]["possible"],
    "explains of expected returns": lambda a: a["variance"]["explained_of_expected"],
    "next tokens in the right order": lambda a: a["ranking"]["clear"]["value"],
    "sd of a single return where V is right": lambda a: a["where_right"]["deviation"],
    "sd of true advantages": lambda a: a["advantages"]["true_deviation"],
}
COLUMNS: dict[str, Callable[[Audit], float | None]] = {
    "error": lambda row: row["error"]["value"],
    "bias": lambda row: row["bias"]["value"],
    "bias without V(s)": lambda row: row["bias_of_returns"]["value"],
    "sd": lambda row: row["deviation"],
    "correlation": lambda row: row["correlation"],
}


def quartet(*words: str) -> None:
    command = [sys.executable, "-m", "quartet", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)


def audits(world: str, seed: int, folder: Path) -> list[Audit]:
    """Return the audits of one run, which is trained first if it is not there."""
    words, steps = WORLDS[world]
    name = f"{world}-{seed}"
    if not any(folder.glob(f"*-{name}/policy/config.json")):
        place = [f'run.folder="{folder}"', f'run.name="{name}"', f"seed={seed}"]
        quartet("run", world, *words, *SMALL, *KEPT, *place)
    [run] = [path.parent.parent for path in folder.glob(f"*-{name}/policy/config.json")]
    found = []
    for step in steps:
        file = run / "critic_audits" / f"ppo-{step:06d}.json"
        if not file.exists():
            quartet("critic", str(run), "--step", str(step))
        found.append(json.loads(file.read_text()))
    return found


def over_seeds(numbers: Iterable[float | None]) -> str:
    """Return the mean and, in brackets, the lowest and the highest number."""
    known = [number for number in numbers if number is not None]
    if not known:
        return "–"
    text = f"{statistics.fmean(known):.2f} ({min(known):.2f} to {max(known):.2f})"
    return text.replace("-", "−").replace("−0.00", "0.00")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def at_lam(audit: Audit, place: int) -> Audit:
    row: Audit = audit["advantages"]["by_lam"][place]
    return row


def tables(results: dict[str, list[list[Audit]]]) -> str:
    """Return the tables of docs/critic.md: a column for each world and step."""
    columns = {
        f"{world}, step {own[0]['step']}": own
        for world, seeds in results.items()
        for own in zip(*seeds, strict=True)
    }
    text = table(
        ["", *columns],
        [
            [name, *(over_seeds(map(number, own)) for own in columns.values())]
            for name, number in NUMBERS.items()
        ],
    )
    for name, own in columns.items():
        rows = []
        for place, first in enumerate(own[0]["advantages"]["by_lam"]):
            at = [at_lam(audit, place) for audit in own]
            best = sum(row["is_best"] for row in at)
            numbers = [over_seeds(map(column, at)) for column in COLUMNS.values()]
            rows.append([f"{first['lam']:g}", *numbers, f"{best} of {len(at)}"])
        text += f"\n{name}:\n\n" + table(["λ", *COLUMNS, "among the best"], rows)
    return text


def summary(results: dict[str, list[list[Audit]]]) -> dict[str, Any]:
    """Return the numbers of the tables, seed by seed."""
    found: dict[str, Any] = {}
    for world, seeds in results.items():
        for own in zip(*seeds, strict=True):
            numbers: dict[str, Any] = {
                name: _rounded(map(number, own)) for name, number in NUMBERS.items()
            }
            numbers["advantages"] = {
                f"{row['lam']:g}": {
                    name: _rounded(column(at_lam(audit, place)) for audit in own)
                    for name, column in COLUMNS.items()
                }
                for place, row in enumerate(own[0]["advantages"]["by_lam"])
            }
            found[f"{world}, step {own[0]['step']}"] = numbers
    return found


def _rounded(numbers: Iterable[float | None]) -> list[float | None]:
    return [None if number is None else round(number, 4) for number in numbers]


def figure(results: dict[str, list[list[Audit]]]) -> Any:
    """Return error and correlation by λ at the last step: a line for each seed."""
    from plotly.subplots import make_subplots

    titles = [f"{what}, {world}" for what in ("error", "correlation") for world in results]
    drawn = make_subplots(2, len(results), subplot_titles=titles, vertical_spacing=0.16)
    for column, seeds in enumerate(results.values(), 1):
        for own in seeds:
            rows = own[-1]["advantages"]["by_lam"]
            for line, name in enumerate(("error", "correlation"), 1):
                drawn.add_scatter(
                    x=[f"{row['lam']:g}" for row in rows],
                    y=[COLUMNS[name](row) for row in rows],
                    line={"color": "#3b82f6"},
                    opacity=0.7,
                    row=line,
                    col=column,
                )
    drawn.update_xaxes(type="category", title_text="λ")
    drawn.update_layout(showlegend=False, template="plotly_white", width=1000, height=620)
    drawn.update_layout(margin={"l": 50, "r": 20, "t": 40, "b": 50})
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs-critic"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--figure", type=Path, help="an HTML file for the figure")
    options = parser.parse_args()
    results = {
        world: [audits(world, seed, options.folder) for seed in range(options.seeds)]
        for world in WORLDS
    }
    print(tables(results))
    RESULTS.write_text(json.dumps(summary(results), indent=1) + "\n")
    if options.figure:
        figure(results).write_html(options.figure, config={"displayModeBar": False})


if __name__ == "__main__":
    main()
