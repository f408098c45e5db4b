"""Value learning for long answers: what a critic needs where the outcome is 500 tokens away.

    python benchmarks/papers/long_answers.py [--folder runs-long-answers] [--seeds 3]

VC-PPO (arXiv 2503.01491), VAPO (arXiv 2504.05118) and VinePPO (arXiv 2410.01679) say what keeps PPO
from learning to write long answers: a critic that begins with the wrong values, and a reward that
fades on its way to the first tokens. Here answers have 513 or 577 tokens, of which four decide the
outcome. One SFT policy has learned to write them, and to decide almost at random. Critics of
several origins are held against the values that the policy really has, position by position, and
PPO is trained with each part of VAPO left out.

Rows that are in the results, and runs that are in the folder, are not made again. Prints the tables
of docs/papers/long_answers.md and writes benchmarks/results/papers/long_answers.json.
"""

import json
import math
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import paper
import transformers
from chapters import Answers, World, answers_of

import quartet

RESULTS = paper.RESULTS / "long_answers.json"


@dataclass(frozen=True)
class Plan:
    """What is trained and sampled."""

    world: World = field(default_factory=World)
    width: int = 32
    sft_steps: int = 500
    reward_steps: int = 150
    pretraining_steps: int = 20
    probed: int = 128
    """Answers on which critics are held against true values."""
    steps: int = 24
    responses: int = 32
    seeds: int = 3
    layers: int = 1


SMALL = Plan(World(2, 5, 3), 16, 150, 2, 2, 8, 2, 4, 1)
SPARSE = {"run.rollouts_every": 10}


def gae(**settings: Any) -> dict[str, Any]:
    return {"type": "gae", **settings}


VAPO: dict[str, Any] = {"preset": "vapo", "normalize": {"type": "whiten"}}
"""The preset, with the whitening that the authors' code has."""
ADAPTIVE = "length_adaptive_gae"


@dataclass(frozen=True)
class Variant:
    """An algorithm, and the critic that it begins with."""

    name: str
    changes: dict[str, Any]
    """What differs from `VAPO`."""
    critic: str = "pretrained"

    @property
    def algorithm(self) -> dict[str, Any]:
        return VAPO | self.changes


CLIP = {"policy_loss": {"type": "clip", "low": 0.2, "high": 0.2}}
PER_RESPONSE = {"aggregation": {"type": "sequence_mean"}}
NO_POSITIVES = {"positives": {"coef": 0.0}}
FIXED = {"advantage": gae(lam=0.95, value_lam=1.0)}
COUPLED = {"advantage": gae(lam=0.95)}
NO_CRITIC = {
    "preset": "grpo",
    "kl": {"type": "none"},
    "aggregation": {"type": "token_mean"},
    "policy_loss": {"type": "clip", "low": 0.2, "high": 0.28},
    "positives": {"coef": 0.1},
}
STATES = {"type": "monte_carlo_values", "continuations": 3, "every": 128}
MONTE_CARLO = NO_CRITIC | {"preset": "vineppo", "advantage": STATES}
BIASED = {"advantage": {"type": ADAPTIVE, "value_lam": 0.95}}
VARIANTS = (
    Variant("VAPO", {}),
    Variant("PPO", COUPLED | CLIP | PER_RESPONSE | NO_POSITIVES, "reward model"),
    Variant("without value pretraining", {}, "reward model"),
    Variant("without decoupled λ", BIASED),
    Variant("without it, also in pretraining", BIASED, "pretrained, λ = 0.95"),
    Variant("group mean, no critic", NO_CRITIC, "none"),
    Variant("λ = 1", {"advantage": gae(lam=1.0)}),
    Variant("without length-adaptive λ", FIXED),
    Variant("without positive examples", NO_POSITIVES),
    Variant("without clip-higher", CLIP),
    Variant("without token-level loss", PER_RESPONSE),
    Variant("Monte Carlo values, no critic", MONTE_CARLO, "none"),
)


