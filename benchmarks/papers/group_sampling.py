"""Group sampling: a step's answers spread over many prompts or repeated for few of them.

    python benchmarks/papers/group_sampling.py [--folder runs-group-sampling] [--seeds 3]

VAPO (arXiv 2504.05118) samples 512 prompts × 16 answers a step, and 8192 × 1 in the row of its
ablation without group sampling. Here a step has 32 answers: 32 prompts × 1, 8 × 4, 4 × 8 or 2 × 16.
The world is that of long_answers.py with 32 prompts, each of which names its own right options, so
that the policy must read it; half of them are hard. All runs begin with the same SFT policy. Those
with a critic begin with the same one, pretrained as in long_answers.py on 32 prompts × 1.

The policy at the end of a run is measured by new answers to all prompts. Results are written after
each run, and runs that are in the folder are not made again. Prints the table of
docs/papers/long_answers.md and writes benchmarks/results/papers/group_sampling.json.
"""

import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import long_answers
import paper
import transformers
from chapters import World, answers_of
from long_answers import FIXED, NO_CRITIC, SPARSE, Plan, Variant

import quartet

RESULTS = paper.RESULTS / "group_sampling.json"
PLAN = Plan(World(4, 7, 4, 0.8, prompts=32), 32, 600, 300, 20, steps=24, layers=2)
SMALL = Plan(World(3, 5, 3, 0.8, prompts=16), 16, 150, 2, 2, 16, 2, 16, 1)
HELD_OUT = 8
"""Answers to each prompt by which a policy is measured."""
SFT = "SFT policy"


@dataclass(frozen=True)
class Row:
    """A variant with so many answers to a prompt."""

    variant: Variant
    each: int

    def name(self, answers: int) -> str:
        return f"{self.variant.name}, {answers // self.each} × {self.each}"


VAPO = Variant("VAPO", FIXED)
"""With λ = 0.95 for the actor. The length-adaptive one is for hundreds of tokens."""
GROUP_MEAN = Variant("group mean, no critic", NO_CRITIC, "none")
ROWS = (*(Row(VAPO, each) for each in (1, 4, 8, 16)), *(Row(GROUP_MEAN, n) for n in (4, 8, 16)))


class Study(long_answers.Study):
    """The runs of the rows, and the answers by which policies are measured."""

    def rl(self, algorithm: dict[str, Any], critic: str, **settings: Any) -> dict[str, Any]:
        """Return the settings of RL, with learning rates for the shorter answers of this world."""
        rates = {"optim.lr": 1e-3, "optim.critic_lr": 1e-3}
        return super().rl(algorithm, critic, **rates, **settings)

    def trained_row(self, row: Row, seed: int) -> Path:
        """Return the folder of the run of a row."""

        def settings() -> dict[str, Any]:
            critic = row.variant.critic
            critic = critic if critic == "none" else self.critic(critic, 0)
            own = {**self.step_of(self.plan.responses, row.each), **SPARSE}
            return self.rl(row.variant.algorithm, critic, steps=self.plan.steps, **own)

        return self.run(f"rl-{ROWS.index(row)}-{seed}", seed, settings)

    def held_out(self, policy: Path, name: str) -> dict[str, Any]:
        """Return the share of right answers to each prompt, and that of whole answers, of a
        policy that is in a folder. Answers are sampled with the same seed for all policies."""

        def settings() -> dict[str, Any]:
            own = self.step_of(HELD_OUT * self.world.prompts, HELD_OUT)
            return self.rl(NO_CRITIC, "none", steps=1, **own) | {"policy": str(policy)}

        run = quartet.Run(self.run(f"held-out-{name}", 0, settings))
        return right_by_prompt(self.world, run)


def right_by_prompt(world: World, run: quartet.Run) -> dict[str, Any]:
    """Return what the answers of a run's first step say."""
    answers = answers_of(world, run, 1)
    right = dict.fromkeys(world.right, 0.0)
    for answer in answers.found:
        right[answer.prompt] += answer.score / HELD_OUT
    return {"by_prompt": list(right.values()), "held_out_formed": answers.formed}


def measured(
    study: Study, results: dict[str, Any], keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Return the results of a study: those that are given, and those that are missing there. Of a
    variant, all rows of a seed come before those of the next. `keep` is given the results after
    each."""
    runs = results["runs"]
    if SFT not in runs:
        runs[SFT] = [study.held_out(study.sft, SFT)]
        results["critics"] = [long_answers.by_position(study.probed("pretrained", 0))]
        keep(results)
    for variant in (VAPO, GROUP_MEAN):
        rows = [row for row in ROWS if row.variant == variant]
        for seed, row in itertools.product(range(study.plan.seeds), rows):
            seeds = runs.setdefault(row.name(study.plan.responses), [])
            if len(seeds) <= seed:
                folder = study.trained_row(row, seed)
                found = long_answers.of_run(study.world, quartet.Run(folder))
                name = f"{ROWS.index(row)}-{seed}"
                seeds.append(found | study.held_out(folder / "policy", name))
                keep(results)
                print(*cells(runs, row.name(study.plan.responses)), sep=" | ", flush=True)
    return results


# --- the table


def table(results: dict[str, Any]) -> str:
    """Return the table of docs/papers/long_answers.md."""
    head = ["", "seeds", "right, all prompts", "easy", "hard", "whole", "less 32 × 1"]
    head += ["right, all steps", "critic explains"]
    return paper.table(head, (cells(results["runs"], name) for name in results["runs"]))


def cells(runs: dict[str, Any], name: str) -> list[str]:
    seeds = runs[name]
    shares = [right_of(seed) for seed in seeds]
    by_kind = ([right_of(seed, [is_hard]) for seed in seeds] for is_hard in (False, True))
    reference = next(row for row in runs if row != SFT)
    row = [
        name,
        str(len(seeds)),
        paper.pm(shares),
        *(f"{statistics.fmean(kind):.2f}" for kind in by_kind),
        f"{statistics.fmean(seed['held_out_formed'] for seed in seeds):.2f}",
    ]
    if name == SFT:
        return [*row, "–", "–", "–"]
    differences = [a - right_of(b) for a, b in zip(shares, runs[reference], strict=False)]
    explained = [seed["explained"] for seed in seeds if seed["explained"] is not None]
    return [
        *row,
        "–" if name == reference else paper.interval(differences),
        paper.pm([statistics.fmean(seed["rewards"]) for seed in seeds]),
        paper.pm(explained) if explained else "–",
    ]


def right_of(seed: dict[str, Any], kinds: Sequence[bool] = (False, True)) -> float:
    """Return the share of right answers to the prompts of these kinds: False easy, True hard."""
    return statistics.fmean(p for k, p in enumerate(seed["by_prompt"]) if bool(k % 2) in kinds)


def main() -> None:
    parser = paper.parser(__doc__ or "", "group_sampling")
    parser.set_defaults(seeds=PLAN.seeds)
    parser.add_argument("--folder", type=Path, default=Path("runs-group-sampling"))
    parser.add_argument("--small", action="store_true", help="a few steps of everything, to try it")
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    if options.redraw:
        results = json.loads(options.results.read_text("utf-8"))
    else:
        plan = SMALL if options.small else replace(PLAN, seeds=options.seeds)
        options.folder.mkdir(parents=True, exist_ok=True)
        kept = long_answers.begun(plan, None if options.small else options.results)
        write = partial(long_answers.write, options.results)
        keep = long_answers.forget if options.small else write
        results = paper.rounded(measured(Study(plan, options.folder), kept, keep))
    print(table(results))


if __name__ == "__main__":
    main()
