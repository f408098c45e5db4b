"""Rewards that Python code gives as objects: functions, `Reward` objects and reward models.

A run's config names them; the objects themselves are in `RewardContext.objects`. They run in the
process of the run, so nothing limits their time or protects the run from what they do.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from quartet.models.protocols import Tokenizer
from quartet.parts import Field
from quartet.rewards.functions import FunctionReward
from quartet.rewards.protocol import Reward, RewardError
from quartet.rewards.source import RewardContext, RewardSource
from quartet.rewards.worker import call, failure, parameters


class ObjectSource(RewardSource):
    """A function, a reward or a reward model that was given to `quartet.train` as an object."""

    object: str = Field(description="The name of the object, for this run only.")
    type: Literal["object"] = "object"
    gives_token_scores: ClassVar[bool] = True
    internal: ClassVar[bool] = True

    @property
    def called(self) -> str:
        return self.name or self.object

    def make(self, context: RewardContext) -> Reward:
        """Return the reward. Raises `RewardError` if the object is not there, as in a run that is
        resumed on the command line."""
        if self.object not in context.objects:
            raise RewardError(
                f'reward.object = "{self.object}": was given as a Python object, which a file '
                f"cannot hold. Resume the run from Python: quartet.train(resume=…, "
                f"reward={self.object})."
            )
        return reward_from(self.called, context.objects[self.object], context)


def object_name(reward: Any) -> str:
    """Return what a reward is called in metrics: the function's or class's name."""
    name = getattr(reward, "__name__", None) or getattr(reward, "name", None)
    return str(name) if name and str(name).isidentifier() else type(reward).__name__


def reward_from(name: str, given: Any, context: RewardContext) -> Reward:
    """Return the reward of an object: a `Reward` as it is; a reward model, ours or a sequence
    classifier of transformers with one label, frozen; a function, called in this process."""
    if hasattr(given, "parameters") and hasattr(given, "forward"):
        from quartet.models.actor_critic import freeze
        from quartet.models.heads import ScalarModel
        from quartet.rewards.reward_model import ModelReward

        check_reads_ids(name, given, context.tokenizer)
        model = given if isinstance(given, ScalarModel) else ScalarModel(given)
        model = freeze(model.to(context.device)).compute_in(next(model.parameters()).dtype)
        return ModelReward(model, context.micro_batch_tokens, name)
    if isinstance(given, RewardSource):
        return given.make(context)
    if hasattr(given, "score"):
        return NamedReward(name, given)
    return InProcessReward(name, given, context.token_texts)


def check_reads_ids(name: str, given: Any, tokenizer: Tokenizer) -> None:
    """Raise `RewardError` unless a model that is given as an object is a sequence classifier with
    one label that can read the policy's token ids: it has an embedding for each, and the tokenizer
    of the folder that it was loaded from, if there is one, gives each token the same id."""
    from quartet.models.heads import ScalarModel
    from quartet.models.language_model import ModelError
    from quartet.models.text_classifier import PooledScalar, has_same_ids

    model = given.model if isinstance(given, ScalarModel) else given
    model = getattr(model, "_orig_mod", model)  # under torch.compile
    config, kind = getattr(model, "config", None), type(model).__name__
    if config is None or getattr(model, "get_input_embeddings", None) is None:
        raise RewardError(
            f"reward {name}: a {kind} is no reward model of transformers. Give a sequence "
            "classifier with one label, or a function that calls the module."
        )
    if kind.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")):
        raise RewardError(
            f"reward {name}: a {kind} generates text and gives no score. Give a sequence "
            "classifier with one label (AutoModelForSequenceClassification)."
        )
    folder = getattr(config, "name_or_path", None) or ""
    advice = f'Give its folder or hub id instead of the object: reward="{folder or "FOLDER"}". '
    advice += "It is then given the text, which its own tokenizer encodes."
    size = model.get_input_embeddings().num_embeddings
    if size < len(tokenizer) or isinstance(given, PooledScalar):
        raise RewardError(
            f"reward {name}: the model has {size:,} embeddings and the policy's tokenizer "
            f"{len(tokenizer):,} tokens, so it cannot read the policy's token ids. {advice}"
        )
    try:
        is_same = not folder or has_same_ids(folder, tokenizer)
    except ModelError:  # a folder without a tokenizer
        is_same = True
    if not is_same:
        raise RewardError(
            f"reward {name}: the tokenizer of {folder}, from which the model was loaded, is not "
            f"the policy's, so it would take the policy's token ids for other words. {advice}"
        )


class NamedReward:
    """A user's reward object under the name that the run knows it by."""

    def __init__(self, name: str, reward: Any) -> None:
        self.name, self.reward = name, reward
        self.score = reward.score
        if hasattr(reward, "token_scores"):
            self.token_scores = reward.token_scores


class InProcessReward(FunctionReward):
    """A function that is called in this process, with the arguments that a function in a file is
    given (docs/rewards.md)."""

    def __init__(
        self, name: str, function: Callable[..., Any], token_texts: Callable[..., list[str]] | None
    ) -> None:
        self.name, self.function, self.token_texts = name, name, token_texts
        self.timeout = math.inf
        self.workers = [InProcess(name, function)]
        self._last = ([], [])


class InProcess:
    """A function in this process behind the interface of `functions.FunctionWorker`."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.function = name, function
        self.parameters = parameters(function)

    def start(self) -> None:
        """Nothing has to be started."""

    def stop(self) -> None:
        """Nothing can be stopped."""

    def call(self, arguments: Mapping[str, Any], timeout: float, count: int) -> dict[str, Any]:
        """Return what `worker.call` returns. Raises `RewardError` if the function fails; its own
        exception is the cause."""
        try:
            return call(self.function, dict(arguments), count)
        except Exception as error:
            raise RewardError(f"{self.name} {failure(error)}.") from error
