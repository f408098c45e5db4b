"""TRL's PPO, which versions up to 1.10 have: all of it is in `PPOTrainer.train`.

One step of `train` runs on a stand-in. What it would get from models (log-probs, values, scores)
are the tensors of a claim; what it hands on (to its whitening, to `backward`) is kept.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
import trl
from torch import Tensor
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from rl_conformance import conventions
from rl_conformance.adapters.stand_in import Accelerator, Metrics, Model, defaults
from rl_conformance.library import Library, NotOffered

PAD, FIRST_ROW = 0, 2
"""The id of padding, and the id of the prompt of row 0: a prompt is the number of its row."""


@dataclass
class Step:
    """What one step of training is given, all [B T] but for the scores [B], and what it does."""

    mask: Tensor
    old: Tensor
    reference: Tensor
    values: Tensor
    new: Tensor
    new_values: Tensor
    scores: Tensor
    advantages: Tensor | None = None
    """What the whitening of advantages gives; None: what it was given."""
    whitened: list[Tensor] = field(default_factory=list)
    """What was handed to the whitening."""
    losses: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, mask: Tensor, **tensors: Tensor) -> "Step":
        """Return a step in which all that is not given is 0. Responses begin in the first column,
        because the trainer finds their ends by the first padding."""
        if (mask.long().diff(dim=1) > 0).any():
            raise NotOffered("padding within or before a response")
        names = ("old", "reference", "values", "new", "new_values")
        values: dict[str, Any] = {name: torch.zeros(mask.shape) for name in names}
        return cls(mask, **values | {"scores": torch.zeros(len(mask))} | tensors)

    def _with_prompt(self, table: Tensor) -> Tensor:
        """Return numbers of responses [B T] as outputs [B 1+T 1] of a model, one position before
        their token."""
        return torch.nn.functional.pad(table, (0, 1))[..., None]

    def _forward(self, model: Any, ids: Tensor, _: int) -> Any:
        rows = ids[:, 0] - FIRST_ROW
        if model == "reference":
            return SimpleNamespace(logits=self._with_prompt(self.reference[rows]))
        logits = self._with_prompt(self.new[rows])
        return SimpleNamespace(logits=logits), self._with_prompt(self.new_values[rows])

    def _get_reward(self, model: Any, *_: Any) -> tuple[Tensor | None, Tensor | None, None]:
        return (self._with_prompt(self.values), self.scores, None)

    def _whiten(self, x: Tensor, *_: Any, shift_mean: bool = True, **__: Any) -> Tensor:
        self.whitened.append(x)
        return x if self.advantages is None or not shift_mean else self.advantages

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """Let the trainer's module see these tensors where it calls models."""
        prompts = torch.arange(len(self.mask))[:, None] + FIRST_ROW
        ids = torch.cat([prompts, self.mask.long()], dim=1)
        generation = contextlib.nullcontext(SimpleNamespace(policy=None))
        with mock.patch.multiple(
            ppo_trainer,
            forward=self._forward,
            get_reward=self._get_reward,
            masked_whiten=self._whiten,
            selective_log_softmax=lambda logits, _: logits[..., 0],
            batch_generation=lambda *_: (ids, self.old[..., None]),
            unwrap_model_for_generation=lambda *_, **__: generation,
        ):
            yield


class Everything:
    """An object whose methods do nothing and whose attributes are such objects."""

    should_save = False

    def __getattr__(self, name: str) -> "Everything":
        return Everything()

    def __call__(self, *_: Any, **__: Any) -> "Everything":
        return self

    def __getitem__(self, _: Any) -> float:
        return 0.0


