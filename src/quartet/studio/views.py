"""What each page shows: from a run to plain values. No HTML here, and no web."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quartet.io.texts import typed
from quartet.runs.charts import charts
from quartet.runs.definitions import Definition, caption, definition
from quartet.runs.figures import finite, lines, phases, smoothed
from quartet.runs.reader import Run, Sample
from quartet.runs.wording import EMPTY, MEASURES, aligned, number

WORST_PAIRS = 12
SAMPLES_SHOWN = 200
"""The most rows of a page of samples."""
TEXT_SHOWN = 4_000
"""The most characters of a prompt or response in a list."""
TOKEN_TEXT_SHOWN = 400
"""The most characters of one token."""
TOKEN_QUOTED = 40
"""The most characters of a token in a sentence."""
TOKENS_SHOWN = 50_000
"""The most tokens of one sample on a page."""


@dataclass(frozen=True)
class TokenColumn:
    """A per-token number and how the inspector shows it."""

    name: str
    label: str
    what: str
    scale: str
    """The colour scale: "zero" (diverging around 0), "one" (around 1) or "up" (from 0)."""


TOKEN_COLUMNS = (
    TokenColumn(
        "advantage",
        "advantage",
        "the weight of the token in the update; above 0 the token becomes more likely",
        "zero",
    ),
    TokenColumn(
        "reward", "reward", "the score where it is given, and the KL penalty of each token", "zero"
    ),
    TokenColumn(
        "change",
        "change of log-prob",
        "log π − log π_old at the last epoch of the update",
        "zero",
    ),
    TokenColumn(
        "kl",
        "KL",
        "log π_old − log π_ref: positive where the policy finds it more likely than the reference",
        "zero",
    ),
    TokenColumn(
        "penalty",
        "KL penalty",
        "−coefficient × KL, the part of the reward that keeps the policy near the reference",
        "zero",
    ),
    TokenColumn("value", "value", "the return that the critic expects before this token", "zero"),
    TokenColumn(
        "td_error",
        "TD error",
        "δ = r + γ V(next) − V, the error of the critic at this token",
        "zero",
    ),
    TokenColumn("raw_advantage", "advantage before whitening", "A as estimated", "zero"),
    TokenColumn("return", "return", "the target of the critic: advantage + value", "zero"),
    TokenColumn("ratio", "ratio", "π / π_old at the last epoch of the update", "one"),
    TokenColumn(
        "entropy",
        "entropy",
        "entropy of the sampling distribution, in nats",
        "up",
    ),
    TokenColumn("logprob", "log-prob now", "log π at the last epoch of the update", "up"),
    TokenColumn("old_logprob", "log-prob old", "log π_old: when it was sampled", "up"),
    TokenColumn(
        "ref_logprob",
        "log-prob reference",
        "log π_ref, by the frozen reference model",
        "up",
    ),
)


def run_row(run: Run) -> dict[str, Any]:
    """Return the row of a run in the list of runs."""
    stage = run.main_stage
    series = run.series[stage] if stage else None
    curve, label = None, ""
    for name in ("reward/gold", "reward", "accuracy", "loss"):
        if series is not None and name in series.columns and len(series.steps) > 1:
            label = definition(name).label
            curve = sparkline(smoothed(list(series.columns[name])) or list(series.columns[name]))
            break
    started = run.events[0]["time"] if run.events else None
    return {
        "name": run.name,
        "status": run.status,
        "recipe": " → ".join(s.replace("_", " ") for s in run.config.get("recipe", [])),
        "stage": stage,
        "step": series.steps[-1] if series is not None and len(series.steps) else 0,
        "numbers": headline(run),
        "sparkline": curve,
        "sparkline_of": label,
        "warnings": len(run.warnings),
        "problems": run.problems,
        "started": started,
    }


def unreadable_row(name: str, sentence: str) -> dict[str, Any]:
    """Return the row in the list of runs of a folder whose record cannot be read."""
    empty: dict[str, Any] = {
        "recipe": "",
        "stage": None,
        "step": None,
        "numbers": [],
        "sparkline": None,
        "sparkline_of": "",
        "warnings": 0,
    }
    return {
        "name": name,
        "status": "unreadable",
        **empty,
        "problems": [sentence.removeprefix(f"{name}: ")],
        "started": None,
    }


def shortened(text: str, limit: int = TEXT_SHOWN) -> str:
    """Return the first `limit` characters of a text, and how many it has if it has more."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"


def visible(text: str) -> str:
    """Return a prompt or response for a list: shortened, or "(empty)" where nothing would show."""
    return shortened(text) if text.strip() else EMPTY


