"""`quartet.critic_audit`: a run's critic against Monte Carlo returns."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quartet.api.run import TrainingRun


@dataclass(frozen=True)
class CriticAudit:
    """The results of an audit."""

    path: Path
    """The file of results, in the run's folder."""
    numbers: Mapping[str, Any]
    """What the file holds. docs/critic.md says what each number means."""

    @property
    def sentences(self) -> list[str]:
        """What the numbers mean."""
        from quartet.runs.critic_audits import audit_sentences

        return audit_sentences(self.numbers)

    def figures(self) -> list[Any]:
        """Return the charts as Plotly figures: calibration, error by position, advantages by λ."""
        import plotly.graph_objects as go

        from quartet.runs.critic_figures import audit_figures

        return [go.Figure(chart["figure"]) for chart in audit_figures(self.numbers)]


def critic_audit(
    run: "TrainingRun | str | Path",
    step: int | None = None,
    prompts: int = 32,
    prefixes: int = 4,
    continuations: int = 32,
    seed: int = 0,
) -> CriticAudit:
    """Compare the critic of a run with Monte Carlo returns, as `quartet critic` does.

    `run` is a run, whose rewards may be Python objects, or its folder; `step` that of a checkpoint,
    by default the newest. The policy answers `prompts` held-out prompts; from `prefixes` states of
    each answer and after up to three next tokens at each, it samples `continuations` responses.
    Raises a QuartetError where a run has no critic, no checkpoint of that step, or responses that
    cannot be continued or scored here.
    """
    from quartet.assembly.critic import audit_critic
    from quartet.evaluation.critic_samples import AuditSizes
    from quartet.runs.reader import Run

    folder, objects = Path(run).resolve(), getattr(run, "objects", {})
    Run(folder)  # raises NoRun where there is none
    sizes, silent = AuditSizes(prefixes, continuations, seed), lambda _: None
    return CriticAudit(*audit_critic(folder, step, prompts, sizes, silent, objects))
