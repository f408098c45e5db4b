"""The configuration of a run: its tables, the files it is read from, and the sentences about what
is wrong in it."""
