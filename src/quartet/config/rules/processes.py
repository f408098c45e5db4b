"""Rules about processes, and about what is held in parts or in 4 bits."""

import json
from pathlib import Path

from quartet.config.rules.base import has_trust_region, rule
from quartet.config.tables import Config
from quartet.models.architectures import ARCHITECTURES

WITHOUT_LINEAR_LAYERS = ("gpt2", "openai-gpt")
"""Model types whose blocks keep their weights in transformers' Conv1D."""


@rule
def address_needs_ray(config: Config) -> str | None:
    launch = config.launch
    if launch.address is None or launch.type == "ray":
        return None
    return (
        f'launch.address: is a Ray cluster\'s, and launch.type = "{launch.type}". Use type = "ray".'
    )


@rule
def torchrun_restarts_itself(config: Config) -> str | None:
    if not config.launch.restarts or config.launch.type != "torchrun":
        return None
    return (
        "launch.restarts: torchrun starts its ranks again itself, with --max-restarts; run.name "
        "and --resume make the same words go on."
    )


@rule
def every_rank_has_a_part(config: Config) -> str | None:
    launch = config.launch
    if launch.type == "torchrun" or isinstance(launch.shard, bool):
        return None
    if launch.processes % launch.parts(launch.processes) == 0:
        return None
    return (
        f"launch.shard = {launch.shard}: launch.processes = {launch.processes} is no multiple of "
        "it, so some rank would have no part."
    )


@rule
def trust_region_excludes_compile(config: Config) -> str | None:
    if not config.policy.compile or not has_trust_region(config):
        return None
    return (
        'policy.compile: algorithm.update.type = "trust_region" takes second derivatives, and what '
        "torch.compile writes has none. Use false."
    )


@rule
def trust_region_excludes_balancing(config: Config) -> str | None:
    if not config.policy.router_aux_loss_coef or not has_trust_region(config):
        return None
    return (
        'policy.router_aux_loss_coef: algorithm.update.type = "trust_region" takes one step of the '
        "policy's loss alone. Leave it out."
    )


@rule
def compile_excludes_balancing(config: Config) -> str | None:
    if not config.policy.router_aux_loss_coef or not config.policy.compile:
        return None
    return (
        "policy.router_aux_loss_coef: what the routers of experts say is not read in compiled "
        "blocks. Use policy.compile = false."
    )


@rule
def trust_region_excludes_sharding(config: Config) -> str | None:
    if not config.launch.shard or not has_trust_region(config):
        return None
    return (
        'launch.shard: second derivatives, for algorithm.update.type = "trust_region", need all '
        "weights on every rank. Use false."
    )


@rule
def quantize_needs_an_adapter(config: Config) -> str | None:
    if config.policy.quantize is None or config.policy.adapter is not None:
        return None
    return (
        f'policy.quantize = "{config.policy.quantize}": weights in 4 bits are not trained, so '
        'policy.adapter = { type = "lora" } is needed too.'
    )


@rule
def quantize_holds_one_trunk_whole(config: Config) -> str | None:
    if config.policy.quantize is None:
        return None
    excluded = {
        "launch.shard": bool(config.launch.shard),
        "staleness, which samples with a copy": bool(config.staleness),
        "policy.compile": config.policy.compile,
        'algorithm.update.type = "trust_region"': has_trust_region(config),
    }
    name = next((name for name, is_set in excluded.items() if is_set), None)
    if name is None:
        return None
    return (
        f'policy.quantize = "{config.policy.quantize}": does not go with {name}. Leave one of them '
        "out."
    )


@rule
def quantize_needs_linear_layers(config: Config) -> str | None:
    """A folder is looked at here so that a plan refuses it, too; of a name on the hub, loading
    tells."""
    policy = config.policy
    if policy.quantize is None:
        return None
    kind = None if policy.create is None else policy.create.type
    file = Path(str(policy.model)) / "config.json"
    if kind is None and file.is_file():
        try:
            kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
        except (OSError, ValueError, AttributeError):
            return None  # loading the model says what is wrong with it
    row = ARCHITECTURES.get(str(kind))
    if row is not None and row.experts is not None:
        return (
            f'policy.quantize = "{policy.quantize}": the experts of {kind}, nearly all of its '
            "weights, are no linear layers and would stay as they are. Leave it out."
        )
    if kind not in WITHOUT_LINEAR_LAYERS:
        return None
    return (
        f'policy.quantize = "{policy.quantize}": {kind} has no linear layers in its blocks that '
        "could be held in 4 bits. Leave it out, or use another model."
    )
