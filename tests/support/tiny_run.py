"""Run folders made in a second or two, for whoever reads run folders."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from quartet.assembly import build
from quartet.config.toml import Settings, read_settings, resolved_toml
from quartet.recipes import recipe_path
from quartet.recording.run_folder import RunFolder
from quartet.recording.tokens import TokenTexts
from quartet.runs.reader import Run
from quartet.runtime.pipeline import Pipeline

SMALL = (
    "policy.create.hidden_size=16",
    "policy.create.num_layers=1",
    "policy.create.num_heads=2",
    "data.rows=64",
    "data.held_out_rows=64",
    "sft.steps=3",
    "sft.batch_size=8",
    "rollout.prompts_per_step=8",
    "rollout.max_new_tokens=8",
    "evaluation.prompts=8",
)
SMALL_REVIEWS = (*SMALL, "reward_model.steps=3", "reward_model.batch_size=8")


def make_run(root: Path, recipe: str, *words: str, fault: str | None = None) -> Run:
    """The whole recipe, in this process, on a model of some thousand weights."""
    small = SMALL_REVIEWS if recipe == "reviews" else (*SMALL, "policy.create.max_length=32")
    if any(word.startswith("policy.model=") for word in words):  # a later round of an earlier run
        small = [word for word in small if not word.startswith(("policy.create", "sft."))]
    settings = read_settings(recipe_path(recipe), [*small, *words], f"recipe {recipe}")
    return carried_out(settings, root, recipe, fault)


def carried_out(settings: Settings, root: Path, name: str, fault: str | None = None) -> Run:
    """The whole run of these settings, in this process."""
    job = build(settings.config, fault)
    files = {"config.toml": settings.text, "config.resolved.toml": resolved_toml(settings)}
    folder = RunFolder.create(root, name, files)
    saving, texts = job.saving(settings.config.run), TokenTexts(job.tokenizer)
    for _ in Pipeline(job.stages, folder, texts, saving, strict=fault is None).run():
        pass
    folder.event("done")
    folder.close()
    return Run(folder.path)


ROUND = ["label", "reward_model", "ppo"]
TWO_ROUNDS = (
    f"recipe={['sft', *ROUND, *ROUND, 'evaluation']}",
    *("reward_model.steps=3", "reward_model.batch_size=8", "run.steps=2", "optim.lr=0.01"),
    *("label.pairs=40", "label.labels=24", "label.simulated=0.1", "policy.create.max_length=128"),
    *("run.keep_last=9", "run.checkpoint_every=1"),
)
"""Settings of `labelled-reviews` with two rounds of labels, which a simulated labeller gives."""


def copied(run: Path, to: Path) -> Path:
    """The record of a run, without its models."""
    return Path(
        shutil.copytree(
            run, to, ignore=shutil.ignore_patterns("policy", "sft", "critic", "reward_model")
        )
    )


def put_words_into_its_mouth(run: Path, words: str) -> None:
    """As if the model had written them, for each token of step 1."""
    file = run / "rollouts" / "000001.parquet"
    table = pq.read_table(file)
    text = pc.if_else(
        table.column("is_response"), pa.scalar(words), table.column("text").cast(pa.string())
    )
    pq.write_table(table.set_column(table.column_names.index("text"), "text", text), file)
