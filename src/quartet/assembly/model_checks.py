"""What must hold of the models that a run names, before any of them is loaded."""

from typing import get_args

import torch

from quartet.assembly.models import Models
from quartet.assembly.reference import check_reference
from quartet.config.run import Role
from quartet.config.tables import SeparateCritic
from quartet.models.classifiers import define_classifier
from quartet.models.language_model import ModelError, check_generates, longest_of, read_config
from quartet.models.precision import has_bf16
from quartet.models.recurrent import why_not_sampled
from quartet.models.routing import why_not_balanced
from quartet.models.text_classifier import check_backbone


def check_models(models: Models) -> None:
    """Check what is known of the models of a run before they are loaded. Raises `ModelError`."""
    policy = models.config.policy
    if policy.compile and (why := models.why_slow()) is not None:
        raise ModelError(
            f"policy.compile = true: compiles Quartet's own forward pass, and {why}. Use false."
        )
    _check_precision(models)
    _check_sampling(models)
    _check_experts(models)
    if models.trained_backbone is not None:
        _check_backbone(models, models.trained_backbone)
    if models.reference_model is not None:
        longest = models.longest_sequence()
        check_reference(models.config, models.reference_model, models.tokenizer, longest)
    if _needs_classifier(models):
        define_classifier(models.policy_config())
    if models.folder is not None:
        config = read_config(models.folder)
        check_generates(models.folder, config)
        size = config.get_text_config().vocab_size
        if len(models.tokenizer) > size and not policy.resize_embeddings:
            raise ModelError(
                f"policy.tokenizer has {len(models.tokenizer):,} tokens, but "
                f"{policy.model} knows only {size:,}. "
                "Use the model's own tokenizer. Or set policy.resize_embeddings = true, which "
                "adds embeddings for the others."
            )


def _check_precision(models: Models) -> None:
    """Raise `ModelError` if a model is to compute in bf16 on a GPU that does not."""
    named = [models.config.run.precision_of(role) for role in get_args(Role)]
    if models.device.type == "cuda" and "bf16" in named and not has_bf16():
        gpu = torch.cuda.get_device_name(models.device)
        raise ModelError(
            f'run.precision = "bf16": this GPU ({gpu}) does not compute in bf16; those of NVIDIA '
            'do from Ampere on. Leave it out: "auto" takes fp32 there.'
        )


def _check_backbone(models: Models, folder: str) -> None:
    """Raise `ModelError` unless reward models can be trained from a folder or hub id."""
    config, reader, settings = read_config(folder), models.text_reader, models.config
    check_backbone(folder, config)
    loss = settings.reward_model.loss
    if loss.needs_every_token and reader is not None and not reader.is_decoder:
        raise ModelError(
            f'reward_model.loss.type = "{loss.type}": reads a score at every token, and '
            f"{folder} has one for the whole text. Use reward_model.loss = "
            '{ type = "last_token" }.'
        )
    limit = longest_of(config)
    longest = settings.data.max_prompt_tokens + settings.rollout.max_new_tokens
    if reader is None and limit < min(longest, models.longest_sequence()):
        raise ModelError(
            f"reward_model.model: {folder} reads at most {limit:,} tokens, and a prompt and a "
            f"response can have {longest:,}. Lower data.max_prompt_tokens or "
            "rollout.max_new_tokens."
        )


def _check_sampling(models: Models) -> None:
    """Raise `ModelError` if answers would be sampled from a recurrent model that cannot be."""
    why: str | None = why_not_sampled(models.policy_config())
    if models.config.reads("rollout") and why is not None:
        raise ModelError(
            f"policy.model: {why}. Use another model, or a recipe that samples nothing, such "
            "as sft or dpo."
        )


def _check_experts(models: Models) -> None:
    """Raise `ModelError` if a load is to be balanced and no model that is trained has one."""
    coef, backbone = models.config.policy.router_aux_loss_coef, models.trained_backbone
    if not coef:
        return
    trained = [models.policy_config()] + ([] if backbone is None else [read_config(backbone)])
    reasons = [why for config in trained if (why := why_not_balanced(config)) is not None]
    if len(reasons) == len(trained):
        raise ModelError(
            f"policy.router_aux_loss_coef = {coef:g}: {' and '.join(dict.fromkeys(reasons))}. "
            "Leave it out."
        )


def _needs_classifier(models: Models) -> bool:
    """Return whether the run makes a reward model or a critic of the policy's trunk."""
    config = models.config
    has_critic = config.algorithm is not None and config.algorithm.needs_critic
    own_critic = has_critic and isinstance(config.critic, SeparateCritic)
    has_trunk = "reward_model" in config.recipe and models.reward_backbone is None
    return has_trunk or (config.rl_stage is not None and own_critic)
