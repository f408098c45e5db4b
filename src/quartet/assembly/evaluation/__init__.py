"""Evaluation of any policies on any sets by any measures: `quartet eval` and `quartet.evaluate`.

A *policy* answers prompts (`policies.py`), a *set* has rows (`sets.py`), and a *measure* gives each
row a number (`measures.py`). `evaluate.py` brings them together.
"""

from quartet.assembly.evaluation.evaluate import EvaluationRequest, evaluate

__all__ = ["EvaluationRequest", "evaluate"]
