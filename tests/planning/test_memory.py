"""Predictions of memory, against what is really kept."""

import dataclasses

import pytest
import torch
import transformers

from quartet.algorithms.presets import ALGORITHMS
from quartet.assembly import build, components
from quartet.assembly.assembler import Assembler
from quartet.assembly.stages import stage
from quartet.config.toml import read_settings
from quartet.distributed.offload import NO_OFFLOAD
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.models import trunk
from quartet.models.actor_critic import Separate
from quartet.models.forward import masked_logprobs
from quartet.models.language_model import create
from quartet.models.shape import Shape
from quartet.models.trunk import checkpoint_blocks
from quartet.planning.gpu_memory import (
    micro_batch_tokens,
    tokens_that_fit,
    training_memory,
    workload,
)
from quartet.planning.memory import (
    Sizes,
    activation_bytes,
    cpu_micro_batch,
    policy_parameters,
    scoring_tokens,
    sizes,
)
from quartet.planning.plan import in_words, plan
from quartet.recipes import recipe_path
from tests.support.world import model, prompts, tokenizer

SHAPE = Shape(type="llama", hidden_size=64, num_layers=3, num_heads=4, max_length=64)


def kept_bytes(made, tokens, mask):
    """What autograd holds between forward and backward, weights aside, each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in made.parameters()}
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = masked_logprobs(made, tokens, mask).sum()
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(checkpointing):
    made = create(SHAPE, tokenizer(), 0)
    if checkpointing:
        made = checkpoint_blocks(made)
    predicted = activation_bytes(Sizes(64, 3, 192), checkpointing)
    mask = torch.arange(64).expand(8, 64) > 0
    tokens = torch.randint(4, 20, (8, 64))
    measured = kept_bytes(made, tokens, mask) / tokens.numel()
    if (
        checkpointing
    ):  # one block is computed again at a time, and its activations are not alive here
        assert measured == pytest.approx(4 * 3 * 64, rel=0.8)
        assert measured < activation_bytes(Sizes(64, 3, 192), False) / 4
        assert predicted < activation_bytes(Sizes(64, 3, 192), False) / 1.5
    else:
        assert measured == pytest.approx(predicted, rel=0.25)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_checkpoints_change_no_gradient_and_turn_no_dropout_on(kind):
    plain, checkpointed = model(kind), checkpoint_blocks(model(kind))
    tokens = torch.randint(4, 20, (3, 12))
    mask = torch.arange(12).expand(3, 12) > 2
    gradients = [
        torch.autograd.grad(masked_logprobs(m, tokens, mask).sum(), list(m.parameters()))
        for m in (plain, checkpointed)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert kept_bytes(checkpointed, tokens, mask) < kept_bytes(plain, tokens, mask)
    assert not any(m.training for m in checkpointed.modules())
    answers = [
        NativeGenerator(m, tokenizer(), frozenset({1}), seed=0).generate(
            prompts(4), Sampling(max_new_tokens=9)
        )
        for m in (plain, checkpointed)
    ]
    assert answers[0] == answers[1]


def test_a_run_with_checkpoints_trains(tmp_path):
    config = read_settings(
        recipe_path("reviews"),
        ["policy.gradient_checkpointing=true", 'recipe="sft"', "sft.steps=2"],
    ).config
    job = build(dataclasses.replace(config, data=dataclasses.replace(config.data, rows=32)))
    trained = job.stages[0].load_policy(tmp_path)
    assert all(block.gradient_checkpointing for block in trained.base_model.layers)


def config_with(*words):
    return read_settings(recipe_path("reviews"), list(words)).config


def of_width(hidden, *words):
    shape = (f"hidden_size={hidden}", "num_layers=10", "num_heads=10")
    return config_with(*(f"policy.create.{key}" for key in shape), *words)


@pytest.mark.slow
def test_what_only_scores_is_given_the_tokens_of_a_pass_without_a_gradient():
    """Reward models, the evaluation, and the learner beside those of its micro-batches."""
    made = Assembler(of_width(1000))
    assert made.rewards.context.micro_batch_tokens == 2048 > made.micro_batch_tokens
    assert stage(made, "evaluation").micro_batch_tokens == 2048
    assert stage(made, "reward_model").micro_batch_tokens == made.micro_batch_tokens
    learner = components._learner(
        made, ALGORITHMS["ppo"], Separate(model(), None), None, NO_OFFLOAD
    )
    assert (learner.budget.tokens, learner.budget.scoring_tokens) == (made.micro_batch_tokens, 2048)


def test_on_a_cpu_the_activations_of_a_micro_batch_are_bounded():
    # A block of width 1,000 with an inner one of 4,000 keeps 4 + 5 + 12 thousand numbers a token.
    assert activation_bytes(Sizes(1000, 10, 4000), False) == 4 * 10 * 21_000
    assert cpu_micro_batch(840e3) == 380  # 320 MB / 0.84 MB
    assert cpu_micro_batch(100.0) == 2048 and cpu_micro_batch(1e9) == 256
    wide, shared = of_width(1000), of_width(1000, "critic.type=shared")
    # Without a gradient there is one block's at a time.
    assert scoring_tokens(wide, 380) == 2048 and scoring_tokens(wide, 3000) == 3000
    wider = of_width(4000)
    assert micro_batch_tokens(wider, None) == 256 < scoring_tokens(wider, 256) < 2048
    # A critic with a trunk of its own has its activations when the actor's are gone.
    assert micro_batch_tokens(wide, None) == micro_batch_tokens(shared, None) < 2048


def test_the_setting_wins_and_a_gpu_gets_what_its_memory_holds():
    chosen, asked = config_with(), config_with("optim.micro_batch_tokens=999")
    assert (
        micro_batch_tokens(asked, None)
        == micro_batch_tokens(asked, 80e9)
        == 999
        == scoring_tokens(asked, 999)
    )
    assert micro_batch_tokens(chosen, None) == 2048
    roomy, tight = (micro_batch_tokens(chosen, free) for free in (2e9, 0.4e9))
    assert 2048 < tight < roomy <= 2**16
    assert micro_batch_tokens(chosen, 0.0) == 2048
    many = config_with("launch.shard=true", "launch.processes=8")
    assert micro_batch_tokens(many, 0.4e9, world=8) > tight, (
        "an eighth of the weights leaves more room"
    )
    assert micro_batch_tokens(config_with("policy.gradient_checkpointing=true"), 0.4e9) > tight


def peak(work, tokens):
    return sum(training_memory(dataclasses.replace(work, micro_tokens=tokens), 1).values())


def test_the_chosen_micro_batch_takes_half_of_what_the_plan_leaves_it():
    config = of_width(1000)
    tokens, work = micro_batch_tokens(config, 8e9), workload(config)
    assert 2048 < tokens < 2**16
    left = 8e9 - peak(work, 1)
    assert peak(work, tokens) - peak(work, 1) == pytest.approx(left / 2, rel=0.01)


def test_adapters_leave_room_for_tokens():
    """They have no gradients and moments of the trunk."""
    full, adapter = of_width(2000), of_width(2000, "policy.adapter.rank=8")
    assert micro_batch_tokens(adapter, 16e9) > 2 * micro_batch_tokens(full, 16e9)


def test_the_logits_of_a_large_vocabulary_take_room():
    """3 copies of an eighth of the logits, in float32, beside what a token has without them."""
    work = dataclasses.replace(workload(of_width(2000)), beside=0)  # no gradients of embeddings
    few, many = (dataclasses.replace(work, vocabulary=words) for words in (80, 262_144))
    without, with_logits = (
        80e9 / tokens_that_fit(each, 1, 80e9 + peak(each, 1)) for each in (few, many)
    )
    assert with_logits - without == pytest.approx(3 * 4 * (262_144 - 80) / 8, rel=0.02)


def test_a_reward_model_that_is_larger_than_the_policy_bounds_the_micro_batch(tmp_path):
    shape = dataclasses.replace(SHAPE, hidden_size=1024)
    create(shape, tokenizer(), 0).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    adapter = ("policy.create.hidden_size=64", "policy.adapter.rank=8")
    alone, beside = config_with(*adapter), config_with(*adapter, f"reward_model.model={tmp_path}")
    assert micro_batch_tokens(alone, 2e9) > micro_batch_tokens(beside, 2e9) > 2048


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sizes_and_parameters_of_a_folder_are_read_from_its_files(kind, tmp_path):
    made = model(kind)
    made.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    config = config_with()
    config = dataclasses.replace(
        config, policy=dataclasses.replace(config.policy, create=None, model=str(tmp_path))
    )
    found = sizes(config)
    assert found is not None and (found.hidden, found.layers) == (32, 2)
    assert found.intermediate == (4 * 32 if kind == "gpt2" and made.config.n_inner is None else 96)
    assert policy_parameters(config, None) == sum(p.numel() for p in made.parameters())
    assert workload(config).vocabulary == made.config.vocab_size, "also where the head is tied"


def test_activations_of_an_architecture_that_is_not_fused_are_what_autograd_keeps(monkeypatch):
    """Gemma 3 has heads wider than hidden / heads: the widths of queries and keys count by themselves. Here it goes through
    transformers' own forward pass."""
    monkeypatch.setattr(trunk, "has_fused_forward", lambda *_: False)
    shape = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1}
    config = transformers.Gemma3TextConfig(vocab_size=64, pad_token_id=0, **shape, **heads)
    made = transformers.Gemma3ForCausalLM(config).eval()
    predicted = activation_bytes(Sizes(96, 3, 256, 1 / 4, 128 / 96, is_fused=False), False)
    mask = torch.arange(64).expand(8, 64) > 0
    tokens = torch.randint(4, 20, (8, 64))
    measured = kept_bytes(made, tokens, mask) / tokens.numel()
    assert measured == pytest.approx(predicted, rel=0.15)


def test_small_models_are_counted_in_thousands():
    words = (
        "policy.create.hidden_size=16",
        "policy.create.num_layers=1",
        "policy.create.num_heads=2",
    )
    small = plan(read_settings(recipe_path("reviews"), words, "reviews").config)
    assert in_words(small).startswith("policy 9 k · critic 9 k")
    assert in_words(plan(read_settings(recipe_path("reviews"), (), "reviews").config)).startswith(
        "policy 0.9 M · "
    )
