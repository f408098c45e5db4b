"""Small repositories in the shape of those that adapters are written for: the names and the order of
arguments are theirs, the formulas are written a second time, and what they import is not there."""

from pathlib import Path

CLIPPED = """
import torch

def clipped(ratio, advantages, low, high):
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)

def mean(x, mask):
    return torch.where(mask.bool(), x, 0).sum() / mask.sum()
"""

OPENRLHF = {
    "openrlhf/models/utils.py": """
import deepspeed
import torch

def compute_approx_kl(log_probs, log_probs_base, kl_estimator="k1"):
    d = log_probs - log_probs_base
    return {"k1": d, "k2": d * d / 2, "k3": torch.expm1(-d) + d}[kl_estimator]

def compute_reward(r, kl_coef, kl, action_mask=None):
    last = action_mask.shape[1] - 1 - action_mask.flip(1).long().argmax(1)
    return -kl_coef * kl + r[:, None] * torch.nn.functional.one_hot(last, kl.shape[1])

def log_probs_from_logits(logits, labels):
    try:
        import flash_attn
        raise AssertionError("flash_attn is missing for modules that do without it")
    except ImportError:
        return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
""",
    "openrlhf/models/loss.py": CLIPPED
    + """
from .utils import compute_approx_kl

class PolicyLoss(torch.nn.Module):
    def __init__(self, clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=None, policy_loss_type="ppo"):
        super().__init__()
        self.low, self.high = clip_eps_low, clip_eps_high

    def forward(self, log_probs, old_log_probs, advantages, action_mask=None):
        ratio = (log_probs - old_log_probs).exp()
        return mean(clipped(ratio, advantages, self.low, self.high), action_mask), None

class DPOLoss(torch.nn.Module):
    def __init__(self, beta, label_smoothing=0.0, ipo=False):
        super().__init__()
        self.beta = beta

    def forward(self, chosen, rejected, reference_chosen, reference_rejected):
        margin = chosen - rejected - (reference_chosen - reference_rejected)
        return -torch.nn.functional.logsigmoid(self.beta * margin).mean(), None, None

def aggregate_loss(loss, loss_mask, token_level_loss=True, dp_size=1, batch_num_tokens=None,
                   global_batch_size=None):
    if batch_num_tokens is None:
        return mean(loss, loss_mask)
    return (loss * loss_mask).sum() / batch_num_tokens * dp_size
""",
    "openrlhf/utils/loss_utils.py": """
def iter_grad_accum_global_norm(data_iter, strategy, accumulated_gradient, mask_fn):
    total = sum(mask_fn(each).sum() for each in data_iter)
    for each in data_iter:
        yield each, {"batch_num_tokens": total / accumulated_gradient}

def _optimizer_step_loss_norm(masks, dp_group, dp_size, gas):
    return {"dp_size": dp_size, "batch_num_tokens": sum(mask.sum() for mask in masks) / gas}
""",
    "openrlhf/trainer/ppo_utils/length_penalty.py": "",
    "openrlhf/trainer/ppo_utils/experience_maker.py": """
import ray
import torch
from openrlhf.models.utils import compute_reward
from openrlhf.trainer.ray.launcher import RayActorGroup
from openrlhf.utils.logging_utils import init_logger

logger = init_logger(__name__)

@ray.remote(num_gpus=1)
class Worker(RayActorGroup):
    pass

class RemoteExperienceMaker:
    def __init__(self, group: RayActorGroup | None):
        self.group = group

    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences):
        logger.debug("experiences: %s", len(experiences))
        (one,) = experiences
        arguments = self.strategy.args
        groups = one.rewards.reshape(-1, arguments.rollout.n_samples_per_prompt)
        centred = groups - groups.mean(1, keepdim=True)
        if self.advantage_estimator == "group_norm":
            centred = centred / groups.std(1, keepdim=True)
        reward = compute_reward(centred.flatten(), self.kl_ctl.value, one.kl, one.action_mask)
        gamma = arguments.algo.advantage.gamma
        one.advantages = self.get_cumulative_returns(reward, one.action_mask, gamma)
        return experiences

    def get_cumulative_returns(self, rewards, action_mask, gamma):
        total, returns = 0, []
        for column in reversed((rewards * action_mask).unbind(1)):
            total = column + gamma * total
            returns.insert(0, total)
        return torch.stack(returns, 1)

    def get_advantages_and_returns(self, values, rewards, action_mask, gamma, lambd):
        values, rewards = values * action_mask, rewards * action_mask
        following = torch.nn.functional.pad(values, (0, 1))[:, 1:]
        delta = rewards + gamma * following - values
        advantages = RemoteExperienceMaker.get_cumulative_returns(
            self, delta, action_mask, gamma * lambd)
        return advantages, advantages + values
""",
}

