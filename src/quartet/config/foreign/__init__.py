"""Configurations of other libraries: read without running them, and written as ours.

`read.py` reads a Python script, a shell script or a YAML file into options, `values.py` turns the
value of one option into ours, `translate.py` makes a run's file of all of them. What an option is
called here is in `config/other_libraries.toml`, and nowhere else.
"""
