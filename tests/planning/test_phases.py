"""The memory of each phase, by hand and against what torch allocates."""

import dataclasses
import itertools

import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from quartet.config.toml import read_settings
from quartet.models.forward import masked_logprobs
from quartet.planning import phases as planned
from quartet.planning.memory import activation_bytes, sizes
from quartet.planning.phases import FRAGMENTATION, KERNEL_BYTES, TOKENIZER_FACTOR, phases
from quartet.planning.plan import plan
from quartet.recipes import recipe_path
from quartet.training.optim import Optimizer, OptimizerConfig
from quartet.training.optimizer_step import optimizer_step
from tests.support.world import model

LORA = 'policy.adapter={type="lora", rank=16}'


def config_with(*words):
    return read_settings(recipe_path("reviews"), list(words)).config


def config_of_folder(folder, *words):
    config = config_with(*words)
    return dataclasses.replace(
        config, policy=dataclasses.replace(config.policy, create=None, model=str(folder))
    )


def test_the_tokenizer_counts_in_each_phase(tmp_path):
    model().save_pretrained(tmp_path)
    config = config_of_folder(tmp_path)
    before = phases(config, {"policy": 1}, 10_000, (8.0, 12.0))
    (tmp_path / "tokenizer.json").write_bytes(b" " * 1_000_000)
    after = phases(config, {"policy": 1}, 10_000, (8.0, 12.0))
    assert list(after) == ["sft", "reward model", "ppo update", "evaluation"]
    for phase, held in after.items():
        assert held - before[phase] == pytest.approx(TOKENIZER_FACTOR * 1_000_000)


def test_a_prompt_of_a_group_counts_once():
    """8 prompts of 10 tokens with 4 answers of at most 20: 8 · 10 + 32 · 20. Of four minibatches each has 8
    answers, perhaps one to each prompt: 8 · 10 + 8 · 20. Of sixteen, 2 answers to 2 prompts."""
    rollout = ("prompts_per_step=8", "samples_per_prompt=4", "max_new_tokens=20")
    words = [f"rollout.{word}" for word in rollout]

    def tokens(minibatches):
        config = config_with(*words, f"optim.minibatches={minibatches}")
        return planned.minibatch_tokens(config, 10.0)

    assert [tokens(count) for count in (1, 4, 16)] == [720, 240, 60]


def test_a_batch_of_ilql_has_its_rows_tokens_and_the_heads_beside_the_policy():
    """Of 20 tokens a row: the second batch has 4 rows more. Q and what trains it are four numbers for each of its weights, the target
    is one."""
    few, more = (
        config_with('recipe=["ilql"]', f"ilql.batch_size={rows}", "optim.micro_batch_tokens=4096")
        for rows in (2, 6)
    )
    held = [phases(c, {"policy": 10**6}, 10**6, (8.0, 12.0))["ilql"] for c in (few, more)]
    per_token = activation_bytes(sizes(few), False)
    assert held[1] - held[0] == pytest.approx(planned.FRAGMENTATION * 80 * per_token)
    heads = 5 * 4 * sizes(few).vocabulary * sizes(few).hidden
    sft = config_with('recipe=["sft"]', "sft.batch_size=2", "optim.micro_batch_tokens=4096")
    assert held[0] - phases(sft, {"policy": 10**6}, 10**6, (8.0, 12.0))["sft"] == pytest.approx(
        heads
    )


def test_an_evaluation_holds_one_policy_and_each_reward_model():
    """The policy, what its decoder copies, and members that are as large: four bytes a parameter."""
    config = config_with("evaluation.best_of=0", "evaluation.prompts=2")
    models = {"policy": 10**9, "reward model": 10**9}
    without = phases(config, {"policy": 10**9}, 10**9, (8.0, 12.0))["evaluation"]
    held = phases(config, models, 10**9, (8.0, 12.0))["evaluation"]
    assert held - without == 4e9
    words = ("reward_model.members=3", 'reward=[{type="ensemble"}]')
    ensemble = config_with("evaluation.best_of=0", "evaluation.prompts=2", *words)
    assert phases(ensemble, models, 10**9, (8.0, 12.0))["evaluation"] - held == 2 * 4e9


def test_the_head_of_a_large_vocabulary_is_not_copied_by_the_decoder(monkeypatch):
    """0.9 M parameters of which the last 40,000 are embeddings: with the limit at 40,000 they are not copied."""
    config = config_with("evaluation.best_of=0", "evaluation.prompts=2")
    matrices = int(sizes(config).matrix_parameters)

    def evaluation():
        return phases(config, {"policy": 1}, matrices + 40_000, (8.0, 12.0))["evaluation"]

    whole = evaluation()
    monkeypatch.setattr(planned, "WIDE_WEIGHT", 40_000)
    assert whole - evaluation() == pytest.approx(FRAGMENTATION * 4 * 40_000)


