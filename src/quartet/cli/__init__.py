"""The command `quartet`: parse, call, print. Heavy imports happen inside the verbs that need them."""

from quartet.cli import running, seeing, trying, using  # noqa: F401
from quartet.cli.common import app


def main() -> None:
    app()
