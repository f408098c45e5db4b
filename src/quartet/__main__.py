"""`python -m quartet`: the command."""

from quartet.cli import main

main()
