"""The Python API: train, record and evaluate. Thin compositions of what the command line uses."""
