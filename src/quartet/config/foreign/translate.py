"""A run's file from another library's options, with what was taken over and what was not.

The file is checked as `quartet run` checks it. A value that the check refuses is taken out and
listed with the sentence of the refusal, so what is written passes, or is said to need something.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quartet.algorithms.preference import PREFERENCES
from quartet.algorithms.presets import ALGORITHMS
from quartet.config.foreign.read import Foreign, is_open
from quartet.config.foreign.values import LOSSES, USUAL, Unlike, added_in, preset_of, value_for
from quartet.config.other_libraries import Equivalent, answer_to
from quartet.config.suggestions import read_by_recipe
from quartet.config.toml import ConfigError, set_value, settings_of_table, table_toml

FROZEN = re.compile(r"(^|\.)(critic|reward_model|reward|ref|rm|profiler|teacher)\.")
"""Tables of other models than the policy."""
SHARED = ("policy.", "rollout.", "data.", "optim.lr", "optim.micro_batch_tokens")
"""Keys that are the policy's or the whole run's."""
KL_SWITCHES = ("use_kl_loss", "use_kl_in_reward", "kl.use_loss")
PER_DEVICE = "per_device_train_batch_size"
CHOICES = ("algorithm.advantage.type", "algorithm.policy_loss.type", "preference.loss.type")
"""Keys that a preset in the recipe sets with all that belongs to them."""
HIGH = "algorithm.policy_loss.high"
ROUNDS = 60


@dataclass
class Translation:
    """A run's file, and what became of each option."""

    table: dict[str, Any]
    taken: dict[str, tuple[str, Any]] = field(default_factory=dict)
    """Our key and value, by the option's name."""
    differs: dict[str, str] = field(default_factory=dict)
    """Options that have a key here which means something else, or that the check refused: why."""
    missing: dict[str, str] = field(default_factory=dict)
    """Options without a counterpart: the reason."""
    unknown: list[str] = field(default_factory=list)
    """Options that the table of other libraries does not have."""
    needs: list[str] = field(default_factory=list)
    """What has to be filled in before the file can run."""
    refusal: str | None = None
    """Why the file does not pass the check; None if it does."""

    def toml(self) -> str:
        """Return the file's text, with what is open as comments."""
        notes = [f"# To fill in: {line}" for line in self.needs]
        notes += [f"# {name}: {why}" for name, why in self.differs.items()]
        notes.append(
            "# What was left out there has that library's defaults; what is left out here, ours."
        )
        return "\n".join([*(note.replace("\n", " ") for note in notes), "", table_toml(self.table)])


def translate(foreign: Foreign) -> Translation:
    """Return the run's file of another library's options."""
    stage = _stage(foreign)
    made = Translation({"recipe": [stage]})
    for name, value in sorted(
        foreign.options.items(), key=lambda pair: pair[0] != "sft_model_path"
    ):
        if value in (None, "", "auto", "-1", -1) or name.endswith(KL_SWITCHES):
            continue
        answer = answer_to(name)
        if answer is None:
            made.unknown.append(name)
        elif is_open(value):
            made.differs[name] = f"its value, {value}, is only known when that program runs."
        elif not answer.keys:
            made.missing[name] = answer.note
        else:
            _take(made, name, value, answer)
    _kl(made, foreign.options)
    _divide(made, foreign.options)
    _per_device(made, foreign.options)
    _fill_in(made, stage)
    _check(made)
    return made


def _stage(foreign: Foreign) -> str:
    """Return the recipe's stage: a preset that an option names, or what the program trains."""
    stage = foreign.stage or "ppo"
    for name, value in foreign.options.items():
        answer = answer_to(name)
        if answer and set(answer.keys) & set(CHOICES) and (preset := preset_of(value)):
            same = PREFERENCES if stage in PREFERENCES else ALGORITHMS
            if preset in same and stage in same and stage not in LOSSES:
                stage = preset
        elif name.endswith("ipo_enable") or name == "ipo":
            stage = "ipo" if value is True and stage == "dpo" else stage
    return stage


def _take(made: Translation, name: str, value: Any, answer: Equivalent) -> None:
    """Set the key of one option, or say why it is not set."""
    key = read_by_recipe(answer.keys, made.table)[0]
    try:
        if key.endswith(".warmup_steps") and isinstance(value, float) and 0 < value < 1:
            key = key.replace("_steps", "_ratio")  # TRL's warmup_steps may be a share
        if reason := _other_meaning(key, name, answer.note, made.table["recipe"][0]):
            raise Unlike(reason)
        if key in CHOICES:
            _check_choice(made.table["recipe"][0], key, value, answer.note)
            made.taken[name] = ("recipe", made.table["recipe"])
        elif key == "algorithm.scores":
            row = added_in(answer.note, value)
            made.table.setdefault("algorithm", {}).setdefault("scores", []).append(row)
            made.taken[name] = (key, row)
        elif key == "data.columns":
            ours = re.search(r"\{ (\w+) = ", answer.note)
            _put(made, name, f"data.columns.{ours[1]}" if ours else key, value)
        elif key.startswith("reward."):
            _reward(made, name, key, value, answer.note)
        else:
            _setting(made, name, value, Equivalent((key,), answer.note))
    except (Unlike, ConfigError) as error:
        made.differs[name] = str(error)


