"""The time that a run takes on this machine, measured on a few of its steps.

Two short runs are made, with responses of different length. The steps of SFT, of the reward model
and of a preference stage all take the same time; the first of each, which warms up, is left out. An
RL step takes a fixed time and a time for each token of its responses, which the two lengths give.
An evaluation is measured with about as many prompts as an RL step has responses, and scaled to the
number of its own.
"""

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartet.config.tables import Config
from quartet.planning.plan import num_steps, plan, row_tokens
from quartet.recording.run_folder import RunFolder
from quartet.recording.tokens import TokenTexts
from quartet.runtime.events import Finished
from quartet.runtime.pipeline import Pipeline
from quartet.stages.kinds import BEST_OF_RESPONSES, CUSTOM, RL, kind_of
from quartet.stages.rl import PROBE_COUNT

STEPS = 4
"""Steps of each stage in a short run."""


@dataclass(frozen=True)
class Line:
    """A time that is linear in a size: `fixed` seconds, and `per` seconds for each unit."""

    fixed: float
    per: float

    @classmethod
    def through(cls, first: tuple[float, float], second: tuple[float, float]) -> "Line":
        """Return the line through two sizes with their seconds. Where noise makes the time fall
        with size, the line is level.

        >>> Line.through((10.0, 3.0), (20.0, 5.0))
        Line(fixed=1.0, per=0.2)
        """
        (x, seconds), (other, more) = first, second
        per = max((more - seconds) / (other - x), 0.0) if other != x else 0.0
        fixed = (seconds + more) / 2 - per * (x + other) / 2
        return cls(fixed, per) if fixed >= 0 else cls(0.0, (seconds + more) / (x + other))

    def at(self, size: float) -> float:
        """Return the seconds for a size."""
        return self.fixed + self.per * size


@dataclass(frozen=True)
class Short:
    """The times of one of the two short runs."""

    steps: dict[str, float]
    """Seconds of a step, by stage."""
    probing: float
    """Seconds of one probe of the RL stage, which it makes between some of its steps."""
    tokens: float
    """Tokens of a response on average."""
    evaluation: float
    """Seconds of the evaluation."""
    rest: float
    """Seconds outside all steps: data, models, files."""


@dataclass(frozen=True)
class MeasuredTimes:
    """The measured times, from which the time of the whole run follows."""

    steps: dict[str, float]
    """Seconds of a step, by stage, without the RL stage."""
    rl: Line | None
    """Seconds of an RL step, by the tokens of a response on average."""
    probing: float
    """Seconds of one probe of the RL stage."""
    evaluation: float
    """Seconds of the whole evaluation."""
    rest: float
    """Seconds outside all steps."""

    def seconds(self, config: Config, tokens: float) -> float:
        """Return the seconds of the whole run if responses have so many tokens on average."""
        total, counts = self.rest, _counts(config)
        total += sum(seconds * counts[stage] for stage, seconds in self.steps.items())
        if self.rl is not None:
            total += (
                config.run.steps * self.rl.at(tokens)
                + min(config.run.steps, PROBE_COUNT) * self.probing
            )
        return total + self.evaluation


