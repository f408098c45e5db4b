"""TRL: its functions, and the loss and advantage methods of its trainers."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import trl
from torch import Tensor
from trl.trainer import dpo_trainer, grpo_trainer, kto_trainer, reward_trainer, rloo_trainer

from rl_conformance import conventions
from rl_conformance.adapters.stand_in import (
    Accelerator,
    Metrics,
    Model,
    defaults,
    sums_as_outputs,
)
from rl_conformance.library import Library, NotOffered, Pairs


def trainer(config: type, **more: Any) -> SimpleNamespace:
    """Return a stand-in for a trainer: the fields of its config and what the methods read."""
    args = defaults(config)
    args.steps_per_generation, args.gradient_accumulation_steps = 1, 1
    args.gradient_checkpointing_kwargs = None
    values = vars(args) | {
        "args": args,
        "model": Model(),
        "ref_model": Model(),
        "accelerator": Accelerator(),
        "aux_loss_enabled": False,
        "_metrics": Metrics(),
        "_entropy_bonus_enabled": False,
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "current_gradient_accumulation_steps": 1,
    }
    return SimpleNamespace(**values | more)


def of_responses(advantages: Tensor, mask: Tensor) -> Tensor:
    """Return the one advantage of each response [B], as the trainer has it."""
    return torch.stack([row[own][0] for row, own in zip(advantages, mask, strict=True)])


class Trl(Library):
    name = "trl"
    states: ClassVar[Mapping[str, str]] = {
        conventions.epsilon(1e-4): "GRPOTrainer, advantages",
        conventions.PER_TOKEN: "DPOTrainer, a comment at ipo",
    }

    def __init__(self) -> None:
        self.version = trl.__version__

    # --- GRPO's trainer ---

    def _grpo_loss(
        self, tokens: Sequence[Tensor], reference: Tensor | None = None, **more: Any
    ) -> Tensor:
        logprobs, old, advantages, mask = tokens
        own = trainer(grpo_trainer.GRPOConfig, **{"epsilon_low": 0.2, "epsilon_high": 0.2} | more)
        vars(own.args).update({k: v for k, v in more.items() if hasattr(own.args, k)})
        outputs = (logprobs, torch.zeros(logprobs.shape), None)
        own._get_per_token_logps_and_entropies = lambda *_, **__: outputs
        ids = torch.zeros(mask.shape, dtype=torch.long)
        inputs = {
            "prompt_ids": ids[:, :1],
            "prompt_mask": ids[:, :1] + 1,
            "completion_ids": ids,
            "completion_mask": mask.long(),
            "advantages": advantages,
            "old_per_token_logps": old,
            "ref_per_token_logps": reference,
            "num_items_in_batch": more.get("num_items_in_batch", mask.sum()),
        }
        return grpo_trainer.GRPOTrainer._compute_loss(own, own.model, inputs)

    def policy_loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        low: float,
        high: float,
    ) -> Tensor:
        """By the default loss, "dapo"; advantages may be [B T] there."""
        tokens = (logprobs, old_logprobs, advantages, mask)
        return self._grpo_loss(tokens, epsilon_low=low, epsilon_high=high, beta=0.0)

    def dual_clip_loss(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cap: float
    ) -> Tensor:
        return self._grpo_loss((logprobs, old_logprobs, advantages, mask), delta=cap, beta=0.0)

    def cispo_loss(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cap: float
    ) -> Tensor:
        tokens = (logprobs, old_logprobs, advantages, mask)
        return self._grpo_loss(tokens, loss_type="cispo", epsilon_high=cap, beta=0.0)

    def gspo_loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        low: float,
        high: float,
    ) -> Tensor:
        return self._grpo_loss(
            (logprobs, old_logprobs, of_responses(advantages, mask), mask),
            loss_type="grpo",
            importance_sampling_level="sequence",
            epsilon_low=low,
            epsilon_high=high,
            beta=0.0,
        )

    def _mean(self, loss: Tensor, mask: Tensor, **more: Any) -> Tensor:
        zeros = torch.zeros(loss.shape)
        return self._grpo_loss((zeros, zeros, -loss, mask), beta=0.0, **more)

    def token_mean(self, loss: Tensor, mask: Tensor) -> Tensor:
        return self._mean(loss, mask, loss_type="dapo")

    def sequence_mean(self, loss: Tensor, mask: Tensor) -> Tensor:
        return self._mean(loss, mask, loss_type="grpo")

    def fixed_length_mean(self, loss: Tensor, mask: Tensor, length: int) -> Tensor:
        return self._mean(loss, mask, loss_type="dr_grpo", max_completion_length=length)

    def over_micro_batches(self, losses: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        total, count = sum(mask.sum() for mask in masks), len(masks)
        shared = {
            "loss_type": "dapo",
            "num_items_in_batch": total,
            "current_gradient_accumulation_steps": count,
            "steps_per_generation": count,
        }
        pieces = zip(losses, masks, strict=True)
        return torch.stack([self._mean(loss, mask, **shared) for loss, mask in pieces]).sum()

    def over_ranks(self, losses: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        total = sum(mask.sum() for mask in masks)
        shared = {
            "loss_type": "dapo",
            "num_items_in_batch": total,
            "accelerator": Accelerator(len(masks)),
        }
        pieces = zip(losses, masks, strict=True)
        return torch.stack([self._mean(loss, mask, **shared) for loss, mask in pieces]).mean()

    def _kl(self, logprobs: Tensor, old: Tensor, reference: Tensor, **more: Any) -> Tensor:
        """Return the KL term, one token at a time because the trainer returns means."""
        one, zero = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1)
        flat = zip(logprobs.flatten(), old.flatten(), reference.flatten(), strict=True)
        terms = [
            self._grpo_loss((p[None, None], o[None, None], zero, one), r[None, None], **more)
            for p, o, r in flat
        ]
        return torch.stack(terms).reshape(logprobs.shape)

    def kl_loss(self, logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return self._kl(logprobs, old_logprobs, ref_logprobs, beta=1.0)

    def k3(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        more = {"beta": 1.0, "use_bias_correction_kl": False}
        return self._kl(logprobs, logprobs.detach(), ref_logprobs, **more)

    # --- advantages ---

    def _advantages(self, module: Any, scores: Tensor, groups: Tensor, **more: Any) -> Tensor:
        sizes = groups.unique_consecutive(return_counts=True)[1]
        if (sizes != sizes[0]).any():
            raise NotOffered("groups of unequal size")
        count, ids = len(scores), [[1]] * len(scores)
        config = getattr(module, "GRPOConfig", None) or module.RLOOConfig
        own = trainer(
            config,
            num_generations=int(sizes[0]),
            environment_factories=None,
            environments=None,
            tools=None,
            use_vllm=False,
            pad_to_multiple_of=None,
            mask_truncated_completions=False,
            num_iterations=1,
            beta=0.0,
            _tokenizer=SimpleNamespace(pad_token_id=0, eos_token_id=1),
            processing_class=SimpleNamespace(batch_decode=lambda *_, **__: [""] * count),
            eos_token_ids=[1],
            reward_weights=torch.ones(1),
            reward_funcs=[None],
            reward_func_names=["score"],
            _logs={
                **{name: [] for name in ("prompt", "completion", "advantages", "images")},
                "rewards": {"score": []},
                "extra": {},
            },
            _pending_extra_logs={},
            _pending_metrics={},
            _is_vlm=False,
            **more,
        )
        own._calculate_rewards = lambda *_: scores.clone()[:, None]
        zeros = torch.zeros(count, 1)
        own._get_per_token_logps_and_entropies = lambda *_, **__: (zeros, zeros, None)
        of_grpo: tuple[Any, ...] = (ids, ids, None, [""] * count, None, {}, None, None)
        of_rloo = (ids, ids, [""] * count)
        own._generate = lambda *_: of_grpo if module is grpo_trainer else of_rloo
        kind = grpo_trainer.GRPOTrainer if module is grpo_trainer else rloo_trainer.RLOOTrainer
        rows = [{"prompt": ""} for _ in range(count)]
        return kind._generate_and_score_completions(own, rows)["advantages"]

    def grpo(self, scores: Tensor, groups: Tensor) -> Tensor:
        return self._advantages(grpo_trainer, scores, groups, scale_rewards="group")

    def dr_grpo(self, scores: Tensor, groups: Tensor) -> Tensor:
        return self._advantages(grpo_trainer, scores, groups, scale_rewards="none")

    def rloo(self, scores: Tensor, groups: Tensor) -> Tensor:
        return self._advantages(rloo_trainer, scores, groups)

    def token_logprobs(self, logits: Tensor, ids: Tensor) -> Tensor:
        return trl.trainer.utils.selective_log_softmax(logits, ids)

    # --- comparisons ---

    def _preference(self, pairs: Pairs, module: Any, config: type, **more: Any) -> Tensor:
        tokens = torch.cat([pairs.chosen_tokens, pairs.rejected_tokens])
        columns = torch.arange(int(tokens.max()) + 1)
        mask = ((columns > 0) & (columns <= tokens[:, None])).long()
        sums = torch.cat([pairs.chosen, pairs.rejected])
        reference = torch.cat([pairs.ref_chosen, pairs.ref_rejected])
        ids = torch.zeros(mask.shape, dtype=torch.long)
        model = Model(sums_as_outputs(sums, tokens, mask))
        own = trainer(
            config,
            model=model,
            ref_model=Model(sums_as_outputs(reference, tokens, mask)),
            precompute_ref_logps=False,
            use_weighting=False,
            **more,
        )
        inputs = {"input_ids": ids, "attention_mask": ids + 1, "completion_mask": mask}
        count = len(pairs.chosen)
        if module is kto_trainer:
            inputs["label"] = torch.tensor([True] * count + [False] * count)
            return kto_trainer.KTOTrainer._compute_loss(own, model, inputs, False)
        return dpo_trainer.DPOTrainer._compute_loss(own, model, inputs, False)

    def _dpo(self, pairs: Pairs, kind: str, beta: float) -> Tensor:
        more = {"beta": beta, "loss_types": [kind], "loss_weights": [1.0], "ld_alpha": None}
        return self._preference(pairs, dpo_trainer, dpo_trainer.DPOConfig, **more)

    def dpo(self, pairs: Pairs, beta: float) -> Tensor:
        return self._dpo(pairs, "sigmoid", beta)

    def ipo(self, pairs: Pairs, beta: float) -> Tensor:
        return self._dpo(pairs, "ipo", beta)

    def kto(self, pairs: Pairs, kl: float, beta: float) -> Tensor:
        measured = iter((torch.tensor([kl]), torch.tensor([0.0])))
        more = {
            "beta": beta,
            "loss_type": "kto",
            "calculate_KL": True,
            "_compute_kl_logps": lambda *_: next(measured),
        }
        return self._preference(pairs, kto_trainer, kto_trainer.KTOConfig, **more)

    def simpo(self, pairs: Pairs, beta: float, gamma: float) -> Tensor:
        from trl.experimental.cpo import cpo_trainer

        own = trainer(cpo_trainer.CPOConfig, loss_type="simpo", beta=beta, simpo_gamma=gamma)
        own.alpha = 0.0
        means = (pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens)
        return cpo_trainer.CPOTrainer.cpo_loss(own, *means)[0].mean()

    def bradley_terry(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        outputs = SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None])
        own = trainer(reward_trainer.RewardConfig)
        own.args.center_rewards_coefficient = None
        inputs = {"attention_mask": torch.ones(len(outputs.logits), 1, dtype=torch.long)}
        return reward_trainer.RewardTrainer.compute_loss(own, Model(outputs), inputs)