def test_the_libraries_of_cuda_are_planned_where_torch_is_built_with_them(monkeypatch):
    config = read_settings(recipe_path("reviews"), (), "reviews").config
    peaks = []
    for spec in (None, "a namespace"):
        monkeypatch.setattr(planned.importlib.util, "find_spec", lambda name, s=spec: s)
        peaks.append(plan(config).memory.items())
    assert {n: size + planned.CUDA_BYTES for n, size in peaks[0]} == dict(peaks[1])


def most_bytes(work):
    """The most bytes that torch has allocated during the work, above those before it."""
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiled:
        work()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events))


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_that_are_trained_count_twice_more(tied):
    """A model that is nearly all embeddings. Its second step of two micro-batches holds their gradients, and
    two more of the size of one, at the end of a backward pass or in AdamW's step."""
    shape = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    config = transformers.LlamaConfig(vocab_size=2**15, tie_word_embeddings=tied, **shape)
    made = transformers.LlamaForCausalLM(config).eval()
    optimizer = Optimizer(list(made.parameters()), OptimizerConfig(), 2)
    tokens, mask = torch.randint(4, 1000, (2, 8)), torch.arange(8).expand(2, 8) > 0

    def step():
        losses = (-masked_logprobs(made, tokens, mask).sum() for _ in range(2))
        optimizer_step(losses, {"policy": optimizer})

    step()
    embeddings = 4 * 2**15 * 64
    kept = sum(p.nbytes for p in made.parameters())
    assert most_bytes(step) - kept == pytest.approx(2 * embeddings, rel=0.05)


def test_the_plan_has_them_where_all_weights_are_trained():
    """100,000 embeddings more: weights, gradients and moments are 16 bytes of each, and twice a gradient
    is 8. Under an adapter the embeddings take 4."""

    def held(*words):
        words = ('recipe="sft"', *words)
        matrices = int(sizes(config_with(*words)).matrix_parameters)
        few, more = (
            phases(config_with(*words), {"policy": n}, n, (8.0, 12.0))["sft"]
            for n in (matrices + 100_000, matrices + 200_000)
        )
        return (more - few) / 100_000

    assert held() == pytest.approx(16 + 8)
    assert held(LORA) == pytest.approx(4)


def test_a_stage_with_an_adapter_ends_with_the_matrices_that_it_is_merged_into():
    """With micro-batches of one token, the copies of the matrices are more than the activations."""
    words = ('recipe="sft"', "policy.create.hidden_size=512", "policy.create.num_heads=8")
    small, large = (config_with(*words, LORA, f"optim.micro_batch_tokens={n}") for n in (1, 1024))
    parameters = int(sizes(small).matrix_parameters)
    held = [phases(c, {"policy": 1}, parameters, (8.0, 12.0))["sft"] for c in (small, large)]
    activations = (
        FRAGMENTATION * min(1024, small.sft.batch_size * 20) * activation_bytes(sizes(small), False)
    )
    copies = FRAGMENTATION * 4 * parameters
    assert activations + planned.WORKING_BYTES > copies, "or the test compares nothing"
    assert held[1] - held[0] == pytest.approx(activations + planned.WORKING_BYTES - copies)


@pytest.mark.parametrize(
    ("bits", "precision", "held", "copied"),
    [("", "fp32", 4, 0), ("", "bf16", 2, 4), ("nf4", "fp32", 4, 2), ("nf4", "bf16", 2, 0)],
)
def test_embeddings_are_copied_where_they_are_saved_in_another_dtype(bits, precision, held, copied):
    """Beside the merged matrices. A model is saved in float32, one on a base in 4 bits in bfloat16."""
    words = ['recipe="sft"', LORA, f"run.precision={precision}", "optim.micro_batch_tokens=1"]
    words += ["policy.create.hidden_size=1024", "policy.create.num_heads=8"]
    config = config_with(*words, *([f'policy.quantize="{bits}"'] if bits else []))
    matrices = int(sizes(config).matrix_parameters)
    few, more = (
        phases(config, {"policy": n}, n, (8.0, 12.0))["sft"]
        for n in (matrices + 100_000, matrices + 200_000)
    )
    assert (more - few) / 100_000 == pytest.approx(held + FRAGMENTATION * copied)


