"""The peers' side of the comparisons: run by the Python of a peers' environment, never by ours.

    peers-python benchmarks/peers.py WORK SIZE [--repeats N]

Trainers run as their documentation has it: their defaults for how things are computed, our numbers
for what is computed. Responses end where the workload says: `generate` is given a stopping
criterion per row, and TRL's PPO, which never stops early, has the end of sequence written into what
it generated.
"""

import argparse
import functools
import itertools
import logging
import time
import warnings

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import workload as w

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)


class StopAt(StoppingCriteria):
    """Each row is over after its own number of tokens."""

    def __init__(self, lengths, prompt_width):
        self.lengths, self.prompt_width = torch.tensor(lengths), prompt_width

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] - self.prompt_width >= self.lengths


def left_padded(rows):
    width = max(map(len, rows))
    ids, mask = (
        torch.full((len(rows), width), w.PAD),
        torch.zeros(len(rows), width, dtype=torch.long),
    )
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = torch.tensor(row), 1
    return ids, mask


def generate(model, rows, lengths, limit):
    """transformers' generate with nothing that filters or records."""
    ids, mask = left_padded(rows)
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=limit,
        eos_token_id=None,
        pad_token_id=w.PAD,
        stopping_criteria=StoppingCriteriaList([StopAt(lengths, ids.shape[1])]),
    )


def generation(size, repeats, copies=1):
    model = w.language_model(size)
    rows = w.prompts(size, size.rows // copies, *((16, 48) if copies == 1 else (64, 128)))
    rows = [row for row in rows for _ in range(copies)]
    lengths = w.response_lengths(size.limit, size.rows)
    seconds = w.timed(lambda: generate(model, rows, lengths, size.limit), repeats)
    w.report(seconds=seconds, tokens=sum(lengths))


def continuous(size, repeats):
    """transformers' continuous batching, whose requests end at a limit of their own."""
    from transformers import GenerationConfig

    model = w.language_model(size)
    model.set_attn_implementation("sdpa")
    rows, lengths = w.prompts(size, size.rows), w.response_lengths(size.limit, size.rows)
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        max_new_tokens=size.limit,
        eos_token_id=-1,
        pad_token_id=w.PAD,
    )

    def work():
        # One request at a time cannot be given its own limit by generate_batch: everybody writes
        # the mean number of tokens.
        config.max_new_tokens = round(sum(lengths) / len(lengths))
        return model.generate_batch(inputs=rows, generation_config=config, progress_bar=False)

    made = work()
    count = sum(len(m.generated_tokens) for m in made.values())
    w.report(seconds=w.timed(work, repeats), tokens=count)


def forced(model, size, steps_rows):
    """A model whose generate ends its rows where the workload says, with the end of sequence."""
    inner = model.generate
    lengths = w.response_lengths(size.limit, steps_rows)

    @functools.wraps(inner)
    def wrapped(input_ids, generation_config=None, **kwargs):
        width = input_ids.shape[1]
        generation_config.eos_token_id = None
        stop = StoppingCriteriaList([StopAt(lengths[: len(input_ids)], width)])
        made = inner(
            input_ids=input_ids,
            generation_config=generation_config,
            stopping_criteria=stop,
            **kwargs,
        )
        for i, n in enumerate(lengths[: len(input_ids)]):
            made[i, width + n - 1] = w.EOS
            made[i, width + n :] = w.PAD
        return made

    model.generate = wrapped
    return sum(lengths)


def steps_of(trainer, repeats):
    """Seconds from one log to the next."""
    stamps = []
    log = trainer.log

    def stamped(*args, **kwargs):
        stamps.append(time.perf_counter())
        return log(*args, **kwargs)

    trainer.log = stamped
    trainer.train()
    gaps = [b - a for a, b in itertools.pairwise(stamps)]
    return gaps[:repeats]