class Study:
    """The runs of a plan in a folder, each made once."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder, self.world = plan, folder, plan.world
        self.tokenizer = folder / "tokenizer"
        self.world.tokenizer().save_pretrained(self.tokenizer)
        self.sft = self.run("sft", 0, self._sft) / "sft"

    def run(self, name: str, seed: int, settings: Callable[[], dict[str, Any]]) -> Path:
        def train() -> Any:
            return quartet.train(seed=seed, folder=self.folder, name=name, **settings())

        return paper.finished(self.folder, name, train)

    @property
    def _longest(self) -> int:
        world = self.world
        return world.chapters * (world.letters + 1) + world.remark + 4

    def _data(self, rows: Iterable[dict[str, str]]) -> dict[str, Any]:
        """Return the settings of rows, of which the last tenth is held out."""
        every = list(rows)
        kept = len(every) - max(len(every) // 10, 1)
        tokens = {"data.max_response_tokens": self._longest}
        return {"data": every[:kept], "eval_data": every[kept:], **tokens}

    def _sft(self) -> dict[str, Any]:
        shape = {"hidden_size": self.plan.width, "num_layers": self.plan.layers, "num_heads": 2}
        shape["max_length"] = self._longest + 72
        return {
            "recipe": "sft",
            "policy": {"create": shape, "tokenizer": str(self.tokenizer)},
            "sft": {"batch_size": 16, "lr": 1e-2, "warmup_steps": 20},
            "steps": self.plan.sft_steps,
            **self._data(self.world.demonstrations(2_000, random.Random("sft"))),
        }

    def reward_model(self) -> Path:
        """Return a reward model that tells right answers from wrong ones at their end."""

        def settings() -> dict[str, Any]:
            rng = random.Random("reward model")
            return {
                "recipe": "reward_model",
                "policy": str(self.sft),
                "reward_model": {"batch_size": 8, "lr": 2e-3, "warmup_steps": 5},
                "steps": self.plan.reward_steps,
                **self._data(self.world.comparisons(8 * self.plan.reward_steps + 200, rng)),
            }

        return self.run("reward-model", 0, settings) / "reward_model"

    def step_of(self, answers: int, each: int | None = None) -> dict[str, Any]:
        """Return the settings of steps with so many answers, `each` to a prompt; by default as few
        to a prompt as the number of prompts allows."""
        each = each or max(answers // self.world.prompts, 1)
        return {"rollout.prompts_per_step": answers // each, "rollout.samples_per_prompt": each}

    def rl(self, algorithm: dict[str, Any], critic: str, **settings: Any) -> dict[str, Any]:
        """Return the settings of RL from the SFT policy, with this critic or "none"."""
        optim = {"lr": 5e-4, "critic_lr": 5e-3, "epochs": 1, "minibatches": 4}
        return {
            "recipe": algorithm["preset"],
            "policy": str(self.sft),
            "data": [{"prompt": prompt} for prompt in self.world.right],
            "eval_data": [{"prompt": prompt} for prompt in self.world.right],
            "reward": self.world.reward,
            "algorithm": algorithm,
            "rollout.max_new_tokens": self._longest,
            **self.step_of(self.plan.responses),
            "optim": optim,
            **({} if critic == "none" else {"critic": {"init": critic}}),
            **settings,
        }

    def pretrained(self, seed: int, value_lam: float = 1.0) -> Path:
        """Return a critic that began as the reward model and then learned the values of the SFT
        policy, by targets of this λ."""

        def settings() -> dict[str, Any]:
            algorithm = VAPO | {"advantage": gae(lam=0.95, value_lam=value_lam)}
            algorithm |= {"value_loss": {"clip": math.inf}}
            steps = self.plan.pretraining_steps
            critic = str(self.reward_model())
            warmup = {"optim.critic_warmup_steps": steps, "optim.epochs": 5}
            return self.rl(algorithm, critic, steps=steps, **warmup, **SPARSE)

        return self.run(f"critic-{value_lam:g}-{seed}", seed, settings) / "critic"

    def critic(self, origin: str, seed: int) -> str:
        """Return what `critic.init` is for an origin."""
        if origin == "reward model":
            return str(self.reward_model())
        if origin == "pretrained, λ = 0.95":
            return str(self.pretrained(seed, 0.95))
        return str(self.pretrained(seed)) if origin == "pretrained" else "policy"

    def probed(self, origin: str, seed: int) -> Answers:
        """Return answers of the SFT policy with the values of a critic, before it learns."""

        def settings() -> dict[str, Any]:
            own = {**self.step_of(self.plan.probed), "optim.critic_warmup_steps": 1}
            return self.rl(VAPO, self.critic(origin, seed), steps=1, **own)

        name = f"probe-{ORIGINS.index(origin)}-{seed}"
        return answers_of(self.world, quartet.Run(self.run(name, seed, settings)), 1)

    def trained(self, variant: Variant, seed: int) -> quartet.Run:
        """Return the run of a variant."""

        def settings() -> dict[str, Any]:
            critic = "none" if variant.critic == "none" else self.critic(variant.critic, seed)
            return self.rl(variant.algorithm, critic, steps=self.plan.steps, **SPARSE)

        name = f"rl-{VARIANTS.index(variant)}-{seed}"
        return quartet.Run(self.run(name, seed, settings))


ORIGINS = ("fresh head", "reward model", "pretrained, λ = 0.95", "pretrained")


# --- what is computed of the answers


def by_position(answers: Answers) -> dict[str, Any]:
    """Return what a critic says beside the true values: means over the answers at each place that
    all of them have, its error over all places, and the share of the true values' variance that it
    explains."""
    said = [answer.values for answer in answers.found]
    true = [answer.true_values(answers.formed) for answer in answers.found]
    pairs = [pair for v, t in zip(said, true, strict=True) for pair in zip(v, t, strict=True)]
    error = statistics.fmean((v - t) ** 2 for v, t in pairs)
    return {
        "value": [statistics.fmean(at) for at in zip(*said, strict=False)],
        "true": [statistics.fmean(at) for at in zip(*true, strict=False)],
        "rmse": math.sqrt(error),
        "explained": 1 - error / statistics.pvariance([t for _, t in pairs]),
    }


def of_run(world: World, run: quartet.Run) -> dict[str, Any]:
    """Return the rewards and lengths of a run's steps, and what its last answers say: None where
    they have lost the form."""
    metrics, step = run.metrics, max(run.steps())
    answers = answers_of(world, run, step)
    probs = [answer.option_probs for answer in answers.found]
    has_critic = bool(probs) and answers.found[0].values[0] is not None
    return {
        "rewards": metrics["reward"].to_pylist(),
        "lengths": metrics["response/tokens"].to_pylist(),
        "clipped": metrics["policy/clip_fraction"].to_pylist(),
        "formed": answers.formed,
        "right": [statistics.fmean(at) for at in zip(*probs, strict=True)] or None,
        "explained": by_position(answers)["explained"] if has_critic else None,
    }


def measured(
    study: Study, results: dict[str, Any], keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Return the results of a study: those that are given, and those of the seeds that are missing
    there. All rows of a seed come before those of the next, so that what is there is balanced at
    any time. `keep` is given the results after each."""
    for seed in range(study.plan.seeds):
        for origin in ORIGINS:
            numbers = results["critics"].setdefault(origin, [])
            if len(numbers) <= seed:
                numbers.append(by_position(study.probed(origin, seed)))
                keep(results)
                print(*critic_cells(origin, numbers, results["plan"]), sep=" | ", flush=True)
        for variant in VARIANTS:
            runs = results["runs"].setdefault(variant.name, [])
            if len(runs) <= seed:
                runs.append(of_run(study.world, study.trained(variant, seed)))
                keep(results)
                print(*run_cells(variant.name, runs, study.world.chapters), sep=" | ", flush=True)
    return results


