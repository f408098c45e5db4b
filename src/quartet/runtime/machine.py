"""The installed packages."""

from importlib import metadata

from packaging.requirements import Requirement


def unmet_requirements() -> list[str]:
    """Return a sentence about each required package that is missing or has a wrong version."""
    problems = []
    for line in metadata.requires("quartet-rlhf") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, specifier = requirement.name, requirement.specifier
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            problems.append(f"{name} is not installed.")
            continue
        if not specifier.contains(installed, prereleases=True):
            problems.append(
                f"{name} {installed} is installed, Quartet needs {specifier}: pip install "
                f'"{name}{specifier}"'
            )
    return problems