HEADLINE = (
    "reward",
    "reward/gold",
    "kl",
    "accuracy",
    "loss",
    "response/tokens",
    "value/explained_variance",
)


UNITS = {"kl": "nats", "response/tokens": "tokens"}


def headline(run: Run) -> list[tuple[str, str, str]]:
    """Return the most important metrics of the main stage and the win rate: label, last value (the
    mean of five steps), and the value of the first step where there are several."""
    stage = run.main_stage
    numbers = []
    if stage is not None:
        series = run.series[stage]
        for name in HEADLINE:
            value = series.last(name, 5)
            if value is not None and not (name in {"accuracy", "loss"} and run.rl_stage):
                label = definition(name).label
                label = f"{label}, {UNITS[name]}" if name in UNITS else label
                values = [v for v in series.columns[name] if not math.isnan(v)]
                now, first = aligned([value, values[0]])
                numbers.append((label, now, first if len(values) > 1 else ""))
    evaluation = run.evaluation
    if evaluation and evaluation.get("win_rate"):
        win = evaluation["win_rate"]
        interval = f"{win['mean']:.2f} ± {win['interval']:.2f}"
        numbers.append((win_rate_label(evaluation), interval, ""))
    return numbers


def last_numbers(run: Run) -> dict[str, str]:
    """Return the last values of `headline` by their labels."""
    return {label: value for label, value, _ in headline(run)}


def standing(run: Run) -> str:
    """Return what became of a run that is not done: its error, or how it goes on. Nothing of one
    that is done or under way."""
    again = f"quartet run {typed(run.path)} --resume"
    return {
        "failed": f"The run failed: {failure(run)}",
        "interrupted": f"The run was stopped, and nothing is lost: {again} goes on with it.",
        "stopped": f"Nothing was written for five minutes. If the run has ended: {again}",
    }.get(run.status, "")


def failure(run: Run) -> str:
    """Return the error of a run that failed; nothing of any other."""
    last = run.events[-1] if run.events else {}
    return str(last["error"]) if last.get("event") == "failed" else ""


def win_rate_label(evaluation: Mapping[str, Any]) -> str:
    judge = "gold reward" if evaluation["judge"] == "gold" else evaluation["judge"]
    return f"win rate by {judge}"