def begun(plan: Plan, file: Path | None) -> dict[str, Any]:
    """Return the results in a file, or those of a plan of which nothing is measured.

    Raises SystemExit if the file has results of another plan.
    """
    results: dict[str, Any] = {"plan": asdict(plan), "critics": {}, "runs": {}}
    if file is None or not file.exists():
        return results
    kept: dict[str, Any] = json.loads(file.read_text("utf-8"))
    if kept["plan"] | {"seeds": plan.seeds} != results["plan"]:
        raise SystemExit(f"{file} has results of another plan. Give another file with --results.")
    return kept | {"plan": results["plan"]}


def last_of(run: dict[str, Any]) -> float:
    """Return the share of right answers in the last third of a run's steps."""
    rewards: list[float] = run["rewards"]
    return statistics.fmean(rewards[-max(len(rewards) // 3, 1) :])


def chapters_of(numbers: dict[str, Any], plan: dict[str, Any]) -> list[float]:
    """Return the mean of value − true value in each chapter."""
    world = World(**plan["world"])
    errors = [v - t for v, t in zip(numbers["value"], numbers["true"], strict=True)]
    length = world.letters + 1
    starts = range(0, world.chapters * length, length)
    return [statistics.fmean(errors[start : start + length]) for start in starts]


# --- tables and the figure


def tables(results: dict[str, Any]) -> str:
    """Return the tables of docs/papers/long_answers.md, with an empty line between them."""
    plan = results["plan"]
    chapters = range(1, plan["world"]["chapters"] + 1)
    critic = ["critic", *(f"bias, chapter {k}" for k in chapters), "RMS error", "explained"]
    run = ["", "right, last third", "right, all steps", *(f"chapter {k}" for k in chapters)]
    run += ["whole", "tokens", "clipped", "critic explains"]
    critics, runs = results["critics"].items(), results["runs"].items()
    critic_rows = [critic_cells(name, seeds, plan) for name, seeds in critics]
    run_rows = [run_cells(name, seeds, len(chapters)) for name, seeds in runs]
    return "\n".join([paper.table(critic, critic_rows), paper.table(run, run_rows)])


def critic_cells(name: str, seeds: Sequence[dict[str, Any]], plan: dict[str, Any]) -> list[str]:
    biases = zip(*(chapters_of(seed, plan) for seed in seeds), strict=True)
    rest = ([seed[key] for seed in seeds] for key in ("rmse", "explained"))
    return [name, *map(paper.pm, biases), *map(paper.pm, rest)]


def run_cells(name: str, seeds: Sequence[dict[str, Any]], chapters: int) -> list[str]:
    """Return a row of the table of RL runs."""
    explained = [seed["explained"] for seed in seeds if seed["explained"] is not None]
    return [
        name,
        paper.pm([last_of(seed) for seed in seeds]),
        paper.pm([statistics.fmean(seed["rewards"]) for seed in seeds]),
        *([f"{p:.2f}" for p in right_of(seeds)] or ["–"] * chapters),
        f"{statistics.fmean(seed['formed'] for seed in seeds):.2f}",
        f"{statistics.fmean(seed['lengths'][-1] for seed in seeds):.0f}",
        f"{statistics.fmean(share for seed in seeds for share in seed['clipped']):.2%}",
        paper.pm(explained) if explained else "–",
    ]


def right_of(seeds: Sequence[dict[str, Any]]) -> list[float]:
    """Return the probability of the right option of each chapter, of those seeds whose last answers
    have the form; nothing where none has."""
    known = [seed["right"] for seed in seeds if seed["right"] is not None]
    return [statistics.fmean(at) for at in zip(*known, strict=True)]


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Return the mean of each value and those up to `width` − 1 before it."""
    return [statistics.fmean(values[max(i - width + 1, 0) : i + 1]) for i in range(len(values))]


def figure(results: dict[str, Any]) -> Any:
    """Return values by position, right answers over steps, and right options by chapter."""
    from plotly.subplots import make_subplots

    titles = ("value, mean of 32 tokens", "right answers, mean of 5 steps", "right options, at end")
    drawn = make_subplots(1, 3, subplot_titles=titles)
    mean = {
        name: [statistics.fmean(at) for at in zip(*(s["value"] for s in seeds), strict=False)]
        for name, seeds in results["critics"].items()
    }
    first = next(iter(results["critics"].values()))
    true = [statistics.fmean(at) for at in zip(*(s["true"] for s in first), strict=False)]
    for place, (name, values) in enumerate({"true": true, **mean}.items()):
        line = {"color": "#111827" if name == "true" else paper.COLORS[-place], "dash": "dot"}
        y = smoothed(values, 32)
        drawn.add_scatter(y=y, name=f"value: {name}", line=line, mode="lines", row=1, col=1)
    colors = [*paper.COLORS, "#111827", "#9ca3af", "#a3e635", "#f472b6"]
    for color, (name, seeds) in zip(colors, results["runs"].items(), strict=False):
        rewards = [statistics.fmean(at) for at in zip(*(s["rewards"] for s in seeds), strict=True)]
        right = right_of(seeds)
        style: dict[str, Any] = {"name": name, "line": {"color": color}, "legendgroup": name}
        drawn.add_scatter(x0=1, y=smoothed(rewards, 5), row=1, col=2, mode="lines", **style)
        drawn.add_scatter(x0=1, y=right, row=1, col=3, showlegend=False, **style)
    drawn.update_xaxes(title_text="token of the answer", row=1, col=1)
    drawn.update_xaxes(title_text="step", row=1, col=2)
    drawn.update_xaxes(title_text="chapter", dtick=1, row=1, col=3)
    drawn.update_layout(legend={"tracegroupgap": 0}, margin={"t": 50, "b": 60})
    return drawn


def write(file: Path, results: dict[str, Any]) -> None:
    file.write_text(json.dumps(paper.rounded(results)) + "\n", encoding="utf-8")


def forget(results: dict[str, Any]) -> None:
    """Keep no results: those of a small study are not of the docs."""


def main() -> None:
    parser = paper.parser(__doc__ or "", "long_answers")
    parser.set_defaults(seeds=Plan.seeds)
    parser.add_argument("--folder", type=Path, default=Path("runs-long-answers"))
    parser.add_argument("--small", action="store_true", help="a few steps of everything, to try it")
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    if options.redraw:
        results = json.loads(options.results.read_text("utf-8"))
    else:
        plan = SMALL if options.small else Plan(seeds=options.seeds)
        options.folder.mkdir(parents=True, exist_ok=True)
        study = Study(plan, options.folder)
        kept = begun(plan, None if options.small else options.results)
        keep = forget if options.small else partial(write, options.results)
        results = paper.rounded(measured(study, kept, keep))
    print(tables(results))
    if options.image is not None:
        paper.picture(figure(results), options.image, 1500, 540)


if __name__ == "__main__":
    main()
