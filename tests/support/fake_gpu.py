"""Forward passes on torch's own fake CUDA tensors, in a build of torch without CUDA.

A fake tensor has a shape, a dtype and a device, and no numbers. torch's rules for each operation on CUDA tensors are applied to it:
which devices mix, which dtypes, what is differentiable. These rules are other code than that of `pretended_device.py`, and neither was
written from the other. Tensors in main memory stay real, since what decides shapes is computed there.

`python -m tests.support.fake_gpu` runs the passes and prints, for each, the operations that have no derivative. It needs a process of its
own: a device guard for CUDA is put into torch's table of guards, which autograd asks for the current stream. No backward pass can be run
with it.
"""

import contextlib
import ctypes
import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

CUDA_TYPE, META_TYPE, TYPES = 1, 14, 21
"""Numbers of c10::DeviceType, and how many there are."""
GUARDS = "_ZN3c104impl26device_guard_impl_registryE"
WAITS = frozenset({"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"})
"""What the host waits for. The answer is True or 1."""
GPU = torch.device("cuda", 0)


def install_guard() -> None:
    """Have torch take the guard of its meta device for CUDA's, which does nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * TYPES).in_dll(library, GUARDS)
    guards[CUDA_TYPE] = guards[META_TYPE]
    torch.cuda._lazy_init = lambda: None
    torch.cuda.mem_get_info = lambda *_: (60 * 10**9, 80 * 10**9)
    torch.cuda.memory_reserved = torch.cuda.memory_allocated = lambda *_: 0
    torch._C._set_only_lift_cpu_tensors(
        True
    )  # torch.tensor(…, device="cuda") makes one on the CPU first


class FakeGPU(TorchDispatchMode):
    """Fake tensors for CUDA, real ones for the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        flat = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        asks_for_gpu = device is not None and torch.device(device).type == "cuda"
        if not asks_for_gpu and not any(isinstance(x, FakeTensor) for x in flat):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in WAITS:
            return (
                1
                if args[0].dtype != torch.bool and name in {"item", "_local_scalar_dense"}
                else True
            )
        if name == "copy_" and not isinstance(
            args[0], FakeTensor
        ):  # what comes back has no numbers
            return args[0].zero_()
        if name == "_varlen_attn":
            check_flash_attention(*flat)
        real = {id(x): x for x in flat}

        def faked(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or isinstance(x, FakeTensor):
                return x
            made = self.fakes.from_tensor(x.detach())
            real[id(made)] = x
            return made

        with self.fakes:
            out = func(*tree_map(faked, args), **tree_map(faked, kwargs))

        def known(x: Any) -> Any:
            if isinstance(x, FakeTensor) and x.device.type == "cpu":
                return real[id(x)] if id(x) in real else torch.zeros(x.shape, dtype=x.dtype)
            return x

        return tree_map(known, out)


def check_flash_attention(*tensors: Any) -> None:
    """Raise where torch's flash attention on rows end to end would (mha_varlen_fwd, torch 2.13): the fake kernel checks nothing."""
    heads, starts = tensors[:3], tensors[3:]
    assert all(x.device == GPU for x in tensors), [x.device for x in tensors]
    assert all(x.dtype == torch.bfloat16 and x.stride(-1) == 1 for x in heads)
    assert heads[0].shape[-1] % 8 == 0 and heads[0].shape[-1] <= 256
    assert heads[0].shape[1] % heads[1].shape[1] == 0 and heads[1].shape == heads[2].shape
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in starts)
    lengths = [len(starts[0]), len(starts[0]), len(starts[0]) - 1][: len(starts)]
    assert [len(x) for x in starts] == lengths


def config_of(kind: str, **more: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48} | more
    return AutoConfig.for_model(
        kind, vocab_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, eos_token_id=1, num_labels=1, **sizes,
    )  # fmt: skip


def model_of(kind: str, auto: Any = AutoModelForCausalLM, **more: Any) -> Any:
    with GPU:
        return auto.from_config(config_of(kind, **more), dtype=torch.float32).eval()


