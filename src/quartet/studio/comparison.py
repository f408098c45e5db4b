"""What the studio's page Compare shows of several runs: their metrics in one chart each, and their
answers to the same prompts."""

import html as markup
from collections.abc import Sequence
from typing import Any

from quartet.runs import figures
from quartet.runs.charts import Chart, charts
from quartet.runs.reader import Run
from quartet.studio import views


def overlaid(chosen: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a chart for each metric that at least two runs have in their main stage, with a line
    per run: all of them smoothed, or none."""
    stages = [(run, run.main_stage) for run in chosen]
    having_stage = [(run, stage) for run, stage in stages if stage is not None]
    shown: dict[str, Chart] = {}
    for run, stage in having_stage:
        for chart, names in charts(run.series[stage], run.definitions):
            for name in names:
                shown.setdefault(name, chart)
    result = []
    for name, chart in shown.items():
        having = [(run, stage) for run, stage in having_stage if name in run.series[stage].columns]
        if len(having) > 1:
            result.append(_overlay(chosen, having, name, chart.percent))
    return result


def _overlay(
    chosen: Sequence[Run], having: Sequence[tuple[Run, str]], name: str, percent: bool
) -> dict[str, Any]:
    """Return the chart of one metric, with a line per run in the colour of its place."""
    smooth = all(
        figures.can_smooth(run.series[stage], [name], run.definitions) for run, stage in having
    )
    label = views.meaning(name, having[0][0].definitions)["label"]
    title = label[0].upper() + label[1:]
    drawn = [figures.lines(run, stage, title, [name], percent, smooth) for run, stage in having]
    data = []
    for (run, _), spec in zip(having, drawn, strict=True):
        stroke = figures.stroke(chosen.index(run))
        for line in spec["data"]:
            more = {"name": markup.escape(run.name)} if "name" in line else {}
            data.append(line | more | {"line": stroke})
    longest = max(drawn, key=lambda spec: max(spec["data"][-1]["x"], default=0))
    layout = longest["layout"] | {"annotations": [], "shapes": []}
    return {
        "figure": {"data": data, "layout": layout},
        "meanings": [views.meaning(name, having[0][0].definitions)],
    }


def same_prompts(chosen: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the runs' responses to prompts that all of them were evaluated on."""
    if len(chosen) < 2:
        return []
    by_prompt = [{row["prompt"]: row["after"] for row in run.answers()} for run in chosen]
    common = [prompt for prompt in by_prompt[0] if all(prompt in table for table in by_prompt)][:20]
    return [
        {"prompt": prompt, "answers": [table[prompt] for table in by_prompt]} for prompt in common
    ]
