"""The recipes that ship with the package, one TOML file per task."""

from pathlib import Path

FOLDER = Path(__file__).parent


def recipe_path(name: str) -> Path | None:
    """The file of a recipe, if there is one of this name."""
    return FOLDER / f"{name}.toml" if name in recipe_names() else None


def recipe_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def template_path(name: str) -> Path | None:
    """The commented file for a stage that `quartet init` writes."""
    return FOLDER / "templates" / f"{name}.toml" if name in template_names() else None


def template_names() -> list[str]:
    return sorted(path.stem for path in (FOLDER / "templates").glob("*.toml"))


def sweep_path(name: str) -> Path | None:
    """The file of a sweep that ships with the package."""
    return FOLDER / "sweeps" / f"{name}.toml" if name in sweep_names() else None


def sweep_names() -> list[str]:
    return sorted(path.stem for path in (FOLDER / "sweeps").glob("*.toml"))
