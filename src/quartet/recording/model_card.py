"""Model cards: what a model is and how it was trained, read from the run folder."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quartet import __version__, files
from quartet.recording.card_head import card_head
from quartet.recording.run_folder import read_record
from quartet.runs.definitions import definition
from quartet.runs.rounds import num_rounds, place_of, round_of
from quartet.runs.wording import MEASURES, number, stage_summary

ROLES = {
    "policy": "The policy: a causal language model.",
    "policy_ema": "The average of the policy over its training: a causal language model.",
    "sft": "The policy after supervised fine-tuning, which later stages start from: a causal "
    "language model.",
    "reward_model": "A reward model: a sequence classifier with one label, the higher the better.",
    "critic": "The critic of the policy beside it: a token classifier with one label, the return "
    "it expects after each token.",
}
BEFORE = {"sft": {"sft"}, "reward_model": {"sft"}}
"""The stages that shaped a model before its own, for models that not all stages shaped. Those of
later rounds are meant too."""
SETTINGS = "config.resolved.toml"
SAMPLED = frozenset({"policy", "policy_ema", "sft"})
"""The models that generate text."""
LOADED_BY = {
    "reward_model": "AutoModelForSequenceClassification",
    "critic": "AutoModelForTokenClassification",
}


def write_cards(folder: Path, title: str | None = None) -> None:
    """Write `README.md` for the run and for each model in it, those of earlier rounds too. `title`
    names the run; left out, its folder does."""
    resolved, title = folder / SETTINGS, title or folder.name
    config = tomllib.loads(resolved.read_text(encoding="utf-8")) if resolved.is_file() else {}
    events = read_record(folder).events
    for earlier in range(1, num_rounds(config)):
        own = [event for event in events if _is_until(event, earlier)]
        place, name = folder / place_of(config, earlier, "."), f"{title}, round {earlier}"
        _write_model_cards(place, config, own, name, f"../../{SETTINGS}")
    _write_model_cards(folder, config, events, title, f"../{SETTINGS}")
    files.replace(
        folder / "README.md", f"# {title}\n\n{_numbers(events)}{_making(config, SETTINGS)}"
    )


def _is_until(event: Mapping[str, Any], earlier: int) -> bool:
    """Return whether an event is of a stage of this round or of one before it. The evaluation is of
    the last round."""
    name, own = round_of(event.get("stage") or "")
    return name != "evaluation" and own <= earlier


def _write_model_cards(
    folder: Path,
    config: dict[str, Any],
    events: list[dict[str, Any]],
    title: str,
    settings: str,
) -> None:
    """Write `README.md` for each model in the folder of a round. `events` are those that shaped
    them, `settings` is the path of the run's settings from a model."""
    of_recipe = [e | {"stage": round_of(e["stage"])[0]} for e in events if e.get("stage")]
    for name in models_in(folder):
        role = name.partition("-")[0]
        head = f"# {title}: {name.replace('_', ' ')}\n\n{ROLES[role]}\n\n"
        before = BEFORE.get(role)
        numbers = _numbers(
            [
                e
                for e in events
                if before is None or round_of(e.get("stage") or "")[0] in before | {name}
            ]
        )
        front = card_head(role, config, of_recipe, f"{title}: {name}")
        text = front + head + _loading(folder, name) + numbers + _making(config, settings)
        files.replace(folder / name / "README.md", text)


def models_in(folder: Path) -> list[str]:
    """Return the names of the models in a run folder, which are those of their folders. The reward
    models of an ensemble are numbered: reward_model-1, reward_model-2."""
    return [
        path.name
        for role in ROLES
        for path in (folder / role, *sorted(folder.glob(f"{role}-*")))
        if (path / "config.json").is_file()
    ]


def complete(target: Path, run_folder: Path, role: str) -> None:
    """Complete the folder that a run's model was exported to, so that it needs no run folder.

    The settings that the card names are copied, and a policy gets the generation config of
    `write_generation_config`. `run_folder` may be that of an earlier round, in the run's.
    """
    resolved, card = run_folder / SETTINGS, target / "README.md"
    if not resolved.is_file():
        resolved = run_folder.resolve().parent / SETTINGS
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        for path in (f"../../{SETTINGS}", f"../{SETTINGS}"):
            text = text.replace(path, SETTINGS)
        files.replace(card, text)
    if not resolved.is_file():
        return
    text = resolved.read_text(encoding="utf-8")
    files.replace(target / resolved.name, text)
    rollout = tomllib.loads(text).get("rollout")
    if rollout is None or role not in SAMPLED:
        return
    write_generation_config(target, rollout)


