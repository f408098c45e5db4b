"""How much mismatch between sampler and learner RL bears, and what the doctor says of it.

    python benchmarks/papers/mismatch.py [--folder runs-mismatch] [--seeds 5] [--image FILE]

GRPO learns `sums` from a sampler whose distribution is not the learner's (`perturbed.py`): noise of
known size, rounded weights, a filter, another temperature, weights that come late. Each kind goes
with and without the corrections of algorithms/correction.py. The doctor sees every step and stops
none. On `reviews` it sees runs whose judge has a planted bias, with and without a penalty.

Every run is written when it is finished, and one that is in the file is not made again. Prints the
tables of docs/papers/mismatch.md and writes benchmarks/results/papers/mismatch.json.
"""

import contextlib
import copy
import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mismatch_tables
import paper
import torch
import transformers
from perturbed import Perturbed

import quartet
from quartet.algorithms.correction import (
    Correction,
    Masked,
    NoCorrection,
    SequenceMasked,
    SequenceTruncated,
    Truncated,
)
from quartet.algorithms.kl import KLInLoss
from quartet.runs.doctor import Watch
from quartet.runs.history import TOLERANCES
from quartet.worlds.reviews import Reviews
from quartet.worlds.sums import Sums

CORRECTIONS: dict[str, Correction] = {
    "none": NoCorrection(),
    "truncated": Truncated(),
    "masked": Masked(),
    "sequence_truncated": SequenceTruncated(ratio="product"),
    "sequence_masked": SequenceMasked(),
}
ALL = tuple(CORRECTIONS)
BIASED_WORD, WORD_BONUS, LENGTH_BONUS = "brilliant", 1.0, 0.1


@dataclass(frozen=True)
class Setting:
    """A world, its SFT policy, and how GRPO learns there."""

    world: Any
    sft: Mapping[str, Any]
    prompts: int
    samples: int
    max_new_tokens: int
    held_out: int
    lr: float = 1e-3
    every: int = 5
    """Steps between two tests on held-out prompts."""


SHAPE = {"type": "llama", "hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_length": 128}
SUMS = Setting(
    Sums(0),
    {
        "data": {
            "world": "sums",
            "rows": 20_000,
            "max_prompt_tokens": 8,
            "max_response_tokens": 8,
        },
        "sft": {"batch_size": 128, "lr": 3e-3, "warmup_steps": 20},
        "steps": 900,
    },
    prompts=32,
    samples=8,
    max_new_tokens=6,
    held_out=200,
)
REVIEWS = Setting(
    Reviews(0),
    {
        "data": {
            "world": "reviews",
            "rows": 9_600,
            "max_prompt_tokens": 32,
            "max_response_tokens": 64,
        },
        "sft": {"batch_size": 64, "lr": 4e-3, "warmup_steps": 20},
        "steps": 150,
    },
    prompts=16,
    samples=8,
    max_new_tokens=48,
    held_out=64,
)


@dataclass(frozen=True)
class Kind:
    """A kind of mismatch, with what it is measured with."""

    name: str
    source: Perturbed
    corrections: tuple[str, ...] = ("none",)
    seeds: int = 5
    steps: int = 40
    coef: float = 0.01
    """Of the KL penalty."""


