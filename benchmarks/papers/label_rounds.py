"""Does it help to label in rounds? The same number of labels at once, or in two rounds.

    python benchmarks/papers/label_rounds.py [--folder runs-label-rounds] [--seeds 3]

Ziegler et al. 2019 (arXiv 1909.08593) collect labels again as the policy moves, because a reward
model that has only seen answers of the first policy can be exploited. Here a simulated labeller
compares answers on the world `reviews` by its gold reward, a tenth of the labels turned round. All
ways start from the same SFT policy of a seed, and have the same number of labels, of reward-model
steps and of PPO steps in all.

What is measured, on held-out prompts: the gold reward of the last policy, its KL to the SFT policy,
and how often the last reward model prefers the answer with the higher gold reward, among pairs of
the SFT policy's answers and among pairs of the last policy's.

Runs that are in the folder already are not made again. Prints the table of docs/labelling.md and
writes benchmarks/results/papers/label_rounds.json.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import paper
import transformers

import quartet
from quartet.experience import Prompt, Rollout
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.models.heads import ScalarModel
from quartet.models.language_model import load_model, load_tokenizer, stop_ids
from quartet.rewards.reward_model import ModelReward
from quartet.worlds.reviews import Reviews

POLICY = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_length": 128}
ROUND = ("label", "reward_model", "ppo")


@dataclass(frozen=True)
class Plan:
    """What is trained and measured. Labels and steps are those of all rounds together."""

    rounds: tuple[int, ...] = (1, 2)
    coefs: tuple[float, ...] = (0.12,)
    """KL coefficients: the weaker the penalty, the farther the policy goes."""
    labels: int = 960
    pairs: int = 1_200
    """Pairs that are sampled in each round. A policy that has learnt gives some prompts two equal
    answers, which are no pair."""
    wrong: float = 0.1
    reward_steps: int = 120
    ppo_steps: int = 48
    sft_steps: int = 120
    batch: int = 64
    prompts: int = 300
    answers: int = 4
    """Answers to each held-out prompt; each two of them are a pair."""


SMALL = Plan((1, 2), (0.1,), 24, 40, 0.1, 4, 4, 2, 8, 6, 4)


@dataclass(frozen=True)
class Study:
    """The runs of one seed in a folder, each made once."""

    plan: Plan
    folder: Path
    seed: int

    def sft(self) -> Path:
        """Return the folder of the SFT policy that all ways start from."""
        name = f"sft-{self.seed}"
        return self._finished(
            name,
            "sft",
            policy={"create": POLICY},
            steps=self.plan.sft_steps,
            sft={"batch_size": 64, "lr": 2e-3, "warmup_steps": 20},
        )

    def run(self, rounds: int, coef: float) -> Path:
        """Return the folder of a run of so many rounds."""
        plan = self.plan
        label = {
            "pairs": plan.pairs,
            "labels": plan.labels // rounds,
            "simulated": plan.wrong,
        }
        return self._finished(
            f"rounds-{rounds}-{coef:g}-{self.seed}",
            [*ROUND * rounds, "evaluation"],
            policy=str(self.sft() / "sft"),
            steps=plan.ppo_steps // rounds,
            label=label,
            reward_model={
                "steps": plan.reward_steps // rounds,
                "batch_size": 32,
                "lr": 1e-3,
                "warmup_steps": 10 // rounds,
            },
            critic={"type": "separate"},
            reward={"type": "model"},
            rollout={"prompts_per_step": plan.batch, "max_new_tokens": 48},
            algorithm={"preset": "ppo", "kl": {"coef": coef}},
            optim={"lr": 3e-4, "critic_lr": 1e-3, "epochs": 4, "minibatches": 2},
            evaluation={"best_of": 0},
        )

    def _finished(self, name: str, recipe: str | Sequence[str], **settings: Any) -> Path:
        train = partial(
            quartet.train,
            recipe,
            data={"world": "reviews", "rows": 9_600},
            seed=self.seed,
            folder=self.folder,
            name=name,
            **settings,
        )
        return paper.finished(self.folder, name, train)


def answers_of(policy: Path, plan: Plan, seed: int) -> list[Rollout]:
    """Return a policy's answers to held-out prompts, `plan.answers` to each."""
    model, tokenizer = load_model(policy), load_tokenizer(policy)
    generator = NativeGenerator(model, tokenizer, stop_ids(model, tokenizer), seed)
    examples = Reviews(seed).prompts(plan.prompts, held_out=True)
    prompts = [
        Prompt(e.id, tuple(tokenizer(e.prompt)["input_ids"]), str(e.prompt)) for e in examples
    ]
    return generator.generate(prompts, Sampling(max_new_tokens=48), plan.answers)


