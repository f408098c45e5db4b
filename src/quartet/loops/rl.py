"""Reinforcement learning from a reward: the loop, readable in a minute."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from quartet.algorithms.algorithm import Algorithm
from quartet.data.sampler import Sampler
from quartet.experience import Batch, Experience, Prompt, Rollout
from quartet.generation.protocol import Generator
from quartet.generation.sampling import Sampling
from quartet.loops.collect import collect
from quartet.loops.progress import Clock, Progress
from quartet.rewards.protocol import Weighted
from quartet.training.learner import Learner, Update
from quartet.training.metrics import rl_metrics


@dataclass(frozen=True)
class Step(Progress):
    """One turn of the loop: the numbers, and everything they were computed from."""

    rollouts: list[Rollout]
    batch: Batch
    experience: Experience
    update: Update
    algorithm: Algorithm
    """The next step's: its coefficients have adapted to this one."""


def rl(
    prompts: Sampler[Prompt],
    generator: Generator,
    sampling: Sampling,
    samples_per_prompt: int,
    rewards: Sequence[Weighted],
    learner: Learner,
    algorithm: Algorithm,
    steps: int,
    done: int = 0,
) -> Iterator[Step]:
    """Generate and reward, score, estimate, update, publish, adapt; until `steps` are done."""
    for number in range(done + 1, steps + 1):
        clock = Clock()
        rollouts, unscored = collect(prompts, generator, sampling, samples_per_prompt, rewards, algorithm)
        clock.lap("rollouts")
        batch = learner.score(rollouts, algorithm)  # old and reference log-probs, values
        experience = algorithm.experience(batch)  # token rewards, advantages, returns
        clock.lap("scoring")
        update = learner.update(experience, algorithm, train_actor=number > learner.optim.critic_warmup_steps)
        generator.load_weights(learner.weights())
        clock.lap("update")
        metrics = rl_metrics(rollouts, unscored, batch, experience, update, algorithm)
        algorithm = algorithm.adapt(metrics)  # coefficients that follow what was measured
        yield Step(number, metrics, rollouts, batch, experience, update, algorithm, seconds=clock.laps)