MODELS = {
    "llama": {},
    "gemma3_text": {
        "head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16,
    },
}  # fmt: skip


def without_derivative(*outputs: Any) -> list[str]:
    """Return the nodes behind some outputs that stand for operations without a derivative."""
    waiting, seen, found = [x.grad_fn for x in outputs], set(), []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "NotImplemented" in node.name():
            found.append(node.name())
        waiting += [following for following, _ in node.next_functions]
    assert len(seen) > 10, "no graph was recorded"
    return found


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens of four rows and the mask of what is scored in them."""
    tokens, mask = torch.randint(4, 24, (4, 9)), torch.zeros(4, 9, dtype=torch.bool)
    mask[:, 4:8] = True
    return tokens, mask


def decode(model: Any) -> None:
    """Sample some tokens, and drop rows that have ended."""
    from quartet.generation.decoders import make_decoder
    from quartet.generation.sampling import Sampling, draw
    from quartet.generation.slots import SlotDecoder

    decoder = make_decoder(model, 40)
    assert isinstance(decoder, SlotDecoder)
    with torch.inference_mode():
        logits = decoder.prefill([[3, 4, 5], [4, 5, 6, 7]], 3)
        for _ in range(9):
            noise = torch.rand(len(logits)).to(GPU)
            logits = decoder.step(draw(logits, Sampling(top_k=4), noise).tokens)
        decoder.keep(torch.ones(6, dtype=torch.bool, device=GPU))
    assert logits.shape == (6, 24) and logits.dtype == torch.float32 and logits.device == GPU


def outputs_of(actor: Any, critic: Any, reference: Any) -> list[torch.Tensor]:
    """Return what actor and critic say of the tokens of `rows`."""
    from quartet.algorithms.algorithm import Forward
    from quartet.models.actor_critic import ForwardRequest, Separate

    request = ForwardRequest(*rows(), 1.0, True, reference)
    found = Forward.joined(Separate(actor, critic).forward_passes(request))
    return [found.logprobs, found.entropy, found.values, found.exact_kl]


def passes() -> dict[str, list[str]]:
    """Return what has no derivative in each forward pass."""
    from quartet.models.actor_critic import freeze
    from quartet.models.heads import ScalarModel
    from quartet.models.precision import compute_in

    found = {}
    for kind, more in MODELS.items():
        for dtype in (torch.bfloat16, torch.float32):
            actor = compute_in(model_of(kind, **more), dtype)
            classifier = model_of(kind, AutoModelForSequenceClassification, **more)
            critic = ScalarModel(classifier).compute_in(dtype)
            reference = compute_in(freeze(model_of(kind, **more)), dtype)
            outputs = outputs_of(actor, critic, reference)
            assert all(x.device == GPU and x.dtype == torch.float32 for x in outputs)
            found[f"{kind}, {dtype}"] = without_derivative(*outputs)
        decode(compute_in(model_of(kind, **more), torch.bfloat16))
        found[f"{kind}, decoding"] = []
    return found


@torch.no_grad()
def apply(module: Any, fn: Any, recurse: bool = True) -> Any:
    """Stand in for `nn.Module._apply`, which puts other data into the same parameters: a fake tensor's cannot be put into a real one."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    for name, p in module._parameters.items():
        if p is not None and (there := fn(p)) is not p:
            module._parameters[name] = torch.nn.Parameter(there, p.requires_grad)
    module._buffers.update({n: fn(b) for n, b in module._buffers.items() if b is not None})
    return module


