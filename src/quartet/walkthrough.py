"""A batch of eight responses, step by step: what each function of a training step takes and
returns, with the numbers of one response. `quartet explain ppo` and `quartet explain grpo` print
it."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartet.config.toml import settings_of_table
from quartet.errors import QuartetError
from quartet.launch.start import job_of, open_workers
from quartet.loops.rl import Step
from quartet.models.language_model import load_model
from quartet.runtime.events import Advanced, Started
from quartet.runtime.interruption import Interruption
from quartet.runtime.job import Job
from quartet.runtime.lifecycle import Execution, begin
from quartet.runtime.log import no_progress_bars
from quartet.runtime.worker import WorkerGroup
from quartet.tensors import Tensor

WALKS = ("ppo", "grpo")
"""The presets that can be walked through."""
STEP = 3
"""The step that is shown. In the first, policy and reference are still equal, and every KL is 0."""
SETTINGS: dict[str, Any] = {
    "data": {"world": "reviews", "rows": 3200, "max_prompt_tokens": 32, "max_response_tokens": 64},
    "policy": {
        "create": {
            "type": "llama",
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "max_length": 128,
        }
    },
    "sft": {"steps": 120, "batch_size": 32, "lr": 4e-3, "warmup_steps": 10},
    "reward_model": {"steps": 60, "batch_size": 32, "lr": 2e-3, "warmup_steps": 10},
    "reward": [{"type": "model"}],
    "optim": {"lr": 3e-4, "critic_lr": 1e-3, "epochs": 4, "minibatches": 2},
}
ROWS = 8
BEST_LENGTHS = range(5, 13)
"""Tokens of a response that is short enough for a table and long enough to show something."""

FUNCTIONS = (
    ("models are loaded, some are frozen", "Assembler", "load_model initialize_models"),
    ("prompts are drawn", "Sampler.next", "sample_prompt"),
    ("the actor responds", "Collector.collect", "respond generate_experience"),
    ("the reward model scores the responses", "ModelReward.score", "reward_model forward_value"),
    ("log-probs and values of each token", "Learner.score", "analyze_responses"),
    ("rewards of each token", "Algorithm.token_rewards", "reward_func compute_rewards"),
    (
        "advantages and returns",
        "Algorithm.experience",
        "advantage_func get_advantages_and_returns",
    ),
    (
        "the actor's loss",
        "Algorithm.policy_loss",
        "actor_loss_func actor_loss_fn cal_actor_loss",
    ),
    (
        "the critic's loss",
        "Algorithm.value_loss",
        "critic_loss_func critic_loss_fn cal_critic_loss",
    ),
    ("the update of the weights", "Learner.update", "train train_rlhf learn"),
)
"""What happens, the function here, and the same function's names in other texts."""


@dataclass(frozen=True)
class Walk:
    """One step of a small run, and which of its responses is shown token by token."""

    preset: str
    step: Step
    parameters: int
    row: int
    words: tuple[str, ...]
    """The tokens of that response, as text."""

    @property
    def places(self) -> Tensor:
        """The columns of that response."""
        return self.step.experience.response_mask[self.row].nonzero()[:, 0]

    def of_row(self, tensor: Tensor | None) -> list[float]:
        """Return a per-token tensor [B, T] at the tokens of the response."""
        assert tensor is not None
        return [float(x) for x in tensor[self.row, self.places]]

    def table(self, columns: Sequence[tuple[str, Sequence[float | str]]]) -> str:
        """Return a table with a row for each token of the response."""
        rows = [("token", self.words), *columns]
        return "\n".join(
            [
                "| " + " | ".join(name for name, _ in rows) + " |",
                "|---" + "|--:" * len(columns) + "|",
                *(
                    "| " + " | ".join(map(_cell, cells)) + " |"
                    for cells in zip(*(values for _, values in rows), strict=True)
                ),
            ]
        )


