"""How far a learned reward can be trusted: the laws of over-optimisation on the world `reviews`.

    python benchmarks/papers/overoptimization.py [--folder runs-overoptimization] [--seeds 5]

Gao et al. 2022 (arXiv 2210.10760) find that the true reward follows d (α − β d) for best-of-n and
d (α − β log d) for RL, where d is the square root of the KL. Coste et al. 2023 (arXiv 2310.02743)
find that ensembles delay the turn, more so with noisy labels. Here reward models of several sizes
learn from several numbers of comparisons, some of them with a quarter of the labels flipped. Each
one chooses the best of n answers of one SFT policy, and some of them train a policy by PPO. The
true reward is the world's.

Runs that are in the folder already are not made again. Prints the tables of docs/papers/
overoptimization.md and writes benchmarks/results/papers/overoptimization.json.
"""

import argparse
import itertools
import json
import math
import random
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import overoptimization_tables
import paper
import transformers

import quartet
from quartet.evaluation.best_of_n import best_of_n
from quartet.experience import Prompt, Rollout
from quartet.files import replace
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.models.heads import ScalarModel
from quartet.models.language_model import load_model, load_tokenizer, stop_ids
from quartet.rewards.reward_model import ModelReward
from quartet.worlds.reviews import Reviews

RESULTS = paper.RESULTS / "overoptimization.json"
POLICY = {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "max_length": 128}


@dataclass(frozen=True)
class Cell:
    """A kind of reward model."""

    width: int
    comparisons: int
    flipped: float
    """The share of labels that are changed over."""


@dataclass(frozen=True)
class Ppo:
    """A kind of PPO run, and the kind of reward model that it learns from."""

    width: int
    comparisons: int
    coef: float
    lr: float = 3e-4
    steps: int = 24


def grid(widths: Sequence[int], comparisons: Sequence[int], flipped: float) -> tuple[Cell, ...]:
    return tuple(Cell(width, count, flipped) for width in widths for count in comparisons)


@dataclass(frozen=True)
class Plan:
    """What is trained and sampled."""

    reward_models: tuple[Cell, ...] = (
        *grid((8, 16, 32, 64, 128), (200, 800, 3_200, 6_400), 0.0),
        *grid((16, 64), (200, 800, 3_200), 0.25),
    )
    members: tuple[Cell, ...] = (Cell(32, 800, 0.0),)
    """The kinds of which every seed is trained on every seed's comparisons."""
    ppo: tuple[Ppo, ...] = (
        Ppo(64, 200, 0.0),
        Ppo(64, 3_200, 0.0),
        Ppo(64, 3_200, 0.0, lr=1e-4, steps=48),
        Ppo(64, 3_200, 0.12),
    )
    seeds: int = 5
    prompts: int = 64
    answers: int = 256
    sft_steps: int = 120
    reward_steps: int = 100
    """At most; a few comparisons are seen ten times."""


SMALL = Plan(
    (Cell(16, 50, 0.0), Cell(16, 50, 0.25)),
    (Cell(16, 50, 0.0),),
    (Ppo(16, 50, 0.0, steps=4), Ppo(16, 50, 0.1, steps=4)),
    seeds=2,
    prompts=4,
    answers=8,
    sft_steps=2,
    reward_steps=2,
)


