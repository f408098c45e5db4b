"""The libraries that can be judged. Each module has a `Library` subclass that calls the library's
own functions, and imports it only when it is made."""

import importlib
import sys
from pathlib import Path

from rl_conformance.library import Library

ADAPTERS = {
    "quartet": "rl_conformance.adapters.quartet:Quartet",
    "trl": "rl_conformance.adapters.trl:Trl",
    "trl-ppo": "rl_conformance.adapters.trl_ppo:TrlPpo",
    "verl": "rl_conformance.adapters.verl:Verl",
    "areal": "rl_conformance.adapters.areal:AReaL",
    "torchtune": "rl_conformance.adapters.torchtune:Torchtune",
}
"""Short names of adapters, and where they are, as `load` takes it."""


def load(key: str) -> Library:
    """Return the adapter of a library: by its name in `ADAPTERS`, as `package.module:Class`, or as
    `path/to/file.py:Class`. Raises ImportError where the library is not installed, and ValueError
    for a key that names no adapter."""
    place, _, name = ADAPTERS.get(key, key).partition(":")
    if not name:
        raise ValueError(
            f"{key}: no such adapter; give one of {', '.join(ADAPTERS)} or file.py:Class"
        )
    if place.endswith(".py"):
        path = Path(place).resolve()
        sys.path.insert(0, str(path.parent))
        place = path.stem
    try:
        module = importlib.import_module(place)
    except Exception as error:  # some libraries wrap what is missing in errors of their own
        raise ImportError(
            str(error).strip().splitlines()[-1] if str(error) else repr(error)
        ) from error
    made = getattr(module, name, None)
    if not (isinstance(made, type) and issubclass(made, Library)):
        raise ValueError(f"{key}: {name} is no subclass of rl_conformance.Library")
    return made()