def measure(config: Config, build: Callable[[Config], Any]) -> MeasuredTimes:
    """Run `STEPS` steps of each stage in a temporary folder, once with responses of at most half
    the length and once of the whole, and return the times. `build` makes the stages of a config
    (`quartet.assembly.build`)."""
    most = config.rollout.max_new_tokens
    prompts = min(
        config.evaluation.prompts,
        config.rollout.prompts_per_step * config.rollout.samples_per_prompt,
    )
    first, second = (
        _short(config, build, max(most // 2, 1), prompts),
        _short(config, build, most, prompts),
    )
    rl = config.rl_stage
    line = None
    if rl is not None:
        line = Line.through((first.tokens, first.steps[rl]), (second.tokens, second.steps[rl]))
    return MeasuredTimes(
        {
            stage: statistics.fmean((first.steps[stage], second.steps[stage]))
            for stage in first.steps
            if stage != rl
        },
        line,
        second.probing,
        second.evaluation * _answers(config, config.evaluation.prompts) / _answers(config, prompts),
        min(first.rest, second.rest),
    )


def in_words(config: Config, measured: MeasuredTimes) -> list[str]:
    """Return lines for a terminal, one fact in each; the last is the time of the whole run."""
    counts, lines = _counts(config), []
    for stage, seconds in measured.steps.items():
        lines.append(f"measured {stage}: {counts[stage]} steps of {_shown(seconds)}")
    expected = min(row_tokens(config)[1], float(config.rollout.max_new_tokens))
    if measured.rl is not None:
        step = (
            f"{_shown(measured.rl.fixed)} + {_shown(measured.rl.per)} for each token of the mean "
            "answer"
        )
        probes = f"{min(config.run.steps, PROBE_COUNT)} probes of {_shown(measured.probing)}"
        lines.append(f"measured {config.rl_stage}: {config.run.steps} steps of {step}; {probes}")
    if "evaluation" in config.recipe:
        lines.append(
            f"measured evaluation: {config.evaluation.prompts} prompts in "
            f"{_shown(measured.evaluation)}"
        )
    likely = measured.seconds(config, expected)
    longest = measured.seconds(config, float(config.rollout.max_new_tokens))
    guessed = plan(config).seconds
    beside = f" (without measuring: {guessed:,.0f} s)" if guessed else ""
    if measured.rl is None or longest < 1.05 * likely:
        return [*lines, f"in all   about {likely:,.0f} s{beside}"]
    range_of_times = (
        f"about {likely:,.0f} s with answers of {expected:.0f} tokens, {longest:,.0f} s if each "
        "has the most tokens it may"
    )
    return [*lines, f"in all   {range_of_times}{beside}"]


def _shown(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{1000 * seconds:,.0f} ms"


def _answers(config: Config, prompts: int) -> int:
    """Return the responses of an evaluation: of the policy before and after, and for best-of-n."""
    return 2 * prompts + BEST_OF_RESPONSES * (config.evaluation.best_of >= 2)


def _counts(config: Config) -> dict[str, int]:
    """Return the number of steps of each stage but RL."""
    counts = {
        stage: num_steps(config, kind.optim)
        for stage in config.stages
        if (kind := kind_of(stage)) is not None and kind.optim is not None and kind is not RL
    }
    own = {} if config.stage_source is None else {CUSTOM.name: config.stage_source.steps}
    return counts | own


def _short(config: Config, build: Callable[[Config], Any], answer: int, prompts: int) -> Short:
    custom = config.custom
    small = dataclasses.replace(
        config,
        sft=dataclasses.replace(config.sft, steps=STEPS, epochs=None),
        reward_model=dataclasses.replace(config.reward_model, steps=STEPS, epochs=None),
        preference=dataclasses.replace(config.preference, steps=STEPS, epochs=None),
        ilql=dataclasses.replace(config.ilql, steps=STEPS, epochs=None),
        custom=None if custom is None else dataclasses.replace(custom, steps=STEPS),
        run=dataclasses.replace(config.run, steps=STEPS, track=()),
        optim=dataclasses.replace(config.optim, critic_warmup_steps=0),
        rollout=dataclasses.replace(config.rollout, max_new_tokens=answer),
        evaluation=dataclasses.replace(config.evaluation, prompts=prompts),
    )
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        job = build(small)
        folder = RunFolder.create(Path(place), "measured", {})
        pipeline = Pipeline(job.stages, folder, TokenTexts(job.tokenizer), job.saving(small.run))
        ended = {
            event.stage.name: event.seconds
            for event in pipeline.run()
            if isinstance(event, Finished)
        }
        folder.close()
        lines = (
            json.loads(line)
            for line in (folder.path / "events.jsonl").read_text(encoding="utf-8").splitlines()
        )
        events = [e for e in lines if e["event"] == "metrics"]
    evaluation = ended.get("evaluation", 0.0)
    by_stage = {
        name: [e for e in events if e["stage"] == name] for name in ended if name != "evaluation"
    }
    return _summed(config, by_stage, evaluation, time.monotonic() - began)


def _summed(
    config: Config, by_stage: Mapping[str, list[dict[str, Any]]], evaluation: float, took: float
) -> Short:
    steps = {
        stage: statistics.median(_seconds(e) for e in events[1:])
        for stage, events in by_stage.items()
    }
    rl = by_stage.get(config.rl_stage or "", [])
    probing = statistics.median(e["seconds"] - _seconds(e) for e in rl[1:]) if rl else 0.0
    tokens = statistics.fmean(e["metrics"]["response/tokens"] for e in rl[1:]) if rl else 0.0
    counted = evaluation + sum(e["seconds"] for events in by_stage.values() for e in events)
    return Short(steps, max(probing, 0.0), tokens, evaluation, took - counted)


def _seconds(event: dict[str, Any]) -> float:
    """Return the seconds of a step, without the RL stage's probes."""
    phases = event.get("phases")
    return sum(phases.values()) if phases else float(event["seconds"])
