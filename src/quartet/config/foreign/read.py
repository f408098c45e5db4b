"""Reads another library's script or configuration into options, without executing any of it.

Python is parsed to its syntax tree, shell is split into words, YAML is loaded as plain data. Values
that only a run of the program would give are left as text, and told apart by `is_open`.
"""

import ast
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quartet.errors import QuartetError
from quartet.io.texts import line_of, not_utf8

MAX_BYTES = 4_000_000
STAGES = {
    "sft": "sft",
    "reward": "reward_model",
    "rm": "reward_model",
    "ppo": "ppo",
    "ppo_ray": "ppo",
    "main_ppo": "ppo",
    "grpo": "grpo",
    "gspo": "gspo",
    "rloo": "rloo",
    "dpo": "dpo",
    "kto": "kto",
    "orpo": "orpo",
    "cpo": "simpo",
    "onlinedpo": "online_dpo",
    "dpo_online": "online_dpo",
}
"""What the classes, scripts and commands of other libraries train, by the word in their names."""
PROGRAMS = (
    re.compile(r"openrlhf\.cli\.train_(\w+)"),
    re.compile(r"verl\.trainer\.(main_\w+|\w*sft\w*)"),
    re.compile(r"\btrl +(\w+)"),
    re.compile(r"scripts/(?:\w+/)?(?:train_)?(\w+)\.py"),
)
"""The programs of commands, the surest first; each names what it trains."""
LAUNCHERS = {
    *("address", "runtime_env_json", "working_dir", "module", "include", "standalone", "nnodes"),
    *("nproc_per_node", "node_rank", "master_addr", "master_port", "rdzv_backend", "rdzv_endpoint"),
    *("config_file", "config_path", "config_name", "num_processes", "num_machines"),
    "main_process_port",
}
"""Options of what starts the program."""
OTHER_NAMES = {"r": "lora_r", "model": "model_name_or_path"}
"""Arguments of LoraConfig and of trainers, by the option of the same meaning."""


class ForeignError(QuartetError, ValueError):
    """A file that cannot be read as another library's configuration: one sentence."""


@dataclass
class Foreign:
    """What another library's file says."""

    stage: str | None = None
    """The stage of ours that it trains, None where the file does not say."""
    options: dict[str, Any] = field(default_factory=dict)
    """The values by option; a name may have tables before it (`actor_rollout_ref.rollout.n`)."""


def is_open(value: Any) -> bool:
    """Return whether a value is only known when the program runs."""
    if isinstance(value, list | tuple):
        return any(map(is_open, value))
    return isinstance(value, str) and ("$" in value or value.startswith("<Python>"))


def read_foreign(path: Path) -> Foreign:
    """Return what a .py, .sh, .yaml or .yml file says. Raises `ForeignError`."""
    readers = {".py": of_python, ".sh": of_shell, ".yaml": of_yaml, ".yml": of_yaml}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ForeignError(
            f"{path}: name a .py script, a .sh script or a .yaml file of TRL, OpenRLHF or veRL."
        )
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ForeignError(f"{path}: has more than {MAX_BYTES:,} bytes.")
        text = path.read_text(encoding="utf-8-sig")
        found = reader(text)
    except UnicodeDecodeError as error:
        words = not_utf8(error, f"byte {error.start} of the file")
        raise ForeignError(f"{path}:{line_of(error)}: {words}") from None
    except OSError as error:
        raise ForeignError(f"{path}: cannot be read ({error.strerror}).") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, ForeignError):
            raise
        first = " ".join(str(error).split())[:200]
        raise ForeignError(f"{path}: cannot be understood ({first}).") from None
    if not found.options:
        raise ForeignError(
            f"{path}: no options were found in it. A Python script has them in a call such as "
            "GRPOConfig(…), a shell script as --name value or name=value."
        )
    found.stage = found.stage or stage_in(path.stem)
    return found


def stage_in(name: str) -> str | None:
    """Return what a script of this name trains: the first word of the table that it has, of
    several at one place the longest."""
    found = [
        (match.start(), -len(word), stage)
        for word, stage in STAGES.items()
        if (match := re.search(rf"(?<![a-z]){re.escape(word)}(?![a-z])", name.lower()))
    ]
    return min(found)[2] if found else None


# --- shell


def of_shell(text: str) -> Foreign:
    """Return the options of the commands in a script, `--name value` and `name=value`; of an option
    that is there twice, the first."""
    variables: dict[str, str] = {}
    lines = re.sub(r"\\\s*\n", " ", text).splitlines()
    for line in lines:
        assigned = re.match(
            r"\s*(?:export\s+)?(\w+)=(\"[^\"]*\"|'[^']*'|[^\s;]*)\s*(?:#.*)?$", line
        )
        if assigned:
            variables[assigned[1]] = substituted(assigned[2].strip("\"'"), variables)
    found = Foreign()
    programs = [match[1] for each in PROGRAMS for line in lines for match in each.finditer(line)]
    found.stage = next((stage for name in programs if (stage := stage_in(name))), None)
    for line in lines:
        for name, value in options_in(words_of(line)):
            found.options.setdefault(name, substituted(value, variables))
    found.options = {name: typed(value) for name, value in found.options.items()}
    return found


def words_of(line: str) -> list[str]:
    """Return the words of a line of shell; a line with an open quote is split at its spaces."""
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return line.replace('"', " ").replace("'", " ").split()


