"""Learning rates and optimizers."""

import importlib.util
import re

import pytest
import torch

from quartet.assembly import build
from quartet.config.toml import read_settings
from quartet.io.install import install_command
from quartet.models.adapters import add_adapter
from quartet.models.heads import AdaptedScalar, ScalarModel
from quartet.models.language_model import create
from quartet.models.lora import Lora
from quartet.models.shape import Shape
from quartet.models.trunk import block_matrices
from quartet.planning.memory import Sizes, trained_bytes
from quartet.recipes import recipe_path
from quartet.training.checkpoint import read_checkpoint, write_checkpoint
from quartet.training.optim import Optim, Optimizer, OptimizerConfig
from quartet.training.optimizer_types import MUON_MOMENTUM, TYPES, OptimizerError
from tests.support.world import model, tokenizer

has_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not has_bitsandbytes, reason="bitsandbytes is missing")
KINDS = [
    "adamw",
    pytest.param("adamw_8bit", marks=needs_bitsandbytes),
    "muon",
]


def factors(steps, total, **settings):
    config = OptimizerConfig(lr=1.0, **settings)
    return [round(config.factor(step, total), 4) for step in steps]


def test_schedules_rise_and_fall():
    # warm-up over 2 steps, 10 in all: 1/3, 2/3, then 8/8 … 1/8
    linear = OptimizerConfig(lr=1.0, warmup_steps=2)
    assert [round(linear.factor(step, 10), 4) for step in (0, 1, 2, 6, 9)] == [
        0.3333,
        0.6667,
        1.0,
        0.5,
        0.125,
    ]
    constant = OptimizerConfig(lr=1.0, warmup_steps=1, schedule="constant")
    assert [constant.factor(step, 10) for step in (0, 1, 9)] == [0.5, 1.0, 1.0]
    assert factors((0, 1, 2, 6, 9), 10, warmup_steps=2) == [0.3333, 0.6667, 1.0, 0.5, 0.125]
    assert factors((0, 1, 9), 10, warmup_steps=1, schedule="constant") == [0.5, 1.0, 1.0]


def test_a_cosine_falls_slowly_then_fast_then_slowly():
    # x = 0, 1/6, …, 5/6 after one step of warm-up; (1 + cos πx) / 2, with cos 30° = 0.8660
    cosine = factors(range(7), 7, schedule="cosine", warmup_steps=1)
    assert cosine == [0.5, 1.0, 0.933, 0.75, 0.5, 0.25, 0.067]


def test_a_schedule_falls_to_the_least_share():
    # linear, 4 steps, to 0.2: 0.2 + 0.8 · (1, 3/4, 1/2, 1/4)
    assert factors(range(5), 4, min_lr_ratio=0.2) == [1.0, 0.8, 0.6, 0.4, 0.2]
    # cosine at x = 0, 1/2, 1: 0.1 + 0.9 · (1, 1/2, 0)
    assert factors((0, 2, 4), 4, schedule="cosine", min_lr_ratio=0.1) == [1.0, 0.55, 0.1]
    # the warm-up still begins at 0
    assert factors((0, 1), 4, warmup_steps=3, min_lr_ratio=0.2) == [0.25, 0.5]
    # and the only step after it has the whole rate; steps beyond the last one the least
    assert factors((3, 4, 9), 4, warmup_steps=3, min_lr_ratio=0.2) == [1.0, 0.2, 0.2]
    assert factors((3, 4), 4, warmup_steps=4, min_lr_ratio=0.2) == [0.8, 0.2]


@pytest.mark.parametrize(
    "ratio, total, warmup", [(0.03, 100, 3), (0.03, 10, 1), (0.07, 100, 7), (0.5, 5, 3), (0, 9, 0)]
)
def test_a_warmup_ratio_is_a_share_of_the_steps_rounded_up(ratio, total, warmup):
    assert OptimizerConfig(warmup_ratio=ratio).warmup(total) == warmup
    assert factors((0,), total, warmup_ratio=ratio) == factors((0,), total, warmup_steps=warmup)


@pytest.mark.parametrize(
    "settings, depends",
    [
        ({"schedule": "linear"}, True),
        ({"schedule": "cosine"}, True),
        ({"schedule": "constant", "warmup_steps": 2}, False),
        ({"schedule": "constant", "warmup_ratio": 0.1}, True),
    ],
)
def test_a_rate_depends_on_the_number_of_steps_unless_it_is_constant(settings, depends):
    config = OptimizerConfig(**settings)
    assert config.depends_on_total is depends
    assert (config.factor(1, 20) != config.factor(1, 40)) is depends


