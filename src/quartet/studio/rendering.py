"""Templates and the chart library: what pages and report are rendered with."""

import functools
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from quartet.runs.untrusted import finite
from quartet.studio.views import number, shortened


@functools.cache
def templates() -> Environment:
    """The templates of pages and report, each compiled once. Everything that is put into them is
    escaped."""
    made = Environment(
        loader=PackageLoader("quartet.studio"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": number, "ago": ago, "shortened": shortened}
    made.policies["json.dumps_function"] = json_text
    return made


def json_text(value: Any, **more: Any) -> str:
    """Return JSON as browsers know it: null in place of what is infinite or no number."""
    return json.dumps(finite(value), allow_nan=False, **more)


def plotly_file() -> Path:
    """Of Plotly's Python package: nothing comes from elsewhere."""
    found = importlib.util.find_spec("plotly")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent / "package_data" / "plotly.min.js"


def ago(when: float | None) -> str:
    """How long since, in words."""
    if when is None:
        return ""
    seconds = max(0.0, time.time() - when)
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' * (count > 1)} ago"
    return "just now"
