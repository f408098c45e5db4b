"""The YAML head of a model card, which the hub and `huggingface_hub.ModelCard` read."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from quartet.runs.definitions import definition

TASKS = {"reward_model": "text-classification", "critic": "token-classification"}
LICENCE = ("license", "license_name", "license_link")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
FILES = (".jsonl", ".json", ".csv", ".parquet", ".gz", ".txt", ".toml")


def card_head(
    role: str, config: Mapping[str, Any], events: Sequence[Mapping[str, Any]], title: str
) -> str:
    """Return the head of the card of a model with this role (`policy`, `reward_model`, …) in the
    run that has these settings and events: library, task, tags, base model and its licence, data
    sets, and what was measured on held-out data.

    Folders and files are of this machine, so only names of the hub are named. The licence is that
    of the base model's own card, where it is a folder with one; of a base model on the hub, the
    hub knows it.
    """
    base = config.get("policy", {}).get("model")
    if role == "reward_model":
        base = config.get("reward_model", {}).get("model", base)
    table: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": TASKS.get(role, "text-generation"),
        "tags": list(dict.fromkeys(["quartet", *config.get("recipe", [])])),
    }
    if isinstance(base, str):
        table |= {"base_model": base} if is_hub_id(base) else _licence(Path(base))
    train = config.get("data", {}).get("train") or []
    sets = [name for name in ([train] if isinstance(train, str) else train) if is_hub_id(name)]
    if sets:
        table["datasets"] = sets
    if metrics := list(_metrics(role, events)):
        result = {
            "task": {"type": table["pipeline_tag"]},
            "dataset": {"type": sets[0] if sets else "other", "name": _held_out(config)},
            "metrics": metrics,
        }
        table["model-index"] = [{"name": title, "results": [result]}]
    return f"---\n{yaml.safe_dump(table, sort_keys=False, allow_unicode=True)}---\n\n"


def is_hub_id(name: str) -> bool:
    """Return whether a name is one of the hub, owner/name, and no file or folder here."""
    is_file = name.endswith(FILES) or Path(name).exists()
    return HUB_ID.fullmatch(name) is not None and not is_file


def _licence(folder: Path) -> dict[str, Any]:
    """Return what the card in a model's folder says of its licence."""
    try:
        head = re.match(r"---\n(.*?)\n---\s", (folder / "README.md").read_text("utf-8"), re.DOTALL)
        table = yaml.safe_load(head[1]) if head else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    found = table if isinstance(table, dict) else {}
    return {key: found[key] for key in LICENCE if isinstance(found.get(key), str)}


def _held_out(config: Mapping[str, Any]) -> str:
    data = config.get("data", {})
    where = data.get("eval") or data.get("train") or f"the embedded world {data.get('world')}"
    names = [Path(name).name for name in ([where] if isinstance(where, str) else where)]
    return f"held-out rows of {', '.join(names)}"


def _metrics(role: str, events: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield what the run measured of a model on held-out data."""
    summaries = {e["stage"]: e.get("summary") or {} for e in events if e["event"] == "finished"}
    if role == "policy" and "win_rate" in (found := summaries.get("evaluation", {})):
        against = f"win rate against the model before, by {found['judge']}"
        yield _metric("win_rate", found["win_rate"]["mean"], against)
        yield _metric("kl", found["kl"]["mean"], "KL to the model before, nats per response")
        for name in ("reward", "gold"):
            if name in found["after"]:
                label = definition("reward/gold" if name == "gold" else name).label
                yield _metric(name, found["after"][name], f"mean {label}")
    if role == "sft" and "held_out_loss" in (found := summaries.get("sft", {})):
        yield _metric("loss", found["held_out_loss"], "loss per token")
    if role == "reward_model" and "held_out_accuracy" in (found := summaries.get(role, {})):
        yield _metric("accuracy", found["held_out_accuracy"], "pair accuracy")


def _metric(kind: str, value: float, name: str) -> dict[str, Any]:
    return {"type": kind, "value": value, "name": name}
