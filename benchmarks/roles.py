"""The memory of PPO's four roles on one GPU: all weights trained, LoRA and QLoRA, for three sizes
of Qwen 2.5, by the formulas of `quartet plan --on`.

    python benchmarks/roles.py

Prints the table of docs/models.md. No model is loaded: a folder with the real config and a header
of weights stands for each. Nothing here was measured on a GPU; tests hold the formulas to what the
program allocates on a device that is only pretended (tests/planning/test_gpu_memory.py).
"""

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

from quartet.config.toml import settings_of_table
from quartet.planning.gpu_memory import (
    Workload,
    memory_between_updates,
    native_generation,
    training_memory,
    workload,
)
from quartet.planning.hardware import GPUS, CannotFit

SIZES = {
    # vocabulary, hidden, layers, heads, heads of keys and values, width of the MLP, tied head
    "0.5B": (151_936, 896, 24, 14, 2, 4_864, True),
    "1.5B": (151_936, 1_536, 28, 12, 2, 8_960, True),
    "7B": (152_064, 3_584, 28, 28, 4, 18_944, False),
}
WAYS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "LoRA": {"adapter": {"type": "lora", "rank": 16}},
    "QLoRA": {"adapter": {"type": "lora", "rank": 16}, "quantize": "nf4"},
    "QLoRA, checkpoints": {
        "adapter": {"type": "lora", "rank": 16},
        "quantize": "nf4",
        "gradient_checkpointing": True,
    },
}
PROMPT, RESPONSE, ROWS, MICRO_BATCH = 256, 256, 64, 4_096
GB = 1e9


def write_folder(folder: Path, size: str) -> None:
    """Write the config of a size, and a file with the header of its weights and none of them."""
    vocabulary, hidden, layers, heads, kv_heads, inner, tied = SIZES[size]
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": tied,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    wide = hidden + 2 * hidden * kv_heads // heads
    layer = hidden * (wide + hidden) + wide + 3 * hidden * inner + 2 * hidden
    number = vocabulary * hidden * (1 if tied else 2) + layers * layer + hidden
    header = json.dumps({"all": {"dtype": "F32", "shape": [number], "data_offsets": [0, 0]}})
    content = struct.pack("<Q", len(header)) + header.encode()
    (folder / "model.safetensors").write_bytes(content)


def work_of(folder: Path, way: str) -> Workload:
    """Return what a PPO step of a size takes on GPUs."""
    table = {
        "recipe": ["reward_model", "ppo"],
        "policy": {"model": str(folder), **WAYS[way]},
        "data": {"train": "prompts.jsonl", "max_prompt_tokens": PROMPT},
        "reward_model": {"data": "comparisons.jsonl"},
        "reward": [{"type": "model"}],
        "rollout": {"prompts_per_step": ROWS, "max_new_tokens": RESPONSE},
        "optim": {"micro_batch_tokens": MICRO_BATCH},
    }
    return workload(settings_of_table(table, "roles", "roles").config)


def row(size: str, way: str) -> dict[str, float]:
    """Return what one GPU of 141 GB holds, in GB, by what it is for."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "model"
        write_folder(folder, size)
        work = work_of(folder, way)
        parts = training_memory(work, 1)
        between = memory_between_updates(parts, work)
        try:
            sampling = native_generation(work, GPUS["h200"], 1, taken=between).memory
        except CannotFit:
            sampling = {}
    roles = {name: parts.pop(name, 0.0) for name in ("trunk", "actor", "critic")}
    frozen = parts.pop("reference, reward model", 0.0)
    figures = {
        "parameters": float(work.parameters),
        **roles,
        "reference and reward model": frozen,
        "micro-batch": sum(parts.values()),
        "update": sum(roles.values()) + frozen + sum(parts.values()),
        "sampling": between + sum(sampling.values()) if sampling else 0.0,
    }
    return {name: figure / GB for name, figure in figures.items()}


def table() -> str:
    """Return the table of docs/models.md."""
    found = {(size, way): row(size, way) for size in SIZES for way in WAYS}
    columns = [name for name in found["7B", "LoRA"] if name != "parameters"]
    lines = [f"| GB on one GPU | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for (size, way), figures in found.items():
        cells = [f"{figures[name]:.1f}" if figures[name] else "" for name in columns]
        lines.append(f"| {size}, {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