@no_progress_bars()
def explain(preset: str, seed: int = 0, on_stage: Callable[[str], None] | None = None) -> str:
    """Return a Markdown text that walks through one step of PPO (`"ppo"`) or GRPO (`"grpo"`) with
    eight responses.

    The numbers are of a real run of a small model (0.1 M parameters) on film reviews: SFT, a reward
    model, and three RL steps, some twenty seconds on a laptop. `on_stage` is called with the name
    of each stage as it begins. Nothing is left on the disk. Raises `QuartetError` for another
    preset.
    """
    if preset not in WALKS:
        raise QuartetError(
            f'"{preset}" has no walk-through; there is one of {" and of ".join(WALKS)}. '
            f"`quartet algorithms {preset}` prints its parts, and docs/algorithms.md has its "
            "formulas."
        )
    walk = _walk(preset, seed, on_stage)
    sections = _ppo_sections(walk) if preset == "ppo" else _grpo_sections(walk)
    return "\n\n".join([*_introduction(walk), *sections]) + "\n"


def _walk(preset: str, seed: int, on_stage: Callable[[str], None] | None) -> Walk:
    """Train until the step that is shown."""
    prompts = ROWS if preset == "ppo" else 1
    with tempfile.TemporaryDirectory() as folder:
        table = SETTINGS | {
            "recipe": ["sft", "reward_model", preset],
            "seed": seed,
            "rollout": {
                "prompts_per_step": prompts,
                "samples_per_prompt": ROWS // prompts,
                "max_new_tokens": 32,
            },
            "algorithm": {"preset": preset},
            "run": {"steps": STEP, "folder": folder},
        }
        settings = settings_of_table(table, preset, "quartet.explain")
        job = job_of(settings.config)
        execution = begin(settings, job)
        step = _shown_step(execution, preset, on_stage)
        tokenizer = job.tokenizer
        policy = load_model(execution.folder.path / "sft")
    lengths = [len(rollout.response_ids) for rollout in step.rollouts]
    row = min(range(ROWS), key=lambda i: (lengths[i] not in BEST_LENGTHS, lengths[i]))
    words = tuple(tokenizer.decode([token]) for token in step.rollouts[row].response_ids)
    return Walk(preset, step, int(policy.num_parameters()), row, words)


def _shown_step(execution: Execution, preset: str, on_stage: Callable[[str], None] | None) -> Step:
    """Carry out the run up to the step that is shown, and return that."""
    config = execution.settings.config

    def open_group(job: Job, path: Path) -> AbstractContextManager[WorkerGroup]:
        return open_workers(config, job, path, None)

    with closing(execution.events(open_group, Interruption(None))) as events:
        for event in events:
            if isinstance(event, Started) and on_stage is not None:
                on_stage(event.stage.name)
            step = event.progress if isinstance(event, Advanced) else None
            if isinstance(step, Step) and step.number == STEP:
                return step
    raise QuartetError(f"the small run of {preset} ended before step {STEP}")


def _introduction(walk: Walk) -> Iterator[str]:
    title = "PPO" if walk.preset == "ppo" else "GRPO"
    experience, rollouts = walk.step.experience, walk.step.rollouts
    width = experience.tokens.shape[1]
    yield f"# One batch of eight responses through a step of {title}"
    yield (
        f"These are the numbers of step {STEP} of a real run: a policy of {walk.parameters:,} "
        "parameters that was first taught to write film reviews, and a reward model that was "
        "trained on comparisons of reviews."
    )
    names = ["| what happens | here | in other texts |", "|---|---|---|"]
    for what, here, others in FUNCTIONS:
        listed = ", ".join(f"`{name}`" for name in others.split())
        names.append(f"| {what} | `{here}` | {listed} |")
    yield "\n".join(names)
    yield "## 1. Eight responses"
    if walk.preset == "ppo":
        yield "Eight prompts are drawn, and the actor responds to each of them once."
    else:
        yield "One prompt is drawn, and the actor responds to it eight times: a group."
    rows = ["| | prompt | response | tokens |", "|---|---|---|--:|"]
    for i, rollout in enumerate(rollouts):
        texts = _cell(rollout.prompt.text), _cell(rollout.response.strip())
        rows.append(f"| {i} | {texts[0]} | {texts[1]} | {len(rollout.response_ids)} |")
    yield "\n".join(rows)
    yield (
        f"As tensors: `tokens` [8, {width}] has prompt and response of each row, padded on the "
        f"right to the longest; `response_mask` [8, {width}] is true at the tokens that the actor "
        f"has sampled ({int(experience.response_mask.sum())} in all). Below, response "
        f"{walk.row} is shown token by token. Entry t of a tensor is always about token t: its "
        "log-prob, the value before it, its reward."
    )


