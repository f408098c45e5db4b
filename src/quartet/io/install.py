"""How the optional packages of the distribution are installed."""

from pathlib import Path

DISTRIBUTION = "quartet-rlhf"


def install_command(*extras: str) -> str:
    """Return the command that installs extras, such as `pip install "quartet-rlhf[lora]"`; where
    Quartet runs from a clone, the command that adds them to the clone's installation."""
    wanted = ",".join(extras)
    clone = _clone()
    if clone is None:
        return f'pip install "{DISTRIBUTION}[{wanted}]"'
    folder = "." if clone == Path.cwd() else str(clone)
    return f'pip install -e "{folder}[{wanted}]"'


def _clone() -> Path | None:
    """Return the folder of the clone that this code is in; None where it is installed."""
    source = Path(__file__).resolve().parents[2]
    is_clone = source.name == "src" and (source.parent / "pyproject.toml").is_file()
    return source.parent if is_clone else None
