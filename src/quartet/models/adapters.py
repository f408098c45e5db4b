"""Adapters (LoRA, by peft) inside a model: several on one trunk, of which at most one is active.

A model with adapters stays the transformers model that it was, with its linear layers replaced by
peft's. Its forward pass uses the active adapter, normally the policy's. The base without an adapter
is the reference (`AdapterView(model, None)`), and further roles are further adapters
(`AdapterView(model, "critic")`): one trunk, four roles.
"""

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from quartet.distributed.offload import MAIN_MEMORY
from quartet.distributed.sharding import copy_saved, full_state_dict
from quartet.errors import QuartetError
from quartet.files import readable_weights
from quartet.io.activity import counted
from quartet.io.install import install_command
from quartet.models.experts import holds_experts
from quartet.models.lora import Lora
from quartet.models.precision import compute_in, keep_in_float32
from quartet.models.protocols import CausalModel, Trunk
from quartet.models.quantize import NF4Linear
from quartet.models.recurrent import is_read_by_weight
from quartet.tensors import Tensor

POLICY, CRITIC, REWARD, REFERENCE = "policy", "critic", "reward", "reference"


class AdapterError(QuartetError, ValueError):
    """An adapter that cannot be added to a model; the message is one sentence."""


def add_adapter(model: CausalModel, lora: Lora, name: str, seed: int) -> Any:
    """Add an adapter to the model and return the model. Its own weights are frozen; the new
    adapter's are trained, as are those of adapters that were trained before. The policy's adapter
    is active afterwards, if there is one."""
    try:
        import peft
    except ImportError:
        raise AdapterError(
            f"policy.adapter needs the package peft: {install_command('lora')}."
        ) from None
    trained = [p for p in model.parameters() if p.requires_grad] if adapters_of(model) else []
    config = lora_config(model, lora)
    # peft draws on the CPU. Without `devices`, torch warns where there are several GPUs.
    fork = torch.random.fork_rng(devices=[])
    with fork, warnings.catch_warnings(), _weights_on_cpu(model):
        warnings.filterwarnings(
            "ignore", "Already found a `peft_config`"
        )  # several adapters are intended
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, adapter_name=name)
    model.requires_grad_(False)
    keep_in_float32(adapter_parameters(model, name))  # peft takes the dtype of the base
    for p in [*trained, *adapter_parameters(model, name)]:
        p.requires_grad_(True)
    _activate(model, POLICY if POLICY in adapters_of(model) else None)
    return model


@contextmanager
def _weights_on_cpu(model: CausalModel) -> Iterator[None]:
    """Have parameters without memory, of a model that is not read yet, look like such on a CPU, so
    that peft initializes its matrices beside them. (One number stands for each of them.)"""
    held = [
        (module, name, p)
        for module in model.modules()
        for name, p in module._parameters.items()
        if p is not None and p.is_meta
    ]
    for module, name, p in held:
        stand_in = torch.zeros((), dtype=p.dtype).expand(p.shape)
        module._parameters[name] = nn.Parameter(stand_in, requires_grad=False)
    try:
        yield
    finally:
        for module, name, p in held:
            module._parameters[name] = p


def lora_config(model: CausalModel, lora: Lora) -> Any:
    """Return peft's configuration of an adapter. Raises AdapterError for a layer that the model
    does not have."""
    import peft

    linear = linear_layers(model)
    if not linear:
        raise AdapterError(
            f"policy.adapter: {model.config.model_type} has no linear layer that an adapter can "
            "be added to. Leave it out."
        )
    targets = sorted(linear) if lora.targets == "all-linear" else list(lora.targets)
    if missing := [target for target in targets if target not in linear]:
        raise AdapterError(
            f"policy.adapter.targets: the model has no layer {missing[0]}. It has "
            f"{', '.join(sorted(linear))}."
        )
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear.values()),
    )