def _check_choice(stage: str, key: str, value: Any, note: str) -> None:
    """Raise `Unlike` where the recipe's preset is not what an option chooses."""
    preset = preset_of(value)
    if preset == stage or (preset == "grpo" and stage in LOSSES):
        return
    if key == "algorithm.policy_loss.type" and str(value).lower() in USUAL and stage in ALGORITHMS:
        return
    if preset is None:
        raise Unlike(f"{value} is none of our presets. {note}".strip())
    raise Unlike(f"The recipe is {stage}, and {value} is our preset {preset}.")


def _setting(made: Translation, name: str, value: Any, answer: Equivalent) -> None:
    """Set the one key of an answer, and what has to be said beside it. Raises `Unlike`."""
    (key,), note = answer.keys, answer.note
    ours = other = value_for(key, name, value, note)
    if key == "algorithm.policy_loss.low" and isinstance(ours, list):
        ours, other = ours[0], ours[-1]
    if key == HIGH:  # it counts beside an option for both sides
        made.table.get("algorithm", {}).get("policy_loss", {}).pop("high", None)
    _put(made, name, key, ours)
    if owner := re.search(r'It is of (?:[\w.]*\.)?(\w+)\.type = "(\w+)"', note):
        _set_type(made, key, owner[2])
    if "controller" in key and key != "algorithm.kl.controller.type":
        _set_type(made, key, "adaptive")
    has_high = any(taken == HIGH for taken, _ in made.taken.values())
    if key == "algorithm.policy_loss.low" and "other side" in note and not has_high:
        set_value(made.table, HIGH, other)
    if key.startswith("policy.adapter."):
        made.table["policy"]["adapter"].setdefault("type", "lora")


def _other_meaning(key: str, name: str, note: str, stage: str) -> str:
    """Return why an option's value is not taken over, whatever it is; "" if it may be."""
    last = name.rpartition(".")[2]
    if FROZEN.search(name) and key.startswith(SHARED):
        return f"It is of another model than the policy; {key} is the policy's."
    if key.startswith("algorithm.") and stage not in ALGORITHMS:
        return f"It is of RL stages, and {stage} is none."
    if last == "max_len" and stage in ALGORITHMS:
        return (
            "It bounds prompt and answer together: set data.max_prompt_tokens and "
            "rollout.max_new_tokens."
        )
    if key in {"optim.minibatches", "data.train", "data.eval"} or last == PER_DEVICE:
        return note
    if key == "run.steps" and last not in {"max_steps", "total_training_steps"}:
        return note or "Here run.steps counts steps, not passes over the data."
    return ""


def _set_type(made: Translation, key: str, kind: str) -> None:
    """Set the type of the part that has a key, where no option has."""
    part = made.table
    for step in key.split(".")[:-1]:
        part = part.setdefault(step, {})
    if part.get(key.rpartition(".")[2]):
        part.setdefault("type", kind)


def _kl(made: Translation, options: Mapping[str, Any]) -> None:
    """Say where the KL is, from the switches that OpenRLHF and veRL have for it."""
    switches = {n: v for n, v in options.items() if n.endswith(KL_SWITCHES)}
    if not switches or made.table["recipe"][0] not in ALGORITHMS:
        return
    on = [name for name, value in switches.items() if value is True]
    if not on and any(name.endswith("kl.use_loss") for name in switches):
        return  # OpenRLHF's KL is in the reward then
    kind = "none" if not on else "in_loss" if "loss" in on[0].rpartition(".")[2] else "in_reward"
    for name, (key, _) in list(made.taken.items()):
        if key.startswith("algorithm.kl.") and kind == "none":
            del made.taken[name]
            made.differs[name] = "It has no effect there: both KL switches are off."
    kl = made.table.setdefault("algorithm", {}).setdefault("kl", {})
    if kind == "none":
        kl.clear()
    kl["type"] = kind
    for name in switches:
        made.taken[name] = ("algorithm.kl.type", kind)


def _put(made: Translation, name: str, key: str, value: Any) -> None:
    here: Any = made.table
    for step in key.split(".")[:-1]:
        here = here.get(step, {}) if isinstance(here, dict) else {}
    last = key.rpartition(".")[2]
    if isinstance(here, dict) and last in here and here[last] != value:
        if isinstance(here[last], dict):
            return  # a table of which a key was set before
        raise Unlike(f"{key} was set by another option already, to {here[last]!r}.")
    set_value(made.table, key, value)
    made.taken[name] = (key, value)


def _reward(made: Translation, name: str, key: str, value: Any, note: str) -> None:
    """Add a row to [[reward]], of the type that the note of the table names."""
    values = value if isinstance(value, list) else str(value).split(",")
    field_of = key.partition(".")[2]
    if field_of == "function":
        raise Unlike(f"{note} There: {value}.")
    if field_of not in {"model", "url"}:
        raise Unlike(note)
    for each in values:
        if str(each).endswith(".py"):
            row = {"type": "function", "function": f"{each}:reward_func"}
        else:
            row = {"type": "server" if field_of == "url" else "model", field_of: str(each)}
        made.table.setdefault("reward", []).append(row)
    made.taken[name] = ("reward", made.table["reward"])