def pair_accuracy(scores: Sequence[float], gold: Sequence[float]) -> float | None:
    """Return how often the answer with the higher gold reward has the higher score, over the pairs
    (0, 1), (2, 3), … An equal score counts a half; pairs of equal gold reward are left out."""
    shares = []
    for place in range(0, len(gold) - 1, 2):
        better = gold[place] - gold[place + 1]
        if better:
            margin = (scores[place] - scores[place + 1]) * better
            shares.append(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0)
    return statistics.fmean(shares) if shares else None


def measured(study: Study, run: Path) -> dict[str, Any]:
    """Return the measures of a run that is done."""
    scorer = ModelReward(ScalarModel.load(run / "reward_model"), 4_096)
    world = Reviews(study.seed)
    found: dict[str, Any] = {}
    policies = {"before": study.sft() / "sft", "after": run / "policy"}
    for name, folder in policies.items():
        rollouts = answers_of(folder, study.plan, study.seed)
        gold = [world.gold("", rollout.response) for rollout in rollouts]
        scores = [float(x or 0.0) for x in scorer.score(rollouts)]
        found[name] = {
            "gold": statistics.fmean(gold),
            "score": statistics.fmean(scores),
            "accuracy": pair_accuracy(scores, gold),
        }
    record = quartet.Run(run)
    evaluation = record.evaluation
    assert evaluation is not None, f"{run} is not finished"
    stages = record.rl_stages
    return found | {
        "kl": evaluation["kl"]["mean"],
        "gold_by_round": [record.series[stage].last("reward/gold", 5) for stage in stages],
        "kl_by_round": [record.series[stage].last("kl", 5) for stage in stages],
    }


def one_seed(plan: Plan, folder: Path, seed: int) -> list[dict[str, Any]]:
    """Return a row for each KL coefficient and number of rounds."""
    study, found = Study(plan, folder, seed), []
    for coef in plan.coefs:
        for rounds in plan.rounds:
            row = {"coef": coef, "rounds": rounds, **measured(study, study.run(rounds, coef))}
            found.append(row)
            print(seed, row, flush=True)
    return found


def table(seeds: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Return the table of docs/labelling.md: means and deviations over seeds."""
    head = ["`kl.coef`", "rounds", "gold before", "gold at the end", "each seed", "KL, nats"]
    head += ["accuracy, pairs of the SFT policy", "accuracy, pairs of the last policy"]
    lines = []
    for rows in zip(*seeds, strict=True):
        after = [row["after"]["gold"] for row in rows]
        lines.append(
            [
                f"{rows[0]['coef']:g}",
                str(rows[0]["rounds"]),
                paper.pm([row["before"]["gold"] for row in rows]),
                paper.pm(after),
                paper.minus(", ".join(f"{gold:.2f}" for gold in after)),
                paper.pm([row["kl"] for row in rows]),
                paper.pm([row["before"]["accuracy"] for row in rows]),
                paper.pm([row["after"]["accuracy"] for row in rows]),
            ]
        )
    return paper.table(head, lines)


def main() -> None:
    parser = paper.parser(__doc__ or "", "label_rounds")
    parser.set_defaults(seeds=3)
    parser.add_argument("--folder", type=Path, default=Path("runs-label-rounds"))
    parser.add_argument("--rounds", type=int, nargs="+", default=Plan.rounds)
    parser.add_argument("--coefs", type=float, nargs="+", default=Plan.coefs)
    parser.add_argument("--small", action="store_true", help="a few steps of everything, to try it")
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    plan = SMALL if options.small else Plan(tuple(options.rounds), tuple(options.coefs))
    measure = partial(one_seed, plan, options.folder)
    print(table(paper.over_seeds(measure, options, **asdict(plan))))


if __name__ == "__main__":
    main()
