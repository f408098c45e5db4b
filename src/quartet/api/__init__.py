"""The Python API: train, record and evaluate. Thin compositions of what the command line uses."""

from quartet.api.evaluate import evaluate
from quartet.api.record import record
from quartet.api.run import RunInterrupted, TrainingRun
from quartet.api.train import train

__all__ = ["RunInterrupted", "TrainingRun", "evaluate", "record", "train"]
