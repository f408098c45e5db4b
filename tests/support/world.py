"""The tiny world: a model, prompts and a reward so small that the whole pipeline is a test."""

import math
from pathlib import Path
from typing import Any

import torch

from quartet.experience import Batch, Prompt, Rollout
from quartet.models.language_model import create
from quartet.models.shape import Shape
from quartet.worlds.tokenizers import word_tokenizer

WORDS = [
    "the",
    "a",
    "film",
    "was",
    "is",
    "good",
    "bad",
    "long",
    "short",
    "and",
    "but",
    "not",
    "very",
    "story",
    "music",
    "end",
]
SHAPES = {
    "llama": Shape(type="llama", hidden_size=32, num_layers=2, num_heads=4, max_length=64),
    "qwen2": Shape(type="qwen2", hidden_size=32, num_layers=2, num_heads=4, max_length=64),
    "gpt2": Shape(type="gpt2", hidden_size=32, num_layers=2, num_heads=4, max_length=64),
}


def tokenizer(pad: bool = True) -> Any:
    """Twenty-odd words. Without a pad token of its own where asked."""
    made = word_tokenizer(WORDS, ".")
    if not pad:
        made.pad_token = None
    return made


def model(kind: str = "llama", seed: int = 0) -> Any:
    return create(SHAPES[kind], tokenizer(), seed)


def prompts(count: int, seed: int = 0) -> list[Prompt]:
    """Prompts of one to six words."""
    rng = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        length = int(torch.randint(1, 7, (), generator=rng))
        ids = torch.randint(4, len(tokenizer()), (length,), generator=rng).tolist()
        made.append(Prompt(f"tiny:{number}", tuple(ids), tokenizer().decode(ids)))
    return made


def rollout(
    prompt: Prompt, response_ids: tuple[int, ...], score: float, group: int = 0, number: int = 0
) -> Rollout:
    return Rollout(
        id=f"{prompt.id}/{number}",
        prompt=prompt,
        group=group,
        response_ids=response_ids,
        response=tokenizer().decode(response_ids),
        logprobs=(-1.0,) * len(response_ids),
        finish_reason="stop",
        policy_version=0,
        score=score,
        components={"tiny": score},
    )


def ragged_batch(
    lengths: list[int],
    scores: list[float],
    groups: list[int] | None = None,
    dtype: Any = torch.float64,
) -> Batch:
    """A batch of one-token prompts with responses of these lengths, its numbers drawn from a seed."""
    rng = torch.Generator().manual_seed(1)
    width = 1 + max(lengths)
    positions = torch.arange(width)
    mask = (positions >= 1) & (positions < 1 + torch.tensor(lengths)[:, None])

    def draw() -> torch.Tensor:
        return torch.where(mask, torch.randn(mask.shape, generator=rng, dtype=dtype), 0.0)

    old = -draw().abs()
    return Batch(
        ids=tuple(f"row {i}" for i in range(len(lengths))),
        tokens=torch.where(mask, torch.randint(4, 20, mask.shape, generator=rng), 0),
        lengths=1 + torch.tensor(lengths),
        response_mask=mask,
        scores=torch.tensor(scores, dtype=dtype),
        ended=torch.arange(len(lengths)) % 3 != 2,
        groups=torch.tensor(groups if groups is not None else list(range(len(lengths)))),
        rollout_logprobs=old,
        old_logprobs=old,
        ref_logprobs=old + 0.3 * draw(),
        values=draw(),
        exact_kl=draw().abs(),
        entropy=draw().abs(),
        final_values=draw()[:, 1],
        token_scores=draw(),
        greedy_scores=torch.tensor(scores, dtype=dtype) / 2,
        state_values=torch.where(mask & (positions % 2 == 1), draw(), math.nan),
    )


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