SLIME = {
    "slime/utils/ppo_utils.py": """
import torch

@torch.compile(dynamic=True)
def compute_approx_kl(log_probs, log_probs_base, kl_loss_type):
    d = log_probs - log_probs_base
    return {"k1": d, "k2": d * d / 2, "k3": torch.expm1(-d) + d}[kl_loss_type]

def calculate_log_probs_and_entropy(logits, tokens, tp_group):
    return logits.log_softmax(-1).gather(-1, tokens[:, None]), None

def discounted(row, gamma):
    total, sums = 0, []
    for x in reversed(row.unbind()):
        total = x + gamma * total
        sums.insert(0, total)
    return torch.stack(sums)

def get_advantages_and_returns_batch(total_lengths, response_lengths, values, rewards, gamma, lambd):
    rows = []
    for length, v, r in zip(response_lengths, values, rewards):
        assert len(v) == length
        delta = r + gamma * torch.cat([v[1:], torch.zeros(1)]) - v
        rows.append(discounted(delta, gamma * lambd))
    return rows, [a + v for a, v in zip(rows, values)]
""",
    "slime/utils/distributed_utils.py": """
import torch
import torch.distributed as dist

def distributed_masked_whiten(values, mask, process_group=None):
    sums = torch.stack([(values * mask).sum(), mask.sum()])
    dist.all_reduce(sums, group=process_group)
    centred = values - sums[0] / sums[1]
    return centred / ((centred**2 * mask).sum() / sums[1]).sqrt()
""",
    "slime/backends/megatron_utils/cp_utils.py": "from megatron.core import mpu\n",
    "slime/backends/megatron_utils/loss.py": CLIPPED
    + """
from megatron.core import mpu
from slime.utils.ppo_utils import compute_approx_kl, get_advantages_and_returns_batch
from .cp_utils import mpu as same

assert mpu is same

def get_values(logits):
    return mpu.unknown_to_the_adapter()

def compute_advantages_and_returns(args, rollout_data):
    assert mpu.is_pipeline_last_stage() and args.advantage_estimator == "ppo"
    rewards = []
    for score, p, q in zip(rollout_data["rewards"], rollout_data["log_probs"],
                           rollout_data["ref_log_probs"]):
        row = -args.kl_coef * compute_approx_kl(p, q, args.kl_loss_type)
        row[-1] += score
        rewards.append(row)
    rollout_data["advantages"], rollout_data["returns"] = get_advantages_and_returns_batch(
        rollout_data["total_lengths"], rollout_data["response_lengths"], rollout_data["values"],
        rewards, args.gamma, args.lambd)

def loss_function(args, batch, num_microbatches, step_global_batch_size, logits):
    _, outputs = get_log_probs_and_entropy(logits)
    log_ratio = torch.cat(outputs["log_probs"]) - torch.cat(batch["log_probs"])
    losses = clipped(log_ratio.exp(), torch.cat(batch["advantages"]), args.eps_clip,
                     args.eps_clip_high)
    masks = torch.cat(batch["loss_masks"])
    return (losses * masks).sum(), masks.sum(), {}
""",
    "slime/ray/rollout.py": """
import ray
import torch
from sglang.srt import constants

@ray.remote
class RolloutManager:
    def _post_process_rewards(self, samples):
        rewards = torch.tensor([each.get_reward_value(self.args) for each in samples])
        rewards = rewards.reshape(self.args.rollout_batch_size, self.args.n_samples_per_prompt)
        centred = rewards - rewards.mean(1, keepdim=True)
        if self.args.grpo_std_normalization:
            centred = centred / rewards.std(1, keepdim=True)
        return [], centred.flatten().tolist()
""",
}

