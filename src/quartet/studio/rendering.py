"""The templates and the chart library of pages and reports."""

import functools
import importlib.util
import json
import re
import shlex
import time
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from quartet.runs.untrusted import finite
from quartet.runs.wording import aligned, number, where
from quartet.studio.views import score_parts, visible

STATUSES = {
    "running": "The run wrote something in the last five minutes.",
    "stopped": "The run has not ended, and has written nothing for five minutes.",
    "interrupted": "The run was stopped and has saved a checkpoint; quartet run --resume goes on.",
    "failed": "The run ended with an error.",
    "done": "All stages are done.",
}
"""What each status of a run means."""


@functools.cache
def templates() -> Environment:
    """Return the templates, each compiled once. Every value that is inserted is escaped."""
    environment = Environment(
        loader=PackageLoader("quartet.studio"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "aligned": aligned,
        "breakable": breakable,
        "where": where,
        "sentence": lambda text: text[:1].upper() + text[1:],
        "ago": ago,
        "status_meaning": lambda status: STATUSES.get(status, ""),
        "shortened": visible,
        "score_parts": score_parts,
        "typed": lambda path: shlex.quote(str(path)),
    }
    environment.policies["json.dumps_function"] = json_text
    return environment


def breakable(name: str) -> Markup:
    """Return the name of a setting as HTML, which a narrow column breaks at its dots and
    underscores."""
    return Markup("<wbr>").join(re.split(r"(?<=[._])", name))


def json_text(value: Any, **more: Any) -> str:
    """Return JSON with null for NaN and infinity, which browsers do not accept."""
    return json.dumps(finite(value), allow_nan=False, **more)


def plotly_file() -> Path:
    """Return Plotly's JavaScript file from its Python package, so that nothing is downloaded."""
    spec = importlib.util.find_spec("plotly")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "package_data" / "plotly.min.js"


def ago(when: float | None) -> str:
    """Return how long ago a time was, in words."""
    if when is None:
        return ""
    seconds = max(0.0, time.time() - when)
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' * (count > 1)} ago"
    return "just now"
