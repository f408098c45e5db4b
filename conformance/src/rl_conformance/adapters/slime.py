"""slime: its loss for Megatron, its advantages and its rewards of groups, from a checkout.

It takes responses without padding, so padding is cut off before its functions are called.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from rl_conformance import conventions
from rl_conformance.adapters.unpadded import padded, unpadded
from rl_conformance.checkout import Checkout, FromCheckout
from rl_conformance.library import NotOffered

PPO, WHITEN = "slime.utils.ppo_utils", "slime.utils.distributed_utils"
LOSS, CONTEXT = "slime.backends.megatron_utils.loss", "slime.backends.megatron_utils.cp_utils"
ROLLOUT = "slime.ray.rollout"
ONE_PROCESS = SimpleNamespace(
    is_pipeline_last_stage=lambda: True,
    get_context_parallel_group=lambda: None,
    get_context_parallel_rank=lambda: 0,
    get_context_parallel_world_size=lambda: 1,
    get_data_parallel_group=lambda **_: None,
    get_data_parallel_world_size=lambda **_: 1,
)
"""What it asks Megatron for."""
DEFAULTS = {
    "advantage_estimator": "grpo",
    "allgather_cp": False,
    "calculate_per_token_loss": True,
    "custom_advantage_function_path": None,
    "entropy_coef": 0.0,
    "eps_clip": 0.2,
    "eps_clip_c": None,
    "eps_clip_high": 0.2,
    "gamma": 1.0,
    "get_mismatch_metrics": False,
    "grpo_std_normalization": True,
    "kl_coef": 0.0,
    "kl_loss_type": "k1",
    "lambd": 1.0,
    "loss_type": "policy_loss",
    "normalize_advantages": False,
    "recompute_loss_function": False,
    "rewards_normalization": True,
    "use_kl_loss": False,
    "use_opd": False,
    "use_opsm": False,
    "use_rollout_logprobs": False,
    "use_tis": False,
    "use_unbiased_kl": False,
}
"""The defaults of its arguments, but for the mean, which is that of tokens here."""


class Slime(FromCheckout):
    name = "slime"
    repository = "THUDM/slime"
    states: ClassVar[Mapping[str, str]] = {
        conventions.epsilon(1e-6): "RolloutManager._post_process_rewards",
        conventions.SAMPLE_DEVIATION: "distributed_masked_whiten, a comment",
        conventions.WITHOUT_HALF: "value_loss_function, docstring",
        conventions.AS_K1: "--kl-loss-type; --use-unbiased-kl has the ratio",
    }

    def opened(self, folder: Path) -> Checkout:
        given = {"megatron.core.mpu": ONE_PROCESS}
        return Checkout(folder, (PPO, WHITEN, LOSS, CONTEXT, ROLLOUT), given=given)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.ppo, self.losses = self.checkout.module(PPO), self.checkout.module(LOSS)
        self.whitening, self.rollout = self.checkout.module(WHITEN), self.checkout.module(ROLLOUT)
        self.whitening.dist = SimpleNamespace(all_reduce=lambda *_, **__: None)

    def token_logprobs(self, logits: Tensor, ids: Tensor) -> Tensor:
        flat = logits.flatten(end_dim=-2), ids.flatten()
        return self.ppo.calculate_log_probs_and_entropy(*flat, None)[0].reshape(ids.shape)

    def k1(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return self.ppo.compute_approx_kl(logprobs, ref_logprobs, "k1")

    def k2(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return self.ppo.compute_approx_kl(logprobs, ref_logprobs, "k2")

    def k3(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return self.ppo.compute_approx_kl(logprobs, ref_logprobs, "k3")

    def kl_loss(self, logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        """By the default of `--kl-loss-type`."""
        kind = DEFAULTS["kl_loss_type"]
        return self.ppo.compute_approx_kl(logprobs, ref_logprobs, kind)

    # --- advantages ---

    def _advantages(
        self, mask: Tensor, scores: Tensor | None = None, **given: Any
    ) -> tuple[Tensor, Tensor]:
        """Return what `compute_advantages_and_returns` gives, at the places of the responses. What
        is given as tables [B T] is data, the rest are arguments."""
        rows = {k: unpadded(v, mask) for k, v in given.items() if isinstance(v, Tensor)}
        arguments = {k: v for k, v in given.items() if not isinstance(v, Tensor)}
        own = unpadded(mask.float(), mask)
        lengths = [len(row) for row in own]
        data: dict[str, Any] = {
            "rewards": [0.0] * len(mask) if scores is None else scores.tolist(),
            "response_lengths": lengths,
            "total_lengths": lengths,
            "loss_masks": own,
            **rows,
        }
        self.losses.compute_advantages_and_returns(SimpleNamespace(**DEFAULTS | arguments), data)
        return padded(data["advantages"], mask), padded(data["returns"], mask)

    def token_rewards(
        self, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float
    ) -> Tensor:
        """Differences of returns: its function for PPO makes the rewards and returns the GAE, which
        with γ = λ = 1 and values of 0 is their sum from each token on."""
        sums, _ = self._advantages(
            mask,
            scores,
            log_probs=logprobs,
            ref_log_probs=ref_logprobs,
            values=torch.zeros(mask.shape),
            advantage_estimator="ppo",
            kl_coef=beta,
        )
        return sums - torch.nn.functional.pad(sums, (0, 1))[:, 1:]

    def gae(
        self, rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        own = unpadded(values, mask), unpadded(rewards, mask)
        lengths = [len(row) for row in own[0]]
        function = self.ppo.get_advantages_and_returns_batch
        advantages, returns = function(lengths, lengths, *own, gamma, lam)
        return padded(advantages, mask), padded(returns, mask)

    def _of_rewards(self, rewards: Tensor, mask: Tensor, gamma: float, is_normal: bool) -> Tensor:
        """Return the advantages of REINFORCE++. The rewards are given as those of a KL."""
        return self._advantages(
            mask,
            log_probs=-rewards,
            ref_log_probs=torch.zeros(rewards.shape),
            advantage_estimator="reinforce_plus_plus",
            kl_coef=1.0,
            gamma=gamma,
            normalize_advantages=is_normal,
        )[0]

    def returns(self, rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
        return self._of_rewards(rewards, mask, gamma, False)

    def reinforce_pp(self, rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
        return self._of_rewards(rewards, mask, gamma, True)

    def whiten(self, x: Tensor, mask: Tensor) -> Tensor:
        flat = torch.cat(unpadded(x, mask)), torch.cat(unpadded(mask.float(), mask))
        whitened = self.whitening.distributed_masked_whiten(*flat)
        return padded(whitened.split([len(row) for row in unpadded(x, mask)]), mask)

    def _of_groups(self, scores: Tensor, groups: Tensor, is_scaled: bool) -> Tensor:
        """Groups of one are not scaled: its arguments see to that."""
        sizes = groups.unique_consecutive(return_counts=True)[1]
        if (sizes != sizes[0]).any():
            raise NotOffered("groups of unequal size")
        counts = {"n_samples_per_prompt": int(sizes[0]), "rollout_batch_size": len(sizes)}
        is_scaled = is_scaled and int(sizes[0]) > 1
        settings = SimpleNamespace(**DEFAULTS | counts | {"grpo_std_normalization": is_scaled})
        manager = SimpleNamespace(args=settings, custom_reward_post_process_func=None)
        samples = [
            SimpleNamespace(get_reward_value=lambda _, score=score: score)
            for score in scores.tolist()
        ]
        done = self.rollout.RolloutManager._post_process_rewards(manager, samples)
        return torch.tensor(done[1])

    def grpo(self, scores: Tensor, groups: Tensor) -> Tensor:
        return self._of_groups(scores, groups, True)

    def dr_grpo(self, scores: Tensor, groups: Tensor) -> Tensor:
        return self._of_groups(scores, groups, False)

    # --- losses ---

    def _loss(self, outputs: str, table: Tensor, mask: Tensor, **given: Any) -> Tensor:
        """Return its loss as Megatron averages it. `outputs` names what its forward pass gives
        (log-probs or values), which is the table."""
        rows = {k: unpadded(v, mask) for k, v in given.items() if isinstance(v, Tensor)}
        settings = {k: v for k, v in given.items() if not isinstance(v, Tensor)}
        own, current = unpadded(mask.float(), mask), unpadded(table, mask)
        lengths = [len(row) for row in own]
        batch = {
            "unconcat_tokens": None,
            "response_lengths": lengths,
            "total_lengths": lengths,
            "loss_masks": own,
            "rollout_mask_sums": [row.sum() for row in own],
            **rows,
        }
        forward = {outputs: current, "entropy": [torch.zeros(n) for n in lengths]}
        self.losses.get_log_probs_and_entropy = lambda *_, **__: (None, forward)
        self.losses.get_rollout_top_p_logprob_kwargs = lambda *_: {}
        self.losses.get_values = lambda *_, **__: (None, forward)
        arguments = SimpleNamespace(**DEFAULTS | settings)
        loss, count, _ = self.losses.loss_function(arguments, batch, 1, len(mask), table)
        return loss / count

    def _policy_loss(self, tokens: Sequence[Tensor], **settings: Any) -> Tensor:
        logprobs, old, advantages, mask = tokens
        tables = {"log_probs": old, "advantages": advantages}
        return self._loss("log_probs", logprobs, mask, **tables, **settings)

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
        return self._policy_loss(tokens, eps_clip=low, eps_clip_high=high)

    def dual_clip_loss(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cap: float
    ) -> Tensor:
        return self._policy_loss((logprobs, old_logprobs, advantages, mask), eps_clip_c=cap)

    def cispo_loss(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cap: float
    ) -> Tensor:
        settings = {"advantage_estimator": "cispo", "eps_clip": 1.0, "eps_clip_high": cap - 1}
        return self._policy_loss((logprobs, old_logprobs, advantages, mask), **settings)

    def gspo_loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        low: float,
        high: float,
    ) -> Tensor:
        """With its default mean, that of responses."""
        settings = {"advantage_estimator": "gspo", "calculate_per_token_loss": False}
        tokens = (logprobs, old_logprobs, advantages, mask)
        return self._policy_loss(tokens, **settings, eps_clip=low, eps_clip_high=high)

    def value_loss(
        self, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
    ) -> Tensor:
        tables = {"values": old_values, "returns": returns}
        settings = {"loss_type": "value_loss", "value_clip": clip}
        return self._loss("values", values, mask, **tables, **settings)

    def _mean(self, loss: Tensor, mask: Tensor, per_token: bool) -> Tensor:
        zeros = torch.zeros(loss.shape)
        return self._policy_loss((zeros, zeros, -loss, mask), calculate_per_token_loss=per_token)

    def token_mean(self, loss: Tensor, mask: Tensor) -> Tensor:
        return self._mean(loss, mask, True)

    def sequence_mean(self, loss: Tensor, mask: Tensor) -> Tensor:
        return self._mean(loss, mask, False)
