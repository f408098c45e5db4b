"""An evaluation from its request to its file."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from quartet import __version__, files
from quartet.assembly.evaluation import measures as m
from quartet.assembly.evaluation.answers import Answer, kept_answers, key_of
from quartet.assembly.evaluation.measures import ACCURACY, KL, PERPLEXITY, Measure
from quartet.assembly.evaluation.policies import (
    EvaluationError,
    LocalPolicy,
    Policy,
    check_one_vocabulary,
    is_run,
    labelled,
    policies_of,
    run_config,
    start_of,
)
from quartet.assembly.evaluation.reward_models import reward_models_of
from quartet.assembly.evaluation.sets import Set, examples_of, row_key, sets_of, world_of
from quartet.evaluation.at_k import maj_at_k, pass_at_k
from quartet.evaluation.results import Measured, cell, comparison, corrected, estimated
from quartet.evaluation.statistics import mean
from quartet.generation.sampling import Sampling
from quartet.io.texts import well_formed_json
from quartet.rewards.judge import JudgeReward
from quartet.rewards.objects import object_name
from quartet.rewards.protocol import Reward, Score

Say = Callable[[str], None]


@dataclass(frozen=True)
class EvaluationRequest:
    """What is evaluated, on what, by what."""

    policies: tuple[str, ...]
    on: tuple[str, ...] = ()
    measures: tuple[Any, ...] = ()
    against: str | None = None
    samples: int = 1
    rows: int = 500
    seed: int = 0
    max_new_tokens: int | None = None
    temperature: float | None = None
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    folder: Path | None = None
    name: str | None = None
    token_env: str | None = None
    rubric: str | None = None
    """A file of criteria by which the judges of `measures` compare (docs/labelling.md)."""

    @property
    def run(self) -> Path | None:
        """The first run among the policies."""
        for words in self.policies:
            spec = labelled(words)[1]
            for place in (Path(spec), Path(spec.rpartition("@")[0])):
                if "://" not in spec and is_run(place):
                    return place.resolve()
        return None

    @property
    def to(self) -> Path:
        """The folder that the evaluation is kept in."""
        if self.folder is not None:
            return self.folder
        return Path("evaluation") if self.run is None else self.run / "evaluation"


def evaluate(request: EvaluationRequest, say: Say = lambda _: None) -> tuple[Path, dict[str, Any]]:
    """Carry out an evaluation. Return its file and what it holds. `say` is told what is being done.
    One that was stopped goes on with the answers that its folder has. Raises a QuartetError for
    anything that cannot be used."""
    evaluation = ResolvedEvaluation(request, say)
    folder = request.to
    folder.mkdir(parents=True, exist_ok=True)
    measured = list(evaluation.measured())
    result = evaluation.result(measured)
    path = folder / f"{request.name or 'eval-' + _key(request)[:8]}.json"
    text = json.dumps(well_formed_json(result), ensure_ascii=False, allow_nan=False)
    files.replace(path, text + "\n")
    return path, result


def _key(request: EvaluationRequest) -> str:
    """Return a short name of what a request says. Of a Python object only its name counts."""
    words = [object_name(each) if m.is_object(each) else each for each in request.measures]
    named = dataclasses.replace(request, measures=tuple(words))
    return key_of([dataclasses.asdict(named), [str(each) for each in words]])


def _sampling(base: Sampling, request: EvaluationRequest) -> Sampling:
    """Return `base`, the sampling of a run's rollouts or a default, with what the request sets. No
    mask is kept: nothing is trained. Raises EvaluationError for a value out of range."""
    own = {field.name: getattr(base, field.name) for field in dataclasses.fields(Sampling)}
    names = ("max_new_tokens", "temperature")
    given = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    try:
        sampling = Sampling(**own | {"keep_mask": False} | given)
    except ValidationError as error:
        first = error.errors()[0]
        raise EvaluationError(f"{first['loc'][0]} = {first['input']}: {first['msg']}.") from None
    shortest = min(sampling.min_new_tokens, sampling.max_new_tokens)
    return dataclasses.replace(sampling, min_new_tokens=shortest)


class ResolvedEvaluation:
    """The policies, sets and measures of a request, resolved."""

    def __init__(self, request: EvaluationRequest, say: Say) -> None:
        """Raises a QuartetError for what does not exist or does not fit."""
        self.request, self.say, self.run = request, say, request.run
        if not request.policies:
            raise EvaluationError("no model was named. Name runs, folders, hub ids or URL#MODEL.")
        self._check_places()
        config = None if self.run is None else run_config(self.run)
        self.world = None if config is None else world_of(config)
        self.sets = sets_of(request.on, self.run, dict(request.columns), request.rows)
        base = Sampling(max_new_tokens=256) if config is None else config.rollout
        self.sampling = _sampling(base, request)
        words = request.measures or self._default_measures()
        only_choices = all(each == ACCURACY.name for each in words)
        self.policies: list[Policy] = [] if only_choices else self._policies()
        self.against = self._against() if self.policies else None
        has_rival = self.against is not None
        self.measures = [m.measure_of(each, has_rival, request.rubric) for each in words]
        self._check()
        self.rubrics = {measure.name: measure.rubric() for measure in self.measures}
        if request.rubric is not None and not any(self.rubrics.values()):
            raise EvaluationError(
                "--rubric: is for a language model that compares answers. Name it with --measure "
                "judge:URL#MODEL."
            )
        self.reward_models: dict[str, Measure] = {}
        if ACCURACY in self.measures:
            first = [request.against] if request.against is not None else []
            self.reward_models = reward_models_of([*first, *request.policies])

    def _check_places(self) -> None:
        """Raise EvaluationError for a folder that does not exist, where it would have had to give
        the sets or the measures: a word may be a hub id, too."""
        if self.run is not None or (self.request.on and self.request.measures):
            return
        for words in self.request.policies:
            spec = labelled(words)[1]
            if "://" not in spec and not Path(spec.rpartition("@")[0] or spec).exists():
                raise EvaluationError(
                    f"{spec}: no such folder here. A model of the hub needs --on FILE and "
                    "--measure."
                )

    def _default_measures(self) -> tuple[str, ...]:
        if self.world is not None:
            return ("gold",)
        if self.run is not None and (self.run / "reward_model").is_dir():
            return (f"model:{self.run / 'reward_model'}",)
        raise EvaluationError(
            "no measure was named. Add --measure: accuracy, perplexity, or a reward, such as "
            "number, model:FOLDER or judge:URL#MODEL."
        )

    def _policies(self) -> list[Policy]:
        token = self.request.token_env
        policies = [p for words in self.request.policies for p in policies_of(words, token)]
        names = [policy.name for policy in policies]
        if doubled := next((name for name in names if names.count(name) > 1), None):
            raise EvaluationError(f"two policies are called {doubled}. Write name=MODEL.")
        return policies

    def _against(self) -> Policy | None:
        """Return the policy that the others are compared with: the one named, or what a single run
        started from, or the first of several. One that is new becomes the first."""
        words = self.request.against
        if words is None:
            several = len(self.request.policies) > 1
            if several or self.run is None:
                return self.policies[0] if len(self.policies) > 1 else None
            try:
                start_of(self.run)
            except EvaluationError:
                return self.policies[0] if len(self.policies) > 1 else None
            words = f"{self.run}@start"
        named = policies_of(words, self.request.token_env)
        if len(named) != 1:
            raise EvaluationError(f"--against {words}: names {len(named)} policies; name one.")
        for policy in self.policies:
            if policy.identity == named[0].identity or policy.name == words:
                return policy
        if any(policy.name == named[0].name for policy in self.policies):
            raise EvaluationError(f"two policies are called {named[0].name}. Write name=MODEL.")
        self.policies.insert(0, named[0])
        return named[0]

    def _check(self) -> None:
        """Raise EvaluationError for measures that cannot be taken, before a model is loaded."""
        names = [measure.name for measure in self.measures]
        if doubled := next((name for name in names if names.count(name) > 1), None):
            raise EvaluationError(f'--measure: two are called {doubled}. Add name = "…" to one.')
        for measure in self.measures:
            fitting = self._sets_for(measure)
            if not fitting:
                needed = {"choices": "chosen and rejected", "texts": "text, or completion"}
                raise EvaluationError(
                    f"--measure {measure.name}: no set has rows for it. It needs "
                    f"{needed.get(measure.needs, 'prompt')}."
                )
            m.check_reward(measure, self._gold, self.run)
            if measure.source is not None:
                for each in fitting:
                    m.check_column(measure, each.prompts)
            served = [policy.name for policy in self.policies if not policy.has_weights]
            if measure in (PERPLEXITY, KL) and served:
                raise EvaluationError(
                    f"--measure {measure.name}: needs the weights of each policy, and {served[0]} "
                    "is a server."
                )
            if self.against is None and (measure is KL or measure.is_pairwise):
                raise EvaluationError(
                    f"--measure {measure.name}: needs a policy to compare with: --against MODEL."
                )
        if KL in self.measures and self.sampling.filters:
            raise EvaluationError(
                "--measure kl: the run samples with top_k, top_p or min_new_tokens, and the KL is "
                "that of the whole distribution. Leave kl out."
            )
        if KL in self.measures and isinstance(self.against, LocalPolicy):
            local = [policy for policy in self.policies if isinstance(policy, LocalPolicy)]
            check_one_vocabulary(self.against, local)

    @property
    def _gold(self) -> Any:
        return None if self.world is None else self.world.gold

    def _sets_for(self, measure: Measure) -> list[Set]:
        return [each for each in self.sets if each.has(measure.needs)]

    # --- numbers

    def measured(self) -> Iterator[Measured]:
        """Yield the numbers of each policy on each set by each measure, and keep the answers."""
        self.answers: dict[tuple[str, str], list[Answer]] = {}
        own_logprobs: dict[tuple[str, str], list[float]] = {}
        for policy in self.policies:
            with contextlib.ExitStack() as stack:
                loaded = functools.cache(functools.partial(self._open, stack, policy))
                yield from self._of_weights(policy, loaded, own_logprobs)
        if KL in self.measures:
            yield from self._kl(own_logprobs)
        for measure in self.measures:
            if measure.source is not None:
                yield from self._rewarded(measure)
        if ACCURACY in self.measures:
            yield from self._accuracy()

    def _open(self, stack: contextlib.ExitStack, policy: Policy) -> Any:
        self.say(f"loading {policy.name}")
        return stack.enter_context(policy.opened())

    def _of_weights(
        self,
        policy: Policy,
        loaded: Callable[[], Any],
        own_logprobs: dict[tuple[str, str], list[float]],
    ) -> Iterator[Measured]:
        """Answer the sets' prompts, and take the measures that need the policy's weights."""
        if any(measure.needs == "prompts" for measure in self.measures):
            for each in self.sets:
                if not each.has("prompts"):
                    continue
                place = policy.name, each.name
                self.answers[place] = self._answers(policy, loaded, each)
                if KL in self.measures and policy is not self.against:
                    temperature = self.sampling.temperature
                    own_logprobs[place] = loaded().logprobs(self.answers[place], temperature)
        if PERPLEXITY in self.measures:
            for each in self._sets_for(PERPLEXITY):
                self.say(f"{policy.name}: perplexity of {each.name}")
                losses = loaded().losses(each.texts)
                values, tokens = [loss for loss, _ in losses], [count for _, count in losses]
                yield self._measured(policy.name, each, PERPLEXITY, values, tokens=tokens)

    def _answers(self, policy: Policy, loaded: Callable[[], Any], each: Set) -> list[Answer]:
        samples, seed = self.request.samples, self.request.seed
        rows = [row_key(example) for example in each.prompts]
        sampling = dataclasses.asdict(self.sampling)
        key = key_of([policy.identity, rows, sampling, samples, seed])
        folder = self.request.to / "answers"
        folder.mkdir(exist_ok=True)

        def ask(block: Sequence[Any], number: int) -> Sequence[Answer]:
            opened = loaded()
            self.say(f"{policy.name}: answers to {each.name}, {len(rows):,} prompts")
            of_block = int(key_of([seed, rows[0], number]), 16) % 2**62
            answers: Sequence[Answer] = opened.answers(block, self.sampling, samples, of_block)
            return answers

        file = folder / f"{key}.jsonl"
        return kept_answers(file, each.prompts, samples, ask, reuse_whole=policy.has_weights)

    def _kl(self, own_logprobs: dict[tuple[str, str], list[float]]) -> Iterator[Measured]:
        """Yield Σ_t log π(t) − log π_against(t) of each answer, in nats."""
        assert self.against is not None
        with self.against.opened() as before:
            for each in self._sets_for(KL):
                for policy in self.policies:
                    if policy is self.against:
                        continue
                    place = policy.name, each.name
                    theirs = before.logprobs(  # type: ignore[union-attr]  # no server, by _check
                        self.answers[place], self.sampling.temperature
                    )
                    pairs = zip(own_logprobs[place], theirs, strict=True)
                    differences = self._means([own - other for own, other in pairs])
                    yield self._measured(policy.name, each, KL, differences)

    def _rewarded(self, measure: Measure) -> Iterator[Measured]:
        reward = m.reward_of(measure, self._gold, self.request.to, self.run)
        samples = self.request.samples
        for each in self._sets_for(measure):
            for policy in self.policies:
                if measure.is_pairwise and policy is self.against:
                    continue
                self.say(f"{policy.name}: {measure.name} of the answers to {each.name}")
                answers = self.answers[policy.name, each.name]
                if measure.is_pairwise:
                    yield from self._compared(policy.name, each, measure, reward)
                    continue
                scores = m.scores_of(reward, each.prompts, answers, samples)
                yield self._measured(policy.name, each, measure, self._means(scores))
                if measure.is_verifier and samples > 1:
                    yield from self._at_k(policy.name, each, measure, answers, scores)

    def _compared(
        self, policy: str, each: Set, measure: Measure, judge: Reward
    ) -> Iterator[Measured]:
        """Yield how often a policy wins by a judge, and by each criterion of its rubric."""
        assert self.against is not None and isinstance(judge, JudgeReward)
        answers, rivals = (self.answers[name, each.name] for name in (policy, self.against.name))
        won = m.compared(judge, each.prompts, answers, rivals, self.request.samples)
        yield self._measured(policy, each, measure, self._means(won.scores))
        for name, shares in won.criteria.items():
            named = dataclasses.replace(measure, name=f"{measure.name} {name}")
            yield self._measured(policy, each, named, self._means(shares))

    def _at_k(
        self,
        policy: str,
        each: Set,
        measure: Measure,
        answers: Sequence[Answer],
        scores: Sequence[Score],
    ) -> Iterator[Measured]:
        """Yield pass@k, and maj@k where answers can be counted, for k = 2, 4, 8 … and all."""
        n = self.request.samples
        sizes = sorted({2**power for power in range(1, n.bit_length()) if 2**power <= n} | {n})
        groups = [range(i, i + n) for i in range(0, len(scores), n)]
        for k in sizes:
            passed: list[Score] = []
            majority: list[Score] = []
            for group in groups:
                known = [score for i in group if (score := scores[i]) is not None]
                if len(known) < n:
                    passed.append(None)
                    majority.append(None)
                    continue
                passed.append(pass_at_k(sum(score == 1 for score in known), n, k))
                if m.votes(measure):
                    votes = [m.vote_of(measure.source, answers[i].response) for i in group]
                    majority.append(maj_at_k(votes, known, k))
            named = dataclasses.replace(measure, name=f"{measure.name} pass@{k}")
            yield self._measured(policy, each, named, passed, is_at_k=True)
            if m.votes(measure):
                named = dataclasses.replace(measure, name=f"{measure.name} maj@{k}")
                yield self._measured(policy, each, named, majority, is_at_k=True)

    def _accuracy(self) -> Iterator[Measured]:
        for name, measure in self.reward_models.items():
            reward = m.reward_of(measure, None, self.request.to, None)
            for each in self._sets_for(ACCURACY):
                self.say(f"{name}: accuracy on {each.name}")
                yield self._measured(name, each, ACCURACY, m.right_choices(reward, each.choices))

    def _means(self, scores: Sequence[Score]) -> list[Score]:
        """Return the mean score of each prompt's answers; None where one has none."""
        n, means = self.request.samples, []
        for i in range(0, len(scores), n):
            known = [score for score in scores[i : i + n] if score is not None]
            means.append(sum(known) / n if len(known) == n else None)
        return means

    def _measured(
        self,
        policy: str,
        each: Set,
        measure: Measure,
        values: Sequence[Score],
        tokens: Sequence[int] | None = None,
        is_at_k: bool = False,
    ) -> Measured:
        return Measured(
            policy,
            each.name,
            measure.name,
            values,
            measure.needs,
            measure.higher_is_better,
            is_compared=measure is not KL and not is_at_k,
            is_pairwise=measure.is_pairwise,
            tokens=tokens,
            lengths=self._lengths(policy, each.name) if measure.needs == "prompts" else None,
        )

    def _lengths(self, policy: str, name: str) -> list[float]:
        """Return the mean length of the answers to each prompt, in characters."""
        n, answers = self.request.samples, self.answers[policy, name]
        lengths = [len(answer.response) for answer in answers]
        return [sum(lengths[i : i + n]) / n for i in range(0, len(lengths), n)]

    # --- results

    def result(self, measured: Sequence[Measured]) -> dict[str, Any]:
        """Return what the evaluation's file holds."""
        cells = [cell(each) for each in measured]
        for (policy, name), answers in self.answers.items():
            tokens = self._means([float(answer.tokens) for answer in answers])
            place = {"policy": policy, "set": name, "measure": "tokens"}
            cells.append(estimated(place, mean([t for t in tokens if t is not None]), tokens))
        return {
            "quartet": __version__,
            "policies": self._names(measured),
            "against": self._against_name(measured),
            "sets": [{"name": each.name, "source": each.source} for each in self.sets],
            "samples": self.request.samples,
            "seed": self.request.seed,
            "sampling": dataclasses.asdict(self.sampling) | {"stop": list(self.sampling.stop)},
            "rubrics": {
                name: [criterion.model_dump() for criterion in rubric.criteria]
                for name, rubric in self.rubrics.items()
                if rubric is not None
            },
            "cells": cells,
            "comparisons": corrected(self._comparisons(measured)),
            "items": {each.name: self._items(each, measured) for each in self.sets},
        }

    def _names(self, measured: Sequence[Measured]) -> list[str]:
        policies = [policy.name for policy in self.policies]
        return list(dict.fromkeys([*policies, *(each.policy for each in measured)]))

    def _against_name(self, measured: Sequence[Measured]) -> str | None:
        if self.against is not None:
            return self.against.name
        names = self._names(measured)
        return names[0] if len(names) > 1 else None

    def _comparisons(self, measured: Sequence[Measured]) -> list[dict[str, Any]]:
        """Return the comparisons with the policy compared with."""
        against = self._against_name(measured)
        table = {(each.policy, each.set, each.measure): each for each in measured}
        found = []
        for each in measured:
            if each.policy == against or against is None or not each.is_compared:
                continue
            rival = table.get((against, each.set, each.measure))
            if each.is_pairwise:  # the rival has no numbers, but lengths
                rival = dataclasses.replace(each, lengths=self._lengths(against, each.set))
            if rival is not None:
                found.append(comparison(each, rival, against))
        return [each for each in found if each is not None]

    def _items(self, each: Set, measured: Sequence[Measured]) -> dict[str, Any]:
        """Return the numbers of each row of a set, for `quartet eval --compare`."""
        own = [dataclasses.asdict(one) for one in measured if one.set == each.name]
        needs = {m.needs for m in self.measures if each.has(m.needs)}
        keys = {need: [row_key(row) for row in examples_of(each, need)] for need in sorted(needs)}
        return {"keys": keys, "measured": own}