class Study:
    """The runs of a plan in a folder, each made once."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.sft = paper.finished(folder, "sft", self._train_sft) / "sft"

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

    @cached_property
    def samples(self) -> list[list[Rollout]]:
        """The answers of the SFT policy to held-out prompts, by prompt."""
        model, tokenizer, plan = load_model(self.sft), load_tokenizer(self.sft), self.plan
        generator = NativeGenerator(model, tokenizer, stop_ids(model, tokenizer), seed=0)
        sampling = Sampling(max_new_tokens=48)
        return [
            generator.generate(
                [Prompt(e.id, tuple(tokenizer(e.prompt)["input_ids"]), str(e.prompt))],
                sampling,
                plan.answers,
            )
            for e in Reviews(0).prompts(plan.prompts, held_out=True)
        ]

    @cached_property
    def gold(self) -> list[list[float]]:
        """The true reward of these answers."""
        world = Reviews(0)
        return [[world.gold("", r.response) for r in group] for group in self.samples]

    def reward_model(self, cell: Cell, seed: int, data: int | None = None) -> Path:
        """Return the folder of a reward model. `data`: the seed of its comparisons and of the
        labels that are changed over, where it is not the run's."""
        data = seed if data is None else data
        name = f"rm-{cell.width}-{cell.comparisons}-{cell.flipped:g}-{seed}"
        name += "" if data == seed else f"-of-{data}"

        def train() -> Any:
            rng, world = random.Random(f"flipped/{data}"), Reviews(data)
            heads = max(cell.width // 32, 1)
            steps = min(self.plan.reward_steps, max(10 * cell.comparisons // 64, 1))
            return quartet.train(
                "reward_model",
                policy={
                    "create": POLICY | {"hidden_size": cell.width, "num_heads": heads},
                    "tokenizer": str(self.sft),
                },
                data=list(rows(world.comparisons(cell.comparisons), cell.flipped, rng)),
                eval_data=list(rows(world.comparisons(500, held_out=True), 0.0, rng)),
                reward_model={"batch_size": 64, "lr": 1e-3, "warmup_steps": 10},
                steps=steps,
                seed=seed,
                folder=self.folder,
                name=name,
            )

        return paper.finished(self.folder, name, train)

    def scores(self, folder: Path) -> list[list[float]]:
        """Return a reward model's scores of the sampled answers, by prompt. They are kept in the
        folder of its run."""
        kept = folder / "scores.json"
        if not kept.exists():
            scorer = ModelReward(ScalarModel.load(folder / "reward_model"), 4_096)
            scores = [[float(x or 0.0) for x in scorer.score(group)] for group in self.samples]
            replace(kept, json.dumps(scores))
        found: list[list[float]] = json.loads(kept.read_text(encoding="utf-8"))
        return found

    def ppo(self, kind: Ppo, seed: int) -> list[dict[str, float]]:
        """Return KL, reward and true reward of each step of a PPO run."""
        judge = self.reward_model(Cell(kind.width, kind.comparisons, 0.0), seed) / "reward_model"
        name = f"ppo-{kind.width}-{kind.comparisons}-{kind.coef:g}-{kind.lr:g}-{seed}"
        folder = paper.finished(
            self.folder,
            name,
            lambda: quartet.train(
                "ppo",
                policy=str(self.sft),
                data={"world": "reviews", "rows": 9_600},
                reward=str(judge),
                steps=kind.steps,
                seed=seed,
                folder=self.folder,
                name=name,
                algorithm={"preset": "ppo", "kl": {"coef": kind.coef}},
                rollout={"prompts_per_step": 32, "max_new_tokens": 48},
                optim={"lr": kind.lr, "critic_lr": 1e-3, "epochs": 4, "minibatches": 2},
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


def ensemble_gains(study: Study, members: Sequence[list[list[float]]]) -> dict[str, list[float]]:
    """Return an ensemble's gains by the ways to aggregate."""
    return {name: Curve.of(s, study.gold).gain for name, s in ensemble(members).items()}


def accuracy(folder: Path) -> float:
    """Return the held-out pair accuracy that the run of a reward model has recorded."""
    summary = quartet.Run(folder).summary("reward_model")
    assert summary is not None, f"{folder} is not finished"
    return float(summary["held_out_accuracy"])


def best_of_n_row(study: Study, cell: Cell) -> dict[str, Any]:
    """Return the pair accuracy and the gains of each seed's reward model, and the gains of their
    ensemble."""
    folders = [study.reward_model(cell, seed) for seed in range(study.plan.seeds)]
    members = [study.scores(folder) for folder in folders]
    curves = [Curve.of(scores, study.gold) for scores in members]
    return asdict(cell) | {
        "accuracy": [accuracy(folder) for folder in folders],
        "d": curves[0].d,
        "gains": [curve.gain for curve in curves],
        "ensemble": ensemble_gains(study, members),
    }


def members_row(study: Study, cell: Cell) -> dict[str, Any]:
    """Return the gains of models that every seed has trained on every seed's comparisons, and of
    their ensembles: as many whose members share the comparisons, and as many whose members share
    neither seed nor comparisons. Each model is in one of either kind."""
    seeds = range(study.plan.seeds)
    scores = {
        (seed, data): study.scores(study.reward_model(cell, seed, data))
        for seed, data in itertools.product(seeds, seeds)
    }
    same = [[scores[seed, data] for seed in seeds] for data in seeds]
    own = [[scores[seed, (seed + shift) % len(seeds)] for seed in seeds] for shift in seeds]
    return asdict(cell) | {
        "single": [Curve.of(each, study.gold).gain for each in scores.values()],
        "same": [ensemble_gains(study, members) for members in same],
        "own": [ensemble_gains(study, members) for members in own],
    }


def ppo_row(study: Study, kind: Ppo) -> dict[str, Any]:
    """Return the steps of each seed's run."""
    return asdict(kind) | {"runs": [study.ppo(kind, seed) for seed in range(study.plan.seeds)]}


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
    print(overoptimization_tables.tables(results))
    if options.image is not None:
        paper.picture(overoptimization_tables.figure(results), options.image, 1400, 820)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Return the results of the study, and keep those of the whole plan."""
    plan = SMALL if options.small else Plan(seeds=options.seeds)
    study = Study(plan, options.folder)
    found = {
        "plan": asdict(plan),
        "start": statistics.fmean(x for group in study.gold for x in group),
        "best_of_n": [best_of_n_row(study, cell) for cell in plan.reward_models],
        "members": [members_row(study, cell) for cell in plan.members],
        "ppo": [ppo_row(study, kind) for kind in plan.ppo],
    }
    results: dict[str, Any] = paper.rounded(found)
    if not options.small:
        options.results.write_text(json.dumps(results) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
