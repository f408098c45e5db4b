"""The command that explains: a step of an algorithm with its numbers, or a setting."""

from typing import Annotated

import typer

from quartet.cli.common import app, complaints, console, refuse, refusing

STAGES = {"sft": "SFT", "reward_model": "the reward model"}


@app.command()
def explain(
    word: Annotated[
        str,
        typer.Argument(
            metavar="ppo, grpo or KEY", help="An algorithm, or a setting such as optim.lr."
        ),
    ],
    seed: Annotated[
        int, typer.Option(min=0, help="The seed of the small run that an algorithm is shown on.")
    ] = 0,
) -> None:
    """Walk through one step of PPO or GRPO with eight responses, or say what a setting means.

    For an algorithm, a small model is trained for some twenty seconds, and the numbers of its third
    step are shown: responses, scores, log-probs, rewards, advantages, losses. The text is Markdown.
    """
    from quartet.config.explain import key_in_words, one_of_them, setting_in_words
    from quartet.config.suggestions import known_keys

    if word.split(".")[0] == "sweep":
        from quartet.sweeps.spec import SweepSpec

        with refusing():
            console.print(key_in_words(word, "sweep", SweepSpec), soft_wrap=True)
        return
    if word in known_keys():
        console.print(setting_in_words(word), soft_wrap=True)
        return
    from quartet.algorithms.presets import ALGORITHMS
    from quartet.io.texts import did_you_mean

    if word not in ALGORITHMS:
        keys = [*known_keys(), "ppo", "grpo"]
        with refusing():
            if "." in word:
                setting_in_words(word)
        same = [key for key in known_keys() if key.rpartition(".")[2] == word]
        near = f" Did you mean {one_of_them(same[:5])}?" if same else did_you_mean(word, keys)
        refuse(
            f'"{word}": neither a setting nor an algorithm.{near} Settings are written as in a '
            "file: quartet explain optim.lr."
        )
    from quartet.walkthrough import explain as walk_through

    def show(stage: str) -> None:
        complaints.print(f"training {STAGES.get(stage, 'with ' + stage.upper())} …")

    with refusing():
        text = walk_through(word, seed, show)
    console.print(text, soft_wrap=True, end="")
