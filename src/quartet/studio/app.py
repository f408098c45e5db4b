"""The studio's pages and its JSON addresses. By default only this machine can open them, and
nothing is written. The one costly request, which runs a model, is a POST that only the studio's own
pages may send."""

import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from quartet import __version__
from quartet.errors import QuartetError
from quartet.runs import figures
from quartet.runs.critic_audits import (
    audit_history,
    audit_sentences,
    audit_tables,
    critic_audits,
)
from quartet.runs.critic_figures import audit_figures
from quartet.runs.definitions import definition
from quartet.runs.doctor import Diagnosis, diagnose, why
from quartet.runs.evaluations import evaluation_tables, evaluations, kl_frontier
from quartet.runs.label_tables import labelled_run
from quartet.runs.reader import DamagedRun, NoRun, Run
from quartet.runs.rounds import in_round, probe_folders, rounds_of_reward_models
from quartet.runs.rules import RULES
from quartet.runs.untrusted import finite
from quartet.runs.wording import stage_summary
from quartet.studio import sweep_views, views
from quartet.studio.comparison import overlaid, same_prompts
from quartet.studio.first_policy import Busy, FirstPolicies, NoAnswer, folder_of
from quartet.studio.library import Library
from quartet.studio.protection import (
    HEADERS,
    LOOPBACK,
    is_from_elsewhere,
    protection,
    static_files,
)
from quartet.studio.rendering import plotly_file, templates

DIAGNOSES_KEPT = 50
"""The most runs whose diagnosis stays in memory."""
ROLLOUTS, PROBES = "rollouts", "probes"


class BadQuestion(QuartetError, ValueError):
    """A parameter in the address has a wrong form."""