def write_generation_config(folder: Path, rollout: Mapping[str, Any]) -> None:
    """Write a generation config that samples as the responses of a run were sampled: with its
    temperature and filters, and as many tokens as a response could have.

    `rollout` has the fields of `Sampling`. Of the config that is there, only the token ids stay:
    penalties and other settings of the base model were not in force while the policy was trained.
    Stop strings are not in it: with them, transformers generates nothing unless it is given the
    tokenizer, too.
    """
    path = folder / "generation_config.json"
    table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    table = {key: value for key, value in table.items() if key.endswith("_token_id")}
    table["do_sample"] = True
    for name in ("temperature", "top_k", "top_p", "max_new_tokens"):
        table[name] = rollout[name]
    if rollout.get("min_new_tokens"):
        table["min_new_tokens"] = rollout["min_new_tokens"]
    files.replace(path, json.dumps(table, indent=2) + "\n")


HERE = "."
"""How a card names its folder: so it is right wherever the folder is moved."""


def _loading(folder: Path, name: str) -> str:
    role = name.partition("-")[0]
    auto = LOADED_BY.get(role, "AutoModelForCausalLM")
    table = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
    if role == "critic" and not str(table.get("architectures", [""])[0]).endswith(
        "ForTokenClassification"
    ):
        auto = "AutoModelForSequenceClassification"
    if table.get("quartet_classifier"):
        lines = [
            "transformers has no sequence classifier for this architecture. Quartet's is its trunk "
            "under a linear layer `score`:",
            "",
            "    from quartet.models.heads import ScalarModel",
            f'    model = ScalarModel.load("{HERE}")  # or the path of this folder',
            "",
        ]
    else:
        lines = [
            "    import transformers",
            f'    model = transformers.{auto}.from_pretrained("{HERE}")  # or its path',
            "",
        ]
    if centre := table.get("quartet_reward_centre"):
        lines += [
            f"Quartet takes {centre:.6g} (`quartet_reward_centre` in config.json) off its scores, "
            f"so that the policy RL "
            "started from scores 0 on average; transformers does not.",
            "",
        ]
    if (folder / name / "adapter").is_dir() and role not in {"reward_model", "critic"}:
        lines += [
            "`adapter/` is the LoRA adapter alone, for peft, on the model it was trained on; here "
            "it is merged.",
            "",
        ]
    return "\n".join([*lines, ""])


def _numbers(events: list[dict[str, Any]]) -> str:
    """Return a table of the last metrics of each stage, what it measured on held-out data, and the
    evaluation."""
    last: dict[str, tuple[int, dict[str, float]]] = {}
    for event in events:
        if event["event"] == "metrics":
            last[event["stage"]] = (event["step"], event["metrics"])
    shown = (
        "loss",
        "accuracy",
        "reward",
        "kl",
        "response/tokens",
        "response/ended",
        "value/explained_variance",
    )
    rows = []
    for stage, (step, metrics) in last.items():
        values = [
            f"{definition(name).label} {number(metrics[name])}" for name in shown if name in metrics
        ]
        if values:
            rows.append(f"| {stage.replace('_', ' ')} | {step:,} | {', '.join(values)} |")
    text = (
        "| stage | steps | at the last step |\n|---|---|---|\n" + "\n".join(rows) + "\n\n"
        if rows
        else ""
    )
    for event in events:
        if event["event"] != "finished" or not event.get("summary"):
            continue
        summary = event["summary"]
        if event["stage"] == "evaluation":
            text += _evaluation(summary)
        else:
            sentences = " ".join(stage_summary(summary))
            text += f"{event['stage'].replace('_', ' ')}: {sentences}\n\n" if sentences else ""
    return text


def _evaluation(summary: dict[str, Any]) -> str:
    win, kl = summary["win_rate"], summary["kl"]
    lines = [
        f"Against the model it started from, on {summary['prompts']:,} held-out prompts: wins "
        f"{win['mean']:.2f} ± "
        f"{win['interval']:.2f} (judged by {summary['judge']}), KL {kl['mean']:.3g} ± "
        f"{kl['interval']:.2g} nats per response.",
        "",
        "| | before | after |",
        "|---|---|---|",
        *(
            f"| {label} | {number(summary['before'][name])} | {number(summary['after'][name])} |"
            for name, label in MEASURES.items()
            if name in summary["before"]
        ),
    ]
    return "\n".join([*lines, "", ""])


def _making(config: dict[str, Any], settings: str) -> str:
    """Return sentences on how the model was trained. `settings` is the path of its settings from
    the card."""
    data = config.get("data", {})
    train = data.get("train")
    source = (
        ", ".join(train) if isinstance(train, list) else train
    ) or f"the embedded world {data.get('world')}"
    recipe = " → ".join(config.get("recipe", []))
    origin = f"Made by Quartet {__version__}: {recipe}, on {source}, seed {config.get('seed')}."
    return f"{origin} All settings: `{settings}`.\n"
