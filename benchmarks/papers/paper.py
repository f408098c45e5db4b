"""What the scripts of this folder have in common: seeds, results, tables, pictures.

A script says in `main` what it measures for one seed, and hands over the results of all. Results
are JSON files in benchmarks/results/papers, pictures PNG files in docs/images.
"""

import argparse
import contextlib
import io
import json
import math
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "papers"
IMAGES = ROOT / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
COLORS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#57534e")
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Quantile 0.975 of Student's t for the mean of so many values."""


def options(description: str, name: str) -> argparse.Namespace:
    """Return what the command line says: the number of seeds, and where results go."""
    return parser(description, name).parse_args()


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """Return the parser of these options, for a script that has more of them."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS / f"{name}.json")
    parser.add_argument("--image", type=Path, help="a PNG file; needs Chromium")
    parser.add_argument("--redraw", action="store_true", help="tables and image of results as kept")
    return parser


def over_seeds(
    measure: Callable[[int], Any], options: argparse.Namespace, **settings: Any
) -> list[Any]:
    """Return what each seed gave, and write it with the settings, the day and the machine. With
    --redraw return what was written before."""
    if options.redraw:
        found: list[Any] = json.loads(options.results.read_text(encoding="utf-8"))["results"]
        return found
    results = []
    for seed in range(options.seeds):
        begin = time.perf_counter()
        results.append(rounded(measure(seed)))
        print(f"seed {seed}: {time.perf_counter() - begin:.0f} s", flush=True)
    about = {"date": datetime.now(UTC).date().isoformat(), "machine": platform.machine()}
    whole = {**about, "settings": settings, "results": results}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(whole) + "\n", encoding="utf-8")
    return results


def finished(folder: Path, name: str, train: Callable[[], Any]) -> Path:
    """Return the folder of the finished run of this name in `folder`, such as 1130-0531-NAME. Where
    there is none, it is trained: `train` returns it, as `quartet.train` does."""
    for report in folder.glob(f"????-????-{name}/report.html"):
        return report.parent
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run = train()
        run.finish()
    return Path(run.folder)


def pm(values: Sequence[float]) -> str:
    """Return mean ± standard deviation over seeds."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return minus(f"{statistics.fmean(values):.2f}{deviation}")


def interval(values: Sequence[float]) -> str:
    """Return the mean of two to five values with its interval of 95% by Student's t. One value has
    no interval."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return minus(f"{mean:.2f}")
    half = T_975[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return minus(f"{mean:.2f} ({mean - half:.2f} to {mean + half:.2f})")


def minus(number: str) -> str:
    return number.replace("-", "−")


def rounded(value: Any) -> Any:
    """Return the value with four significant digits in every number of it."""
    if isinstance(value, dict):
        return {str(key): rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of Markdown."""
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def picture(figure: Any, path: Path, width: int, height: int) -> None:
    """Write a figure of plotly as a PNG file, with the Chromium of this machine.

    Raises SystemExit if there is none.
    """
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"{path}: needs Chromium. Install it, or leave out --image.")
    figure.update_layout(width=width, height=height, template="plotly_white")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "figure.html"
        html = figure.to_html(include_plotlyjs=True, config={"displayModeBar": False})
        page.write_text(html.replace("<body>", '<body style="margin:0">'), encoding="utf-8")
        words = ["--headless", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=10000"]
        words += [f"--user-data-dir={folder}/profile", f"--window-size={width},{height}"]
        words += [f"--screenshot={path.resolve()}", page.as_uri()]
        subprocess.run([browser, *words], check=True, capture_output=True, timeout=300)
