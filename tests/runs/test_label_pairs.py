"""Pairs to be labelled, from the rollouts of a run."""

import dataclasses
import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quartet.algorithms.presets import ALGORITHMS
from quartet.data.shapes import read_examples
from quartet.experience import Prompt, Rollout
from quartet.labels.log import Label, LabelLog
from quartet.recording.tokens import TokenTexts, token_table, write_tokens
from quartet.runs.label_pairs import run_pairs
from quartet.runs.reader import NoRun, Run
from tests.support.world import ragged_batch

CHAT = [{"role": "user", "content": "café 日本?"}]
ANSWERS = ("é 日本.", "naïve <b>")


def byte_tokenizer():
    """One token per byte, and <bos> and <eos>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<bos>", "<eos>", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


def rollout(tokenizer, number, text, response, **changes):
    start = tokenizer.bos_token_id
    prompt = Prompt(f"p{number // 2}", (start, *tokenizer(text).input_ids), text)
    ids = (*tokenizer(response).input_ids, tokenizer.eos_token_id)
    made = Rollout(
        f"p/{number}",
        prompt,
        number // 2,
        ids,
        response,
        (-1.0,) * len(ids),
        "stop",
        0,
        float(number),
    )
    return dataclasses.replace(made, components={"deviation/rm": 0.3 + 0.1 * number}, **changes)


def table_of(rollouts, tokenizer):
    lengths = [len(r.prompt.ids) + len(r.response_ids) for r in rollouts]
    batch = ragged_batch(
        [length - 1 for length in lengths],
        [float(r.score) for r in rollouts],
        [r.group for r in rollouts],
    )
    tokens = torch.zeros_like(batch.tokens)
    mask = torch.zeros_like(batch.response_mask)
    for row, each in enumerate(rollouts):
        ids = (*each.prompt.ids, *each.response_ids)
        tokens[row, : len(ids)] = torch.tensor(ids)
        mask[row, len(each.prompt.ids) : len(ids)] = True
    batch = dataclasses.replace(batch, tokens=tokens, response_mask=mask)
    grpo = ALGORITHMS["grpo"]
    batch = dataclasses.replace(batch, values=None)
    texts = TokenTexts(tokenizer)
    return token_table(1, rollouts, batch, grpo.experience(batch), grpo, texts, {})


@pytest.fixture
def rollouts():
    tokenizer = byte_tokenizer()
    made = [
        *(rollout(tokenizer, i, "Review: café 日本", text) for i, text in enumerate(ANSWERS)),
        *(rollout(tokenizer, 2 + i, "<user> café 日本? <assistant>", a) for i, a in enumerate(ANSWERS)),
    ]  # fmt: skip
    return [
        *made[:2],
        *(
            dataclasses.replace(r, prompt=dataclasses.replace(r.prompt, messages=CHAT))
            for r in made[2:]
        ),
    ]


@pytest.fixture
def run(tmp_path, rollouts):
    started = {"time": 1.0, "event": "started", "stage": "ppo"}
    (tmp_path / "events.jsonl").write_text(json.dumps(started) + "\n")
    write_tokens(table_of(rollouts, byte_tokenizer()), tmp_path / "rollouts" / "000001.parquet")
    return Run(tmp_path)


@pytest.mark.parametrize("source", ["rollouts", "best-of-n"])
def test_pairs_of_rollouts_are_the_texts_and_messages_that_were_sampled(run, source, tmp_path):
    pairs = run_pairs(run, source)
    assert [pair.prompt for pair in pairs] == ["Review: café 日本", CHAT]
    assert [{pair.answer_a, pair.answer_b} for pair in pairs] == [set(ANSWERS)] * 2
    assert pairs[0].uncertainty == pytest.approx((0.3**2 + 0.4**2) ** 0.5)
    assert "<eos>" in run.samples(1)[0].response  # the tokens show it, the pair does not have it
    assert not run.problems
    log = LabelLog(tmp_path / "labels.jsonl")
    for number, pair in enumerate(pairs):
        log.add(Label(str(number), "ann", pair, "a", "ab"))
    log.close()
    examples = list(read_examples(log.path, "comparisons", {}))
    assert [e.prompt for e in examples] == ["Review: café 日本", CHAT]


def test_rollouts_without_texts_are_read_and_give_no_pairs(run, rollouts, tmp_path):
    path = tmp_path / "rollouts" / "000001.parquet"
    table = table_of(rollouts, byte_tokenizer())
    old = table.drop_columns(["prompt", "response"])
    turns = [dataclasses.replace(r, policy_mask=(True,) * len(r.response_ids)) for r in rollouts]
    damaged = table.set_column(
        table.column_names.index("prompt"), "prompt", [['[{"role": 1}]'] * table.num_rows]
    )
    for kept in (old, table_of(turns, byte_tokenizer()), damaged):
        write_tokens(kept, path)
        again = Run(tmp_path)
        assert len(again.samples(1)) == 4 and not again.problems
        with pytest.raises(NoRun, match="recorded without the texts of prompts and responses"):
            run_pairs(again, "rollouts")