def options_in(words: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield the options among words, with True for one without a value."""
    for place, word in enumerate(words):
        following = words[place + 1] if place + 1 < len(words) else ""
        if match := re.fullmatch(r"--([A-Za-z][\w.-]*)(?:=(.*))?", word, re.DOTALL):
            name, value = match[1].replace("-", "_"), match[2]
            if value is None:
                flag = not following or re.match(r"--?[A-Za-z]|[&|;]", following)
                more = [following]
                for other in words[place + 2 :]:
                    if not re.fullmatch(r"-?\d[\d.e-]*", other):
                        break
                    more.append(other)
                value = "true" if flag else " ".join(more)
            if name not in LAUNCHERS:
                yield name, value
        elif match := re.fullmatch(r"\+{0,2}([A-Za-z]\w*(?:\.\w+)+)=(.*)", word, re.DOTALL):
            yield match[1], match[2]


def substituted(text: str, variables: Mapping[str, str]) -> str:
    """Return text with the shell variables that the script sets itself; others stay."""

    def value(match: "re.Match[str]") -> str:
        name, default = match[1] or match[3], match[2]
        return variables.get(name, default if default is not None else match[0])

    return re.sub(r"\$\{(\w+)(?::?-([^}]*))?\}|\$(\w+)", value, text)


def typed(value: Any) -> Any:
    """Return a word as a number, truth value, list or text."""
    if not isinstance(value, str):
        return value
    word = value.strip().strip("\"'")
    if word.lower() in {"true", "false"}:
        return word.lower() == "true"
    if word.lower() in {"none", "null", ""}:
        return None
    for kind in (int, float):
        try:
            return kind(word.replace("_", "") if re.fullmatch(r"[\d_]+", word) else word)
        except ValueError:
            continue
    if re.fullmatch(r"\[.*\]", word):
        return [typed(each) for each in word[1:-1].split(",") if each.strip()]
    if re.fullmatch(r"-?\d[\d.e-]*( -?\d[\d.e-]*)+", word):
        return [typed(each) for each in word.split()]
    return word


# --- YAML


def of_yaml(text: str) -> Foreign:
    """Return the values of a YAML file by their dotted names. References to values of the same file
    (`${data.seed}`) are followed."""
    import yaml

    try:
        table = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(error) from None
    if not isinstance(table, dict):
        raise ValueError("it is no mapping")
    options = dict(_flat(table))
    for name, value in options.items():
        reference = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
        if reference and reference[1] in options:
            options[name] = options[reference[1]]
    stage = None
    if "actor_rollout_ref" in table:
        stage = "ppo"
    elif isinstance(named := table.get("stage") or table.get("trainer_type"), str):
        stage = stage_in(named)
    typed_options = {name: typed(value) for name, value in options.items()}
    return Foreign(stage, typed_options)


def _flat(table: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


# --- Python


def of_python(text: str) -> Foreign:
    """Return the arguments of configuration classes in a script, and of what loads models and data;
    for a script that takes them from its command line, those of the command in its docstring."""
    tree = ast.parse(text)
    names = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = Foreign()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            _read_call(node, names, found)
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    strings = [t.value for t in texts if isinstance(t, ast.Constant) and isinstance(t.value, str)]
    shown = "\n".join(strings)
    in_comments = "\n".join(re.findall(r"^# ?(.*)$", text, re.MULTILINE))
    for command in (shown, in_comments):
        if "--" in command:
            told = of_shell(command)
            found.stage = found.stage or told.stage
            found.options = {n: v for n, v in found.options.items() if not is_open(v)}
            for name, value in told.options.items():
                found.options.setdefault(name, value)
    if found.stage is None:
        classes = re.findall(r"\b(\w+?)(?:Config|Trainer)\b", text)
        stages = [STAGES[name.lower()] for name in classes if name.lower() in STAGES]
        found.stage = stages[0] if stages else None
    return found


def _read_call(call: ast.Call, names: Mapping[str, ast.expr], found: Foreign) -> None:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    first = _value(call.args[0], names) if call.args else None
    if match := re.fullmatch(r"(\w*?)(Config|TrainingArguments|Trainer)", name):
        if stage := STAGES.get(match[1].lower()):
            found.stage = found.stage or stage
        elif match[1] not in {"Lora", "", "Model", "Script", "BitsAndBytes"}:
            return
        for keyword in call.keywords:
            value = _value(keyword.value, names)
            if keyword.arg is not None and not is_open(value):
                found.options.setdefault(OTHER_NAMES.get(keyword.arg, keyword.arg), value)
        if match[1] == "Lora":
            found.options.setdefault("use_peft", True)
    elif name == "load_dataset" and isinstance(first, str):
        found.options.setdefault("dataset_name", first)
    elif (
        name == "from_pretrained"
        and isinstance(first, str)
        and isinstance(call.func, ast.Attribute)
    ):
        owner = getattr(call.func.value, "id", "")
        if "CausalLM" in owner:
            found.options.setdefault("model_name_or_path", first)
        elif "SequenceClassification" in owner:
            found.options.setdefault("reward_model_path", first)


def _value(node: ast.expr, names: Mapping[str, ast.expr], depth: int = 0) -> Any:
    """Return a literal, also behind a name; other expressions as text that begins with <Python>."""
    if isinstance(node, ast.Name) and node.id in names and depth < 5:
        return _value(names[node.id], names, depth + 1)
    if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "torch":
        return node.attr
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return f"<Python> {ast.unparse(node)}"
