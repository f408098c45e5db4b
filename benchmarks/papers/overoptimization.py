"""How far a learned reward can be trusted: the laws of over-optimisation on the world `reviews`.

    python benchmarks/papers/overoptimization.py [--folder runs-overoptimization] [--seeds 5]

Gao et al. 2022 (arXiv 2210.10760) find that the true reward follows d (α − β d) for best-of-n and
d (α − β log d) for RL, where d is the square root of the KL. Coste et al. 2023 (arXiv 2310.02743)
find that ensembles delay the turn, more so with noisy labels. Here reward models of several sizes
learn from several numbers of comparisons, with labels as the world gives them and with a quarter of
them flipped. Each one chooses the best of n answers of one SFT policy, and some of them train a
policy by PPO. The true reward is the world's.

Runs that are in the folder already are not made again. Prints the tables of docs/papers/
overoptimization.md and writes benchmarks/results/papers/overoptimization.json.
"""

import argparse
import json
import math
import random
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import paper
import transformers

import quartet
from quartet.evaluation.best_of_n import best_of_n
from quartet.experience import Prompt, Rollout
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.models.heads import ScalarModel
from quartet.models.language_model import load_model, load_tokenizer, stop_ids
from quartet.rewards.reward_model import ModelReward
from quartet.worlds.reviews import Reviews

RESULTS = paper.RESULTS / "overoptimization.json"
POLICY = {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "max_length": 128}


@dataclass(frozen=True)
class Plan:
    """What is trained and sampled."""

    widths: tuple[int, ...] = (16, 64)
    comparisons: tuple[int, ...] = (200, 800, 3_200)
    flipped: tuple[float, ...] = (0.0, 0.25)
    seeds: int = 5
    prompts: int = 64
    answers: int = 256
    sft_steps: int = 120
    reward_steps: int = 100
    """At most; a few comparisons are seen ten times."""
    ppo_steps: int = 24
    ppo: tuple[tuple[int, int, float], ...] = ((64, 200, 0.0), (64, 3_200, 0.0), (64, 3_200, 0.12))
    """Width and comparisons of the reward model, and KL coefficient."""
    ppo_seeds: int = 3


SMALL = Plan((16,), (50,), (0.0, 0.25), 2, 4, 8, 2, 2, 4, ((16, 50, 0.1),), 1)


class Study:
    """The runs of a plan in a folder, each made once."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.sft = paper.finished(folder, "sft", self._train_sft) / "sft"
        self.tokenizer = load_tokenizer(self.sft)
        self.samples = self._sampled()
        world = Reviews(0)
        self.gold = [[world.gold("", r.response) for r in group] for group in self.samples]

    def _train_sft(self) -> Any:
        return quartet.train(
            "sft",
            policy={"create": POLICY},
            data={"world": "reviews", "rows": 9_600},
            sft={"batch_size": 64, "lr": 2e-3, "warmup_steps": 20},
            steps=self.plan.sft_steps,
            seed=0,
            folder=self.folder,
            name="sft",
        )

    def _sampled(self) -> list[list[Rollout]]:
        """Return the answers of the SFT policy to held-out prompts, by prompt."""
        model, plan = load_model(self.sft), self.plan
        ends = stop_ids(model, self.tokenizer)
        generator = NativeGenerator(model, self.tokenizer, ends, seed=0)
        examples = Reviews(0).prompts(plan.prompts, held_out=True)
        prompts = [
            Prompt(e.id, tuple(self.tokenizer(e.prompt)["input_ids"]), str(e.prompt))
            for e in examples
        ]
        groups: list[list[Rollout]] = []
        for prompt in prompts:
            groups.append(generator.generate([prompt], Sampling(max_new_tokens=48), plan.answers))
        return groups

    def reward_model(self, width: int, count: int, flipped: float, seed: int) -> Path:
        """Return the folder of a reward model that was trained on so many comparisons."""
        name = f"rm-{width}-{count}-{flipped:g}-{seed}"

        def train() -> Any:
            rng = random.Random(f"flipped/{seed}")
            steps = min(self.plan.reward_steps, max(10 * count // 64, 1))
            return quartet.train(
                "reward_model",
                policy={
                    "create": POLICY | {"hidden_size": width, "num_heads": max(width // 32, 1)},
                    "tokenizer": str(self.sft),
                },
                data=list(rows(Reviews(seed).comparisons(count), flipped, rng)),
                eval_data=list(rows(Reviews(seed).comparisons(500, held_out=True), 0.0, rng)),
                reward_model={"batch_size": 64, "lr": 1e-3, "warmup_steps": 10},
                steps=steps,
                seed=seed,
                folder=self.folder,
                name=name,
            )

        return paper.finished(self.folder, name, train)

    def scores(self, folder: Path) -> list[list[float]]:
        """Return a reward model's scores of the sampled answers, by prompt."""
        scorer = ModelReward(ScalarModel.load(folder / "reward_model"), 4_096)
        return [[float(x or 0.0) for x in scorer.score(group)] for group in self.samples]

    def ppo(self, width: int, count: int, coef: float, seed: int) -> list[dict[str, float]]:
        """Return KL, reward and true reward of each step of a PPO run."""
        judge = self.reward_model(width, count, 0.0, seed) / "reward_model"
        name = f"ppo-{width}-{count}-{coef:g}-{seed}"
        folder = paper.finished(
            self.folder,
            name,
            lambda: quartet.train(
                "ppo",
                policy=str(self.sft),
                data={"world": "reviews", "rows": 9_600},
                reward=str(judge),
                steps=self.plan.ppo_steps,
                seed=seed,
                folder=self.folder,
                name=name,
                algorithm={"preset": "ppo", "kl": {"coef": coef}},
                rollout={"prompts_per_step": 32, "max_new_tokens": 48},
                optim={"lr": 3e-4, "critic_lr": 1e-3, "epochs": 4, "minibatches": 2},
            ),
        )
        steps = quartet.Run(folder).metrics.to_pylist()
        return [
            {"kl": step["kl"], "reward": step["reward"], "gold": step["reward/gold"]}
            for step in steps
        ]


