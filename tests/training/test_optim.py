"""Learning rates and optimizers."""

import pytest

from quartet.training.optim import Optim, OptimizerConfig


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
