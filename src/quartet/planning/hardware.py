"""GPUs by their makers' data sheets, clusters of them, and spans of time."""

import re
from dataclasses import dataclass

from quartet.errors import QuartetError

COMPUTE = (0.25, 0.5)
"""The share of the makers' dense bf16 rate that training and scoring reach: from, to."""
BANDWIDTH = (0.5, 0.85)
"""The share of the memory's bandwidth that decoding reaches: from, to."""
DISK = (1e9, 5e9)
"""Bytes per second of the disk through which servers get weights: from a disk in a machine, to one
in its memory. Assumed."""
MEASURED: frozenset[str] = frozenset()
"""The figures of a plan that were measured on a GPU, by name. None was."""
LEGEND = (
    "~ was never measured on a GPU. Memory follows counts of what the program allocates, without a "
    "GPU; times follow the makers' numbers, of which 25 to 50% are assumed in compute and 50 to "
    "85% in bandwidth."
)
HOST = 8
"""GPUs of one host, which can hold one copy of the weights together."""
RESERVED = 0.1
"""The share of a GPU's memory that kernels, communication and fragmentation take."""
GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    memory: float
    """Bytes."""
    flops: float
    """Dense bf16 operations per second."""
    bandwidth: float
    """Bytes per second from its memory."""
    network: float = 50 * GB
    """Bytes per second to other hosts, for each GPU: 400 Gbit/s."""

    def rate(self, number: int) -> float:
        """Return the operations per second on numbers of so many bytes: bfloat16, or float32 in the
        tensor cores (TF32), which takes twice as long on all of these."""
        return self.flops if number == 2 else self.flops / 2


GPUS = {
    "a100": Gpu(80 * GB, 312e12, 2039 * GB, 25 * GB),
    "h100": Gpu(80 * GB, 989e12, 3350 * GB),
    "h200": Gpu(141 * GB, 989e12, 4800 * GB),
    "b200": Gpu(192 * GB, 2250e12, 8000 * GB),
    "l40s": Gpu(48 * GB, 362e12, 864 * GB, 12.5 * GB),
    "rtx4090": Gpu(24 * GB, 165e12, 1008 * GB, 3 * GB),
}
"""The GPUs that are known, by the name that `--on` takes; from the makers' data sheets."""


class CannotFit(QuartetError, ValueError):
    """A run that needs more memory than a cluster has. The message says how much is missing, with a
    line for each role."""


@dataclass(frozen=True)
class Cluster:
    """A number of GPUs of one kind."""

    gpu: Gpu
    count: int
    name: str

    @classmethod
    def of(cls, text: str) -> "Cluster":
        """Return the cluster that a text such as `8xh200` describes. Raises ValueError."""
        match = re.fullmatch(r"(\d+)\s*[x×]\s*(\w+)", text.strip().lower())
        if match is None or match[2] not in GPUS or int(match[1]) < 1:
            raise ValueError(
                f'--on "{text}": say how many of which, "8xh200". Known are {", ".join(GPUS)}.'
            )
        return cls(GPUS[match[2]], int(match[1]), text)


@dataclass(frozen=True)
class Span:
    """The seconds that something takes, from the best to the worst case to expect."""

    best: float
    worst: float

    def __add__(self, other: "Span") -> "Span":
        """Return the time of both, one after the other."""
        return Span(self.best + other.best, self.worst + other.worst)

    def max(self, other: "Span") -> "Span":
        """Return the time of both at once, which is the longer of the two."""
        return Span(max(self.best, other.best), max(self.worst, other.worst))

    @property
    def middle(self) -> float:
        """The mean of the best and the worst case."""
        return (self.best + self.worst) / 2

    def __str__(self) -> str:
        if self.worst < 100:
            return f"{self.best:,.2g} to {self.worst:,.2g} s"
        return f"{self.best:,.0f} to {self.worst:,.0f} s"


def marked(figure: str, words: str) -> str:
    """Return the words of a figure, with a mark if it was never measured on a GPU."""
    return words if figure in MEASURED else f"~ {words}"