def rows(examples: Iterable[Any], flipped: float, rng: random.Random) -> Iterator[dict[str, str]]:
    """Yield comparisons as rows of data, a part of them with the labels changed over."""
    for example in examples:
        pair = [example.chosen, example.rejected]
        if rng.random() < flipped:
            pair.reverse()
        yield {"prompt": example.prompt, "chosen": pair[0], "rejected": pair[1]}


# --- what is computed of the scores


@dataclass(frozen=True)
class Law:
    """A fit of the gain in true reward over d = √KL."""

    alpha: float
    beta: float
    r2: float

    @classmethod
    def fitted(cls, d: Sequence[float], gain: Sequence[float], shape: str) -> "Law":
        """Fit d (α − β d) for "bon", d (α − β log d) for "rl", by least squares over d > 0."""
        x, y = (np.array(values)[np.array(d) > 0] for values in (d, gain))
        bend = x * x if shape == "bon" else x * np.log(x)
        (alpha, minus_beta), *_ = np.linalg.lstsq(np.stack([x, bend], 1), y, rcond=None)
        rest = y - alpha * x - minus_beta * bend
        spread = float(((y - y.mean()) ** 2).sum())
        return cls(float(alpha), float(-minus_beta), 1 - float((rest**2).sum()) / spread)


@dataclass(frozen=True)
class Curve:
    """Best-of-n by one scorer: d = √KL, and the gain in true reward over one answer."""

    d: list[float]
    gain: list[float]

    @classmethod
    def of(cls, scores: list[list[float]], gold: list[list[float]]) -> "Curve":
        points = best_of_n(scores, gold)
        first = points[0].gold
        assert first is not None
        gains = [point.gold - first for point in points if point.gold is not None]
        return cls([math.sqrt(point.kl) for point in points], gains)


def mean_curve(curves: Sequence[Curve]) -> Curve:
    gains = zip(*(curve.gain for curve in curves), strict=True)
    return Curve(curves[0].d, [statistics.fmean(values) for values in gains])


def standardized(scores: list[list[float]]) -> Any:
    """Return the scores less their mean, over their deviation: members of an ensemble differ in
    both."""
    values = np.array(scores)
    return (values - values.mean()) / values.std()


def ensemble(members: Sequence[list[list[float]]]) -> dict[str, list[list[float]]]:
    """Return the scores of an ensemble by each way to aggregate its members'."""
    together = np.stack([standardized(scores) for scores in members])
    mean, worst, spread = together.mean(0), together.min(0), together.std(0)
    ways = {"mean": mean, "mean − deviation": mean - spread, "worst": worst}
    return {name: values.tolist() for name, values in ways.items()}


