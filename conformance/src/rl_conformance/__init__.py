"""Claims about the losses and advantages of RL for language models, checked against any library.

python -m rl_conformance --library trl
"""

from rl_conformance.adapters import load
from rl_conformance.claims import Claim, Evidence, Verdict, judge, judge_all
from rl_conformance.library import Library, NotOffered, Pairs
from rl_conformance.registry import CLAIMS

__all__ = [
    "CLAIMS",
    "Claim",
    "Evidence",
    "Library",
    "NotOffered",
    "Pairs",
    "Verdict",
    "judge",
    "judge_all",
    "load",
]
