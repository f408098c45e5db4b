"""The report: one HTML file that explains a run to a reader who did not follow it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from quartet import __version__
from quartet.runs.critic_audits import audit_history, audit_sentences, audit_tables, critic_audits
from quartet.runs.critic_figures import audit_figures
from quartet.runs.doctor import Finding, examine
from quartet.runs.evaluations import evaluation_tables, evaluations
from quartet.runs.figures import frontier
from quartet.runs.reader import DamagedRun, Run
from quartet.runs.wording import number
from quartet.studio import views
from quartet.studio.rendering import json_text, plotly_file, templates

ROLLOUTS = 10
"""The number of rollouts that are shown token by token."""
CHARTS = 4
"""The number of charts of each stage."""

STAGES = {
    "sft": "Supervised fine-tuning: the model imitates demonstrations. The loss is the mean "
    "negative log-probability of the demonstrations' tokens; it should fall.",
    "reward_model": "Reward model: from pairs of answers of which one was preferred, a model "
    "learns to score answers. Pair accuracy is the share of pairs in which the preferred answer "
    "scores higher; guessing gives 50%.",
    "ilql": "Offline Q-learning: from answers with scores the model learns which tokens lead to "
    "high scores (Q and V), and leaves a policy that takes them more often.",
    "custom": "A stage of the user's own. The mean loss and the rewards of sampled answers are "
    "measured as in other stages.",
    "evaluation": "",
}
RL = (
    "Reinforcement learning: the model answers prompts, the answers are scored, and tokens that "
    "led to better scores than expected become more likely. The KL is the distance from the "
    "initial model; each answer pays a penalty for it."
)
COMPARISONS = (
    "The model learns from pairs of answers directly: the preferred answer should become more "
    "likely relative to the other."
)


def write_report(run: Run) -> Path:
    """Write `report.html` into the run's folder and return its path. The file needs no other."""
    path, page = run.path / "report.html", report(run)
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)  # a link would be written through
    with temporary.open("x", encoding="utf-8") as file:
        file.write(page)
    temporary.replace(path)
    return path


def report(run: Run) -> str:
    static = Path(__file__).parent / "static"
    stages: list[dict[str, Any]] = [
        {
            "name": stage,
            "about": STAGES.get(
                re.split(r"[-.]", stage)[0], RL if stage in run.rl_stages else COMPARISONS
            ),
            "charts": charts,
        }
        for stage in run.series
        if (charts := views.overview(run, stage)[:CHARTS])
    ]
    findings = examine(run)
    figures = [chart["figure"] for stage in stages for chart in stage["charts"]]
    line = frontier(run)
    results, unread = evaluations(run.path)
    audits, damaged = critic_audits(run.path)
    rollouts = [_rollout(run, step, number) for step, number in chosen_rollouts(run)]
    if line["data"]:
        figures.append(line)
    critic = _critic(audits)
    figures += [chart["figure"] for chart in critic["charts"]]
    return (
        templates()
        .get_template("report.html")
        .render(
            run=run,
            version=__version__,
            verdict=verdict(run, findings),
            numbers=views.headline(run),
            stages=stages,
            figures=Markup(
                json_text(figures).replace("<", "\\u003c")
            ),  # JSON in a script; < cannot end it
            has_frontier=bool(line["data"]),
            findings=findings,
            evaluation=run.evaluation,
            measures=views.evaluation_rows(run.evaluation) if run.evaluation else [],
            rollouts=rollouts,
            evaluations=[
                {"name": name, "tables": evaluation_tables(result)}
                for name, result in results.items()
            ],
            critic=critic,
            problems=[*run.problems, *unread, *damaged],
            style=Markup(
                (static / "studio.css")
                .read_text(encoding="utf-8")
                .replace('url("icon.svg")', "none")
            ),
            plotly=Markup(plotly_file().read_text(encoding="utf-8")),
        )
    )