def best_of_n_results(study: Study) -> list[dict[str, Any]]:
    """Return a row for each kind of reward model: the gain of each seed, the law of their mean, and
    the gains of their ensemble."""
    plan, found = study.plan, []
    for width in plan.widths:
        for count in plan.comparisons:
            for flipped in plan.flipped:
                folders = [
                    study.reward_model(width, count, flipped, seed) for seed in range(plan.seeds)
                ]
                members = [study.scores(folder) for folder in folders]
                curves = [Curve.of(scores, study.gold) for scores in members]
                mean = mean_curve(curves)
                together = {
                    name: Curve.of(scores, study.gold).gain
                    for name, scores in ensemble(members).items()
                }
                found.append(
                    {
                        "width": width,
                        "comparisons": count,
                        "flipped": flipped,
                        "accuracy": [accuracy(folder) for folder in folders],
                        "d": mean.d,
                        "gains": [curve.gain for curve in curves],
                        "law": asdict(Law.fitted(mean.d, mean.gain, "bon")),
                        "ensemble": together,
                    }
                )
                print(*cells_of(found[-1]), sep=" | ", flush=True)
    return found


def accuracy(folder: Path) -> float:
    """Return the held-out pair accuracy that the run of a reward model has recorded."""
    summary = quartet.Run(folder).summary("reward_model")
    assert summary is not None, f"{folder} is not finished"
    return float(summary["held_out_accuracy"])


def ppo_results(study: Study) -> list[dict[str, Any]]:
    """Return a row for each kind of PPO run: its steps by seed, and the law of all of them."""
    found = []
    start = statistics.fmean(x for group in study.gold for x in group)
    for width, count, coef in study.plan.ppo:
        runs = [study.ppo(width, count, coef, seed) for seed in range(study.plan.ppo_seeds)]
        d = [math.sqrt(max(step["kl"], 0.0)) for run in runs for step in run]
        gain = [step["gold"] - start for run in runs for step in run]
        found.append(
            {
                "width": width,
                "comparisons": count,
                "coef": coef,
                "runs": runs,
                "start": start,
                "law": asdict(Law.fitted(d, gain, "rl")),
            }
        )
        print(*ppo_cells_of(found[-1]), sep=" | ", flush=True)
    return found


# --- tables and the figure


def cells_of(row: dict[str, Any]) -> list[str]:
    """Return a row of the table of best-of-n."""
    return [
        str(row["width"]),
        f"{row['comparisons']:,}",
        f"{row['flipped']:.0%}",
        paper.pm(row["accuracy"]),
        paper.pm([gain[-1] for gain in row["gains"]]),
        *law_of(row),
        *(paper.minus(f"{gain[-1]:.2f}") for gain in row["ensemble"].values()),
    ]


def ppo_cells_of(row: dict[str, Any]) -> list[str]:
    """Return a row of the table of PPO."""
    best = [max(run, key=lambda step: step["gold"]) for run in row["runs"]]
    last = [run[-1] for run in row["runs"]]
    return [
        *kind_of(row),
        paper.pm([step["gold"] - row["start"] for step in best]),
        paper.pm([step["kl"] for step in best]),
        paper.pm([step["gold"] - row["start"] for step in last]),
        paper.pm([step["kl"] for step in last]),
        *law_of(row),
    ]


def kind_of(row: dict[str, Any]) -> list[str]:
    return [str(row["width"]), f"{row['comparisons']:,}", f"{row['coef']:g}"]


def law_of(row: dict[str, Any]) -> list[str]:
    return [paper.minus(f"{row['law'][name]:.2f}") for name in ("alpha", "beta", "r2")]


def first_at(run: Sequence[dict[str, float]], kl: float) -> float | None:
    """Return the true reward of a run where its KL first reaches a value, between two steps by a
    straight line; None where it does not."""
    for before, after in pairwise(run):
        if before["kl"] < kl <= after["kl"]:
            share = (kl - before["kl"]) / (after["kl"] - before["kl"])
            return before["gold"] + share * (after["gold"] - before["gold"])
    return None