def test_the_decoder_of_a_large_model_is_returned_before_the_update(monkeypatch):
    """Of a small one, rollouts and update count together."""
    config = config_with()
    working = planned._Working(config, sizes(config), 10**6, (8.0, 12.0))
    rows = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    update = working.training(planned.minibatch_tokens(config, 8.0))
    assert working.rl_step() == working.sampling(rows, fragmentation=1.0) + update
    monkeypatch.setattr(planned, "LARGE", 1)
    assert working.rl_step() == max(working.sampling(rows), KERNEL_BYTES + update)


def test_a_decoder_has_room_for_the_longest_prompt_of_a_file(tmp_path):
    """A world says how long its prompts are. Keys and values of 4 layers are 8 · 128 numbers a token."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 4)
    of_world = config_with("data.max_prompt_tokens=40", 'policy.tokenizer={type="train"}')
    data = dataclasses.replace(of_world.data, world=None, train=str(tmp_path / "rows.jsonl"))
    of_file = dataclasses.replace(of_world, data=data)
    held = [
        planned._Working(c, sizes(c), 10**6, (10.0, 12.0)).sampling(64) for c in (of_world, of_file)
    ]
    shape = of_world.policy.create
    keys_and_values = 4 * 2 * shape.num_layers * shape.hidden_size
    assert held[1] - held[0] == pytest.approx(FRAGMENTATION * 64 * 30 * keys_and_values)


def test_a_pass_over_prompts_has_what_one_block_computes():
    """Of width 128 with an inner one of 384, 4 + 5 times 128 and 3 times 384 numbers a token, for at most 4,096 tokens."""
    working = planned._Working(config_with(), sizes(config_with()), 10**6, (10.0, 12.0))
    few, many, more = (working.sampling(rows, fragmentation=1.0) for rows in (100, 400, 500))
    token = 4 * (9 * 128 + 3 * 384)
    row = (many - few - 300 * 10 * token) / 300  # its keys, values and logits
    assert more - many == pytest.approx(96 * token + 100 * row)
    assert 0 < row < (40 + 48) * 4 * 2 * 4 * 128 + 3 * 4 * 4096


GOLD = 'reward=[{type="gold"}]'


def test_the_evaluation_has_the_kernels_of_a_stage_that_samples_beside_its_own():
    group = ("rollout.samples_per_prompt=8", 'algorithm={preset="grpo"}')
    memory = {}
    for stage, more in (("dpo", ()), ("grpo", group), ("online_dpo", ())):
        recipe = f'recipe=["sft", "{stage}", "evaluation"]'
        config = config_with(recipe, GOLD, *more)
        memory[stage] = phases(config, {"policy": 1}, 10**6, (8.0, 12.0))["evaluation"]
    assert memory["grpo"] - memory["dpo"] == KERNEL_BYTES
    assert memory["online_dpo"] - memory["dpo"] == KERNEL_BYTES


@pytest.mark.parametrize("large", [False, True])
def test_online_pairs_are_sampled_and_scored_beside_the_update(large, monkeypatch):
    """Two answers to each prompt, and the reward model of the run with its 700,000 parameters in float32."""
    monkeypatch.setattr(planned, "LARGE", 1 if large else 2**40)
    monkeypatch.setattr(planned, "reward_model_parameters", lambda *_: 700_000)
    roles = {"policy": 10**6, "reward model": 700_000, "reference": 10**6}
    row = (8.0, 12.0)
    memory = {}
    for stage in ("dpo", "online_dpo"):
        config = config_with(f'recipe=["sft", "reward_model", "{stage}"]')
        memory[stage] = phases(config, roles, 10**6, row)[stage]
    working = planned._Working(config, sizes(config), 10**6, row)
    rows = config.preference.batch_size
    update = working.training(rows * (8.0 + 2 * 12))
    sampled = working.sampling(2 * rows, fragmentation=1.0)
    together = max(working.sampling(2 * rows) - update, KERNEL_BYTES) if large else sampled
    assert memory["online_dpo"] - memory["dpo"] == pytest.approx(together + 4 * 700_000)


def test_keys_and_values_that_come_from_the_system_leave_no_holes():
    """A row of 80 tokens takes 2 · 512 numbers a token in each layer: 32 MiB are 102 rows."""
    words = [f"policy.create.{key}" for key in ("hidden_size=512", "num_layers=8", "num_heads=8")]
    config = config_with(*words, "rollout.max_new_tokens=80")
    working = planned._Working(config, sizes(config), 27 * 10**6, (0.0, 12.0))

    def holes(rows):
        return working.sampling(rows) - working.sampling(rows, fragmentation=1.0)

    row = 8 * 80 * 2 * 512 * 4
    assert holes(102) - holes(0) == pytest.approx((FRAGMENTATION - 1) * 102 * row)
    assert holes(103) == pytest.approx(holes(0))
