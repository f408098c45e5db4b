"""The inputs of every comparison: the same shapes, texts and lengths from the same seeds for both
sides.

The workers of both sides import this file, so it needs torch and transformers and nothing else.
"""

import argparse
import functools
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

PAD, EOS = 0, 1
LORA_RANK, LORA_ALPHA = 16, 32
"""The adapter that a pretrained model is trained with, on all linear layers but the head."""


@dataclass(frozen=True)
class Size:
    """The shape of a Llama model with random weights, or of a pretrained model, and how much it is
    asked to do."""

    hidden: int
    layers: int
    heads: int
    vocabulary: int
    limit: int
    """The longest response."""
    rows: int = 64
    folder: str = ""
    """The folder of a pretrained model, which gets an adapter; "" for a model of random weights."""
    pad: int = PAD
    eos: int = EOS
    ppo_epochs: int = 4

    @classmethod
    def of_folder(cls, folder: str) -> "Size":
        """Return the size of a pretrained model: 32 answers of 24 tokens, one epoch of PPO."""
        config = AutoConfig.from_pretrained(folder).get_text_config()
        ends = config.eos_token_id
        eos = ends[0] if isinstance(ends, list) else ends
        return cls(
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.vocab_size,
            limit=24,
            rows=32,
            folder=folder,
            pad=eos if config.pad_token_id is None else config.pad_token_id,
            eos=eos,
            ppo_epochs=1,
        )

    def lengths(self, count: int, seed: int = 2) -> list[int]:
        """Return the tokens of each response: spread as `response_lengths` says, or for a
        pretrained model, all at the limit."""
        if self.folder:
            return [self.limit] * count
        return response_lengths(self.limit, count, seed)

    def config(self, **more: Any) -> Any:
        return AutoConfig.for_model(
            "llama",
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=3 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=PAD,
            **more,
        )

    def parameters(self) -> int:
        return self.vocabulary * self.hidden + self.layers * 13 * self.hidden**2


SIZES = {
    "1m": Size(128, 4, 4, 4_096, 128),
    "10m": Size(320, 6, 8, 4_096, 128),
    "gpt2": Size(768, 12, 12, 50_257, 96),
    "tiny": Size(32, 2, 2, 256, 16, rows=8),
}


def size_of(name: str) -> Size:
    """Return the size of a name in `SIZES`, or of a model folder. Raises ValueError."""
    if name in SIZES:
        return SIZES[name]
    if (Path(name) / "config.json").is_file():
        return Size.of_folder(name)
    raise ValueError(f"{name}: neither a model folder nor one of {', '.join(SIZES)}")


def language_model(size: Size, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if size.folder:
        return AutoModelForCausalLM.from_pretrained(size.folder, dtype=torch.float32).eval()
    return AutoModelForCausalLM.from_config(size.config(), dtype=torch.float32).eval()


def scalar_model(size: Size, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if size.folder:
        return AutoModelForSequenceClassification.from_pretrained(
            size.folder, num_labels=1, dtype=torch.float32
        ).eval()
    return AutoModelForSequenceClassification.from_config(
        size.config(num_labels=1), dtype=torch.float32
    ).eval()


def tokenizer(size: Size) -> Any:
    """Return a tokenizer in which every token is a word: "t2" is token 2; or the folder's own."""
    if size.folder:
        return folder_tokenizer(size.folder)
    words = {"<pad>": PAD, "<eos>": EOS} | {f"t{i}": i for i in range(2, size.vocabulary)}
    by_word = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    by_word.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=by_word, pad_token="<pad>", eos_token="<eos>")


@functools.cache
def folder_tokenizer(folder: str) -> Any:
    """Return the tokenizer of a model folder."""
    return AutoTokenizer.from_pretrained(folder)


def prompts(
    size: Size, count: int, low: int = 16, high: int = 48, seed: int = 1
) -> list[list[int]]:
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (count,), generator=rng).tolist()
    if size.folder:
        return _written_prompts(size, lengths, rng)
    return [torch.randint(2, size.vocabulary, (n,), generator=rng).tolist() for n in lengths]