def linear_layers(model: CausalModel) -> dict[str, Any]:
    """Return the linear layers of the trunk by the last part of their names; under adapters, the
    layers that the adapters are added to.

    Of a model with experts these are the projections of attention alone. Its experts are tensors
    and no layers, and peft takes the name of a linear layer of its other MLPs for those tensors.
    Layers of a Mamba mixer whose weight is read by itself are left out, and such as have a number
    for a name.
    """
    layers, attention_only = {}, holds_experts(model)
    modules = dict(model.base_model.named_modules())
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        plain = getattr(module, "base_layer", module)
        if attention_only and "attn" not in name and "attention" not in name:
            continue
        if is_read_by_weight(modules.get(parent), last):
            continue
        if (
            isinstance(plain, nn.Linear | Conv1D)
            and "lora_" not in name
            and last != "base_layer"
            and not last.isdigit()
        ):
            layers[last] = plain
    return layers


def named_layers(model: Trunk | CausalModel) -> dict[str, Any]:
    """Return the layers that have adapters, by name."""
    return {
        name: m
        for name, m in model.named_modules()
        if hasattr(m, "lora_A") and hasattr(m, "base_layer")
    }


def layers_with_adapters(model: Trunk | CausalModel) -> list[Any]:
    return list(named_layers(model).values())


def adapters_of(model: Trunk | CausalModel) -> set[str]:
    """Return the names of the adapters that a model has."""
    return {name for layer in layers_with_adapters(model)[:1] for name in layer.lora_A}


def adapter_parameters(model: CausalModel, name: str) -> list[nn.Parameter]:
    return [
        p
        for layer in layers_with_adapters(model)
        for matrices in (layer.lora_A, layer.lora_B)
        if name in matrices
        for p in matrices[name].parameters()
    ]


def copy_adapter(model: CausalModel, source: str, other: Any, target: str) -> None:
    """Copy the weights of one adapter into another of the same shape, on the same model or
    another."""
    pairs = zip(adapter_parameters(model, source), adapter_parameters(other, target), strict=True)
    with torch.no_grad():
        for from_weight, to_weight in pairs:
            copy_saved(to_weight, from_weight)


# --- which adapter is active ---


class AdapterView:
    """A language model under one of its adapters, or under none, which is the frozen base. It
    serves forward passes only: `forward_positions` activates the adapter for one pass."""

    def __init__(self, model: CausalModel, adapter: str | None) -> None:
        self.model, self.adapter = model, adapter

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    def get_output_embeddings(self) -> nn.Linear:
        return self.model.get_output_embeddings()

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Return the parameters that its passes read: those of the model, and of no other adapter.
        Which others there are depends on how many ranks hold the model."""
        others = adapters_of(self.model) - {self.adapter}
        unread = {id(p) for name in others for p in adapter_parameters(self.model, name)}
        return (p for p in self.model.parameters() if id(p) not in unread)

    def active(self) -> AbstractContextManager[None]:
        return adapter_active(self.model, self.adapter)


LanguageModel = CausalModel | AdapterView
"""What `forward_positions` takes: a model, or a model under another of its adapters."""


@contextmanager
def adapter_active(model: Trunk | CausalModel, adapter: str | None) -> Iterator[None]:
    """Make this adapter (None: none) the active one inside the context.

    peft's own `set_adapter` would also change `requires_grad`; here it stays, so that the adapters
    of actor and critic are both trained, whichever is active.
    """
    before = _active_adapter_of(model)
    _activate(model, adapter)
    try:
        yield
    finally:
        _activate(model, before)


def _activate(model: Trunk | CausalModel, adapter: str | None) -> None:
    for layer in layers_with_adapters(model):
        layer._disable_adapters = adapter is None
        layer._active_adapter = [] if adapter is None else [adapter]


def _active_adapter_of(model: Trunk | CausalModel) -> str | None:
    for layer in layers_with_adapters(model):
        return (
            None
            if layer._disable_adapters or not layer._active_adapter
            else str(layer._active_adapter[0])
        )
    return None


def checkpoint_contexts(
    model: Trunk | CausalModel,
) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """Return the `context_fn` of torch's activation checkpoints: the backward pass computes a block
    again under the adapter that was active in the forward pass."""
    if not adapters_of(model):
        return lambda: (nullcontext(), nullcontext())

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), adapter_active(model, _active_adapter_of(model))

    return contexts


# --- layers as one weight ---


def is_plain_linear(layer: Any) -> bool:
    """Return whether a layer is torch's own linear layer, possibly read in another dtype, and not
    one that a library has derived from it."""
    return getattr(type(layer), "_plain_class", type(layer)) is nn.Linear


def is_conv1d(layer: Any) -> bool:
    """Return whether a layer is transformers' Conv1D, a linear layer whose weight is [in, out]."""
    return getattr(type(layer), "_plain_class", type(layer)) is Conv1D