def _scores(walk: Walk) -> Iterator[str]:
    scores = walk.step.experience.scores
    yield "## 2. Scores"
    yield (
        "The reward model reads prompt and response, and gives one number at the last token: "
        f"`scores` [8] = {_list(scores.tolist())}. It is frozen."
    )


def _ppo_sections(walk: Walk) -> Iterator[str]:
    yield from _scores(walk)
    yield from _log_probs_and_values(walk)
    yield from _rewards(walk)
    yield from _gae(walk)
    yield from _ppo_losses(walk)
    yield from _update(walk)


def _log_probs_and_values(walk: Walk) -> Iterator[str]:
    batch, width = walk.step.batch, walk.step.batch.tokens.shape[1]
    yield "## 3. What the models say of each token"
    yield (
        f"One forward pass each: the actor gives `old_logprobs` [8, {width}] (*old*: before this "
        f"step's update), the reference, which is the policy as SFT left it, `ref_logprobs` "
        f"[8, {width}], the critic `values` [8, {width}], its guess of the reward that is still to "
        "come before each token."
    )
    yield walk.table(
        [
            ("log π_old", walk.of_row(batch.old_logprobs)),
            ("log π_ref", walk.of_row(batch.ref_logprobs)),
            ("V", walk.of_row(batch.values)),
        ]
    )


def _rewards(walk: Walk) -> Iterator[str]:
    algorithm, experience = walk.step.algorithm, walk.step.experience
    coef = float(algorithm.kl.coef)  # type: ignore[attr-defined]
    limit = float(algorithm.scores[0].limit)  # type: ignore[attr-defined]
    penalties = walk.of_row(experience.penalties)
    rewards = walk.of_row(experience.token_rewards)
    score = float(experience.scores[walk.row])
    yield "## 4. Rewards of each token"
    yield (
        f"r_t = −β (log π_old − log π_ref) with β = {coef:g}; the last token also gets the score, "
        f"cut at ±{limit:g}. A token that the actor finds likelier than the reference does costs "
        f"something. `token_rewards` [8, {experience.tokens.shape[1]}]; the last one here is "
        f"{_cell(penalties[-1])} + {_cell(score)} = {_cell(rewards[-1])}."
    )
    scores = [0.0] * (len(rewards) - 1) + [score]
    yield walk.table([("penalty", penalties), ("score", scores), ("r", rewards)])


