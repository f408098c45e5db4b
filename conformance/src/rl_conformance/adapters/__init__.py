"""The libraries that can be judged. Each module has a `Library` subclass that calls the library's
own functions. It imports the library, or is made with the folder of a checkout."""

import importlib
import sys
from pathlib import Path

from rl_conformance.checkout import FromCheckout
from rl_conformance.library import Library

ADAPTERS = {
    "quartet": "rl_conformance.adapters.quartet:Quartet",
    "trl": "rl_conformance.adapters.trl:Trl",
    "trl-ppo": "rl_conformance.adapters.trl_ppo:TrlPpo",
    "verl": "rl_conformance.adapters.verl:Verl",
    "areal": "rl_conformance.adapters.areal:AReaL",
    "torchtune": "rl_conformance.adapters.torchtune:Torchtune",
    "openrlhf": "rl_conformance.adapters.openrlhf:OpenRLHF",
    "nemo-rl": "rl_conformance.adapters.nemo_rl:NeMoRL",
    "slime": "rl_conformance.adapters.slime:Slime",
    "skyrl": "rl_conformance.adapters.skyrl:SkyRL",
    "open-instruct": "rl_conformance.adapters.open_instruct:OpenInstruct",
    "prime-rl": "rl_conformance.adapters.prime_rl:PrimeRL",
}
"""Short names of adapters, and where they are, as `load` takes it."""


def load(key: str) -> Library:
    """Return the adapter of a library: by its name in `ADAPTERS`, as `package.module:Class`, or as
    `path/to/file.py:Class`; for a library that is called from a checkout, with "=FOLDER" behind it.
    Raises ImportError where the library is not installed, and ValueError for a key that names no
    adapter."""
    adapter, _, folder = key.partition("=")
    place, _, name = ADAPTERS.get(adapter, adapter).partition(":")
    if not name:
        raise ValueError(
            f"{adapter}: no such adapter; give one of {', '.join(ADAPTERS)} or file.py:Class"
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
    return opened(made, adapter, folder)


def opened(kind: type[Library], adapter: str, folder: str) -> Library:
    """Return the adapter of this class, with its checkout if it is called from one."""
    if not issubclass(kind, FromCheckout):
        if folder:
            raise ValueError(f"{adapter} is called where it is installed; leave out ={folder}")
        return kind()
    if not folder:
        source = f"https://github.com/{kind.repository}"
        raise ImportError(f"it is called from a checkout of {source}: give {adapter}=FOLDER")
    return kind(Path(folder))
