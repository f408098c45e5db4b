"""What a notebook shows of a run: a line per metric, with its course as a small figure."""

import html
from collections.abc import Sequence

from quartet.runs.reader import Run
from quartet.stages.kinds import kind_of
from quartet.studio.views import sparkline

WIDTH, HEIGHT = 160, 32


def figures(run: Run) -> str:
    """Return an HTML table with the headline metrics of each stage."""
    rows = []
    for stage, series in run.series.items():
        kind = kind_of(stage)
        headlines = kind.headlines if kind is not None else ()
        shown = [
            (h.label, series.columns[h.metric]) for h in headlines if h.metric in series.columns
        ]
        if kind is None:
            shown = list(series.columns.items())[:6]
        for label, values in shown:
            rows.append(
                f"<tr><td>{html.escape(stage)}</td><td>{html.escape(label)}</td>"
                f"<td>{values[0]:.3g} → {values[-1]:.3g}</td><td>{_line(values)}</td></tr>"
            )
    return f"<table>{''.join(rows)}</table>"


def _line(values: Sequence[float]) -> str:
    points = sparkline(values, WIDTH, HEIGHT)
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}"><polyline points="{points}" fill="none" '
        'stroke="currentColor" stroke-width="1.5"/></svg>'
    )
