"""The peers' side of the comparisons, for the Python of a peers' environment.

    peers-python benchmarks/peers.py WORK SIZE [--repeats N]

Trainers run as their documentation has it: their defaults for how things are computed, our numbers
for what is computed. Responses end where the workload says: `generate` is given a stopping
criterion per row, and TRL's PPO, which never stops early, has the end of sequence written into what
it generated. Works whose package is not installed print that they were skipped.
"""

import functools
import importlib.util
import itertools
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

import workload as w
from workload import Measurement, Size

FOLDER = Path("/tmp/quartet-bench-peer")
"""Where trainers write; nothing of it is read again."""


def lora() -> Any:
    """Return the adapter of a pretrained model, by peft."""
    import peft

    return peft.LoraConfig(r=w.LORA_RANK, lora_alpha=w.LORA_ALPHA, target_modules="all-linear")


def generation(size: Size, repeats: int, copies: int = 1) -> Measurement:
    model = w.language_model(size)
    if size.folder:
        model.add_adapter(lora())
    low, high = (16, 48) if copies == 1 else (64, 128)
    prompts = w.prompts(size, size.rows // copies, low, high)
    rows = [row for row in prompts for _ in range(copies)]
    lengths = size.lengths(size.rows)
    seconds = w.timed(
        lambda: w.transformers_generate(model, rows, lengths, size.limit, size.pad), repeats
    )
    return Measurement(seconds, sum(lengths))


def continuous(size: Size, repeats: int) -> Measurement:
    """Run transformers' continuous batching. Its requests cannot be given limits of their own, so
    each writes the mean number of tokens."""
    model = w.language_model(size)
    model.set_attn_implementation("sdpa")
    rows, lengths = w.prompts(size, size.rows), size.lengths(size.rows)
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        max_new_tokens=round(sum(lengths) / len(lengths)),
        eos_token_id=-1,
        pad_token_id=size.pad,
    )

    def work() -> Any:
        return model.generate_batch(inputs=rows, generation_config=config, progress_bar=False)

    tokens = sum(len(output.generated_tokens) for output in work().values())
    return Measurement(w.timed(work, repeats), tokens)


def force_lengths(model: Any, size: Size, rows: int) -> int:
    """Replace the model's `generate` by one that ends its rows where the workload says, with the
    end of sequence. Return how many tokens that is."""
    inner = model.generate
    lengths = size.lengths(rows)

    @functools.wraps(inner)
    def wrapped(input_ids: torch.Tensor, generation_config: Any = None, **kwargs: Any) -> Any:
        width = input_ids.shape[1]
        generation_config.eos_token_id = None
        stop = StoppingCriteriaList([w.StopAt(lengths[: len(input_ids)], width)])
        output = inner(
            input_ids=input_ids,
            generation_config=generation_config,
            stopping_criteria=stop,
            **kwargs,
        )
        for i, n in enumerate(lengths[: len(input_ids)]):
            output[i, width + n - 1] = size.eos
            output[i, width + n :] = size.pad
        return output

    model.generate = wrapped
    return sum(lengths)


def seconds_of_steps(trainer: Any, repeats: int) -> list[float]:
    """Train, and return the seconds from one log to the next."""
    stamps: list[float] = []
    log = trainer.log

    def stamped(*args: Any, **kwargs: Any) -> Any:
        stamps.append(w.clock())
        return log(*args, **kwargs)

    trainer.log = stamped
    trainer.train()
    return [b - a for a, b in itertools.pairwise(stamps)][:repeats]


def common() -> dict[str, Any]:
    """Return the settings that all of TRL's trainers are given."""
    return {
        "output_dir": str(FOLDER),
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "learning_rate": 1e-5,
        "dataloader_pin_memory": False,
    }