def common(folder="/tmp/quartet-bench-peer"):
    return {
        "output_dir": folder,
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


def ppo(size, repeats):
    import trl.experimental.ppo.ppo_trainer as module
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    rows, words = size.rows // 2, w.tokenizer(size)
    words.padding_side = "left"
    lengths = w.response_lengths(size.limit, rows)
    plain = module.batch_generation

    def ended(model, queries, *args, **kwargs):
        made, logits = plain(model, queries, *args, **kwargs)
        for i, n in enumerate(lengths):
            made[i, queries.shape[1] + n - 1] = w.EOS
        return made, logits

    module.batch_generation = ended
    config = PPOConfig(
        **common(),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=4,
        total_episodes=rows * (repeats + 2),
        response_length=size.limit,
        local_rollout_forward_batch_size=rows,
        temperature=1.0,
        stop_token="eos",
        num_sample_generations=0,
        kl_coef=0.05,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=words,
        model=w.language_model(size),
        ref_model=w.language_model(size),
        reward_model=w.scalar_model(size, 1),
        value_model=w.scalar_model(size, 2),
        train_dataset=Dataset.from_dict({"input_ids": w.prompts(size, rows)}),
    )
    w.report(seconds=steps_of(trainer, repeats), tokens=sum(lengths), optimizer_steps=4)


def grpo(size, repeats, rloo=False):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    rows, samples = size.rows, 8
    words = w.tokenizer(size)
    words.padding_side = "left"
    prompts = [w.text(p) for p in w.prompts(size, rows // samples)]
    settings = {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 1,
        "num_generations": samples,
        "max_completion_length": size.limit,
        "num_iterations": 1,
        "beta": 0.04,
        "max_steps": repeats + 2,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "model_init_kwargs": None,
    }
    make_config, make = (RLOOConfig, RLOOTrainer) if rloo else (GRPOConfig, GRPOTrainer)
    model = w.language_model(size)
    model.name_or_path = model.config.name_or_path = ""
    folder = "/tmp/quartet-bench-peer/model"
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    trainer = make(
        model=folder,
        reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
        args=make_config(**common(), **settings),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=words,
    )
    tokens = forced(trainer.model, size, rows)
    w.report(seconds=steps_of(trainer, repeats), tokens=tokens, optimizer_steps=1)


def sft(size, repeats):
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
        max_steps=repeats + 2,
        max_length=None,
    )
    trainer = SFTTrainer(
        w.language_model(size), args=config, train_dataset=data, processing_class=w.tokenizer(size)
    )
    tokens = sum(map(len, asked)) + sum(map(len, answers))
    w.report(seconds=steps_of(trainer, repeats), tokens=tokens, optimizer_steps=1)


def reward_model(size, repeats):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rows = size.rows // 4
    asked, good, bad = w.prompts(size, rows), w.responses(size, rows), w.responses(size, rows, 4)
    data = Dataset.from_dict(
        {
            "chosen_ids": [p + a for p, a in zip(asked, good, strict=True)],
            "rejected_ids": [p + a for p, a in zip(asked, bad, strict=True)],
        }
    )
    config = RewardConfig(
        **common(),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        max_steps=repeats + 2,
        max_length=None,
    )
    trainer = RewardTrainer(
        w.scalar_model(size), args=config, train_dataset=data, processing_class=w.tokenizer(size)
    )
    tokens = 2 * sum(map(len, asked)) + sum(map(len, good)) + sum(map(len, bad))
    w.report(seconds=steps_of(trainer, repeats), tokens=tokens, optimizer_steps=1)


WORKS = {
    "generation": generation,
    "group": functools.partial(generation, copies=8),
    "continuous": continuous,
    "ppo": ppo,
    "grpo": grpo,
    "rloo": functools.partial(grpo, rloo=True),
    "sft": sft,
    "reward_model": reward_model,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=sorted(WORKS))
    parser.add_argument("size", choices=sorted(w.SIZES))
    parser.add_argument("--repeats", type=int, default=3)
    a = parser.parse_args()
    WORKS[a.work](w.SIZES[a.size], a.repeats)
