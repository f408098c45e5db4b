"""From `[[reward]]` tables to rewards."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quartet import files as durable
from quartet.data import DataError
from quartet.evaluation.compare import Gold
from quartet.experience import Prompt
from quartet.models.actor_critic import freeze
from quartet.models.heads import ScalarModel, scores_last_token
from quartet.models.language_model import ModelError, load_tokenizer, read_config
from quartet.rewards.code import CodeReward, checked_tests
from quartet.rewards.combine import EnsembleReward
from quartet.rewards.environment import EnvironmentReward
from quartet.rewards.functions import FunctionReward, TextReward
from quartet.rewards.judge import JudgeReward
from quartet.rewards.protocol import Reward, RewardError
from quartet.rewards.remote import Endpoint, ServerReward
from quartet.rewards.reward_model import ModelReward
from quartet.rewards.sandbox import Sandbox
from quartet.rewards.sources import (
    CodeSource,
    EnsembleSource,
    EnvironmentSource,
    ExactSource,
    FunctionSource,
    GoldSource,
    JsonSource,
    JudgeSource,
    LengthSource,
    MathSource,
    ModelSource,
    NumberSource,
    PatternSource,
    ServerSource,
    Source,
    StepsSource,
)
from quartet.rewards.text_models import StepReward, TextModelReward, the_label
from quartet.rewards.verifiable import (
    ExactMatch,
    JsonMatch,
    LengthWithin,
    MathMatch,
    NumberMatch,
    PatternMatch,
    final_number,
)

HEAVY = (ModelSource, EnsembleSource, StepsSource)
"""Sources that load models: made when a stage begins. The others are made, and thereby checked,
before anything is loaded."""


@dataclass
class RewardMaker:
    """Makes rewards; each of the light ones once."""

    tokenizer: Any
    token_texts: Callable[[Sequence[int]], list[str]]
    micro_batch_tokens: int
    device: torch.device
    gold: Gold | None
    made: dict[str, Reward] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def check(self, sources: Sequence[Source], per_token: bool) -> None:
        """All that can be known before a model is loaded."""
        for source in sources:
            if isinstance(source, EnsembleSource):
                for model in source.models:
                    self._check_model(source, model, None, per_token)
            elif isinstance(source, ModelSource) and source.model is not None:
                self._check_model(source, source.model, source.label, per_token)
            elif isinstance(source, StepsSource):
                read_config(source.model)
            elif isinstance(source, JudgeSource):
                _judge(
                    source, Path(source.cache) if source.cache else None
                )  # prompt, token and cache are usable
            elif not isinstance(source, HEAVY):
                self.made[source.called] = self._light(source)

    def _check_model(self, source: Source, model: str, label: int | None, per_token: bool) -> None:
        config = read_config(model)
        kinds = config.architectures or ["ForSequenceClassification"]
        if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
            raise ModelError(
                f"{model}: is a {kinds[0]}, not a reward model. A reward model is a "
                f"ForSequenceClassification with one label; "
                "the stage reward_model makes one."
            )
        the_label(model, config.num_labels, label)
        if not self.reads_ids(model, label) and source.weight:
            if per_token:
                raise ModelError(
                    f"{model}: policy and reward model use different tokenizers, so it has no "
                    f"score for each of the policy's "
                    'tokens. Use algorithm.rewards.type = "last_token".'
                )
            self.notes.append(
                f"policy and reward model {model} use different tokenizers: text is re-encoded for "
                f"the reward model; "
                "per-token rewards are not available."
            )

    def reads_ids(self, model: str, label: int | None = None) -> bool:
        """Whether a reward model can read the very ids that the policy writes: a decoder with the
        policy's tokenizer."""
        config = read_config(model)
        same = load_tokenizer(model, generates=False).get_vocab() == self.tokenizer.get_vocab()
        return same and config.num_labels == 1 and label is None and scores_last_token(config)

    def check_prompts(self, prompts: Iterable[Prompt], sources: Sequence[Source]) -> None:
        """Each prompt has what the rewards compare answers with."""
        asking = [(source, source.column) for source in sources if source.column is not None]
        for prompt in prompts if asking else ():
            for source, column in asking:
                if column not in prompt.extra:
                    kind = getattr(source, "type", "")
                    raise DataError(
                        f'{prompt.id}: has no column {column}, which reward.type = "{kind}" '
                        f"compares with."
                    )
                answer = prompt.extra[column]
                if isinstance(source, CodeSource):
                    checked_tests(prompt.id, column, answer)
                if isinstance(source, NumberSource) and final_number(str(answer)) is None:
                    raise DataError(f'{prompt.id}: there is no number in its {column}: "{answer}".')

    def make(self, source: Source, trained: Path | ScalarModel, folder: Path) -> Reward:
        """`trained` is the reward model of this run, `folder` the run's."""
        name = source.called
        match source:
            case ModelSource(model=None) if isinstance(trained, ScalarModel):
                return ModelReward(trained, self.micro_batch_tokens, name)
            case ModelSource(model=model, label=label):
                return self._model(name, str(trained) if model is None else model, label)
            case EnsembleSource():
                members = [self._model(name, model, None) for model in source.models]
                return EnsembleReward(name, members, source.weights, source.combine, source.k)
            case StepsSource():
                return StepReward(
                    name,
                    source.model,
                    source.separator,
                    source.label,
                    source.combine,
                    self.token_texts,
                    self.device,
                )
            case JudgeSource():
                judge = _judge(
                    source,
                    Path(source.cache) if source.cache else folder / "judge" / f"{name}.jsonl",
                )
                (folder / "judge").mkdir(exist_ok=True)
                durable.replace(folder / "judge" / f"{name}.txt", judge.prompt)
                return judge
        return self.made[name]

    def _model(self, name: str, model: str, label: int | None) -> Reward:
        if self.reads_ids(model, label):
            return ModelReward(
                freeze(ScalarModel.load(model, self.device)), self.micro_batch_tokens, name
            )
        return TextModelReward(name, model, label, self.micro_batch_tokens, self.device)

    def _light(self, source: Source) -> Reward:
        name = source.called
        match source:
            case FunctionSource():
                return FunctionReward(
                    name, source.function, self.token_texts, source.timeout, source.processes
                )
            case ExactSource(answer=answer):
                return ExactMatch(name, answer)
            case NumberSource(answer=answer):
                return NumberMatch(name, answer)
            case MathSource(answer=answer):
                return MathMatch(name, answer)
            case PatternSource(pattern=pattern):
                return PatternMatch(pattern, name)
            case JsonSource(schema_file=file):
                return JsonMatch(None if file is None else _json_file(file), name)
            case LengthSource():
                return LengthWithin(source.least, source.most, name)
            case ServerSource():
                endpoint = Endpoint(
                    "reward server", source.url, source.timeout, source.tries, source.token_env
                )
                return ServerReward(name, endpoint, source.protocol, source.batch)
            case CodeSource():
                return CodeReward(
                    name,
                    Sandbox(source.seconds, source.memory_mb),
                    source.tests,
                    source.score,
                    source.parallel,
                )
            case EnvironmentSource():
                return EnvironmentReward(name)
            case GoldSource():
                assert self.gold is not None, "the config has refused gold without a world"
                return TextReward(name, self.gold)
        raise AssertionError(f"no such reward: {source}")


def _judge(source: JudgeSource, cache: Path | None) -> JudgeReward:
    endpoint = Endpoint("judge", source.url, source.timeout, source.tries, source.token_env)
    prompt = None if source.prompt is None else _prompt_file(source.prompt)
    return JudgeReward(
        source.called,
        endpoint,
        source.model,
        source.mode,
        prompt,
        cache,
        source.parallel,
        source.score_range,
    )


def _prompt_file(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RewardError(f'reward.prompt = "{file}": no such file.') from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise RewardError(f'reward.prompt = "{file}": cannot be read: {reason}.') from None


def _json_file(file: str) -> Any:
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RewardError(f'reward.schema_file = "{file}": no such file.') from None
    except ValueError as error:
        raise RewardError(f'reward.schema_file = "{file}": not JSON: {error}.') from None
