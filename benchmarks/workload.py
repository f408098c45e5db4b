"""What is computed in every comparison, whoever computes it: the same shapes, texts and lengths
from the same seeds.

Imported by the workers of both sides, so it knows torch and transformers and nothing else.
"""

import json
import resource
import sys
import time
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

PAD, EOS = 0, 1


@dataclass(frozen=True)
class Size:
    hidden: int
    layers: int
    heads: int
    vocabulary: int
    limit: int
    """The longest response."""
    rows: int = 64

    def config(self, **more):
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


def language_model(size: Size, seed: int = 0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(size.config(), dtype=torch.float32).eval()


def scalar_model(size: Size, seed: int = 0):
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(
        size.config(num_labels=1), dtype=torch.float32
    ).eval()


def tokenizer(size: Size):
    """Every token a word: t2 is token 2."""
    words = {"<pad>": PAD, "<eos>": EOS} | {f"t{i}": i for i in range(2, size.vocabulary)}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def prompts(
    size: Size, count: int, low: int = 16, high: int = 48, seed: int = 1
) -> list[list[int]]:
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (count,), generator=rng).tolist()
    return [torch.randint(2, size.vocabulary, (n,), generator=rng).tolist() for n in lengths]


def response_lengths(limit: int, count: int, seed: int = 2) -> list[int]:
    """Log-normal with a mean of a third of the limit, as answers are: many short, few at the
    limit."""
    rng = torch.Generator().manual_seed(seed)
    drawn = torch.exp(0.6 * torch.randn(count, generator=rng)) * limit / 3 / 2.718281828 ** (0.18)
    lengths = drawn.round().long().clamp(2, limit)
    lengths[0] = limit  # somebody always runs into it
    return lengths.tolist()


def responses(size: Size, count: int, seed: int = 3) -> list[list[int]]:
    rng = torch.Generator().manual_seed(seed)
    lengths = response_lengths(size.limit, count, seed)
    return [
        [*torch.randint(2, size.vocabulary, (n - 1,), generator=rng).tolist(), EOS] for n in lengths
    ]


def text(ids: list[int]) -> str:
    return " ".join(f"t{i}" for i in ids)


def timed(work, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, after one that warms up."""
    seconds = []
    for i in range(repeats + 1):
        started = time.perf_counter()
        work()
        if i:
            seconds.append(time.perf_counter() - started)
    return seconds


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def report(**numbers) -> None:
    """One line that the driver reads."""
    numbers |= {"peak_mb": peak_mb(), "threads": torch.get_num_threads()}
    print("RESULT " + json.dumps(numbers), file=sys.__stdout__, flush=True)