def _gae(walk: Walk) -> Iterator[str]:
    algorithm, experience = walk.step.algorithm, walk.step.experience
    gamma, lam = float(algorithm.advantage.gamma), float(algorithm.advantage.lam)  # type: ignore[attr-defined]
    rewards, values = walk.of_row(experience.token_rewards), walk.of_row(experience.values)
    advantages = walk.of_row(experience.raw_advantages)
    deltas = [
        r + gamma * after - v
        for r, after, v in zip(rewards, [*values[1:], 0.0], values, strict=True)
    ]
    yield "## 5. Advantages and returns"
    yield (
        f"δ_t = r_t + γ V_(t+1) − V_t says how much better a token turned out than the critic "
        f"thought; A_t = δ_t + γλ A_(t+1) adds what later tokens showed (GAE), with γ = {gamma:g}, "
        f"λ = {lam:g}. They are computed from the last token backwards:"
    )
    lines = [
        f"    A = δ = {rewards[-1]:.3f} − ({values[-1]:.3f}) = {advantages[-1]:.3f}   last token"
    ]
    if len(values) > 1:
        lines.append(
            f"    δ = {rewards[-2]:.3f} + {gamma:g} · ({values[-1]:.3f}) − ({values[-2]:.3f}) = "
            f"{deltas[-2]:.3f}   the one before"
        )
        lines.append(
            f"    A = {deltas[-2]:.3f} + {gamma * lam:g} · ({advantages[-1]:.3f}) = "
            f"{advantages[-2]:.3f}"
        )
    yield "\n".join(lines)
    yield (
        "The return R_t = A_t + V_t is what the critic learns. For the actor, advantages are "
        "whitened: less their mean over all response tokens of the step, divided by their "
        "standard deviation. `advantages` and `returns` "
        f"[8, {experience.tokens.shape[1]}]. Tokens, old log-probs, values, advantages and returns "
        "are all that the update reads: the experience."
    )
    yield walk.table(
        [
            ("δ", deltas),
            ("A", advantages),
            ("R = A + V", walk.of_row(experience.returns)),
            ("A whitened", walk.of_row(experience.advantages)),
        ]
    )


def _ppo_losses(walk: Walk) -> Iterator[str]:
    algorithm, experience = walk.step.algorithm, walk.step.experience
    loss: Any = algorithm.value_loss
    values, returns = walk.of_row(experience.values), walk.of_row(experience.returns)
    yield "## 6. Both losses"
    yield from _policy_loss(walk)
    yield (
        f"The critic's loss of a token is {loss.coef:g} · ½ (V − R)², and the larger of that and "
        f"the same with V held within ±{loss.clip:g} of its old value. Of the last token, in the "
        f"first minibatch: {loss.coef:g} · ½ ({values[-1]:.3f} − ({returns[-1]:.3f}))² = "
        f"{0.5 * loss.coef * (values[-1] - returns[-1]) ** 2:.4f}. Both losses are means over the "
        "response tokens of a minibatch."
    )


def _policy_loss(walk: Walk) -> Iterator[str]:
    step, experience = walk.step, walk.step.experience
    clip: Any = step.algorithm.policy_loss
    ratio = (step.update.logprobs - experience.old_logprobs).exp()
    advantages = walk.of_row(experience.advantages)
    losses = [
        -min(rho * a, min(max(rho, 1 - clip.low), 1 + clip.high) * a)
        for rho, a in zip(walk.of_row(ratio), advantages, strict=True)
    ]
    clipped = ["clipped" if c else "" for c in step.update.clipped[walk.row, walk.places].tolist()]
    yield (
        "The actor's loss of a token is −min(ρ A, clip(ρ) A), where ρ = π / π_old is the ratio of "
        "its probability now to that when it was sampled, and clip holds it between "
        f"{1 - clip.low:g} and {1 + clip.high:g}. In the first minibatch the weights are those "
        "that sampled, and ρ = 1 (the largest difference was "
        f"{step.update.first_ratio_error:.0e}). In each later minibatch log-probs are computed "
        "again. This is how the last pass over this response found it; a clipped token has no "
        "gradient:"
    )
    yield walk.table(
        [("A", advantages), ("ρ", walk.of_row(ratio)), ("loss", losses), ("", clipped)]
    )