def _written_prompts(size: Size, lengths: Sequence[int], rng: torch.Generator) -> list[list[int]]:
    """Return the ids of texts of so many words, each a token of the vocabulary: random ids would
    not come back from their text as they were, and some peers take text."""
    tokenizer_ = tokenizer(size)
    pieces = tokenizer_.batch_decode([[i] for i in range(min(size.vocabulary, 50_000))])
    words = [piece.strip() for piece in pieces]
    words = sorted({word for word in words if word.isascii() and word.isalpha() and len(word) > 2})
    texts = (
        " ".join(words[i] for i in torch.randint(len(words), (n,), generator=rng).tolist())
        for n in lengths
    )
    return [tokenizer_(line)["input_ids"] for line in texts]


def response_lengths(limit: int, count: int, seed: int = 2) -> list[int]:
    """Return log-normal lengths with a mean of a third of the limit: many short responses, few at
    the limit, the first one exactly at it."""
    rng = torch.Generator().manual_seed(seed)
    drawn = torch.exp(0.6 * torch.randn(count, generator=rng)) * limit / 3 / 2.718281828 ** (0.18)
    lengths: list[int] = drawn.round().long().clamp(2, limit).tolist()
    return [limit, *lengths[1:]]


def responses(size: Size, count: int, seed: int = 3) -> list[list[int]]:
    rng = torch.Generator().manual_seed(seed)
    lengths = size.lengths(count, seed)
    return [
        [*torch.randint(2, size.vocabulary, (n - 1,), generator=rng).tolist(), size.eos]
        for n in lengths
    ]


def text(size: Size, ids: list[int]) -> str:
    """Return the text of a prompt, without control tokens."""
    if size.folder:
        return str(tokenizer(size).decode(ids, skip_special_tokens=True))
    return " ".join(f"t{i}" for i in ids)


class StopAt(StoppingCriteria):  # type: ignore[misc]
    """Ends each row of transformers' `generate` after its own number of tokens."""

    def __init__(self, lengths: Sequence[int], prompt_width: int) -> None:
        self.lengths, self.prompt_width = torch.tensor(lengths), prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.lengths = self.lengths.to(input_ids.device)
        return input_ids.shape[1] - self.prompt_width >= self.lengths


def left_padded(rows: Sequence[Sequence[int]], pad: int = PAD) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids of the rows, padded on the left to the longest, and their attention mask."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = torch.tensor(row), 1
    return ids, mask


def transformers_generate(
    model: Any,
    rows: Sequence[Sequence[int]],
    lengths: Sequence[int],
    limit: int,
    pad: int = PAD,
) -> torch.Tensor:
    """Run transformers' `generate` with nothing that filters or records; row i ends after
    `lengths[i]` tokens."""
    ids, mask = left_padded(rows, pad)
    with torch.no_grad():
        output: torch.Tensor = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=limit,
            eos_token_id=None,
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([StopAt(lengths, ids.shape[1])]),
        )
    return output


@dataclass(frozen=True)
class Measurement:
    """What a worker measured: seconds of each repeat, and how much was computed in it."""

    seconds: list[float]
    tokens: int
    optimizer_steps: int | None = None
    other: dict[str, float] = field(default_factory=dict)


def clock() -> float:
    """Return seconds: of processor time where there is one thread, since other programs do not
    change that; of the wall clock otherwise."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed(work: Callable[[], object], repeats: int) -> list[float]:
    """Return the seconds of each of `repeats` calls, after one that warms up."""
    seconds = []
    for i in range(repeats + 1):
        started = clock()
        work()
        if i:
            seconds.append(clock() - started)
    return seconds


def peak_mb() -> float:
    """Return the largest resident size of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def print_result(measurement: Measurement) -> None:
    """Print one line that speed.py reads."""
    numbers = {
        "seconds": measurement.seconds,
        "tokens": measurement.tokens,
        "optimizer_steps": measurement.optimizer_steps,
        **measurement.other,
        "peak_mb": peak_mb(),
        "threads": torch.get_num_threads(),
    }
    print("RESULT " + json.dumps(numbers), file=sys.__stdout__, flush=True)


def run_worker(
    works: dict[str, Callable[[Size, int], Measurement]],
    description: str | None,
    missing_package: Callable[[str], str | None] = lambda _: None,
) -> None:
    """Run the work that the command line names and print its result, or that it was skipped for
    want of a package."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", choices=sorted(works))
    parser.add_argument("size", type=size_of, help=f"a model folder, or {', '.join(SIZES)}")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if package := missing_package(arguments.work):
        print("RESULT " + json.dumps({"skipped": f"{package} is not installed"}))
        return
    print_result(works[arguments.work](arguments.size, arguments.repeats))
