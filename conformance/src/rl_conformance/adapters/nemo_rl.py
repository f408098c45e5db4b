"""NeMo-RL: its loss functions and advantage estimators, from a checkout."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from rl_conformance import conventions
from rl_conformance.checkout import Checkout, FromCheckout
from rl_conformance.library import Pairs

UTILS = "nemo_rl.algorithms.utils"
ESTIMATORS = "nemo_rl.algorithms.advantage_estimator"
LOSSES = "nemo_rl.algorithms.loss.loss_functions"
INTERFACES = "nemo_rl.algorithms.loss.interfaces"
SAME = SimpleNamespace(
    use_kl_in_reward=True, reference_policy_kl_penalty=0.0, reference_policy_kl_type="k1"
)


def config(kind: type, **more: Any) -> SimpleNamespace:
    """Return the defaults of a config's fields, with changes."""
    fields = {name: getattr(kind, name) for name in kind.__annotations__}
    return SimpleNamespace(**fields | more)


def shifted(table: Tensor) -> Tensor:
    """Return a table [B T] with a column of 0 before it: what is of a token is one place behind
    what is said of it."""
    return torch.nn.functional.pad(table, (1, 0))


class NeMoRL(FromCheckout):
    name = "nemo-rl"
    repository = "NVIDIA-NeMo/RL"
    states: ClassVar[Mapping[str, str]] = {
        conventions.epsilon(1e-6): "GRPOAdvantageEstimator, epsilon",
        conventions.SAMPLE_DEVIATION: "masked_var(unbiased=True)",
        conventions.CUT_AT_10: "ClippedPGLossConfig.kl_output_clamp_value",
        conventions.WITHOUT_RATIO: "ClippedPGLossConfig.use_on_policy_kl_approximation",
    }

    def opened(self, folder: Path) -> Checkout:
        return Checkout(folder, (UTILS, ESTIMATORS, LOSSES, INTERFACES))

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.utils, self.losses = self.checkout.module(UTILS), self.checkout.module(LOSSES)
        self.estimators = self.checkout.module(ESTIMATORS)

    def k1(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return self.utils.calculate_kl(logprobs, ref_logprobs, "k1")

    def k2(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return self.utils.calculate_kl(logprobs, ref_logprobs, "k2")

    def k3(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return self.utils.calculate_kl(logprobs, ref_logprobs, "k3")

    # --- advantages ---

    def _gae(self, gamma: float = 1.0, lam: float = 1.0, **more: Any) -> Any:
        settings = {
            "gae_lambda": lam,
            "gae_gamma": gamma,
            "normalize_advantages": False,
            "gae_lambda_value": None,
            "gae_lambda_policy": None,
            "length_adaptive_alpha": 0,
        }
        loss = SimpleNamespace(**vars(SAME) | more)
        return self.estimators.GeneralizedAdvantageEstimator(settings, loss)

    def token_rewards(
        self, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float
    ) -> Tensor:
        own = self._gae(reference_policy_kl_penalty=beta)
        return own._build_token_level_rewards(scores, mask.float(), logprobs, ref_logprobs)

    def gae(
        self, rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        return self._gae(gamma, lam)._compute_gae(rewards, values, mask.float())

    def whiten(self, x: Tensor, mask: Tensor) -> Tensor:
        return self._gae()._reward_whiten(x, mask.float())

    def _of_groups(self, scores: Tensor, groups: Tensor, **settings: bool) -> Tensor:
        kind = self.estimators.GRPOAdvantageEstimator
        own = kind(SimpleNamespace(**settings), SAME)
        return own.compute_advantage(groups[:, None], scores, torch.ones(len(scores), 1))[:, 0]

    def grpo(self, scores: Tensor, groups: Tensor) -> Tensor:
        settings = {"use_leave_one_out_baseline": False, "normalize_rewards": True}
        return self._of_groups(scores, groups, **settings)

    def dr_grpo(self, scores: Tensor, groups: Tensor) -> Tensor:
        settings = {"use_leave_one_out_baseline": False, "normalize_rewards": False}
        return self._of_groups(scores, groups, **settings)

    def rloo(self, scores: Tensor, groups: Tensor) -> Tensor:
        settings = {"use_leave_one_out_baseline": True, "normalize_rewards": False}
        return self._of_groups(scores, groups, **settings)

    # --- losses ---

    def _loss(
        self,
        tokens: Sequence[Tensor],
        reference: Tensor | None = None,
        count: Tensor | None = None,
        **settings: Any,
    ) -> Tensor:
        """Return the loss, without a KL where there is no reference, and with the number of tokens
        of all micro-batches if it is given."""
        logprobs, old, advantages, mask = tokens
        penalty = 0.0 if reference is None else 1.0
        own = config(
            self.losses.ClippedPGLossConfig, reference_policy_kl_penalty=penalty, **settings
        )
        data = {
            "token_mask": shifted(mask.float()),
            "sample_mask": torch.ones(len(mask)),
            "advantages": shifted(advantages),
            "prev_logprobs": shifted(old),
            "generation_logprobs": shifted(old),
        }
        if reference is not None:
            data["reference_policy_logprobs"] = shifted(reference)
        total = mask.sum() if count is None else count
        loss = self.losses.ClippedPGLossFn(own)
        return loss(logprobs, data, torch.tensor(len(mask)), total)[0]

    def kl_loss(self, logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        """One token at a time, because the loss is a mean."""
        one, zero = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1)
        tables = (logprobs, old_logprobs, ref_logprobs)
        flat = zip(*(table.flatten() for table in tables), strict=True)
        terms = [
            self._loss((p[None, None], o[None, None], zero, one), r[None, None]) for p, o, r in flat
        ]
        return torch.stack(terms).reshape(logprobs.shape)

    def policy_loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        low: float,
        high: float,
    ) -> Tensor:
        tokens = (logprobs, old_logprobs, advantages, mask)
        return self._loss(tokens, ratio_clip_min=low, ratio_clip_max=high)

    def dual_clip_loss(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cap: float
    ) -> Tensor:
        return self._loss((logprobs, old_logprobs, advantages, mask), ratio_clip_c=cap)

    def cispo_loss(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cap: float
    ) -> Tensor:
        settings: dict[str, Any] = {"ratio_clip_min": 1.0, "ratio_clip_max": cap - 1}
        return self._loss((logprobs, old_logprobs, advantages, mask), use_cispo=True, **settings)

    def gspo_loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        low: float,
        high: float,
    ) -> Tensor:
        settings: dict[str, Any] = {"ratio_clip_min": low, "ratio_clip_max": high}
        settings |= {"sequence_level_importance_ratios": True, "token_level_loss": False}
        tokens = (logprobs, old_logprobs, advantages, mask)
        return self._loss(tokens, **settings)

    def value_loss(
        self, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
    ) -> Tensor:
        own = config(self.losses.MseValueLossConfig, cliprange=clip)
        data = {"token_mask": mask.float(), "sample_mask": torch.ones(len(mask))}
        data |= {"returns": returns, "values": old_values}
        loss = self.losses.MseValueLossFn(own)
        return loss(values, data, torch.tensor(len(mask)), mask.sum())[0]

    def _mean(self, loss: Tensor, mask: Tensor, **more: Any) -> Tensor:
        zeros = torch.zeros(loss.shape)
        return self._loss((zeros, zeros, -loss, mask), **more)

    def token_mean(self, loss: Tensor, mask: Tensor) -> Tensor:
        return self._mean(loss, mask)

    def sequence_mean(self, loss: Tensor, mask: Tensor) -> Tensor:
        return self._mean(loss, mask, token_level_loss=False)

    def over_micro_batches(self, losses: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        total = torch.stack([mask.sum() for mask in masks]).sum()
        pieces = zip(losses, masks, strict=True)
        return torch.stack([self._mean(*each, count=total) for each in pieces]).sum()

    # --- comparisons ---

    def dpo(self, pairs: Pairs, beta: float) -> Tensor:
        """A response is one token that has its sum of log-probs; chosen and rejected alternate."""
        both = torch.stack([pairs.chosen, pairs.rejected], dim=1).flatten()[:, None]
        reference = torch.stack([pairs.ref_chosen, pairs.ref_rejected], dim=1).flatten()[:, None]
        own = config(self.losses.DPOLossConfig, reference_policy_kl_penalty=beta)
        data = {
            "token_mask": torch.ones(len(both), 2),
            "sample_mask": torch.ones(len(both)),
            "reference_policy_logprobs": torch.nn.functional.pad(reference, (0, 1)),
        }
        return self.losses.DPOLossFn(own)(both, data, torch.tensor(len(both)), None)[0]

    def bradley_terry(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        scores = torch.stack([chosen, rejected], dim=1).reshape(-1, 1)
        data = {"sample_mask": torch.ones(len(scores))}
        loss = self.losses.PreferenceLossFn()
        return loss(scores, data, torch.tensor(len(scores)), None)[0]
