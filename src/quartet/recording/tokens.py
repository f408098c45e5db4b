"""Tables with one row per token: what a step's update and a probe know about each token."""

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quartet.algorithms.advantages import critic_values, gae
from quartet.algorithms.kl import k1
from quartet.algorithms.ratios import held_exp
from quartet.io.texts import well_formed, well_formed_json
from quartet.models.protocols import Tokenizer
from quartet.tensors import Float, Tensor
from quartet.training.batch import collate

if TYPE_CHECKING:
    from quartet.algorithms.algorithm import Algorithm
    from quartet.data.records import Comparison
    from quartet.experience import Batch, Experience, Rollout
    from quartet.loops.progress import Sampled
    from quartet.training.learner import Learner

NUMBERS = (
    "logprob",
    "old_logprob",
    "ref_logprob",
    "kl",
    "reward",
    "penalty",
    "value",
    "td_error",
    "raw_advantage",
    "advantage",
    "return",
    "change",
    "ratio",
    "clipped",
    "entropy",
)
"""The columns of numbers of each token, in their order."""
MANTISSA_BITS = 9
"""How many of a float32's 24 mantissa bits are written: the relative error is at most 0.2%."""


class TokenTexts:
    """The text of each token id as it reads inside a text, with its leading space."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.anchor = next(i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids)
        self.before = tokenizer.decode([self.anchor])
        self.known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self.known:
            self.known[token] = self.tokenizer.decode([self.anchor, token])[len(self.before) :]
        return self.known[token]


def rollout_table(step: "Sampled", texts: TokenTexts) -> Any:
    """Return the step as an Arrow table with a row per token, without padding. Of responses of a
    stage that is no RL, what the sampler says is known, and the other columns have no values."""
    from quartet.loops.rl import Step

    if not isinstance(step, Step):
        batch = collate(step.rollouts)
        known = {"old_logprob": batch.old_logprobs, "entropy": batch.entropy}
        return _table(
            step.number, step.rollouts, batch, texts, {name: known.get(name) for name in NUMBERS}
        )
    update, algorithm = step.update, step.algorithm
    change = update.logprobs - step.batch.old_logprobs
    update_columns = {
        "logprob": update.logprobs,
        "change": change if update.trained_actor else None,
        "ratio": held_exp(change) if update.trained_actor else None,
        "clipped": update.clipped,
        "entropy": update.entropy,
    }
    return token_table(
        step.number, step.rollouts, step.batch, step.experience, algorithm, texts, update_columns
    )


def probe_table(
    number: int,
    learner: "Learner",
    probes: "Sequence[Rollout]",
    algorithm: "Algorithm",
    texts: TokenTexts,
) -> Any:
    """Return a table of what the models now compute for responses that were sampled earlier."""
    batch = learner.score([dataclasses.replace(r, policy_version=-1) for r in probes], algorithm)
    update_columns = {"logprob": batch.old_logprobs, "entropy": batch.entropy}
    return token_table(
        number, probes, batch, algorithm.experience(batch), algorithm, texts, update_columns
    )


def token_table(
    number: int,
    rollouts: "Sequence[Rollout]",
    batch: "Batch",
    experience: "Experience",
    algorithm: "Algorithm",
    texts: TokenTexts,
    update_columns: "Mapping[str, Tensor | None]",
) -> Any:
    """Return a table with a row per token, without padding. `update_columns` [B, T] are those that
    come from the update, such as log-probs and ratios; None is a column without values."""
    numbers = number_columns(batch, experience, algorithm, update_columns)
    return _table(number, rollouts, batch, texts, numbers)


def _table(
    number: int,
    rollouts: "Sequence[Rollout]",
    batch: "Batch",
    texts: TokenTexts,
    numbers: "Mapping[str, Tensor | None]",
) -> Any:
    import pyarrow as pa

    real = (
        torch.arange(batch.tokens.shape[1], device=batch.lengths.device)[None, :]
        < batch.lengths[:, None]
    )
    rows = torch.arange(len(batch.ids), device=real.device)[:, None].expand_as(real)[real].cpu()
    ids = batch.tokens[real].cpu()
    response = batch.response_mask[real].cpu()
    prompt = (~response).numpy()

    def column(values: Tensor | None, middle: float = 0.0) -> Any:
        """Return a float32 column, null for prompt tokens and where there is no such model. Numbers
        are rounded relative to `middle`, such as 1 for a ratio."""
        if values is None:
            return pa.nulls(len(ids), pa.float32())
        if values.dtype == torch.bool:
            return pa.array(values[real].cpu().numpy(), mask=prompt)
        return pa.array(
            (middle + rounded(values[real].float().cpu() - middle)).numpy(),
            pa.float32(),
            mask=prompt,
        )

    def spread(per_row: Any, kind: Any) -> Any:
        return pa.array(per_row, kind).take(pa.array(rows.numpy()))

    components = {
        f"score/{name}": spread([r.components[name] for r in rollouts], pa.float32())
        for name in rollouts[0].components
    }
    positions = torch.arange(batch.tokens.shape[1], device=real.device).expand_as(real)[real].cpu()
    known, places = ids.unique(return_inverse=True)
    text = pa.DictionaryArray.from_arrays(
        pa.array(places.numpy(), pa.int32()), pa.array([texts[token] for token in known.tolist()])
    )
    return pa.table(
        {
            "step": pa.array([number] * len(ids), pa.int32()),
            "sample": pa.array(rows.numpy(), pa.int32()),
            "id": spread(list(batch.ids), pa.string()),
            "group": spread(batch.groups.tolist(), pa.int32()),
            **text_columns(rollouts, batch.lengths.tolist()),
            **logged_columns(rollouts, batch.lengths.tolist()),
            "score": spread(batch.scores.tolist(), pa.float32()),
            **components,
            "ended": spread(batch.ended.tolist(), pa.bool_()),
            "position": pa.array(positions.numpy(), pa.int32()),
            "token_id": pa.array(ids.numpy(), pa.int32()),
            "text": text,
            "is_response": pa.array(response.numpy()),
            **{n: column(values, 1.0 if n == "ratio" else 0.0) for n, values in numbers.items()},
        }
    )


def number_columns(
    batch: "Batch",
    experience: "Experience",
    algorithm: "Algorithm",
    update_columns: "Mapping[str, Tensor | None]",
) -> dict[str, Tensor | None]:
    """Return the numbers of each token [B, T] by column, in the order of the columns; None where
    there is no such model."""
    reference = batch.ref_logprobs
    known = {
        **update_columns,
        "old_logprob": batch.old_logprobs,
        "ref_logprob": reference,
        "kl": None if reference is None else k1(batch.old_logprobs, reference),
        "reward": experience.token_rewards,
        "penalty": None if reference is None else experience.penalties,
        "value": batch.values,
        "td_error": td_errors(batch, experience, algorithm),
        "raw_advantage": experience.raw_advantages,
        "advantage": experience.advantages,
        "return": experience.returns,
    }
    return {name: known.get(name) for name in NUMBERS}


def text_columns(rollouts: "Sequence[Rollout]", lengths: Sequence[int]) -> dict[str, Any]:
    """Return the columns `prompt` and `response`, which have a value in the first row of each
    rollout: the prompt as JSON, a text or messages, and the response's text without special
    tokens. The texts of single tokens do not add up to these: a character can be several tokens,
    and a chat template is no part of the messages. A rollout with turns of an environment has no
    single response, and no values."""
    import pyarrow as pa

    prompts: list[str | None] = [None] * sum(lengths)
    responses = list(prompts)
    first = 0
    for rollout, length in zip(rollouts, lengths, strict=True):
        if rollout.policy_mask is None:
            prompt = rollout.prompt
            given = prompt.text if prompt.messages is None else [dict(m) for m in prompt.messages]
            prompts[first] = json.dumps(well_formed_json(given), ensure_ascii=False)
            responses[first] = well_formed(rollout.response)
        first += length
    return {
        "prompt": pa.array(prompts, pa.string()),
        "response": pa.array(responses, pa.string()),
    }


def logged_columns(rollouts: "Sequence[Rollout]", lengths: Sequence[int]) -> dict[str, Any]:
    """Return the columns that reward functions logged (`logged/REWARD/COLUMN`), as text, with a
    value in the first row of each rollout."""
    import pyarrow as pa

    columns: dict[str, list[str | None]] = {}
    first = 0
    for rollout, length in zip(rollouts, lengths, strict=True):
        for name, value in rollout.logged_columns.items():
            column = columns.setdefault(f"logged/{well_formed(name)}", [None] * sum(lengths))
            column[first] = None if value is None else well_formed(str(value))
        first += length
    return {name: pa.array(column, pa.string()) for name, column in columns.items()}


def write_pairs(
    path: Path,
    comparisons: "Sequence[Comparison]",
    scores: Float[Tensor, "P 2"],
    tokenizer: Tokenizer,
) -> Path:
    """Write a row per held-out pair: the texts, their lengths in tokens, and the reward model's
    score of each side."""
    import pyarrow as pa

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    return write_tokens(
        pa.table(
            {
                "id": [c.id for c in comparisons],
                "prompt": [text(c.prompt_ids) for c in comparisons],
                "chosen": [text(c.chosen_ids) for c in comparisons],
                "rejected": [text(c.rejected_ids) for c in comparisons],
                "chosen_tokens": pa.array([len(c.chosen_ids) for c in comparisons], pa.int32()),
                "rejected_tokens": pa.array([len(c.rejected_ids) for c in comparisons], pa.int32()),
                "chosen_score": pa.array(scores[:, 0].tolist(), pa.float32()),
                "rejected_score": pa.array(scores[:, 1].tolist(), pa.float32()),
            }
        ),
        path,
    )


def td_errors(
    batch: "Batch", experience: "Experience", algorithm: "Algorithm"
) -> Float[Tensor, "B T"] | None:
    """Return the TD errors δ_t = r_t + γ V_{t+1} − V_t; None without a critic."""
    if batch.values is None:
        return None
    values, final = critic_values(batch, algorithm.needs_final_values)
    gamma = getattr(algorithm.advantage, "gamma", 1.0)
    return gae(experience.token_rewards, values, batch.response_mask, gamma, 0.0, final)


def rounded(values: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Round to MANTISSA_BITS, to nearest. The last bits are noise, do not compress, and would be
    most of a file."""
    drop = 24 - MANTISSA_BITS
    bits = values.contiguous().view(torch.int32)
    finite = ((bits + (1 << (drop - 1))) >> drop << drop).view(torch.float32)
    return torch.where(values.isfinite(), finite, values)


def write_tokens(table: Any, path: Path) -> Path:
    """Write a table as Parquet, under another name until it is complete, and return the path."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(exist_ok=True)
    floats = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    temporary = path.with_suffix(".tmp")
    try:
        pq.write_table(
            table,
            temporary,
            compression="zstd",
            use_dictionary=[name for name in table.column_names if name not in floats],
            column_encoding=dict.fromkeys(floats, "BYTE_STREAM_SPLIT"),
        )
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return path
