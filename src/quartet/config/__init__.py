"""The configuration of a run: its tables, the rules that they follow, the TOML files they are read
from, and the sentences about mistakes in them."""
