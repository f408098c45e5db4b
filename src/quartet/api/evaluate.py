"""`quartet.evaluate`: two policies on the same held-out prompts."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quartet.api.inputs import policy_table
from quartet.api.train import train

if TYPE_CHECKING:
    from quartet.api.run import TrainingRun
else:
    TrainingRun = Any  # its module imports torch


def evaluate(
    policy: Any,
    against: Any,
    *,
    tokenizer: Any = None,
    data: Any = None,
    num_prompts: int | None = None,
    **settings: Any,
) -> TrainingRun:
    """Compare a policy with another on the same held-out prompts. Return the finished run.

    Its `summaries["evaluation"]` has `win_rate` and `kl`, each a mean with half the width of its
    95 % confidence interval; `judge`, what decided a win: "reward", or "gold" in an embedded world;
    `before` and `after`, mean rewards and measures of the texts; and `samples`. The responses are
    in the run folder.

    Args:
        policy: a folder, a hub id, or a model of transformers.
        against: the policy that it is compared with, in the same form.
        tokenizer: a folder or hub id; the tokenizer itself where a policy is an object.
        data: the prompts that are answered, in any form that `quartet.train` takes, or a [data]
            table, of which the held-out part is answered.
        num_prompts: how many prompts are answered at most, 500 by default.
        **settings: what `quartet.train` takes: reward, seed, folder, and tables or dotted keys such
            as rollout={"temperature": 0.7}.
    """
    evaluation = dict(settings.pop("evaluation", {}))
    folder = settings.get("folder") or "runs"
    evaluation["policy"] = policy_table(policy, tokenizer, folder)["model"]
    if num_prompts is not None:
        evaluation["prompts"] = num_prompts
    if data is None:
        data = settings.pop("prompts", settings.get("eval_data"))
    if data is not None:
        settings["data"] = data
    if not isinstance(data, Mapping):  # all of it is evaluated on, nothing is held out
        settings.setdefault("eval_data", data)
    run = train(
        "evaluation", policy=against, tokenizer=tokenizer, evaluation=evaluation, **settings
    )
    return run.finish(progress=False)