NEMO_RL = {
    "nemo_rl/algorithms/utils.py": """
import torch
from transformers import AutoTokenizer
from nemo_rl.data.chat_templates import COMMON_CHAT_TEMPLATES

def calculate_kl(logprobs, logprobs_reference, kl_type="k3"):
    d = logprobs - logprobs_reference
    return {"k1": d, "k2": d * d / 2, "k3": torch.expm1(-d) + d}[kl_type]
""",
    "nemo_rl/algorithms/loss/interfaces.py": """
from typing import Any, Protocol

class LossFunction(Protocol):
    input_type: Any
""",
    "nemo_rl/algorithms/loss/loss_functions.py": CLIPPED
    + """
from pydantic import BaseModel
from nemo_rl.algorithms.loss.interfaces import LossFunction
from nemo_rl.algorithms.utils import calculate_kl

class ClippedPGLossConfig(BaseModel, extra="allow"):
    ratio_clip_min: float = 0.2
    ratio_clip_max: float = 0.2
    reference_policy_kl_penalty: float = 0.01

class ClippedPGLossFn(LossFunction):
    def __init__(self, cfg):
        self.cfg = cfg

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
        log_ratio = next_token_logprobs - data["prev_logprobs"][:, 1:]
        loss = clipped(log_ratio.exp(), data["advantages"][:, 1:], self.cfg.ratio_clip_min,
                       self.cfg.ratio_clip_max)
        if self.cfg.reference_policy_kl_penalty:
            reference = data["reference_policy_logprobs"][:, 1:]
            weight = (next_token_logprobs - next_token_logprobs.detach()).exp()
            loss = loss + weight * calculate_kl(next_token_logprobs, reference)
        return (loss * mask).sum() / global_valid_toks, {}

class DPOLossConfig(BaseModel, extra="allow"):
    reference_policy_kl_penalty: float = 0.05

class DPOLossFn(LossFunction):
    def __init__(self, cfg):
        self.beta = cfg.reference_policy_kl_penalty

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        ratios = (next_token_logprobs - data["reference_policy_logprobs"][:, :-1]).sum(1)
        margins = ratios[::2] - ratios[1::2]
        return -torch.nn.functional.logsigmoid(self.beta * margins).sum() / global_valid_seqs * 2, {}

class MseValueLossConfig(BaseModel, extra="forbid"):
    cliprange: float | None = None

class MseValueLossFn(LossFunction):
    def __init__(self, cfg):
        self.limit = cfg.cliprange

    def __call__(self, logits, data, global_valid_seqs, global_valid_toks):
        near = data["values"] + (logits - data["values"]).clamp(-self.limit, self.limit)
        worse = torch.maximum((logits - data["returns"])**2, (near - data["returns"])**2)
        return (worse * data["token_mask"]).sum() / global_valid_toks / 2, {}
""",
    "nemo_rl/algorithms/advantage_estimator.py": """
import torch
from nemo_rl.algorithms.utils import calculate_kl

class GRPOAdvantageEstimator:
    def __init__(self, estimator_config, loss_config):
        self.leave_one_out = estimator_config.use_leave_one_out_baseline
        self.normalize = estimator_config.normalize_rewards

    def compute_advantage(self, prompt_ids, rewards, mask):
        same = (prompt_ids == prompt_ids.T).float()
        others = same - torch.eye(len(rewards)) if self.leave_one_out else same
        centred = rewards - others @ rewards / others.sum(1)
        if self.normalize:
            variance = same @ rewards**2 / same.sum(1) - (same @ rewards / same.sum(1))**2
            centred = centred / (variance * same.sum(1) / (same.sum(1) - 1)).sqrt()
        return centred[:, None].expand(mask.shape)

class GeneralizedAdvantageEstimator:
    def __init__(self, estimator_config, loss_config):
        self.lam, self.gamma = estimator_config["gae_lambda"], estimator_config["gae_gamma"]
        self.coef = loss_config.reference_policy_kl_penalty

    def _build_token_level_rewards(self, rewards, mask, logprobs, reference_logprobs):
        last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
        own = -self.coef * calculate_kl(logprobs, reference_logprobs, "k1")
        return (own + rewards[:, None] * torch.nn.functional.one_hot(last, mask.shape[1])) * mask

    def _compute_gae(self, rewards, values, mask):
        following, total, advantages = 0, 0, []
        for t in reversed(range(mask.shape[1])):
            delta = rewards[:, t] + self.gamma * following - values[:, t]
            own = mask[:, t] > 0
            total = torch.where(own, delta + self.gamma * self.lam * total, total)
            following = torch.where(own, values[:, t], following)
            advantages.insert(0, total)
        advantages = torch.stack(advantages, 1)
        return advantages, advantages + values
""",
}