class Pages:
    """A method per page. Each takes a request and returns HTML or plain values."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.lock = threading.Lock()
        self.first_policies = FirstPolicies()
        self._diagnoses: dict[str, tuple[tuple[Any, ...], Diagnosis]] = {}
        self.templates = templates()

    def html(self, name: str, status: int = 200, **values: Any) -> Response:
        text = self.templates.get_template(name).render(version=__version__, **values)
        return HTMLResponse(text, status, HEADERS)

    def answering(self, make: Callable[[Request], Any]) -> Callable[[Request], Awaitable[Response]]:
        """Return a request handler that calls `make` in a thread. Errors become a page or JSON with
        a sentence."""

        async def respond(request: Request) -> Response:
            try:
                content = await run_in_threadpool(self._one_at_a_time, make, request)
            except (NoRun, BadQuestion) as error:
                status = 404 if isinstance(error, NoRun) else 400
                if request.url.path.startswith("/api/"):
                    return JSONResponse({"error": str(error)}, status, HEADERS)
                return self.html(
                    "error.html", status, title="Not found", sentence=str(error), run=None
                )
            return (
                content
                if isinstance(content, Response)
                else JSONResponse(finite(content), headers=HEADERS)
            )

        return respond

    def _one_at_a_time(self, make: Callable[[Request], Any], request: Request) -> Any:
        """Call `make` under a lock, so that no run is refreshed while a page is made from it."""
        with self.lock:
            return make(request)

    def run_of(self, request: Request) -> Run:
        return self.library.run(request.path_params["name"])

    def runs(self, _: Request) -> Response:
        rows = [
            views.run_row(run) if isinstance(run, Run) else views.unreadable_row(name, str(run))
            for name, run in self.library.runs()
        ]
        sweeps = [sweep_views.sweep_row(*entry) for entry in self.library.sweeps()]
        return self.html("runs.html", title="Runs", rows=rows, sweeps=sweeps, run=None)

    def sweep(self, request: Request) -> Response:
        sweep = self.library.sweep(request.path_params["name"])
        names = {path: name for name, path in self.library.paths().items()}
        return self.html("sweep.html", **sweep_views.sweep_page(sweep, names), run=None)

    def overview(self, request: Request) -> Response:
        run = self.run_of(request)
        stage = request.query_params.get("stage") or run.main_stage
        if stage is not None and stage not in run.series:
            raise NoRun(f"{run.name} has no stage {stage}.")
        return self.html(
            "overview.html",
            title=run.name,
            run=run,
            stage=stage,
            charts=views.overview(run, stage) if stage else [],
            numbers=views.headline(run),
            standing=views.standing(run),
            summary=stage_summary(run.summary(stage)) if stage else [],
            steps=run.steps(),
            page="overview",
        )

    def samples(self, request: Request) -> Response:
        run = self.run_of(request)
        kind, rounds = _kind(request, run)
        steps = run.steps(kind)
        requested = _whole(request, "step", steps[-1] if steps else 0)
        step = min(steps, key=lambda s: abs(s - requested), default=requested)
        sort, words = request.query_params.get("sort", "number"), request.query_params.get("q", "")
        fault, samples = "", []
        try:
            samples = views.sorted_samples(run.samples(step, kind), sort, words) if steps else []
        except DamagedRun as error:
            fault = str(error)
        at = steps.index(step) if step in steps else 0
        return self.html(
            "samples.html",
            title=f"Samples of step {step}",
            run=run,
            samples=samples[: views.SAMPLES_SHOWN],
            found=len(samples),
            fault=fault,
            steps=steps,
            step=step,
            asked=requested,
            before=steps[at - 1] if at > 0 else None,
            after=steps[at + 1] if at + 1 < len(steps) else None,
            sort=sort,
            sorts={key: label for key, (label, _) in views.SORTS.items()},
            words=words,
            kind=kind,
            rounds=rounds,
            page="samples" if kind == ROLLOUTS else "probes",
        )

    def tokens(self, request: Request) -> Response:
        run = self.run_of(request)
        kind, _ = _kind(request, run)
        steps = run.steps(kind)
        step = _whole(request, "step", steps[-1] if steps else 0)
        number = _whole(request, "sample", 0)
        rows = run.sample(step, number, kind)
        everything = run.samples(step, kind)
        mine = next(s for s in everything if s.number == number)
        return self.html(
            "tokens.html",
            title=f"Step {step}, sample {number}",
            run=run,
            kind=kind,
            step=step,
            steps=steps,
            sample=mine,
            count=len(everything),
            siblings=[s for s in everything if s.group == mine.group and s.number != number][
                : views.SAMPLES_SHOWN
            ],
            length=len(rows["text"]),
            shown=views.TOKENS_SHOWN,
            glance=views.glance(rows),
            inspector=views.inspector(run, rows),
            can_ask=kind == ROLLOUTS
            and folder_of(run) is not None
            and "environment" not in run.config,
            page="samples" if kind == ROLLOUTS else "probes",
        )

    def sample_data(self, request: Request) -> dict[str, Any]:
        run = self.run_of(request)
        kind, _ = _kind(request, run)
        rows = run.sample(_whole(request, "step", 0), _whole(request, "sample", 0), kind)
        return {"inspector": views.inspector(run, rows), "glance": views.glance(rows)}

    async def first_answer(self, request: Request) -> Response:
        """Return the initial policy's greedy response to a rollout's prompt. Pages are served
        meanwhile."""
        if is_from_elsewhere(request):
            return JSONResponse(
                {"error": "only the studio's own pages may ask a model."}, 403, HEADERS
            )
        try:
            run, ids = await run_in_threadpool(self._one_at_a_time, self._prompt, request)
            return JSONResponse(
                {"answer": await self.first_policies.answer(run, ids)}, headers=HEADERS
            )
        except (NoRun, BadQuestion, NoAnswer) as error:
            statuses = {NoRun: 404, BadQuestion: 400, Busy: 503, NoAnswer: 500}
            status = next(status for kind, status in statuses.items() if isinstance(error, kind))
            return JSONResponse({"error": str(error)}, status, HEADERS)

    def _prompt(self, request: Request) -> tuple[Run, list[int]]:
        run = self.run_of(request)
        rows = run.sample(_whole(request, "step", 0), _whole(request, "sample", 0))
        begin = (
            rows["is_response"].index(True)
            if True in rows["is_response"]
            else len(rows["is_response"])
        )
        if None in rows["token_id"][:begin]:
            raise NoRun(
                f"{run.name}: the file of rollouts does not have the tokens of this prompt."
            )
        return run, rows["token_id"][:begin]

    def token_history(self, request: Request) -> dict[str, Any]:
        """Return the numbers of one token of a probe over the steps of training."""
        run = self.run_of(request)
        kind, _ = _kind(request, run, PROBES)
        sample, position = _whole(request, "sample", 0), _whole(request, "position", 0)
        history: dict[str, list[Any]] = {
            name: [] for name in ("step", "logprob", "ref_logprob", "value", "advantage")
        }
        for step in run.steps(kind):
            try:
                rows = run.sample(step, sample, kind)
            except DamagedRun:
                continue
            if not 0 <= position < len(rows["text"]):
                raise NoRun(f"the probe {sample} has no token {position}.")
            history["step"].append(step)
            for name in history.keys() - {"step"}:
                history[name].append(rows[name][position])
        return history

    def frontier(self, request: Request) -> Response:
        run = self.run_of(request)
        stage = request.query_params.get("stage") or run.rl_stage
        if stage is not None and stage not in run.rl_stages:
            raise NoRun(f"{run.name} has no RL stage {stage}.")
        return self.html(
            "frontier.html",
            title="Frontier",
            run=run,
            stage=stage,
            figure=figures.frontier(run, stage),
            onset=figures.overoptimised(run.series[stage]) if stage else None,
            evaluation=run.evaluation,
            measures=views.evaluation_rows(run.evaluation) if run.evaluation else [],
            win_rate_label=views.win_rate_label(run.evaluation) if run.evaluation else "",
            page="frontier",
        )

    def reward_model(self, request: Request) -> Response:
        run = self.run_of(request)
        finished = rounds_of_reward_models(run)
        number = _whole(request, "round", max(finished, default=1))
        if number not in (finished or {1}):
            raise NoRun(f"{run.name} has no reward model of round {number:,}.")
        pairs = run.pairs(number)
        charts = [figures.calibration(pairs), figures.score_histogram(pairs)] if pairs else []
        return self.html(
            "reward_model.html",
            title="Reward model",
            run=run,
            charts=[{"figure": figure, "meanings": []} for figure in charts],
            judged=views.judged(pairs) if pairs else None,
            summary=run.summary(in_round("reward_model", number)) or {},
            members=views.reward_models(run, finished.get(number, [])),
            rounds=list(finished),
            round=number,
            page="reward_model",
        )

    def answers(self, request: Request) -> Response:
        run = self.run_of(request)
        rows = list(run.answers())
        return self.html(
            "answers.html",
            title="Before and after",
            run=run,
            rows=rows[: views.SAMPLES_SHOWN],
            found=len(rows),
            page="answers",
        )

    def labels(self, request: Request) -> Response:
        run = self.run_of(request)
        labelled = labelled_run(run)
        rows = labelled.shown(views.SAMPLES_SHOWN)
        return self.html(
            "labels.html", title="Labels", run=run, labelled=labelled, rows=rows, page="labels"
        )

    def evaluations(self, request: Request) -> Response:
        run = self.run_of(request)
        results, problems = evaluations(run.path)
        return self.html(
            "evaluations.html",
            title="Evaluations",
            run=run,
            evaluations=[
                {"name": name, "tables": evaluation_tables(result)}
                for name, result in results.items()
            ],
            charts=[
                {"figure": figure, "meanings": []}
                for result in results.values()
                if (figure := kl_frontier(result)) is not None
            ],
            unread=problems,
            page="evaluations",
        )

    def critic(self, request: Request) -> Response:
        """Return the page of the critic's audit at one step; by default the last one audited."""
        run = self.run_of(request)
        audits, problems = critic_audits(run.path)
        step = _whole(request, "step", audits[-1]["step"] if audits else 0)
        audit = next((each for each in audits if each["step"] == step), None)
        if audits and audit is None:
            raise NoRun(f"{run.name}: its critic was not audited at step {step:,}.")
        history = audit_history(audits)
        return self.html(
            "critic.html",
            title="Critic",
            run=run,
            audit=audit,
            steps=[each["step"] for each in audits],
            sentences=audit_sentences(audit) if audit else [],
            evaluation={"tables": audit_tables(audit) if audit else []},
            history={"tables": [] if history is None else [history]},
            charts=audit_figures(audit) if audit else [],
            unread=problems,
            page="critic",
        )

    def doctor(self, request: Request) -> Response:
        run = self.run_of(request)
        diagnosis = self._diagnosis(run)
        return self.html(
            "doctor.html",
            title="Doctor",
            run=run,
            findings=diagnosis.findings,
            checks=diagnosis.checks,
            rules=[rule.__name__ for rule in RULES],
            why={rule.__name__: why(rule) for rule in RULES},
            label=lambda metric: definition(metric, run.definitions).label,
            page="doctor",
        )

    def _diagnosis(self, run: Run) -> Diagnosis:
        """Return what the rules say of a run; computed again only where its record has grown, since
        thousands of steps take seconds."""
        record = (run.path, len(run.events), *(len(s.steps) for s in run.series.values()))
        known = self._diagnoses.get(run.name)
        if known is None or known[0] != record:
            while len(self._diagnoses) >= DIAGNOSES_KEPT:
                self._diagnoses.pop(next(iter(self._diagnoses)))
            known = self._diagnoses[run.name] = (record, diagnose(run))
        return known[1]

    def config(self, request: Request) -> Response:
        run = self.run_of(request)
        return self.html(
            "config.html",
            title="Config",
            run=run,
            text=run.config_text,
            environment=run.environment,
            page="config",
        )

    def compare(self, request: Request) -> Response:
        names = request.query_params.getlist("run")
        chosen = [self.library.run(name) for name in dict.fromkeys(names)]
        return self.html(
            "compare.html",
            title="Compare",
            run=None,
            chosen=chosen,
            everything=list(dict.fromkeys([*self.library.paths(trials=False), *names])),
            charts=overlaid(chosen) if len(chosen) > 1 else [],
            differences=views.differences([run.config for run in chosen])
            if len(chosen) > 1
            else [],
            numbers=[views.last_numbers(run) for run in chosen],
            answers=same_prompts(chosen),
        )