KINDS = (
    Kind("none", Perturbed()),
    Kind("fresh, σ 0.1", Perturbed(sigma=0.1), seeds=3),
    Kind("fresh, σ 0.3", Perturbed(sigma=0.3), seeds=2),
    Kind("fresh, σ 1", Perturbed(sigma=1.0), ("none", "truncated"), seeds=3),
    Kind("fresh, σ 2", Perturbed(sigma=2.0), ("none", "truncated")),
    Kind("fresh, σ 4", Perturbed(sigma=4.0), seeds=2),
    Kind("fixed, σ 2", Perturbed(sigma=2.0, noise="fixed"), seeds=3),
    Kind("8 updates late", Perturbed(staleness=8), ALL),
    Kind("2 updates late", Perturbed(staleness=2), seeds=2),
    Kind("top-p 0.9", Perturbed(top_p=0.9), seeds=3),
    Kind("temperature 1.2", Perturbed(temperature=1.2), seeds=2),
    Kind("weights in bf16", Perturbed(weights="bf16"), seeds=2),
    Kind("weights in fp8", Perturbed(weights="fp8"), seeds=2),
    Kind("none", Perturbed(), coef=0.0),
    Kind("fresh, σ 2", Perturbed(sigma=2.0), coef=0.0),
    Kind(
        "8 updates late",
        Perturbed(staleness=8),
        ("none", "truncated", "sequence_masked"),
        coef=0.0,
    ),
    Kind("none", Perturbed(), seeds=1, steps=100),
    Kind("fresh, σ 2", Perturbed(sigma=2.0), seeds=1, steps=100),
    Kind("8 updates late", Perturbed(staleness=8), ("none", "truncated"), 1, 100),
)
JUDGES: dict[str, Callable[[str], float]] = {
    "gold": lambda response: REVIEWS.world.gold("", response),
    "word": lambda response: (
        REVIEWS.world.gold("", response) + WORD_BONUS * response.split().count(BIASED_WORD)
    ),
    "length": lambda response: (
        REVIEWS.world.gold("", response) + LENGTH_BONUS * len(response.split())
    ),
}
"""The true reward, and two judges that like something beside it."""
JUDGED = (("word", 0.0), ("length", 0.0), ("gold", 0.0), ("word", 0.3), ("length", 0.3))
"""The judges, each with the coefficient of the KL penalty."""
JUDGED_SEEDS, JUDGED_STEPS = 3, 40


def sft_policy(setting: Setting, folder: Path) -> Path:
    """Return the folder of the SFT policy of a world; train it where there is none."""
    name = f"sft-{setting.world.name}"
    for report in folder.glob(f"*-{name}/report.html"):
        return report.parent / "sft"
    with contextlib.redirect_stdout(io.StringIO()):
        run = quartet.train(
            "sft", policy={"create": SHAPE}, seed=0, folder=folder, name=name, **setting.sft
        )
        run.finish(progress=False)
    return run.folder / "sft"


class Bench:
    """A world with its SFT policy, on which runs are made."""

    def __init__(self, setting: Setting, policy: Path) -> None:
        self.setting, self.policy = setting, policy
        self.tokenizer = quartet.load_tokenizer(policy)
        self.sampling = quartet.Sampling(max_new_tokens=setting.max_new_tokens)
        self.train = self._prompts(9_600, held_out=False)
        self.held_out = self._prompts(setting.held_out, held_out=True)

    def _prompts(self, count: int, held_out: bool) -> list[quartet.Prompt]:
        return [
            quartet.Prompt(e.id, tuple(self.tokenizer(e.prompt)["input_ids"]), str(e.prompt))
            for e in self.setting.world.prompts(count, held_out)
        ]

    def gold(self, policy: Any) -> float:
        """Return the mean gold reward of the policy's own responses to held-out prompts."""
        ends = quartet.stop_ids(policy, self.tokenizer)
        generator = quartet.NativeGenerator(policy, self.tokenizer, ends, seed=7)
        responses = generator.generate(self.held_out, self.sampling)
        scores = [self.setting.world.gold(r.prompt.text, r.response) for r in responses]
        return float(sum(scores) / len(scores))

    def run(
        self,
        source: Perturbed,
        correction: Correction,
        seed: int,
        steps: int,
        coef: float,
        judge: Callable[[str], float] | None = None,
    ) -> dict[str, Any]:
        """Return what a run of GRPO gave: by step, and what the doctor said. `coef` is that of the
        KL penalty; `judge` is what is rewarded in place of the gold reward."""
        setting, policy = self.setting, quartet.load_model(self.policy)
        gold = quartet.TextReward("gold", setting.world.gold)
        rewards = [quartet.Weighted(gold)]
        if judge is not None:
            score = quartet.TextReward("judge", lambda _, response: judge(response))
            rewards = [quartet.Weighted(score), quartet.Weighted(gold, weight=0.0)]
        algorithm = dataclasses.replace(
            quartet.ALGORITHMS["grpo"], kl=KLInLoss(coef=coef), correction=correction
        )
        learner = quartet.Learner(
            quartet.Separate(policy, None),
            quartet.freeze(copy.deepcopy(policy)),
            quartet.Optim(lr=setting.lr, minibatches=2, warmup_steps=4, schedule="constant"),
            self.sampling,
            steps,
            seed,
        )
        ends = quartet.stop_ids(policy, self.tokenizer)
        context = quartet.GeneratorContext(policy, self.tokenizer, ends, seed)
        collector = quartet.Collector(
            quartet.Sampler(self.train, setting.prompts, seed),
            source.make(context),
            rewards,
            setting.samples,
        )
        record = Record(self.gold(policy))
        for step in quartet.rl(collector, learner, algorithm):
            record.add(step.metrics)
            if step.number % setting.every == 0:
                record.held_out.append(self.gold(policy))
        return record.as_dict()