SKYRL = {
    "skyrl/backends/skyrl_train/utils/off_policy_correction_utils.py": "",
    "skyrl/backends/skyrl_train/utils/torch_utils.py": """
import torch
from jaxtyping import Float

try:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
    raise AssertionError("flash_attn is missing for modules that do without it")
except ImportError:
    pass

def logprobs_from_logits(logits: Float[torch.Tensor, "batch seq vocab"], labels):
    return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
""",
    "skyrl/backends/skyrl_train/utils/ppo_utils.py": CLIPPED
    + """
import numpy as np
import ray
from loguru import logger
from skyrl.backends.skyrl_train.utils.torch_utils import logprobs_from_logits
from skyrl.train.config import AlgorithmConfig

LOSSES = {}

def register(name):
    def decorator(function):
        if ray.is_initialized():
            raise AssertionError("there is no cluster")
        LOSSES[name] = function
        return function
    return decorator

def compute_approx_kl(log_probs, log_probs_base, loss_mask=None, kl_estimator_type="k3"):
    d = log_probs - log_probs_base
    return {"k1": d, "k2": d * d / 2, "k3": torch.expm1(-d) + d}[kl_estimator_type]

def compute_grpo_outcome_advantage(rewards, mask, index, grpo_norm_by_std=True):
    assert isinstance(index, np.ndarray)
    scores, own = rewards.sum(1), torch.zeros(len(index))
    for group in set(index.tolist()):
        rows = torch.from_numpy(index == group)
        own[rows] = scores[rows] - scores[rows].mean()
        if grpo_norm_by_std:
            own[rows] = own[rows] / scores[rows].std()
    logger.debug("%s groups", len(set(index.tolist())))
    return own[:, None] * mask, None

def apply_loss_reduction_to_advantages_minibatch(advantages, mask, reduction, micro, longest):
    assert micro == len(mask)
    counts = {"token_mean": mask.sum(), "sequence_mean": len(mask) * mask.sum(1, keepdim=True),
              "seq_mean_token_sum_norm": len(mask) * longest}
    return advantages / counts[reduction]

def reduce_loss(loss, mask):
    return (loss * mask).sum()

@register("regular")
def ppo_policy_loss(log_probs, old_log_probs, advantages, config: AlgorithmConfig, loss_mask=None):
    ratio = (log_probs - old_log_probs).exp()
    loss = clipped(ratio, advantages, config.eps_clip_low, config.eps_clip_high)
    return reduce_loss(loss, loss_mask), {}
""",
}

OPEN_INSTRUCT = {
    "open_instruct/rl_utils.py": """
import torch
from open_instruct import logger_utils, model_utils

logger = logger_utils.setup_logger(__name__)

def masked_mean(values, mask, axis=None, denominator=None):
    return (values * mask).sum() / (mask.sum() if denominator is None else denominator)
""",
    "open_instruct/model_utils.py": """
import deepspeed
import torch
from olmo_core.nn.attention import AttentionBackendName

NAMES = {AttentionBackendName.flash_2: "flash", AttentionBackendName.torch: "sdpa"}
assert len(NAMES) == 2

@torch.compile
def log_softmax_and_gather(logits, index):
    return logits.log_softmax(-1).gather(-1, index[..., None])[..., 0]

def estimate_kl(d, ratio):
    return torch.stack([d, d * d / 2, torch.expm1(-d) + d, ratio * d])
""",
    "open_instruct/grpo_utils.py": CLIPPED
    + """
import enum
from dataclasses import dataclass
import ray.util.queue as ray_queue
from open_instruct import model_utils, olmo_core_utils
from open_instruct.rl_utils import masked_mean

class GRPOLossType(enum.StrEnum):
    dapo = "dapo"
    cispo = "cispo"

@dataclass
class GRPOExperimentConfig(olmo_core_utils.ExperimentConfig, olmo_core_utils.LoggingConfig):
    queue: ray_queue.Queue | None = None

assert GRPOExperimentConfig(queue=None).queue is None

def compute_grpo_loss(new_logprobs, ratio, advantages, ref_logprobs, config, rho_weights):
    if config.loss_fn == GRPOLossType.dapo:
        loss = clipped(ratio, advantages, config.clip_lower, config.clip_higher)
    else:
        loss = -ratio.detach().clamp(max=1 + config.clip_higher) * advantages * new_logprobs
    if ref_logprobs is None:
        return loss * rho_weights, None, torch.zeros_like(loss)
    kl = model_utils.estimate_kl(new_logprobs - ref_logprobs, ratio)[config.kl_estimator]
    return loss * rho_weights, None, kl
""",
    "open_instruct/dpo_utils.py": """
from torch.nn.functional import logsigmoid

def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0):
    margin = beta * (chosen - rejected - (ref_chosen - ref_rejected))
    both = (1 - label_smoothing) * logsigmoid(margin) + label_smoothing * logsigmoid(-margin)
    return -both, None, None

def simpo_loss(chosen, rejected, beta, gamma_beta_ratio):
    return -logsigmoid(beta * (chosen - rejected - gamma_beta_ratio)), None, None
""",
}

