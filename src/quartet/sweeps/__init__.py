"""Sweeps: one file's run over many settings, each trial an ordinary run in a process of its own."""