def ppo(size: Size, repeats: int) -> Measurement:
    import trl.experimental.ppo.ppo_trainer as module
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    rows, words = size.rows // 2, w.tokenizer(size)
    words.padding_side = "left"
    lengths = size.lengths(rows)
    plain = module.batch_generation

    def ended(model: Any, queries: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output, logits = plain(model, queries, *args, **kwargs)
        for i, n in enumerate(lengths):
            output[i, queries.shape[1] + n - 1] = size.eos
        return output, logits

    module.batch_generation = ended
    config = PPOConfig(
        **common(),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=size.ppo_epochs,
        total_episodes=rows * (repeats + 1),
        response_length=size.limit,
        local_rollout_forward_batch_size=rows,
        temperature=1.0,
        stop_token="eos",
        num_sample_generations=0,
        kl_coef=0.05,
    )
    value_model = w.scalar_model(size, 2)
    if size.folder:  # the head is trained whole, as in ours
        value_model.add_adapter(lora())
        value_model.score.requires_grad_(True)
    trainer = PPOTrainer(
        args=config,
        processing_class=words,
        model=w.language_model(size),
        ref_model=None if size.folder else w.language_model(size),
        reward_model=w.scalar_model(size, 1),
        value_model=value_model,
        train_dataset=Dataset.from_dict({"input_ids": w.prompts(size, rows)}),
        peft_config=lora() if size.folder else None,
    )
    seconds = seconds_of_steps(trainer, repeats)
    return Measurement(seconds, sum(lengths), optimizer_steps=size.ppo_epochs)


def grpo(size: Size, repeats: int, rloo: bool = False) -> Measurement:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    rows, samples = size.rows, 8
    words = w.tokenizer(size)
    words.padding_side = "left"
    prompts = [w.text(size, p) for p in w.prompts(size, rows // samples)]
    settings = {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 1,
        "num_generations": samples,
        "max_completion_length": size.limit,
        "num_iterations": 1,
        "beta": 0.04,
        "max_steps": repeats + 1,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "model_init_kwargs": None,
    }
    config_type, trainer_type = (RLOOConfig, RLOOTrainer) if rloo else (GRPOConfig, GRPOTrainer)
    folder = size.folder
    if not folder:
        model = w.language_model(size)
        model.name_or_path = model.config.name_or_path = ""
        folder = str(FOLDER / "model")
        model.save_pretrained(folder)
        words.save_pretrained(folder)
        del model
    trainer = trainer_type(
        model=folder,
        reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
        args=config_type(**common(), **settings),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=words,
        peft_config=lora() if size.folder else None,
    )
    tokens = force_lengths(trainer.model, size, rows)
    return Measurement(seconds_of_steps(trainer, repeats), tokens, optimizer_steps=1)


def sft(size: Size, repeats: int) -> Measurement:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = size.rows // 2
    asked, answers = w.prompts(size, rows), w.responses(size, rows)
    data = Dataset.from_dict(
        {
            "input_ids": [p + a for p, a in zip(asked, answers, strict=True)],
            "labels": [[-100] * len(p) + a for p, a in zip(asked, answers, strict=True)],
        }
    )
    config = SFTConfig(
        **common(),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        max_steps=repeats + 1,
        max_length=None,
    )
    trainer = SFTTrainer(
        w.language_model(size), args=config, train_dataset=data, processing_class=w.tokenizer(size)
    )
    tokens = sum(map(len, asked)) + sum(map(len, answers))
    return Measurement(seconds_of_steps(trainer, repeats), tokens, optimizer_steps=1)


def reward_model(size: Size, repeats: int) -> Measurement:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rows = size.rows // 4
    asked, chosen, rejected = (
        w.prompts(size, rows),
        w.responses(size, rows),
        w.responses(size, rows, 4),
    )
    data = Dataset.from_dict(
        {
            "chosen_ids": [p + a for p, a in zip(asked, chosen, strict=True)],
            "rejected_ids": [p + a for p, a in zip(asked, rejected, strict=True)],
        }
    )
    config = RewardConfig(
        **common(),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        max_steps=repeats + 1,
        max_length=None,
    )
    trainer = RewardTrainer(
        w.scalar_model(size), args=config, train_dataset=data, processing_class=w.tokenizer(size)
    )
    tokens = 2 * sum(map(len, asked)) + sum(map(len, chosen)) + sum(map(len, rejected))
    return Measurement(seconds_of_steps(trainer, repeats), tokens, optimizer_steps=1)


WORKS: dict[str, Callable[[Size, int], Measurement]] = {
    "generation": generation,
    "group": functools.partial(generation, copies=8),
    "continuous": continuous,
    "ppo": ppo,
    "grpo": grpo,
    "rloo": functools.partial(grpo, rloo=True),
    "sft": sft,
    "reward_model": reward_model,
}

NEEDS_TRL = set(WORKS) - {"generation", "group", "continuous"}


def missing_package(work: str) -> str | None:
    """Return the package that a work needs and that is not installed."""
    needed = ["trl", "datasets", "peft"] if work in NEEDS_TRL else []
    return next((name for name in needed if importlib.util.find_spec(name) is None), None)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    w.run_worker(WORKS, __doc__, missing_package)