def _critic(audits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the report says of the last audit of the critic; nothing where there is none."""
    if not audits:
        return {"charts": []}
    history = audit_history(audits)
    return {
        "step": audits[-1]["step"],
        "sentences": audit_sentences(audits[-1]),
        "tables": [*audit_tables(audits[-1]), *([] if history is None else [history])],
        "charts": audit_figures(audits[-1]),
    }


def verdict(run: Run, findings: Sequence[Finding]) -> list[str]:
    """Return sentences on what was trained on which data, the result, and whether to trust it."""
    config = run.config
    data = config.get("data", {})
    train = data.get("train")
    source = (
        ", ".join(train)
        if isinstance(train, list)
        else train or f"the embedded world {data.get('world')}"
    )
    sentences = [
        f"{' → '.join(s.replace('_', ' ') for s in config.get('recipe', []))}, on {source}."
    ]
    evaluation = run.evaluation
    if evaluation and evaluation.get("win_rate"):
        win, kl, judge = evaluation["win_rate"], evaluation["kl"], evaluation["judge"]
        better = "better than" if win["mean"] - win["interval"] > 0.5 else (
            "worse than" if win["mean"] + win["interval"] < 0.5 else "no different from"
        )  # fmt: skip
        sentences.append(
            f"On {evaluation['prompts']:,} prompts that it was not trained on, its answers are "
            f"{better} those of the model it "
            f"started from: it wins {win['mean']:.0%} ± {win['interval']:.0%} of them by the "
            f"{'gold reward' if judge == 'gold' else 'reward'} "
            f"(a tie is half a win), at a "
            f"KL of {kl['mean']:.1f} nats per answer."
        )
        if judge != "gold":
            sentences.append(
                "The judge is the reward that the policy was trained on, which favours it. Read "
                "some answers below before you trust this number."
            )
    elif run.status != "done":
        sentences.append(f"The run is not complete: {run.status}.")
    if error := views.failure(run):
        sentences.append(f"It failed: {error}")
    if findings:
        first = findings[0]
        place = f"the stage {first.stage.replace('_', ' ')}" if first.stage else "its folder"
        sentences.append(
            f"The doctor has {len(findings)} finding{'s' * (len(findings) > 1)} (below); the first "
            f"is of step {first.step} of {place}."
        )
    else:
        sentences.append("No rule of the doctor found a fault.")
    return sentences


def chosen_rollouts(run: Run) -> list[tuple[int, int]]:
    """Choose the rollouts of the report, as (step, sample): the best and the worst of the first and
    the middle step, and more of the last step."""
    steps = run.steps()
    if not steps:
        return []
    chosen = list(dict.fromkeys([steps[0], steps[len(steps) // 2], steps[-1]]))
    rollouts = []
    for step in chosen:
        try:
            ranked = views.sorted_samples(run.samples(step), "worst", "")
        except DamagedRun:  # it is among the run's problems
            continue
        if not ranked:
            continue
        count = ROLLOUTS - 2 * (len(chosen) - 1) if step == chosen[-1] else 2
        places = {round(i * (len(ranked) - 1) / max(count - 1, 1)) for i in range(count)}
        rollouts += [(step, ranked[place].number) for place in sorted(places, reverse=True)]
    return rollouts


def _rollout(run: Run, step: int, number: int) -> dict[str, Any]:
    rows = {name: column[: views.TOKENS_SHOWN] for name, column in run.sample(step, number).items()}
    return {
        "step": step,
        "number": number,
        "glance": views.glance(rows),
        "tokens": list(_shaded(run, rows)),
    }


def _shaded(run: Run, rows: Mapping[str, Sequence[Any]]) -> Any:
    """Yield each token's text, its colour by its advantage, and its tooltip."""
    sizes = sorted(abs(a) for a in rows["advantage"] if a is not None)
    largest = sizes[int(0.97 * (len(sizes) - 1))] if sizes else 1.0
    for i, (text, advantage, case) in enumerate(
        zip(rows["text"], rows["advantage"], run.cases(rows), strict=True)
    ):
        size = 0.0 if advantage is None or not largest else min(1.0, abs(advantage) / largest)
        color = "59,130,246" if (advantage or 0) > 0 else "245,158,11"
        numbers = ", ".join(
            f"{name.replace('_', ' ')} {number(rows[name][i])}"
            for name in ("reward", "value", "advantage", "ratio", "kl", "logprob")
            if rows[name][i] is not None
        )
        yield {
            "text": views.shortened(text, views.TOKEN_TEXT_SHOWN),
            "style": f"background:rgba({color},{0.08 + 0.62 * size:.2f})" if size >= 0.02 else "",
            "title": f"{numbers}. {case}" if numbers else "",
            "given": not rows["is_response"][i],
            "clipped": bool(rows["clipped"][i]),
        }
