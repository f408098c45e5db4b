"""The stages of a run: one file and one row in `kinds.KINDS` per kind.

Each stage reads the folders that earlier ones wrote, and writes its own. This file imports none of
them: `kinds` is read where no torch is loaded.
"""
