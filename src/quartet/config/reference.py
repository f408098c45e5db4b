"""The file's [reference] table."""

from quartet.parts import Field, part


@part
class Reference:
    """The file's [reference] table: the frozen model that the KL of an RL stage and the losses of
    the DPO family compare the policy with."""

    model: str | None = Field(
        default=None,
        description="A folder or hub id of a model with the policy's tokenizer. Left out, the "
        "reference is the model that the stage starts from. An RL stage without a reward learns "
        "from this model as its teacher.",
    )