KEPT = {"reward": "reward", "ratio": "sampler_ratio", "gold": "reward/gold", "kl": "kl"}
"""The metrics that are kept of every step, by the names that they get."""


class Record:
    """What is kept of a run: a few metrics of each step, the gold reward on held-out prompts, and
    the steps at which rules of the doctor first spoke, by what they take the sampler for."""

    def __init__(self, before: float) -> None:
        self.held_out = [before]
        self.columns: dict[str, list[float]] = {name: [] for name in KEPT}
        self.watches = {name: Watch(tolerance=TOLERANCES[name]) for name in ("fp32", "engine")}
        self.spoke: dict[str, dict[str, int]] = {name: {} for name in self.watches}

    def add(self, metrics: Mapping[str, float]) -> None:
        for name, metric in KEPT.items():
            self.columns[name].append(metrics[metric])
        for name, watch in self.watches.items():
            for rule, _ in watch.see(metrics):
                self.spoke[name].setdefault(rule.__name__, watch.history.steps)

    def as_dict(self) -> dict[str, Any]:
        return {"held_out": self.held_out, **self.columns, "spoke": self.spoke}


def jobs(seeds: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the world of each run and what tells it from others. All runs of a seed come before
    those of the next, so that what is there is balanced at any time."""
    for seed in range(seeds):
        for judge, coef in JUDGED:
            if seed < JUDGED_SEEDS:
                yield "reviews", {"judge": judge, "coef": coef, "seed": seed}
        for kind in KINDS:
            for correction in kind.corrections:
                if seed < kind.seeds:
                    key = {"kind": kind.name, "correction": correction, "coef": kind.coef}
                    yield "sums", key | {"steps": kind.steps, "seed": seed}


def measured(options: Any) -> dict[str, Any]:
    """Return the results: those that are in the file, and those of the runs that are missing."""
    results: dict[str, Any] = {"settings": settings(), "sums": [], "reviews": []}
    if options.results.exists():
        results |= json.loads(options.results.read_text(encoding="utf-8"))
    sort(results["sums"])
    benches: dict[str, Bench] = {}
    for world, key in jobs(options.seeds):
        if any(key.items() <= row.items() for row in results[world]):
            continue
        if world not in benches:
            setting = SUMS if world == "sums" else REVIEWS
            benches[world] = Bench(setting, sft_policy(setting, options.folder))
        row = {**key, **paper.rounded(made(benches[world], key))}
        results[world].append(row)
        sort(results["sums"])
        print(world, *key.values(), row["held_out"][-1], row["spoke"]["engine"], flush=True)
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(results) + "\n", encoding="utf-8")
    return results


def sort(rows: list[dict[str, Any]]) -> None:
    """Put rows into the order of `KINDS`, which is that of the tables."""
    names = [kind.name for kind in KINDS]
    rows.sort(key=lambda row: names.index(row["kind"]))


def made(bench: Bench, key: Mapping[str, Any]) -> dict[str, Any]:
    """Make the run of a key of `jobs`."""
    seed, coef = key["seed"], key["coef"]
    if "judge" in key:
        judge = JUDGES[key["judge"]]
        return bench.run(Perturbed(), NoCorrection(), seed, JUDGED_STEPS, coef, judge)
    source = next(kind.source for kind in KINDS if kind.name == key["kind"])
    return bench.run(source, CORRECTIONS[key["correction"]], seed, key["steps"], coef)


def settings() -> dict[str, Any]:
    """Return what the results rest on."""
    kept = ("lr", "every", "prompts", "samples", "held_out")
    return {
        setting.world.name: {name: getattr(setting, name) for name in kept}
        for setting in (SUMS, REVIEWS)
    }


def main() -> None:
    parser = paper.parser(__doc__ or "", "mismatch")
    parser.add_argument("--folder", type=Path, default=Path("runs-mismatch"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    if options.redraw:
        results = json.loads(options.results.read_text(encoding="utf-8"))
    else:
        results = measured(options)
    print(mismatch_tables.tables(results))
    if options.image:
        paper.picture(mismatch_tables.figure(results), options.image, 1300, 620)


if __name__ == "__main__":
    main()