def has_merged_weight(layer: Any) -> bool:
    """Return whether `merged_weight` gives the weight of a layer: a plain linear layer (or Conv1D),
    or one under plain LoRA (no DoRA or other variant) with at most one active adapter."""
    return _has_matrix(layer) or (has_plain_lora(layer) and _has_matrix(layer.base_layer))


def _has_matrix(layer: Any) -> bool:
    return is_plain_linear(layer) or is_conv1d(layer)


def has_plain_lora(layer: Any) -> bool:
    """Return whether a layer is a linear one, possibly in 4 bits, under plain LoRA (no DoRA or
    other variant) with at most one active adapter."""
    if not hasattr(layer, "lora_A"):
        return False
    base, active = layer.base_layer, layer.active_adapters
    return (
        (_has_matrix(base) or isinstance(base, NF4Linear))
        and len(active) <= 1
        and all(name in layer.lora_A and name not in layer.lora_variant for name in active)
    )


def apply_linear(layer: Any, x: Tensor) -> Tensor:
    """Return layer(x): [n, in] -> [n, out].

    Under plain LoRA it is W x + (alpha / rank) B A x in one `addmm_`, which saves two tensors
    as large as the result. W may be in 4 bits. A layer of another kind uses its own forward.
    """
    if has_plain_lora(layer) and not layer._disable_adapters:
        [name] = layer.active_adapters
        low_rank, raised = layer.lora_A[name](x), layer.lora_B[name].weight.T
        total: Tensor = layer.base_layer(x)
        return total.addmm_(low_rank, raised, alpha=layer.scaling[name])
    output: Tensor = layer(x)
    return output


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """Return the weight [out, in] of a linear layer: W, or W + (alpha / rank) B A under the active
    adapter."""
    base = getattr(layer, "base_layer", layer)
    weight: Tensor = base.weight
    if base is not layer and not layer._disable_adapters:
        for name in layer.active_adapters:
            weight = weight + layer.get_delta_weight(name)
    return weight.t() if is_conv1d(base) else weight