def _grpo_sections(walk: Walk) -> Iterator[str]:
    experience, algorithm = walk.step.experience, walk.step.algorithm
    scores = experience.scores.tolist()
    eps = float(algorithm.advantage.eps)  # type: ignore[attr-defined]
    mean, std = float(experience.scores.mean()), float(experience.scores.std())
    yield from _scores(walk)
    yield "## 3. Advantages"
    yield (
        f"There is no critic: the group is the baseline. Mean {mean:.3f}, standard deviation "
        f"{std:.3f} (of a sample, n − 1). A = (score − mean) / (std + {eps:g}), the same for "
        f"every token of a response: `advantages` [8, {experience.tokens.shape[1]}]. Response "
        f"{walk.row}: "
        f"({scores[walk.row]:.3f} − ({mean:.3f})) / {std:.3f} = "
        f"{(scores[walk.row] - mean) / (std + eps):.3f}."
    )
    rows = ["| response | score | A |", "|---|--:|--:|"]
    for i, score in enumerate(scores):
        advantage = float(experience.advantages[i][experience.response_mask[i]][0])
        rows.append(f"| {i} | {score:.3f} | {advantage:.3f} |")
    yield "\n".join(rows)
    yield "## 4. The loss"
    yield from _policy_loss(walk)
    yield from _kl_in_loss(walk)
    yield from _update(walk)


def _kl_in_loss(walk: Walk) -> Iterator[str]:
    experience, update = walk.step.experience, walk.step.update
    assert experience.ref_logprobs is not None
    coef = float(walk.step.algorithm.kl.coef)  # type: ignore[attr-defined]
    log_ratio = experience.ref_logprobs - update.logprobs
    k3 = log_ratio.exp() - 1 - log_ratio
    yield (
        f"The KL from the reference is part of the loss: β · k3 with β = {coef:g} and k3 = "
        "π_ref/π − 1 − log(π_ref/π), which is never negative. The reference, the policy as SFT "
        "left it, gives `ref_logprobs` in one forward pass:"
    )
    yield walk.table(
        [
            ("log π", walk.of_row(update.logprobs)),
            ("log π_ref", walk.of_row(experience.ref_logprobs)),
            ("k3", walk.of_row(k3)),
            ("β k3", walk.of_row(coef * k3)),
        ]
    )
    yield "The loss is the mean over the tokens of each response, and then over the responses."


def _update(walk: Walk) -> Iterator[str]:
    update, metrics = walk.step.update, walk.step.metrics
    optim = SETTINGS["optim"]
    passes, minibatches = optim["epochs"], optim["minibatches"]
    mask = walk.step.experience.response_mask
    kl_ref = metrics["kl"]
    number = 7 if walk.preset == "ppo" else 5
    trained = "actor and critic" if walk.preset == "ppo" else "the actor"
    yield f"## {number}. The update"
    yield (
        f"{passes} passes over the eight rows, each in {minibatches} minibatches of "
        f"{ROWS // minibatches} rows: {passes * minibatches} optimizer steps of {trained}. "
        f"Mean losses: {_named(update.losses)}. Gradient norms before they are cut: "
        f"{_named(_by_prefix(update.step_stats, 'grad_norm/'))}. At the end, the clip had removed "
        f"the gradient of {int(update.clipped[mask].sum())} of {int(mask.sum())} tokens; the actor "
        f"is {metrics['policy/kl_to_old']:.3f} nats per token from where it was before this step, "
        f"and the responses were {kl_ref:.2f} nats per response from the reference. The next step "
        "samples with the new weights."
    )


def _by_prefix(numbers: Any, prefix: str) -> dict[str, float]:
    return {k.removeprefix(prefix): v for k, v in numbers.items() if k.startswith(prefix)}


def _named(numbers: Any) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in sorted(numbers.items()) if value)


def _list(numbers: Sequence[float]) -> str:
    return "[" + ", ".join(f"{x:.2f}" for x in numbers) + "]"


def _cell(value: float | str) -> str:
    if isinstance(value, str):
        return value.replace("|", "\\|").replace("\n", " ").strip()
    return f"{value:.3f}" if value else "0"