def roles_on_one_trunk() -> list[str]:
    """Return what has no derivative where actor, critic and reward model are adapters on a base in 4 bits, which is the reference.

    The kernels in 4 bits are those of bitsandbytes, of which its own fakes give shapes and check dtypes and devices.
    """
    from quartet.models.actor_critic import freeze
    from quartet.models.adapters import CRITIC, POLICY, REWARD, AdapterView, add_adapter
    from quartet.models.heads import AdaptedScalar
    from quartet.models.loading import fill
    from quartet.models.lora import Lora
    from quartet.models.precision import compute_in
    from quartet.models.quantize import NF4Linear, quantize
    from quartet.models.skeleton import skeleton

    config = config_of("llama", hidden_size=64, intermediate_size=128)
    model = quantize(skeleton(config))
    for seed, name in enumerate((POLICY, CRITIC, REWARD)):
        add_adapter(model, Lora(rank=2), name, seed)
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32).state_dict()
    with mock.patch.object(torch.nn.Module, "_apply", apply):
        fill(compute_in(model, torch.bfloat16), whole, GPU, "here")
        moved = fill(quantize(skeleton(config)), whole, torch.device("cpu"), "here").to(GPU)
    packed, later = (
        [module for module in each.modules() if isinstance(module, NF4Linear)]
        for each in (model, moved)
    )
    for each in (module.quant_state for module in (*packed, *later)):
        scales = (each.absmax, each.code, each.offset, each.state2.absmax, each.state2.code)
        assert all(x.device == GPU for x in scales), [x.device for x in scales]
    assert packed[0].dequantized().dtype == torch.bfloat16
    critic, reward_model = (AdaptedScalar(model, name, 0, 0) for name in (CRITIC, REWARD))
    tokens, _ = rows()
    outputs = outputs_of(model, critic, AdapterView(model, None))
    with torch.no_grad():
        scores = freeze(reward_model).scores(tokens, torch.tensor([9, 8, 7, 9]))
    assert all(x.device == GPU and x.dtype == torch.float32 for x in (*outputs, scores))
    decode(model)
    return without_derivative(*outputs)


class Stream:
    """A stream of a device that is not there, and an event on it: nothing is ordered."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = GPU

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self


def in_parts() -> list[str]:
    """Return what has no derivative in a model that FSDP divides over two GPUs, of which the other does nothing.

    An optimizer steps on gradients of the parts' form: none can be computed here.
    """
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from quartet.distributed.process_group import TorchProcessGroup
    from quartet.distributed.sharding import full_state_dict, is_sharded, local_tensor
    from quartet.models.forward import masked_logprobs
    from quartet.models.precision import compute_in
    from quartet.training.ema import Ema
    from quartet.training.optim import Optimizer, OptimizerConfig
    from quartet.training.parallelize import mesh_of, parallelize

    torch.cuda.Stream = torch.cuda.Event = Stream
    torch.cuda.current_stream = torch.accelerator.current_stream = Stream
    torch.cuda.stream = lambda _: contextlib.nullcontext()
    torch.cuda.current_device, torch.cuda.device_count = lambda: 0, lambda: 2
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    group = TorchProcessGroup(0, 2)
    model = compute_in(model_of("llama"), torch.bfloat16)
    parallelize(model, mesh_of("cuda", group, 2))
    logprobs = masked_logprobs(model, *rows())
    assert logprobs.device == GPU and logprobs.dtype == torch.float32
    missing = without_derivative(logprobs)
    optimizer, ema = Optimizer([*model.parameters()], OptimizerConfig(), 3), Ema(model, 0.9)
    assert optimizer.is_fused and any(map(is_sharded, optimizer.parameters))
    for p in optimizer.parameters:
        p.grad = torch.zeros_like(p)
    optimizer.clip()
    optimizer.step()
    ema.update(model)
    held = (t for p in optimizer.parameters for t in optimizer.moments(p).values())
    assert all(local_tensor(t).device == GPU for t in (*held, *ema.average.values()))
    whole = full_state_dict(model)
    for name, p in model.state_dict(keep_vars=True).items():
        assert whole[name].shape == p.shape and whole[name].dtype == torch.float32
        assert whole[name].device == (torch.device("cpu") if is_sharded(p) else GPU)
    dist.destroy_process_group()
    return missing


if __name__ == "__main__":
    install_guard()
    with FakeGPU():
        result = passes() | {"roles": roles_on_one_trunk(), "in parts": in_parts()}
    print(json.dumps(result))