def make_app(
    roots: Sequence[Path], hosts: Sequence[str] = LOOPBACK, token: str | None = None
) -> Starlette:
    """Return the app over the runs in these folders. `token` is what a browser must send; None
    means that no token is needed."""
    import pyarrow.parquet  # noqa: F401  imported now, so that the first page does not wait

    pages = Pages(Library(roots))
    addresses = {
        "/": pages.runs,
        "/compare": pages.compare,
        "/sweep/{name}": pages.sweep,
        "/run/{name}/": pages.overview,
        "/run/{name}/samples": pages.samples,
        "/run/{name}/tokens": pages.tokens,
        "/run/{name}/frontier": pages.frontier,
        "/run/{name}/answers": pages.answers,
        "/run/{name}/labels": pages.labels,
        "/run/{name}/reward-model": pages.reward_model,
        "/run/{name}/evaluations": pages.evaluations,
        "/run/{name}/critic": pages.critic,
        "/run/{name}/doctor": pages.doctor,
        "/run/{name}/config": pages.config,
        "/api/run/{name}/sample": pages.sample_data,
        "/api/run/{name}/token": pages.token_history,
        "/plotly.js": plotly_js,
    }
    routes = [Route(path, pages.answering(make)) for path, make in addresses.items()]
    routes.append(Route("/api/run/{name}/first-answer", pages.first_answer, methods=["POST"]))
    return Starlette(routes=[*routes, static_files()], middleware=protection(hosts, token))


def plotly_js(_: Request) -> Response:
    return FileResponse(
        plotly_file(),
        media_type="text/javascript",
        headers={"Cache-Control": "max-age=86400", **HEADERS},
    )


def _whole(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise BadQuestion(f"{name}={text}: must be a whole number.")
    return int(text)


def _kind(request: Request, run: Run, default: str = ROLLOUTS) -> tuple[str, dict[int, str]]:
    """Return the folder of rollouts or probes that the address names, and the folders of probes by
    round; no folders for rollouts. "probes" are those of the newest round that has any."""
    name = request.query_params.get("kind", default)
    if not name.endswith(PROBES):
        return ROLLOUTS, {}
    rounds = probe_folders(run)
    return name if name in rounds.values() else next(reversed(rounds.values()), PROBES), rounds