def _divide(made: Translation, options: Mapping[str, Any]) -> None:
    """Set `optim.minibatches` from the sizes that OpenRLHF and veRL give instead."""
    sizes = {
        name.rpartition(".")[2]: value for name, value in options.items() if not FROZEN.search(name)
    }
    for table in ("rollout", "train"):  # OpenRLHF has had two ways to write them
        if f"{table}.batch_size" in options:
            sizes[f"{table}_batch_size"] = options[f"{table}.batch_size"]
    prompts = made.table.get("rollout", {}).get("prompts_per_step")
    per_prompt = made.table.get("rollout", {}).get("samples_per_prompt", 1)
    if "ppo_mini_batch_size" in sizes:  # counts prompts
        whole, part, name = prompts, sizes["ppo_mini_batch_size"], "ppo_mini_batch_size"
    elif "rollout_batch_size" in sizes and "train_batch_size" in sizes:  # counts responses
        whole, part, name = prompts, sizes["train_batch_size"], "train_batch_size"
        whole = whole * per_prompt if isinstance(whole, int) else None
    else:
        return
    if not (isinstance(whole, int) and isinstance(part, int) and part > 0 and whole % part == 0):
        return
    set_value(made.table, "optim.minibatches", whole // part)
    for option in [each for each in made.differs if each.replace(".", "_").endswith(name)]:
        del made.differs[option]
        made.taken[option] = ("optim.minibatches", whole // part)


def _per_device(made: Translation, options: Mapping[str, Any]) -> None:
    """Set the batch of a step from TRL's batch of one device, for a run of one process."""
    size, steps = options.get(PER_DEVICE), options.get("gradient_accumulation_steps", 1)
    if not (isinstance(size, int) and isinstance(steps, int) and size > 0 and steps > 0):
        return
    answer = answer_to(PER_DEVICE)
    assert answer is not None
    key = read_by_recipe(answer.keys, made.table)[0]
    rows = size * steps
    generations = options.get("num_generations", 8 if made.table["recipe"][0] != "rloo" else 2)
    grouped = getattr(ALGORITHMS.get(made.table["recipe"][0]), "needs_group", False)
    if grouped and isinstance(generations, int) and rows % generations == 0:
        rows //= generations  # there, responses are counted
    set_value(made.table, key, rows)
    made.differs.pop(PER_DEVICE, None)
    made.differs.pop("gradient_accumulation_steps", None)
    made.taken[PER_DEVICE] = (key, rows)
    made.needs.append(f"{key}, which is {rows} for one device there: multiply it by their number")


def _fill_in(made: Translation, stage: str) -> None:
    """Put placeholders where a run needs something that the options do not say."""
    if "model" not in made.table.setdefault("policy", {}):
        made.table["policy"]["model"] = "path/to/model"
        made.needs.append("policy.model, a folder or hub id of a causal language model")
    if "train" not in made.table.setdefault("data", {}):
        made.table["data"]["train"] = "path/to/data.jsonl"
        made.needs.append("data.train, a file of rows (docs/data.md)")
    rollout = made.table.get("rollout", {})
    if (
        stage in ALGORITHMS
        and ALGORITHMS[stage].needs_group
        and not rollout.get("samples_per_prompt")
    ):
        set_value(made.table, "rollout.samples_per_prompt", 8)
        made.needs.append("rollout.samples_per_prompt, which the options leave out: 8 is written")
    if (stage in ALGORITHMS or stage == "online_dpo") and not made.table.get("reward"):
        made.table["reward"] = [{"type": "function", "function": "rewards.py:reward"}]
        made.needs.append("[[reward]], what is learnt from (docs/rewards.md)")


def _check(made: Translation) -> None:
    """Check the file, and take out what is refused until it passes or what is refused stays."""
    for _ in range(ROUNDS):
        try:
            settings_of_table(made.table, "imported", "imported")
            made.refusal = None
            return
        except ConfigError as error:
            made.refusal = str(error)
            blamed = next(
                (
                    k
                    for k in re.findall(r"[a-z_]+(?:\.\w+)+", str(error))
                    if _remove(made, k, str(error))
                ),
                None,
            )
            if blamed is None:
                return


def _remove(made: Translation, key: str, why: str) -> bool:
    """Take out the options that set a key or a part of it; return whether there were any."""
    names = [n for n, (k, _) in made.taken.items() if k == key] or [
        n for n, (k, _) in made.taken.items() if key.startswith(f"{k}.") or k.startswith(f"{key}.")
    ]
    for name in names:
        taken, _ = made.taken.pop(name)
        made.differs[name] = why.removeprefix("imported: ")
        *path, last = taken.split(".")
        here: Any = made.table
        for step in path:
            here = here.get(step, {}) if isinstance(here, dict) else {}
        if isinstance(here, dict):
            here.pop(last, None)
        if taken == "algorithm.policy_loss.low":
            here.pop("high", None)
    return bool(names)
