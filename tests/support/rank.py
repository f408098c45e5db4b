"""One rank that trains the tiny world: `python -m tests.support.rank RANK WORLD STORE OUT KIND` writes losses and gradients.

KIND is plain; sharded, or rows: two ranks have a model in parts, and the next two have the same; resting: as sharded, and what
waits in main memory is no number there; or selfish: the negative control, in which each rank divides by what it has itself.
"""

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from quartet.algorithms.kl import KLInLoss
from quartet.algorithms.preference import PREFERENCES, LastTokenLoss
from quartet.algorithms.presets import ALGORITHMS
from quartet.data.records import Comparison, Demonstration
from quartet.data.sampler import Sampler
from quartet.distributed.offload import NO_OFFLOAD, Offloading, Placement
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup, TorchProcessGroup
from quartet.distributed.sharding import full_state_dict, full_tensor, local_tensor
from quartet.generation.sampling import Sampling
from quartet.loops.preference import preference
from quartet.loops.reward_model import reward_model
from quartet.loops.sft import sft
from quartet.models.actor_critic import Separate, freeze
from quartet.models.heads import ScalarModel
from quartet.training.budget import Budget
from quartet.training.learner import Learner
from quartet.training.optim import Optim, Optimizer, OptimizerConfig
from quartet.training.parallelize import mesh_of, parallelize
from quartet.training.trust_region import TrustRegionLearner
from tests.support import resting
from tests.support.gloo import join, leave
from tests.support.world import model, prompts, rollout

LENGTHS = [30, 1, 2, 1, 17, 1, 1, 3, 28, 2]
"""Tokens of the answers: however they are dealt out, no two ranks have as many."""


class Selfish(TorchProcessGroup):
    """Scales gradients as plain data parallelism does: the mean over ranks of losses that each rank divides by its own tokens."""

    def micro_batches(self, lengths, max_tokens, prefixes=None):
        mine = list(range(self.rank, len(lengths), self.world_size))
        self.factor = sum(lengths) / (self.world_size * sum(lengths[i] for i in mine))
        return super().micro_batches(lengths, max_tokens, prefixes)

    def all_reduce_gradients(self, parameters):
        parameters = list(parameters)
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(self.factor)
        super().all_reduce_gradients(parameters)


def answers(seed: int) -> list[tuple[int, ...]]:
    rng = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(4, 20, (n,), generator=rng).tolist()) for n in LENGTHS]


def double(made: Any) -> Any:
    return made.to(torch.float64)


class Recording(Optimizer):
    """Keeps the gradient of each step, and how it was summed, in `seen`."""

    seen: tuple[dict[str, torch.Tensor], ...] | list[dict[str, torch.Tensor]] = ()

    def clip(self) -> float:
        norm = super().clip()
        gradients = [full_tensor(p.grad) for p in self.parameters if p.grad is not None]
        self.seen.append(
            {str(i): g.detach().clone() for i, g in enumerate(gradients)}
            | {"norm": torch.tensor(norm)}
        )
        return norm


def watched(optimizer: Optimizer) -> Recording:
    optimizer.__class__ = Recording
    optimizer.seen = []
    return optimizer


