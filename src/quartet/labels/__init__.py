"""Comparisons by people and judges: pairs to be labelled, the file of labels, agreement. Imports
nothing of the trainer and no torch."""