def at_equal_kl(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """Yield, for each run with a penalty, its gain at its last step, and what the run of the same
    reward model without one had gained when its KL was the same."""
    without = {(r["width"], r["comparisons"]): r["runs"] for r in rows if not r["coef"]}
    for row in rows:
        others = without.get((row["width"], row["comparisons"]))
        if not row["coef"] or others is None:
            continue
        for seed, (run, other) in enumerate(zip(row["runs"], others, strict=True)):
            kl, gain = run[-1]["kl"], run[-1]["gold"] - row["start"]
            gold = first_at(other, kl)
            there = "–" if gold is None else paper.minus(f"{gold - row['start']:.2f}")
            yield [*kind_of(row), str(seed), f"{kl:.1f}", paper.minus(f"{gain:.2f}"), there]


def tables(results: dict[str, Any]) -> str:
    """Return the tables of docs/papers/overoptimization.md, with empty lines between them."""
    plan = results["plan"]
    law, kind = ["α", "β", "R²"], ["width", "comparisons", "`kl.coef`"]
    best = ["width", "comparisons", "flipped", "pair accuracy", f"gain, best of {plan['answers']}"]
    best += [*law, f"mean of {plan['seeds']}", "mean − deviation", f"worst of {plan['seeds']}"]
    ppo = [*kind, "highest gain", "its KL", "gain at the end", "KL at the end", *law]
    equal = [*kind, "seed", "KL", "gain", "gain without, at this KL"]
    return "\n".join(
        [
            paper.table(best, map(cells_of, results["best_of_n"])),
            paper.table(ppo, map(ppo_cells_of, results["ppo"])),
            paper.table(equal, at_equal_kl(results["ppo"])),
        ]
    )


def figure(results: dict[str, Any]) -> Any:
    """Return the gain in true reward over √KL: best-of-n by reward model, and each PPO run."""
    from plotly.subplots import make_subplots

    drawn = make_subplots(1, 2, subplot_titles=("best-of-n, mean over seeds", "PPO, each run"))
    for row in results["best_of_n"]:
        color = paper.COLORS[list(results["plan"]["comparisons"]).index(row["comparisons"])]
        widest = row["width"] == max(results["plan"]["widths"])
        dash = "dash" if row["flipped"] else "solid"
        drawn.add_scatter(
            x=row["d"],
            y=[statistics.fmean(gains) for gains in zip(*row["gains"], strict=True)],
            name=f"width {row['width']}, {row['comparisons']:,}, {row['flipped']:.0%} flipped",
            line={"color": color, "dash": dash, "width": 2.5 if widest else 1},
            mode="lines",
            row=1,
            col=1,
        )
    for place, row in enumerate(results["ppo"]):
        for seed, run in enumerate(row["runs"]):
            drawn.add_scatter(
                x=[math.sqrt(max(step["kl"], 0.0)) for step in run],
                y=[step["gold"] - row["start"] for step in run],
                name=f"PPO, {row['comparisons']:,} comparisons, kl.coef {row['coef']:g}",
                line={"color": paper.COLORS[3 + place]},
                mode="lines",
                showlegend=seed == 0,
                row=1,
                col=2,
            )
    drawn.update_xaxes(title_text="√KL from the SFT policy")
    drawn.update_yaxes(title_text="gain in true reward")
    drawn.update_yaxes(range=[-2, 2], row=1, col=2)
    return drawn


def main() -> None:
    parser = paper.parser(__doc__ or "", "overoptimization")
    parser.set_defaults(seeds=Plan.seeds)
    parser.add_argument("--folder", type=Path, default=Path("runs-overoptimization"))
    parser.add_argument("--small", action="store_true", help="a few steps of everything, to try it")
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    results = (
        json.loads(options.results.read_text("utf-8")) if options.redraw else measured(options)
    )
    print(tables(results))
    if options.image is not None:
        paper.picture(figure(results), options.image, 1300, 560)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Return the results of the study, and keep those of the whole plan."""
    plan = SMALL if options.small else Plan(seeds=options.seeds)
    study = Study(plan, options.folder)
    found = {
        "plan": asdict(plan),
        "best_of_n": best_of_n_results(study),
        "ppo": ppo_results(study),
    }
    results: dict[str, Any] = paper.rounded(found)
    if not options.small:
        options.results.write_text(json.dumps(results) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