def test_an_rl_stage_hands_every_setting_to_both_optimizers():
    given = Optim(
        lr=1e-3,
        critic_lr=2e-3,
        schedule="cosine",
        min_lr_ratio=0.1,
        warmup_ratio=0.2,
        max_grad_norm=0.5,
        weight_decay=0.1,
        betas=(0.8, 0.9),
        eps=1e-6,
        on_nonfinite="skip",
    )
    critic = given.optimizer_config(given.critic_lr)
    assert critic.lr == 2e-3 and type(critic) is OptimizerConfig
    names = set(OptimizerConfig.__dataclass_fields__) - {"lr"}
    assert all(getattr(critic, name) == getattr(given, name) for name in names)


# --- types


def newton_schulz(matrix):
    """Five iterations of 3.4445 X − 4.7750 (XXᵀ) X + 2.0315 (XXᵀ)² X in float64."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_muon_steps_along_the_orthogonalised_momentum(shape):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    gradients = torch.randn(3, *shape, generator=generator)
    weight = torch.nn.Parameter(start.clone())
    config = OptimizerConfig(
        optimizer="muon", lr=0.1, schedule="constant", weight_decay=0.5, max_grad_norm=float("inf")
    )
    optimizer = Optimizer([weight], config, 3, [weight])
    expected, momentum = start.double(), torch.zeros(shape, dtype=torch.float64)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = MUON_MOMENTUM * momentum + (1 - MUON_MOMENTUM) * gradient.double()
        ahead = MUON_MOMENTUM * momentum + (1 - MUON_MOMENTUM) * gradient.double()
        step = 0.1 * 0.2 * max(shape) ** 0.5 * newton_schulz(ahead)
        expected = (1 - 0.1 * 0.5) * expected - step
    # bfloat16 has 8 bits; the iteration has made more of the last of them
    moved = (expected - start.double()).norm()
    assert float((weight.detach().double() - expected).norm() / moved) < 0.02


def test_a_step_of_muon_is_as_long_as_one_of_adamw():
    """The root mean square of a step is near 0.2 lr, whatever the shape: AdamW's is 0.2 to 0.4."""
    for shape in [(16, 16), (16, 200), (200, 16)]:
        weight = torch.nn.Parameter(torch.zeros(shape))
        config = OptimizerConfig(optimizer="muon", lr=1.0, schedule="constant")
        optimizer = Optimizer([weight], config, 1, [weight])
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        assert 0.7 * 0.2 < float(weight.detach().square().mean().sqrt()) < 1.2 * 0.2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_matrices_of_blocks_are_muons_and_all_else_is_adamws(kind):
    made = model(kind)
    scalar = ScalarModel.from_trunk(made, 0, 0)
    for each in (made, scalar):
        matrices = {id(p) for p in block_matrices(each)}
        optimizer = Optimizer(
            list(each.parameters()), OptimizerConfig(optimizer="muon"), 1, block_matrices(each)
        )
        sum(p.sum() for p in each.parameters()).backward()
        optimizer.step()
        for name, p in each.named_parameters():
            is_inside = ".layers." in name or ".h." in name
            is_muons = optimizer.moments(p).keys() == {"momentum_buffer"}
            assert is_muons == (is_inside and p.ndim == 2) == (id(p) in matrices), name


def test_the_matrices_of_adapters_are_among_those_of_blocks():
    actor = add_adapter(model(), Lora(rank=4), "policy", 0)
    critic = AdaptedScalar(add_adapter(actor, Lora(rank=4), "critic", 0), "critic", 0, 0)
    matrices = {id(p) for p in block_matrices(critic)}
    trained = dict(critic.named_parameters())
    assert {name for name, p in trained.items() if id(p) not in matrices} == {"head.weight"}
    assert len(trained) > 1


def test_a_model_without_known_blocks_is_refused_where_a_type_needs_them():
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(OptimizerError, match='"muon" steps the matrices of transformer blocks'):
        Optimizer([weight], OptimizerConfig(optimizer="muon"), 1)
    head = Optimizer([weight], OptimizerConfig(optimizer="muon"), 1, [torch.zeros(4, 4)])
    weight.grad = torch.ones(4, 4)
    head.step()
    assert head.moments(weight).keys() == {"step", "exp_avg", "exp_avg_sq"}


def wide_model(seed=0):
    """A model whose matrices are large enough for 8 bits."""
    shape = Shape(type="llama", hidden_size=64, num_layers=2, num_heads=4, max_length=16)
    return create(shape, tokenizer(), seed)


def optimizer_of(kind, made, total=6):
    config = OptimizerConfig(lr=1e-2, optimizer=kind, schedule="cosine", warmup_ratio=0.3)
    return Optimizer(list(made.parameters()), config, total, block_matrices(made))


