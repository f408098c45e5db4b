"""`quartet.evaluate`: any policies on any sets, or two policies as a run of their own."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartet.api.inputs import STORE, policy_table, store_rows
from quartet.api.train import train
from quartet.errors import QuartetError
from quartet.io.texts import type_in_words
from quartet.runtime.log import no_progress_bars

if TYPE_CHECKING:
    from quartet.api.run import TrainingRun
else:
    TrainingRun = Any  # its module imports torch


def evaluate(
    policy: Any,
    against: Any = None,
    *,
    on: Any = None,
    measures: Any = None,
    tokenizer: Any = None,
    data: Any = None,
    num_prompts: int | None = None,
    **settings: Any,
) -> Any:
    """Evaluate policies on sets, or compare two policies. There are two forms.

    With `on` or `measures`, or without `against`, this is `quartet eval`, the same code: `policy`
    is a run, a checkpoint, a folder, a hub id or a server, or a list of these; `on` the files,
    or a table of names and files or rows; `measures` the names of measures, reward tables,
    `RewardSource` objects or functions; `settings` are `samples`, `rows`, `seed`, `max_new_tokens`,
    `temperature`, `columns`, `folder`, `name`, `token_env` and `rubric`, a file of criteria for
    judges. Returns what the file of results holds (docs/evaluation.md), and `path`, that file.

    Otherwise two policies answer the same held-out prompts as a run of the stage `evaluation`, and
    the finished run is returned. Its `summaries["evaluation"]` has `win_rate` and `kl`, each a mean
    with half the width of its 95% confidence interval; `judge`, what decided a win: "reward", or
    "gold" in an embedded world; `before` and `after`, mean rewards and measures of the texts; and
    `samples`. The responses are in the run folder.

    Args:
        policy: a run, a folder, a hub id, or a model of transformers.
        against: the policy that it is compared with, in the same form.
        tokenizer: a folder or hub id; the tokenizer itself where a policy is an object.
        data: the prompts that are answered, in any form that `quartet.train` takes, or a [data]
            table, of which the held-out part is answered.
        num_prompts: how many prompts are answered at most, 500 by default.
        **settings: what `quartet.train` takes: reward, seed, folder, and tables or dotted keys such
            as rollout={"temperature": 0.7}.
    """
    if on is not None or measures is not None or against is None:
        if any(value is not None for value in (data, num_prompts, tokenizer)):
            raise QuartetError(
                "evaluate: data, num_prompts and tokenizer belong to the form with against; use "
                "on= and rows=."
            )
        return _on_sets(policy, against, on, measures, settings)
    evaluation = dict(settings.pop("evaluation", {}))
    folder = settings.get("folder") or "runs"
    own = _tokenizer_of(policy, tokenizer)
    evaluation["policy"] = policy_table(policy, own, folder)["model"]
    if num_prompts is not None:
        evaluation["prompts"] = num_prompts
    if data is None:
        data = settings.pop("prompts", settings.get("eval_data"))
    if data is not None:
        settings["data"] = data
    if not isinstance(data, Mapping):  # all of it is evaluated on, nothing is held out
        settings.setdefault("eval_data", data)
    own = _tokenizer_of(against, tokenizer)
    run = train("evaluation", policy=against, tokenizer=own, evaluation=evaluation, **settings)
    finished: TrainingRun = run.finish(progress=False)
    return finished


def _tokenizer_of(policy: Any, tokenizer: Any) -> Any:
    """Return the tokenizer; None for an object where the policy is none, so that it is that of the
    other policy."""
    is_others = hasattr(tokenizer, "save_pretrained") and not hasattr(policy, "save_pretrained")
    return None if is_others else tokenizer


@no_progress_bars()
def _on_sets(
    policies: Any, against: Any, on: Any, measures: Any, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Carry out what `quartet eval` does with these arguments."""
    from quartet.assembly.evaluation import EvaluationRequest
    from quartet.assembly.evaluation import evaluate as carry_out
    from quartet.assembly.evaluation.policies import EvaluationError

    known = EvaluationRequest.__dataclass_fields__.keys() - {"policies", "on", "measures"}
    if unknown := sorted(settings.keys() - known):
        raise QuartetError(
            f"evaluate: there is no {unknown[0]}. Beside on and measures there are "
            f"{', '.join(sorted(known))}."
        )
    values = dict(settings)
    if values.get("folder") is not None:
        values["folder"] = Path(values["folder"])
    try:
        path, result = carry_out(
            EvaluationRequest(
                policies=tuple(map(_place, _listed(policies))),
                on=tuple(_sets(on)),
                measures=tuple(_listed(measures)),
                against=None if against is None else _place(against),
                **values,
            )
        )
    except EvaluationError as error:
        raise EvaluationError(re.sub(r"--[a-z][a-z-]+", _argument, str(error))) from None
    return result | {"path": path}


def _argument(option: re.Match[str]) -> str:
    """Return the argument that is called so on the command line."""
    name = option[0].removeprefix("--").replace("-", "_")
    return {"measure": "measures", "to": "folder"}.get(name, name)


def _place(policy: Any) -> str:
    """Return a policy as the command line names it."""
    if isinstance(policy, str | os.PathLike):
        return os.fspath(policy)
    raise QuartetError(
        f"evaluate: {type_in_words(policy)} is no policy of the form with on and measures. Give a "
        "run, or a folder: quartet.save(model, tokenizer, folder) writes one."
    )


def _sets(on: Any) -> Iterator[str]:
    """Yield the sets as the command line names them; rows become files. Raises `QuartetError` for
    rows without a name."""
    if isinstance(on, Mapping):
        for name, rows in on.items():
            is_file = isinstance(rows, str | os.PathLike)
            file = rows if is_file else store_rows(rows, str(name), Path("runs") / STORE)
            yield f"{name}={os.fspath(file)}"
        return
    for file in _listed(on):
        if not isinstance(file, str | os.PathLike):
            raise QuartetError(
                f"evaluate: on: {type_in_words(file)} is no file. Give rows a name: "
                'on={"mine": rows}.'
            )
        yield os.fspath(file)


def _listed(value: Any) -> Sequence[Any]:
    """Return a list or tuple as it is, one value as a list of it, and none for None."""
    if value is None:
        return ()
    return value if isinstance(value, list | tuple) else [value]