def evaluation_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the rows of an evaluation's table: label, before, after. What repeats another row is
    left out: `reward/gold`, which is `gold`, and the only component of the reward."""
    before, after = evaluation["before"], evaluation["after"]
    components = [n for n in before if n.startswith("reward/") and n != "reward/gold"]
    repeated = {"reward/gold"} if "gold" in before else set()
    if len(components) == 1 and before.get("reward") == before[components[0]]:
        repeated |= set(components)
    names = [name for name in MEASURES if name in before]
    names += [name for name in before if name not in MEASURES and name not in repeated]
    texts = [measures(name, before.get(name), after.get(name)) for name in names]
    return [
        (MEASURES.get(name) or definition(name).label, *pair)
        for name, pair in zip(names, texts, strict=True)
    ]


SHARES = {"response/ended", "response/repetition", "response/distinct", "response/most_common"}


def measures(name: str, before: Any, after: Any) -> tuple[str, str]:
    """Return a measure of both sides as text: in percent if it is a share, and else with as many
    decimals on either side."""
    if name in SHARES and all(isinstance(value, int | float) for value in (before, after)):
        return f"{100 * before:.1f}%", f"{100 * after:.1f}%"
    texts = aligned([before, after])
    return texts[0], texts[1]


def score_parts(components: Mapping[str, float | None], score: float | None) -> dict[str, str]:
    """Return the components of a score by name, as text. The only reward is left out where it is
    the score itself; the gold reward is named as such."""
    rewards = [name for name in components if name != "gold"]
    return {
        "gold reward" if name == "gold" else name.replace("_", " "): number(value)
        for name, value in components.items()
        if not (rewards == [name] and value == score)
    }


def sparkline(values: Sequence[float], width: int = 120, height: int = 28) -> str:
    """Return the points of an SVG polyline."""
    shown = [v for v in values if math.isfinite(v)]
    if len(shown) < 2:
        return ""
    step = max(1, len(shown) // width)
    shown = shown[::step]
    low, high = min(shown), max(shown)
    scale = (height - 4) / (high - low) if high > low and math.isfinite(high - low) else 0.0
    return " ".join(
        f"{i * width / (len(shown) - 1):.1f},{height - 2 - (v - low) * scale:.1f}"
        for i, v in enumerate(shown)
    )


def overview(run: Run, stage: str) -> list[dict[str, Any]]:
    """Return the charts of a stage, each with the meanings of its metrics."""
    series = run.series[stage]
    result = [
        {
            "figure": lines(run, stage, chart.title, names, chart.percent),
            "meanings": [meaning(name, run.definitions) for name in names],
        }
        for chart, names in charts(series, run.definitions)
    ]
    if series.phases:
        result.append({"figure": phases(run, stage), "meanings": []})
    return result


def meaning(name: str, own: Sequence[Definition] = ()) -> dict[str, str]:
    return {"label": definition(name, own).label, "text": caption(name, own)}


SORTS = {
    "number": ("as sampled", lambda s: s.number),
    "best": ("best first", lambda s: math.inf if math.isnan(s.score) else -s.score),
    "worst": ("worst first", lambda s: math.inf if math.isnan(s.score) else s.score),
    "longest": ("longest first", lambda s: -s.tokens),
    "kl": ("farthest from the reference", lambda s: -(s.kl or 0.0)),
    "clipped": ("most clipped", lambda s: -s.clipped),
}


def sorted_samples(samples: Sequence[Sample], sort: str, words: str) -> list[Sample]:
    """Return the samples that contain the words, in the order that `sort` names."""
    matches = [s for s in samples if words.lower() in (s.prompt + s.response + s.id).lower()]
    return sorted(matches, key=SORTS.get(sort, SORTS["number"])[1])


def inspector(run: Run, sample: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Return one rollout for the page of tokens: texts, a list of numbers per column, and a phrase
    on what the update did to each token. At most TOKENS_SHOWN tokens."""
    sample = {name: column[:TOKENS_SHOWN] for name, column in sample.items()}
    begin = (
        sample["is_response"].index(True) if True in sample["is_response"] else len(sample["text"])
    )
    columns = [c for c in TOKEN_COLUMNS if any(v is not None for v in sample.get(c.name, ()))]
    whitened = run.config.get("algorithm", {}).get("rewards", {}).get("whiten", False)
    return {
        "texts": [shortened(text, TOKEN_TEXT_SHOWN) for text in sample["text"]],
        "ids": sample["token_id"],
        "begin": begin,
        "own": sample["is_response"],
        "clipped": sample["clipped"],
        "numbers": {
            c.name: finite([None if v is None else round(v, 6) for v in sample[c.name]])
            for c in columns
        },
        "apart": not whitened,  # whitened rewards are no sum of score and penalty
        "columns": [
            {"name": c.name, "label": c.label, "what": c.what, "scale": c.scale} for c in columns
        ],
        "cases": run.cases(sample),
        "clip": None if run.clipping is None else run.clipping.bounds,
    }


def glance(sample: Mapping[str, list[Any]]) -> list[str]:
    """Describe one rollout in a few sentences: its score, the critic's values, and the update."""
    own = [i for i, mine in enumerate(sample["is_response"]) if mine]
    if not own:
        return ["The response is empty."]
    columns = {n.removeprefix("score/"): v[0] for n, v in sample.items() if n.startswith("score/")}
    parts = [f"{name} {text}" for name, text in score_parts(columns, sample["score"][0]).items()]
    sentences = [
        f"Score {number(sample['score'][0])}" + (f" ({', '.join(parts)})" if parts else "") + "."
    ]
    penalties = [
        sample["penalty"][i]
        for i in own
        if sample.get("penalty") and sample["penalty"][i] is not None
    ]
    if penalties and any(penalties):
        sentences[0] = (
            sentences[0][:-1] + f"; the KL penalty "
            f"{'subtracted' if sum(penalties) < 0 else 'added'} {number(abs(sum(penalties)))}."
        )
    values, returns = ([sample[c][i] for i in own] for c in ("value", "return"))
    if values[0] is not None:
        sentences.append(
            f"The critic expected {number(values[0])} at the first token and {number(values[-1])} "
            f"at the last; "
            f"the return from the first was {number(returns[0])}."
        )
    advantages = [(sample["advantage"][i], i) for i in own if sample["advantage"][i] is not None]
    if advantages and sample["ratio"][own[0]] is not None:
        up, down = (sum(1 for a, _ in advantages if sign * a > 0) for sign in (1, -1))
        stopped = sum(1 for i in own if sample["clipped"][i])
        clip = f"; the clip stopped {stopped:,}" if stopped else "; none was clipped"
        tokens = "token" if up == 1 else "tokens"
        sentences.append(f"The update pushed {up:,} {tokens} up and {down:,} down{clip}.")
    if len({a for a, _ in advantages}) > 1:
        best, worst = max(advantages), min(advantages)
        sentences.append(
            f"“{_quoted(sample, best[1])}” has the largest advantage ({number(best[0])}), "
            f"“{_quoted(sample, worst[1])}” the smallest ({number(worst[0])})."
        )
    elif len(advantages) > 1:
        because = ", because whole responses are compared" if values[0] is None else ""
        sentences.append(f"Every token has the advantage {number(advantages[0][0])}{because}.")
    return sentences


