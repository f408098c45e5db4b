"""The table of a run's file that says where its rows come from."""

from typing import Literal

from quartet.data.limits import TooLongRows
from quartet.data.prompt_sampling import EveryPrompt, PromptSampling
from quartet.data.row_shape import RowShape
from quartet.parts import Field, part

WORLDS = Literal["reviews", "sums", "guess", "labelled_texts"]


@part
class Data:
    """The file's [data] table: where prompts, demonstrations and comparisons come from, which is
    files or an embedded world."""

    world: WORLDS | None = Field(
        default=None,
        description="A task that makes its rows and knows the gold reward: an embedded one, or "
        '"labelled_texts", which makes them from data.texts.',
    )
    texts: str | None = Field(
        default=None,
        description="A file of texts with label 1 (good) or 0 (bad), for the world labelled_texts.",
    )
    train: str | tuple[str, ...] | None = Field(
        default=None, description="A file or folder to train on, or a list of them."
    )
    weights: tuple[float, ...] | None = Field(
        default=None,
        description="How often an epoch shows each row of a file, one number for each file of "
        "data.train: 2 is twice, 0.5 a random half.",
    )
    eval: str | None = Field(
        default=None,
        description="A file or folder of held-out rows. Left out, a share of data.train is held "
        "out.",
    )
    pretraining: str | None = Field(
        default=None,
        description="The demonstrations that algorithm.ptx mixes in. Left out, they are the SFT "
        "stage's.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="The names of the files' columns, by Quartet's names for them.",
    )
    shape: RowShape | None = Field(
        default=None,
        description='How rows become prompts and answers, "mine.py:MyShape". Left out, the columns '
        "say it.",
    )
    sampling: PromptSampling = Field(
        default=EveryPrompt(),
        description='How often an RL stage draws each prompt: "every" alike, or by "pass_rate".',
    )
    rows: int = Field(default=4000, ge=1, description="How many rows a world makes for each stage.")
    held_out: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="The share of data.train that is held out where there is no data.eval.",
    )
    held_out_rows: int = Field(
        default=1000,
        ge=1,
        description="How many held-out demonstrations and pairs are evaluated at most, evenly "
        "spread over those that there are: 1,000 measure an accuracy to ± 3%, 200 to ± 7%.",
    )
    max_prompt_tokens: int = Field(
        default=512, ge=1, description="Rows with a longer prompt are unusable."
    )
    max_response_tokens: int = Field(
        default=512,
        ge=1,
        description="Rows with a longer demonstration or answer are unusable; what the policy "
        "samples is bounded by rollout.max_new_tokens.",
    )
    unusable: Literal["refuse", "drop"] = Field(
        default="refuse",
        description='Unusable rows stop the run before it starts; "drop" leaves them out.',
    )
    too_long: TooLongRows | None = Field(
        default=None,
        description='Rows over a limit of tokens: "refuse", "drop", "truncate_left" (prompts keep '
        'their end) or "truncate_right" (their beginning); answers keep their beginning. Left '
        "out, data.unusable says it.",
    )

    @property
    def files(self) -> tuple[str, ...]:
        """The files and folders of `train`."""
        return (self.train,) if isinstance(self.train, str) else self.train or ()
