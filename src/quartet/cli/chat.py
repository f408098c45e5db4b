"""A conversation with a trained policy in the terminal."""

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from quartet.assembly.device import device
from quartet.data.encoding import Encoder
from quartet.experience import Prompt
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.models.actor_critic import freeze
from quartet.models.language_model import (
    ModelError,
    load_model,
    load_tokenizer,
    longest_of,
    stop_ids,
)
from quartet.models.precision import compute_in, dtype_of
from quartet.models.support import limit_support
from quartet.runs.wording import EMPTY

HELP = """/compare  turn the answers from before RL on or off
/new      forget the conversation
/help     print this
/quit     leave (so does the end of the input)"""


def _stop_strings(folder: Path) -> tuple[str, ...]:
    """Return the stop strings of the settings in a run's folder or in that of an exported policy;
    none where there are no settings."""
    try:
        table = tomllib.loads((folder / "config.resolved.toml").read_text(encoding="utf-8"))
        return tuple(str(string) for string in table["rollout"]["stop"] if string)
    except (OSError, ValueError, LookupError, TypeError):
        return ()


def _loaded(folder: Path) -> Any:
    """Return the model of a folder to be sampled from, on the GPU where there is one."""
    place = device("auto")
    return compute_in(freeze(load_model(folder, place)), dtype_of("auto", place))


class ChatSession:
    """A conversation with the policy of a run. If the run has the policy from before RL too, both
    can answer side by side."""

    def __init__(self, run: Path, temperature: float, max_new_tokens: int, seed: int = 0) -> None:
        """`run` is a run's folder, or the Hugging Face folder of any language model."""
        after = next((run / name for name in ("policy", "sft") if (run / name).is_dir()), None)
        if after is None and (run / "config.json").is_file():
            after = run
        if not run.exists():
            raise ModelError(f"{run}: no such folder.")
        if after is None:
            raise ModelError(
                f"{run}: has no policy/ or sft/ to talk to, and is no model's folder. Name a run "
                "folder that finished a stage, or a Hugging Face folder."
            )
        self.tokenizer = load_tokenizer(after)
        stop = _stop_strings(run)
        self.sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, stop=stop)
        model = _loaded(after)
        self.longest = longest_of(model.config)
        self.after = self._generator(model, seed)
        before = run / "sft"
        self.before = (
            self._generator(_loaded(before), seed) if before.is_dir() and before != after else None
        )
        self.compare = False
        self.messages: list[dict[str, str]] = []

    def talk(self, console: Console, lines: Iterable[str]) -> None:
        """Answer line by line until the input ends or is /quit."""
        conversation = self.tokenizer.chat_template is not None
        console.print(
            "A line is a message."
            if conversation
            else "A line is the beginning of a text, which the policy continues.",
            "/help: all commands.",
            style="dim",
        )
        try:
            for line in self._prompted(console, lines):
                if line in {"/quit", "/exit"}:
                    break
                if line == "/compare":
                    self._toggle(console)
                elif line == "/new":
                    self.messages = []
                    console.print("The conversation is forgotten.", style="dim")
                elif line.startswith("/"):
                    if line != "/help":
                        console.print(f"{line}: no such command.", soft_wrap=True)
                    console.print(HELP, style="dim", soft_wrap=True)
                elif line:
                    self.answer(console, line)
        except KeyboardInterrupt:
            console.print()

    def answer(self, console: Console, line: str) -> None:
        """Print the policy's answer to a message, and add both to the conversation."""
        messages = [*self.messages, {"role": "user", "content": line}]
        ids = Encoder(self.tokenizer, 1, 1).prompt_ids(
            messages if self.tokenizer.chat_template else line
        )
        if len(ids) + self.sampling.max_new_tokens > self.longest:
            console.print(
                f"{len(ids):,} tokens with an answer of up to {self.sampling.max_new_tokens:,} are "
                f"more than the {self.longest:,} that the model reads. /new forgets the "
                "conversation; --max-new-tokens shortens answers.",
                soft_wrap=True,
            )
            return
        self.messages = messages
        prompt = Prompt("chat", tuple(ids), line)
        if self.compare and self.before is not None:
            console.print(
                Text("before ", style="dim").append(
                    self._reply(self.before, prompt) or EMPTY, style="default"
                )
            )
        reply = self._reply(self.after, prompt)
        console.print(
            Text("after  " if self.compare else "", style="green").append(
                reply or EMPTY, style="default"
            )
        )
        self.messages = [*self.messages, {"role": "assistant", "content": reply}]

    def _toggle(self, console: Console) -> None:
        if self.before is None:
            console.print("This run has no policy from before RL to compare with.")
            return
        self.compare = not self.compare
        console.print(
            "Answers from before and after." if self.compare else "Answers of the policy only."
        )

    def _reply(self, generator: NativeGenerator, prompt: Prompt) -> str:
        text = generator.generate([prompt], self.sampling)[0].response.strip()
        return "".join(c if c.isprintable() or c == "\n" else " " for c in text)

    def _generator(self, model: Any, seed: int) -> NativeGenerator:
        limit_support(model, self.tokenizer)
        return NativeGenerator(model, self.tokenizer, stop_ids(model, self.tokenizer), seed)

    @staticmethod
    def _prompted(console: Console, lines: Iterable[str]) -> Iterable[str]:
        source = iter(lines)
        while True:
            if console.is_terminal:
                console.print("> ", end="", style="bold")
            line = next(source, None)
            if line is None:
                return
            yield line.strip()