def _quoted(sample: Mapping[str, list[Any]], place: int) -> str:
    """Return a token's text for a sentence; line breaks and other white space are named by signs,
    as on the page of tokens."""
    text = sample["text"][place]
    shown = text.strip() or text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "∅"
    return shown if len(shown) <= TOKEN_QUOTED else f"{shown[:TOKEN_QUOTED]}…"


def reward_models(run: Run, stages: Sequence[str]) -> list[dict[str, Any]]:
    """Return the held-out accuracy of each reward model of an ensemble. `stages` are those of a
    round that have finished."""
    names = [name for name in stages if name.startswith("reward_model-")]
    summaries = [(name, run.summary(name) or {}) for name in names]
    return [
        {"name": name, "accuracy": accuracy}
        for name, summary in summaries
        if isinstance(accuracy := summary.get("held_out_accuracy"), float)
    ]


def judged(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a reward model's accuracy on held-out pairs, and the pairs where it is most wrong."""
    margins = [p["chosen_score"] - p["rejected_score"] for p in pairs]
    longer = [
        m for m, p in zip(margins, pairs, strict=True) if p["chosen_tokens"] > p["rejected_tokens"]
    ]
    shorter = [
        m for m, p in zip(margins, pairs, strict=True) if p["chosen_tokens"] < p["rejected_tokens"]
    ]
    sides = [
        (p[f"{side}_score"], float(p[f"{side}_tokens"]))
        for p in pairs
        for side in ("chosen", "rejected")
    ]
    worst = sorted(zip(margins, pairs, strict=True), key=lambda pair: pair[0])[:WORST_PAIRS]
    return {
        "count": len(pairs),
        "accuracy": right(margins),
        "accuracy_longer": right(longer),
        "accuracy_shorter": right(shorter),
        "longer": len(longer) / len(pairs),
        "length": pearson(*zip(*sides, strict=True)),
        "worst": [pair for margin, pair in worst if margin < 0],
    }


def right(margins: Sequence[float]) -> float | None:
    """Return the share of margins above 0; a tie counts half."""
    return (
        sum(1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins) / len(margins)
        if margins
        else None
    )


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    try:
        return statistics.correlation(x, y)
    except (
        statistics.StatisticsError,
        OverflowError,
        ValueError,
    ):  # one of them does not vary, or beyond all numbers
        return None


def differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the keys in which configs differ, with the value in each config. A table that some
    configs do not have, and that is the same in the others, is one row: its number of settings."""
    flat = [dict(_flat(config)) for config in configs]
    keys = sorted({key for table in flat for key in table})
    rows = [(key, [_setting(table.get(key, NOT_SET)) for table in flat]) for key in keys]
    rows = [(key, values) for key, values in rows if len(set(values)) > 1]
    result = []
    for table, group in itertools.groupby(rows, key=lambda row: _absent_table(row[0], flat)):
        of_table = list(group)
        absent = {tuple(value == NOT_SET for value in values) for _, values in of_table}
        if table and len(of_table) > 1 and len(absent) == 1 and _differ_by_absence(of_table):
            count = f"{len(of_table)} settings"
            row = [NOT_SET if is_absent else count for is_absent in absent.pop()]
            result.append((f"{table}*", row))
        else:
            result += of_table
    return result


NOT_SET = "–"


def _absent_table(key: str, flat: Sequence[Mapping[str, Any]]) -> str:
    """Return the outermost table of a key that some config does not have, with a dot at its end."""
    names = key.split(".")
    tables = [".".join(names[:count]) + "." for count in range(1, len(names))]
    return next((t for t in tables if not all(any(k.startswith(t) for k in c) for c in flat)), "")


def _differ_by_absence(rows: Sequence[tuple[str, list[str]]]) -> bool:
    """Whether the values that are set are the same in each row."""
    return all(len(set(values) - {NOT_SET}) == 1 for _, values in rows)


def _setting(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _flat(table: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(table, Mapping):
        return [
            pair
            for key, value in table.items()
            for pair in _flat(value, f"{prefix}.{key}" if prefix else key)
        ]
    if isinstance(table, list) and any(isinstance(x, Mapping) for x in table):
        return [pair for i, value in enumerate(table) for pair in _flat(value, f"{prefix}.{i}")]
    return [(prefix, table)]