def stepped(optimizer, steps):
    """Steps with gradients that depend on the step and the weights."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in optimizer.parameters:
            p.grad = torch.randn(p.shape, generator=generator) + p.detach()
        optimizer.clip()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in optimizer.parameters])


def saved(optimizer, folder):
    """The state as a checkpoint has it."""
    path = write_checkpoint(folder / "x-000003", optimizer.state(), {"stage": "x", "step": 3})
    return read_checkpoint(path).state()


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_goes_on_from_a_checkpoint_to_the_bit(kind, tmp_path):
    alone = optimizer_of(kind, wide_model())
    stepped(alone, range(3))
    state = saved(alone, tmp_path)
    other = optimizer_of(kind, wide_model(seed=1))
    other.load_state(state)
    assert torch.equal(stepped(alone, range(3, 6)), stepped(other, range(3, 6)))
    # and it is the moments that make it so
    forgetful = optimizer_of(kind, wide_model(seed=1))
    forgetful.load_state(state | {"moments": [{} for _ in alone.parameters]})
    assert not torch.equal(stepped(forgetful, range(3, 6)), stepped(alone, []))


def test_a_state_from_before_there_were_types_is_adamws(tmp_path):
    alone = optimizer_of("adamw", wide_model())
    stepped(alone, range(3))
    state = saved(alone, tmp_path)
    del state["optimizer"]
    other = optimizer_of("adamw", wide_model(seed=1))
    other.load_state(state)
    assert torch.equal(stepped(alone, range(3, 6)), stepped(other, range(3, 6)))
    with pytest.raises(ValueError, match='its optimizer is "adamw", and "muon" cannot go on from'):
        optimizer_of("muon", wide_model()).load_state(state)


@pytest.mark.parametrize("kind", KINDS)
def test_moments_that_are_not_those_of_the_parameters_are_refused(kind, tmp_path):
    alone = optimizer_of(kind, wide_model())
    stepped(alone, range(1))
    state = saved(alone, tmp_path)
    place = max(range(len(alone.parameters)), key=lambda i: len(state["moments"][i]))
    moments = state["moments"][place]
    name = next(n for n, m in moments.items() if torch.is_tensor(m) and m.ndim)
    damages = {
        "moments": {n: m for n, m in moments.items() if n != name},
        "moments of another shape": moments | {name: moments[name][:1]},
        "another type of number": moments
        | {
            name: moments[name].float()
            if moments[name].dtype == torch.uint8
            else moments[name].byte()
        },
    }
    if isinstance(moments["step"], int):
        damages["no number of steps"] = moments | {"step": -1}
    for message, damaged in damages.items():
        others = [damaged if i == place else m for i, m in enumerate(state["moments"])]
        with pytest.raises(ValueError, match=message):
            optimizer_of(kind, wide_model()).load_state(state | {"moments": others})


@pytest.mark.parametrize("kind", KINDS)
def test_moments_take_the_bytes_that_are_planned(kind):
    made = wide_model()
    optimizer = optimizer_of(kind, made)
    stepped(optimizer, range(1))
    constants = TYPES[kind].constants
    taken = sum(
        moment.numel() * moment.element_size()
        for p in optimizer.parameters
        for name, moment in optimizer.moments(p).items()
        if name not in constants | {"step"}
    )
    count = sum(p.numel() for p in optimizer.parameters)
    # two layers of 64 with 192 inside: 2 · (4 · 64² + 3 · 64 · 192) parameters in matrices
    assert sum(p.numel() for p in block_matrices(made)) == 106_496
    per_matrix = {"adamw": 8, "adamw_8bit": 2 + 8 / 256, "muon": 4}[kind]
    assert taken == 106_496 * per_matrix + 8 * (count - 106_496)
    assert trained_bytes(kind, Sizes(64, 2, 192), count) == 8 * count + taken


def test_an_adapter_is_all_matrices():
    assert trained_bytes("muon", Sizes(64, 2, 192), 200_000, adapter=1000) == (8 + 4) * 1000


def test_a_package_that_is_missing_is_named_before_anything_is_loaded(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    config = read_settings(recipe_path("sums"), ["optim.optimizer=adamw_8bit"]).config
    with pytest.raises(
        OptimizerError,
        match='^optim.optimizer = "adamw_8bit" needs the package bitsandbytes: '
        + re.escape(install_command("bitsandbytes")),
    ):
        build(config)


@needs_bitsandbytes
def test_moments_of_8_bits_step_nearly_as_those_of_32():
    start = torch.cat([p.detach().flatten() for p in wide_model().parameters()])
    steps = [
        stepped(optimizer_of(kind, wide_model()), range(6)) for kind in ("adamw", "adamw_8bit")
    ]
    apart = (steps[0] - steps[1]).norm() / (steps[0] - start).norm()
    assert 0 < apart < 0.05
