"""The table of the stage that waits for people's comparisons."""

from quartet.parts import Field, part


@part
class LabelConfig:
    """The file's [label] table: comparisons of the policy's answers that people make while the run
    waits."""

    pairs: int = Field(
        default=300, ge=1, description="Pairs of answers that are sampled to be labelled."
    )
    labels: int = Field(
        default=200, ge=2, description="How many labels the stage waits for, ties and skips too."
    )
    earlier: str | None = Field(
        default=None,
        description="A file or folder of earlier comparisons, such as runs/NAME/comparisons, that "
        "the reward model is trained on as well.",
    )
    simulated: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Label by the world's gold reward instead, and get this share of the labels "
        "wrong. Left out, people label.",
    )
