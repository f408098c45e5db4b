"""The tables about the run itself: its length, its folder, its processes."""

import math
from typing import Annotated, Literal

from quartet.parts import Field, part
from quartet.recording.metric import Metric

KEPT_STEPS = 1000
"""A run with more steps keeps the rollouts of about so many."""


PrecisionName = Literal["auto", "fp32", "bf16"]
"""What a setting of precision can say."""
Role = Literal["policy", "critic", "reference", "reward_model"]
"""The four models of PPO."""


@part
class RolePrecision:
    """A precision for each model. With an adapter (policy.adapter), models on the policy's trunk
    compute as the policy does."""

    policy: PrecisionName = Field(
        default="auto",
        description='What the policy computes in. "auto": bf16 on a GPU, fp32 on a CPU.',
    )
    critic: PrecisionName = Field(
        default="auto",
        description='What the critic computes in. "auto" as for the policy.',
    )
    reference: PrecisionName = Field(
        default="auto",
        description='What the reference computes in. "auto" as for the policy.',
    )
    reward_model: PrecisionName = Field(
        default="auto",
        description='What the reward model computes in. "auto" as for the policy.',
    )


@part
class RunConfig:
    """The file's [run] table: how long the run is, where it is, and what is kept of it."""

    steps: int = Field(default=100, ge=1, description="How many RL steps the run takes.")
    folder: str = Field(default="runs", description="The folder that run folders are made in.")
    name: str | None = Field(
        default=None,
        description="The end of the run folder's name. Left out, it is the recipe's or the file's.",
    )
    device: str = Field(
        default="auto", description='"cpu", "cuda", "mps", or "auto": a GPU where there is one.'
    )
    precision: RolePrecision | PrecisionName = Field(
        default="auto",
        description='What models compute in: "fp32", or "bf16" with float32 weights of what is '
        'trained. "auto" is bf16 on a GPU that has it, fp32 on a CPU and for trust regions. A '
        "table sets it for each of policy, critic, reference and reward_model.",
    )
    offload: bool = Field(
        default=False,
        description="Keep frozen models and the optimizers' moments in main memory while they are "
        "not needed on the GPU.",
    )
    rollouts_every: int | None = Field(
        default=None,
        ge=1,
        description="Steps between two whose rollouts are written; extreme ones always are. Left "
        "out, about 1,000 steps are written.",
    )
    checkpoint_every: int | None = Field(
        default=None,
        ge=1,
        description="Steps between checkpoints. Left out, they take under 2% of the time.",
    )
    keep_last: int = Field(
        default=2, ge=1, description="How many of the newest checkpoints are kept."
    )
    keep_best: str | None = Field(
        default=None,
        description='The metric whose best checkpoint is kept as well, such as "reward/gold"; '
        '"-loss" where less is better.',
    )
    rollbacks: int = Field(
        default=0,
        ge=0,
        description="How often a stage may go back to its last checkpoint, with half the learning "
        "rate, when a loss, gradient or log-probability is not finite. 0 stops the run instead.",
    )
    max_minutes: float | None = Field(
        default=None,
        gt=0,
        description="Save and stop after so many minutes; the run can be resumed.",
    )
    track: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = Field(
        default=(),
        description="Trackers that are sent the metrics; each needs the extra of its name.",
    )
    loop: str | None = Field(
        default=None,
        description="The loop of the RL stage in the place of quartet.rl: file.py:name, a function "
        "with its arguments that yields its steps.",
    )
    metrics: tuple[Metric, ...] = Field(
        default=(),
        description='Metrics of your own, a number of each RL step: ["mine.py:MyMetric"].',
    )

    def precision_of(self, role: Role) -> PrecisionName:
        """Return the precision that the settings give a model."""
        if isinstance(self.precision, str):
            return self.precision
        precision: PrecisionName = getattr(self.precision, role)
        return precision

    @property
    def keep_every(self) -> int:
        """Steps between two whose rollouts are written: `rollouts_every`, or its default."""
        return self.rollouts_every or math.ceil(self.steps / KEPT_STEPS)


@part
class Launch:
    """The file's [launch] table: how many processes train, and what starts them."""

    type: Literal["local", "torchrun", "ray"] = Field(
        default="local",
        description='What starts the ranks: Quartet itself, on this machine ("local"); torchrun or '
        "srun; or Ray, as actors.",
    )
    processes: int = Field(
        default=1, ge=1, description="The number of ranks. Under torchrun, its own number counts."
    )
    shard: bool | Annotated[int, Field(ge=2)] = Field(
        default=False,
        description="Each rank holds a part of every matrix (FSDP2) instead of all weights. With a "
        "number, so many ranks hold one model together (HSDP).",
    )
    deadline: float = Field(
        default=600.0,
        gt=0,
        description="Seconds after which a rank that does not answer counts as lost.",
    )
    restarts: int = Field(
        default=0,
        ge=0,
        description="How often the run resumes by itself after a rank was lost.",
    )
    address: str | None = Field(
        default=None,
        description="The address of a Ray cluster. Left out, one is started on this machine.",
    )

    def parts(self, world: int) -> int:
        """Return the number of ranks, out of `world`, that hold one model together when models are
        sharded."""
        return world if isinstance(self.shard, bool) else self.shard