def run(
    process_group: ProcessGroup, parts: int = 0, placement: Placement = NO_OFFLOAD
) -> dict[str, torch.Tensor]:
    """Everything by name: losses, gradients, metrics. `parts`: over how many ranks a model is divided."""
    mesh = mesh_of("cpu", process_group, parts) if parts else None

    def spread(made: Any) -> Any:
        return made if mesh is None else parallelize(made, mesh)

    found: dict[str, torch.Tensor] = {}

    def keep(name: str, optimizer: Recording, metrics: list[dict[str, float]]) -> None:
        for step, gradients in enumerate(optimizer.seen):
            found.update({f"{name}/{step}/{key}": value for key, value in gradients.items()})
        for step, row in enumerate(metrics):
            found.update(
                {
                    f"{name}/{step}/{key}": torch.tensor(value, dtype=torch.float64)
                    for key, value in row.items()
                }
            )

    descent = OptimizerConfig(lr=1e-4)
    texts = [
        Demonstration(f"d{i}", p.ids, a)
        for i, (p, a) in enumerate(zip(prompts(len(LENGTHS)), answers(0), strict=True))
    ]
    policy = spread(double(model()))
    optimizer = watched(Optimizer([*policy.parameters()], descent, 2))
    keep(
        "sft",
        optimizer,
        [
            s.metrics
            for s in sft(policy, Sampler(texts, 10, 0), optimizer, 2, Budget(64, process_group))
        ],
    )

    pairs = [
        Comparison(d.id, d.prompt_ids, a, b)
        for d, a, b in zip(texts, answers(1), answers(2)[::-1], strict=True)
    ]
    judge = ScalarModel.from_trunk(double(model()), 0, seed=0).to(torch.float64)
    spread(judge.model)
    optimizer = watched(Optimizer([*judge.parameters()], descent, 2))
    steps = reward_model(
        judge, Sampler(pairs, 10, 0), LastTokenLoss(), optimizer, 2, Budget(64, process_group)
    )
    keep("reward_model", optimizer, [s.metrics for s in steps])

    for name in ("dpo", "kto"):
        policy, reference = spread(double(model())), spread(freeze(double(model(seed=2))))
        optimizer = watched(Optimizer([*policy.parameters()], descent, 2))
        steps = preference(
            policy,
            reference,
            Sampler(pairs, 10, 0),
            PREFERENCES[name],
            optimizer,
            2,
            Budget(64, process_group),
        )
        keep(name, optimizer, [s.metrics for s in steps])

    rollouts = [
        rollout(p, a, float(i % 3), i // 2, i)
        for i, (p, a) in enumerate(zip(prompts(10), answers(3), strict=True))
    ]
    exact = dataclasses.replace(ALGORITHMS["grpo"], kl=KLInLoss(estimator="exact", coef=0.1))
    algorithms = {"ppo": ALGORITHMS["ppo"], "grpo": ALGORITHMS["grpo"], "exact_kl": exact}
    for name, algorithm in algorithms.items():
        critic = (
            ScalarModel.from_trunk(double(model(seed=1)), 0, seed=0).to(torch.float64)
            if name == "ppo"
            else None
        )
        if critic is not None:
            spread(critic.model)
        actor, reference = double(model()), freeze(double(copy.deepcopy(model(seed=2))))
        optim = Optim(lr=1e-4, critic_lr=1e-4, epochs=2, minibatches=2, target_kl=10.0, ema=0.5)
        learner = Learner(
            Separate(spread(actor), critic),
            spread(reference),
            optim,
            Sampling(temperature=0.8),
            steps=1,
            micro_batch_tokens=64,
            process_group=process_group,
            placement=placement,
        )
        for role, made in learner.optimizers.items():
            learner.optimizers[role] = watched(made)
        batch = learner.score(rollouts, algorithm)
        found |= {f"{name}/old": batch.old_logprobs, f"{name}/ref": batch.ref_logprobs}
        if batch.values is not None:
            found[f"{name}/values"] = batch.values
        update = learner.update(algorithm.experience(batch), algorithm)
        assert not update.reference_moved
        for role, made in learner.optimizers.items():
            keep(f"{name}/{role}", made, [update.losses, update.step_stats])
        found |= {f"{name}/logprobs": update.logprobs, f"{name}/clipped": update.clipped}
        found[f"{name}/weights"] = torch.cat(
            [t.flatten() for t in learner.weights().tensors.values()]
        )
        assert learner.ema is not None
        averages = full_state_dict(learner.models.actor, learner.ema.average)
        found[f"{name}/averages"] = torch.cat([t.flatten() for t in averages.values()])
    if parts:
        held = sum(local_tensor(p).numel() for p in learner.models.actor.parameters())
        everything = sum(p.numel() for p in learner.models.actor.parameters())
        assert held < everything / parts + 1000, "norms are small, and all else is in parts"
    else:
        actor, critic = (
            double(model()),
            ScalarModel.from_trunk(double(model(seed=1)), 0, seed=0).to(torch.float64),
        )
        reference = freeze(double(model(seed=2)))
        learner = TrustRegionLearner(
            Separate(actor, critic),
            reference,
            Optim(),
            Sampling(),
            1,
            micro_batch_tokens=64,
            process_group=process_group,
        )
        update = learner.update(
            ALGORITHMS["trpo"].experience(learner.score(rollouts, ALGORITHMS["trpo"])),
            ALGORITHMS["trpo"],
        )
        assert update.step_stats["trust_region/fraction"] > 0
        keep("trpo", Recording([actor.lm_head.weight], descent, 1), [update.step_stats])
        found |= {
            "trpo/logprobs": update.logprobs,
            "trpo/weights": torch.cat([p.detach().flatten() for p in actor.parameters()]),
        }
    return found


def main() -> None:
    rank, world, store, out, kind = (
        int(sys.argv[1]),
        int(sys.argv[2]),
        sys.argv[3],
        Path(sys.argv[4]),
        sys.argv[5],
    )
    torch.set_num_threads(1)
    process_group: ProcessGroup = SINGLE_PROCESS
    if world > 1 or kind == "sharded":
        join(rank, world, store)
        process_group = (Selfish if kind == "selfish" else TorchProcessGroup)(rank, world)
    bed = resting.made(setattr) if kind == "resting" else None
    placement = NO_OFFLOAD if bed is None else Offloading(torch.device("cpu"))
    found = run(
        process_group, {"sharded": world, "resting": world, "rows": 2}.get(kind, 0), placement
    )
    assert bed is None or bed.bytes > 0
    save_file(
        {name: tensor.contiguous() for name, tensor in found.items()}, out / f"{rank}.safetensors"
    )
    if dist.is_initialized():
        leave()


if __name__ == "__main__":
    main()