@torch.no_grad()
def merged_state(
    model: Trunk | CausalModel,
    tensors: Mapping[str, Tensor] | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Return the weights of a model with the active adapter merged into them, by the names of the
    model without adapters. `tensors` is its `full_state_dict`, which every rank must call for.

    A weight that had to be computed is moved to `device` at once, so that a GPU holds one of them
    at a time, and rounded to `dtype`; None leaves it where and as it is. The others are the model's
    own.
    """
    layers, tensors = named_layers(model), full_state_dict(model) if tensors is None else tensors
    # Layers in 4 bits without an adapter.
    packed = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, NF4Linear)}
    state = {}
    for name, tensor in counted(tensors.items(), lambda _: 1, len(tensors), "tensors"):
        layer, _, rest = name.partition(".base_layer.")
        if rest == "weight":
            base = layers[layer].base_layer
            weight = base.dequantized() if isinstance(base, NF4Linear) else tensor
            merged = weight + _change(layers[layer], layer, tensors)
            state[f"{layer}.{rest}"] = merged.to(device or merged.device, dtype or merged.dtype)
        elif rest:
            state[f"{layer}.{rest}"] = tensor
        elif name in packed:
            unpacked = packed[name].dequantized()
            state[name] = unpacked.to(device or unpacked.device, dtype or unpacked.dtype)
        elif not any(part.startswith("lora_") for part in name.split(".")):
            state[name] = tensor
    return state


def _change(module: Any, layer: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return what the active adapter adds to a layer's weight: (alpha / rank) B A."""
    change = torch.zeros((), device=tensors[f"{layer}.base_layer.weight"].device)
    for name in [] if module._disable_adapters else module.active_adapters:
        change_ba = (
            tensors[f"{layer}.lora_B.{name}.weight"] @ tensors[f"{layer}.lora_A.{name}.weight"]
        )
        change = (
            change + (change_ba.T if module.fan_in_fan_out else change_ba) * module.scaling[name]
        )
    return change


def save_adapter(
    model: CausalModel, name: str, folder: Path, tensors: Mapping[str, Tensor]
) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained(base_model, folder)` loads. `tensors` is
    the model's `full_state_dict`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            _PREFIX + key.replace(f".{name}.", "."): tensor.to(MAIN_MEMORY).contiguous()
            for key, tensor in tensors.items()
            if in_adapter(name, key)
        },
        folder / _WEIGHTS,
    )
    readable_weights(folder / _WEIGHTS)
    layers = named_layers(model)
    first = next(iter(layers.values()))
    targets = tuple(sorted({module_name.rpartition(".")[2] for module_name in layers}))
    config = lora_config(
        model, Lora(rank=first.r[name], alpha=float(first.lora_alpha[name]), targets=targets)
    )
    config.base_model_name_or_path, config.inference_mode, config.task_type = (
        model.name_or_path,
        True,
        "CAUSAL_LM",
    )
    config.save_pretrained(folder)


def in_adapter(name: str, key: str) -> bool:
    """Return whether a tensor of the model's state dict belongs to this adapter."""
    return f".lora_A.{name}." in key or f".lora_B.{name}." in key


def load_adapter(model: CausalModel, name: str, folder: Path) -> None:
    """Add the adapter that `save_adapter` wrote to a model under this name, frozen."""
    table = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    lora = Lora(
        rank=table["r"], alpha=float(table["lora_alpha"]), targets=tuple(table["target_modules"])
    )
    add_adapter(model, lora, name, seed=0)
    read_adapter(model, name, folder)
    freeze_adapter(model, name)


def freeze_adapter(model: CausalModel, name: str) -> None:
    for p in adapter_parameters(model, name):
        p.requires_grad_(False)


def read_adapter(model: CausalModel, name: str, folder: Path) -> None:
    """Read the weights that `save_adapter` wrote into the adapter of this name."""
    weights = load_file(folder / _WEIGHTS)
    with torch.no_grad():
        for module_name, module in model.named_modules():
            for side in ("lora_A", "lora_B"):
                key = f"{_PREFIX}{module_name}.{side}.weight"
                if key in weights:
                    getattr(module, side)[name].weight.copy_(weights[key])


_PREFIX, _WEIGHTS = "base_model.model.", "adapter_model.safetensors"


def freeze_layers(model: CausalModel, count: int) -> Any:
    """Freeze the embeddings and the first `count` blocks and return the model.

    A head that is tied to the embeddings is frozen with them: the reference shares them, and would
    move otherwise.
    """
    if count == 0:
        return model
    blocks = next(m for m in model.base_model.modules() if isinstance(m, nn.ModuleList))
    if count >= len(blocks):
        raise AdapterError(f"policy.frozen_layers = {count}: the model has {len(blocks)} layers.")
    trained = {
        id(p) for module in [*blocks[count:], *_behind(model, blocks)] for p in module.parameters()
    }
    embedded = {id(p) for p in model.get_input_embeddings().parameters()}
    for p in model.parameters():
        p.requires_grad_(id(p) in trained - embedded)
    return model


def _behind(model: CausalModel, blocks: nn.ModuleList) -> list[Any]:
    """Return the modules after the blocks: the last norm, and the head."""
    children = list(model.base_model.children())
    position = next(i for i, child in enumerate(children) if child is blocks)
    return [*children[position + 1 :], model.get_output_embeddings()]


def frozen_copy(model: CausalModel, dtype: torch.dtype) -> Any:
    """Return a frozen copy of a model that is held in this dtype. Parameters that are not trained
    are shared where they have the dtype already."""
    copied = {
        id(p): p
        if not p.requires_grad and p.dtype == dtype
        else nn.Parameter(p.detach().to(dtype, copy=True), requires_grad=False)
        for p in model.parameters()
    }
    return compute_in(copy.deepcopy(model, copied).eval(), dtype)
