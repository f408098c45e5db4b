"""Inputs that cannot work, and the sentence that a person gets for each."""
