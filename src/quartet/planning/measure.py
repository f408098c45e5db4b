"""What a run takes on this machine, found by running a little of it: twice, with answers of
different length.

Of SFT, reward model and comparisons a step is a step; the first of each, which warms up, is left
out. A step of RL costs something for each token of its answers and something besides: two lengths
give a line. An evaluation is measured with about as many prompts as a step has answers, and takes
as much longer as it asks for more answers.
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
from quartet.planning.plan import plan, row_tokens
from quartet.recording.run_folder import RunFolder
from quartet.recording.tokens import TokenTexts
from quartet.runtime.pipeline import Finished, Pipeline
from quartet.stages.evaluation import BEST_OF_RESPONSES
from quartet.stages.rl import PROBE_COUNT

STEPS = 4


@dataclass(frozen=True)
class Line:
    """Seconds for a size."""

    fixed: float
    per: float

    @classmethod
    def through(cls, first: tuple[float, float], second: tuple[float, float]) -> "Line":
        """Two sizes with their seconds. What noise makes fall with size is level.

        >>> Line.through((10.0, 3.0), (20.0, 5.0))
        Line(fixed=1.0, per=0.2)
        """
        (x, seconds), (other, more) = first, second
        per = max((more - seconds) / (other - x), 0.0) if other != x else 0.0
        fixed = (seconds + more) / 2 - per * (x + other) / 2
        return cls(fixed, per) if fixed >= 0 else cls(0.0, (seconds + more) / (x + other))

    def at(self, size: float) -> float:
        return self.fixed + self.per * size


@dataclass(frozen=True)
class Short:
    """One of the two runs."""

    steps: dict[str, float]
    """Seconds of a step, by stage."""
    probing: float
    """Seconds for what RL looks at now and then, besides its steps."""
    tokens: float
    """Of an answer."""
    evaluation: float
    rest: float
    """Seconds outside all steps: data, models, files."""


@dataclass(frozen=True)
class Measured:
    """What the whole run is reckoned from."""

    steps: dict[str, float]
    rl: Line | None
    """Of a step, by tokens of an answer."""
    probing: float
    evaluation: float
    """Seconds of the whole."""
    rest: float

    def seconds(self, config: Config, tokens: float) -> float:
        """Of the whole run, if answers have so many tokens on average."""
        total, counts = self.rest, _counts(config)
        total += sum(seconds * counts[stage] for stage, seconds in self.steps.items())
        if self.rl is not None:
            total += (
                config.run.steps * self.rl.at(tokens)
                + min(config.run.steps, PROBE_COUNT) * self.probing
            )
        return total + self.evaluation


def measure(config: Config, build: Callable[[Config], Any]) -> Measured:
    """Run `STEPS` steps of each stage in a temporary folder, with answers of half the length and of
    the whole. `build` makes the stages of a config: `quartet.assembly.build`."""
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
    return Measured(
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


def in_words(config: Config, measured: Measured) -> list[str]:
    """A line per fact; the last is the answer."""
    counts, lines = _counts(config), []
    for stage, seconds in measured.steps.items():
        lines.append(f"measured {stage}: {counts[stage]} steps of {_shown(seconds)}")
    expected = min(row_tokens(config)[1], float(config.rollout.max_new_tokens))
    if measured.rl is not None:
        each = f"{_shown(measured.rl.fixed)} + {_shown(measured.rl.per)} for each token of the mean answer"
        besides = f"{min(config.run.steps, PROBE_COUNT)} looks at it of {_shown(measured.probing)}"
        lines.append(f"measured {config.rl_stage}: {config.run.steps} steps of {each}; {besides}")
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
    said = f"about {likely:,.0f} s with answers of {expected:.0f} tokens, {longest:,.0f} s if each takes all it may"
    return [*lines, f"in all   {said}{beside}"]


def _shown(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{1000 * seconds:,.0f} ms"


def _answers(config: Config, prompts: int) -> int:
    """Of an evaluation: before and after, and those that the best are picked from."""
    return 2 * prompts + BEST_OF_RESPONSES * (config.evaluation.best_of >= 2)


def _counts(config: Config) -> dict[str, int]:
    """Steps of each stage."""
    counts = {"sft": config.sft.steps, "reward_model": config.reward_model.steps}
    if config.preference_stage is not None:
        counts[config.preference_stage] = config.preference.steps
    return counts


def _short(config: Config, build: Callable[[Config], Any], answer: int, prompts: int) -> Short:
    small = dataclasses.replace(
        config,
        sft=dataclasses.replace(config.sft, steps=STEPS),
        reward_model=dataclasses.replace(config.reward_model, steps=STEPS),
        preference=dataclasses.replace(config.preference, steps=STEPS),
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
    """Of a step; of RL without what is looked at only now and then."""
    phases = event.get("phases")
    return sum(phases.values()) if phases else float(event["seconds"])