class TrainAccelerator(Accelerator):
    """An accelerator that keeps losses in place of running a backward pass."""

    def __init__(self, losses: list[Tensor]) -> None:
        super().__init__()
        self.backward = losses.append

    def print(self, *_: Any) -> None:
        pass

    def unwrap_model(self, model: Any) -> Any:
        return SimpleNamespace(value_model=None)

    def accumulate(self, _: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def train(step: Step, **settings: Any) -> Step:
    """Run one step of training with these settings of `PPOConfig`, and return it."""
    rows, width = step.mask.shape
    sizes = ("batch_size", "local_batch_size", "local_mini_batch_size", "total_episodes")
    args = defaults(PPOConfig)
    vars(args).update(dict.fromkeys(sizes, rows))
    args.per_device_train_batch_size = args.local_rollout_forward_batch_size = rows
    args.num_total_batches = args.num_ppo_epochs = args.num_mini_batches = 1
    args.gradient_accumulation_steps, args.num_sample_generations = 1, 0
    args.logging_steps = args.eval_steps = args.save_steps = None
    args.response_length, args.temperature = width, 1.0
    vars(args).update(settings)
    own = SimpleNamespace(
        args=args,
        accelerator=TrainAccelerator(step.losses),
        optimizer=Everything(),
        model=Model(),
        ref_model="reference",
        reward_model=None,
        processing_class=SimpleNamespace(pad_token_id=PAD, eos_token_id=1),
        dataloader=[{"input_ids": torch.arange(rows)[:, None] + FIRST_ROW}],
        state=SimpleNamespace(episode=0),
        train_dataset_len=rows,
        callback_handler=Everything(),
        control=Everything(),
        is_deepspeed_enabled=False,
        stop_token_id=None,
        lr_scheduler=Everything(),
        log=lambda *_: None,
        _metrics=Metrics(),
    )
    with step.patched():
        PPOTrainer.train(own)
    return step


class TrlPpo(Library):
    name = "trl-ppo"
    states: ClassVar[Mapping[str, str]] = {
        conventions.AFTER_THE_END: "PPOTrainer.train, a comment at padding_mask_p1",
        conventions.ONE_FURTHER: "PPOTrainer.train, a comment at padding_mask_p1",
        conventions.SAMPLE_DEVIATION: "masked_var(unbiased=True)",
    }

    def __init__(self) -> None:
        self.version = trl.__version__

    def whiten(self, x: Tensor, mask: Tensor) -> Tensor:
        return ppo_trainer.masked_whiten(x, mask)

    def token_rewards(
        self, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float
    ) -> Tensor:
        """The rewards are what is handed to their whitening."""
        step = Step.of(mask, old=logprobs, reference=ref_logprobs, scores=scores)
        return train(step, kl_coef=beta, whiten_rewards=True).whitened[0]

    def gae(
        self, rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        """The rewards are those of a KL, of log-probs 0. Advantages are what is handed to their
        whitening; returns are read off the gradient (0 − G) / n of the value loss."""
        new_values = torch.zeros(mask.shape, requires_grad=True)
        step = Step.of(mask, reference=rewards, values=values, new_values=new_values)
        settings = {"gamma": gamma, "lam": lam, "kl_coef": 1.0}
        train(step, **settings, cliprange_value=1e9, vf_coef=1.0)
        (gradient,) = torch.autograd.grad(step.losses[0], new_values)
        count = (mask.sum(dim=1) + 1).clamp(max=mask.shape[1]).sum()
        return step.whitened[0], -gradient * count

    def policy_loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        low: float,
        high: float,
    ) -> Tensor:
        if low != high:
            raise NotOffered("one cliprange for both sides")
        step = Step.of(mask, old=old_logprobs, new=logprobs, advantages=advantages)
        return train(step, cliprange=low, vf_coef=0.0, kl_coef=0.0).losses[0]

    def value_loss(
        self, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
    ) -> Tensor:
        """With γ = 0 returns are the rewards."""
        step = Step.of(mask, reference=returns, values=old_values, new_values=values)
        step.advantages = torch.zeros(mask.shape)
        settings = {"gamma": 0.0, "kl_coef": 1.0, "vf_coef": 1.0}
        return train(step, **settings, cliprange_value=clip).losses[0]