PRIME_RL = {
    "src/prime_rl/trainer/rl/loss.py": """
import torch
from beartype import beartype as typechecker
from jaxtyping import Float, jaxtyped
from torch import Tensor
from prime_rl.configs.trainer import LossConfig

@jaxtyped(typechecker=typechecker)
@torch.compile(dynamic=True)
def selective_log_softmax(logits: Float[Tensor, "batch seq vocab"], index):
    return logits.log_softmax(-1).gather(-1, index[..., None])[..., 0]

def compute_loss(trainer_logprobs, inference_logprobs, ref_logprobs, advantages, loss_mask,
                 rl_weights, ce_weights, ref_kl_weights, rl_loss_fn, rl_scale, ce_scale,
                 ref_kl_scale):
    assert not any(row.any() for row in rl_weights) and ref_kl_weights is None
    rows = zip(trainer_logprobs, ce_weights)
    return sum((-row * weight).sum() for row, weight in rows) / ce_scale, {}
""",
    "src/prime_rl/orchestrator/algo/base.py": """
from __future__ import annotations
import verifiers.v1 as vf

def traces_of(episodes: list[vf.Episode]):
    return [each for own in episodes for each in own.traces if each.agent.trainable]

class Algorithm:
    pass
""",
    "src/prime_rl/orchestrator/algo/routing.py": """
def assign_advantages(trace, value):
    for node in trace.nodes:
        node.advantages = [value] * sum(node.mask)
""",
    "src/prime_rl/orchestrator/algo/grpo.py": """
from typing import TYPE_CHECKING
import torch
from prime_rl.orchestrator.algo.base import Algorithm, traces_of
from prime_rl.orchestrator.algo.routing import assign_advantages

if TYPE_CHECKING:
    from nowhere import Nothing

class GRPOAlgorithm(Algorithm):
    async def score_group(self, episodes):
        assert self.length_penalty is None
        traces = traces_of(episodes)
        mean = sum(each.reward for each in traces) / len(traces)
        for each in traces:
            assign_advantages(each, each.reward - mean)
""",
}

LOGPROBS = ("log-probs/value", "log-probs/unlikely", "offset/log-probs")
KL = ("kl/k1", "kl/k2", "kl/k3")
GROUPS = ("advantages/grpo", "advantages/dr-grpo")
PPO = ("losses/ppo", "losses/clip-higher")
REWARDS = ("rewards/kl-and-score", "advantages/gae")
CUT = ("means/tokens", "cut/micro-batches")
CHECKOUTS = {
    "openrlhf": (
        OPENRLHF,
        (
            *LOGPROBS,
            *KL,
            *GROUPS,
            *PPO,
            *REWARDS,
            *CUT,
            "advantages/returns",
            "cut/ranks",
            "pairs/dpo",
        ),
    ),
    "slime": (
        SLIME,
        (
            *LOGPROBS,
            *KL,
            *GROUPS,
            *PPO,
            *REWARDS,
            "advantages/whitening",
            "left/gae",
            "nan/policy-loss",
        ),
    ),
    "nemo-rl": (
        NEMO_RL,
        (
            *KL,
            *GROUPS,
            *PPO,
            *REWARDS,
            *CUT,
            "advantages/rloo",
            "advantages/gae-of-turns",
            "losses/value",
            "pairs/dpo",
            "expectations/kl-loss-on-policy",
        ),
    ),
    "skyrl": (
        SKYRL,
        (*LOGPROBS, *KL, *GROUPS, *PPO, *CUT, "means/responses", "means/fixed-length"),
    ),
    "open-instruct": (
        OPEN_INSTRUCT,
        (*LOGPROBS, *KL, *PPO, *CUT, "losses/cispo", "pairs/dpo", "pairs/cdpo", "pairs/simpo"),
    ),
    "prime-rl": (PRIME_RL, (*LOGPROBS, *CUT, "advantages/dr-grpo")),
}
"""For each adapter a repository, and the claims that it holds."""


def written(files: dict[str, str], folder: Path) -> Path:
    """Write the files of a repository into a folder, and return the folder."""
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return folder
