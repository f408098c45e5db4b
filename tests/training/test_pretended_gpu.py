"""Sampling, scoring and learning on a GPU that is not there: nothing mixes devices, and the host seldom waits."""

import contextlib
import dataclasses
from collections import Counter

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM

import quartet
from quartet.algorithms.kl import KLInLoss, NoKL
from quartet.algorithms.presets import ALGORITHMS
from quartet.assembly import build
from quartet.assembly.device import device
from quartet.assembly.model_checks import _check_precision
from quartet.assembly.models import Models
from quartet.config.toml import read_settings
from quartet.data.sampler import Sampler
from quartet.distributed.process_group import SINGLE_PROCESS
from quartet.generation import slots
from quartet.generation.decoders import RowDecoder, make_decoder
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling, draw
from quartet.generation.slots import SlotDecoder
from quartet.loops.collect import Collector
from quartet.loops.custom import StageContext, record
from quartet.loops.responses import Responses
from quartet.loops.rl import rl
from quartet.models import attention
from quartet.models.actor_critic import Separate, freeze
from quartet.models.adapters import add_adapter
from quartet.models.attention import backend, kernel, why_padded
from quartet.models.forward import masked_logprobs
from quartet.models.heads import ScalarModel
from quartet.models.language_model import ModelError, create, stop_ids
from quartet.models.logprobs import head_logits
from quartet.models.lora import Lora
from quartet.models.precision import best_precision, compute_in
from quartet.models.shape import Shape
from quartet.planning.gpu_memory import SAMPLING_COPIES
from quartet.recipes import recipe_path
from quartet.rewards.protocol import Weighted
from quartet.training.budget import Budget
from quartet.training.learner import Learner
from quartet.training.optim import Optim, Optimizer, OptimizerConfig
from tests.support.decoding_cost import cost_of_a_token
from tests.support.pretended_device import CUDA, Pretended, on_device, pretended
from tests.support.recorded_graph import Graph, graphs
from tests.support.world import model, prompts, rollout, tokenizer

BF16 = torch.bfloat16
FIRST_ORDER = sorted(name for name in ALGORITHMS if name not in {"trpo", "npg"})


class Length:
    name = "length"

    def score(self, rollouts):
        return [float(len(r.response_ids) % 5) for r in rollouts]

    def token_scores(self, rollouts):
        return [[1.0] * len(r.response_ids) for r in rollouts]


def parts(name, on_gpu=True, layers=2, dtype=BF16, **optim):
    """A learner, a generator and a collector of the tiny world, for a preset."""
    algorithm = ALGORITHMS[name]

    def there(made):
        return on_device(made) if on_gpu else made

    actor = model() if layers == 2 else deeper(layers)
    critic = None
    if algorithm.needs_critic:
        critic = ScalarModel.from_trunk(actor, None, seed=0)
        there(critic.model)
        critic.compute_in(dtype)
    actor = compute_in(there(actor), dtype)
    reference = None
    if algorithm.needs_reference:
        reference = there(compute_in(freeze(model() if layers == 2 else deeper(layers)), dtype))
    sampling = Sampling(max_new_tokens=12)
    learner = Learner(
        Separate(actor, critic), reference, Optim(lr=1e-4, epochs=2, **optim), sampling, steps=3
    )
    generator = NativeGenerator(actor, tokenizer(), stop_ids(actor, tokenizer()), 0)
    samples = 4 if algorithm.needs_group else 1
    collector = Collector(Sampler(prompts(8), 8, 0), generator, [Weighted(Length(), 1.0)], samples)
    return algorithm, learner, collector


def deeper(layers, vocab_size=None):
    config = AutoConfig.for_model(
        "llama", vocab_size=vocab_size or len(tokenizer()), hidden_size=32, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64, eos_token_id=tokenizer().eos_token_id,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in {"ppo", "grpo", "remax"} else pytest.mark.slow)
        for name in FIRST_ORDER
    ],
)
def test_a_step_of_every_preset_mixes_no_devices(name):
    with pretended():
        algorithm, learner, collector = parts(name)
        [step] = [s for s, _ in zip(rl(collector, learner, algorithm, 0), range(1), strict=False)]
    assert step.metrics["sampler_ratio"] < 1.02
    assert step.metrics["ratio/first_error"] < 0.05
    assert all(isinstance(p, Pretended) for p in learner.models.actor.parameters())


@pytest.mark.parametrize("name", ["ppo", "grpo"])
@pytest.mark.slow
def test_it_learns_what_the_cpu_learns(name):
    """In float32, whose kernels on a GPU are others too."""
    found = {}
    for on_gpu in (True, False):
        with pretended():
            algorithm, learner, collector = parts(name, on_gpu, dtype=torch.float32)
            found[on_gpu] = next(iter(rl(collector, learner, algorithm, 0))).metrics
    there, here = found[True], found[False]
    assert there.keys() == here.keys()
    for metric, value in here.items():
        assert there[metric] == pytest.approx(value, rel=1e-2, abs=1e-3), metric


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "grpo", "opo"])
def test_a_device_without_float64_is_asked_for_none(name):
    with pretended(forbid_float64=True):
        algorithm, learner, collector = parts(name)
        next(iter(rl(collector, learner, algorithm, 0)))


# --- how often the host waits, and how much it asks for


def counted(name, micro_batch_tokens):
    """The waits and kernels of scoring and of one epoch of an update."""
    with pretended() as counts:
        algorithm, learner, collector = parts(name, layers=3)
        learner.optim = dataclasses.replace(learner.optim, epochs=1)
        learner.budget.tokens = micro_batch_tokens
        generator = collector.generator
        samples = collector.samples_per_prompt
        rollouts = [
            dataclasses.replace(r, score=float(i % 3))
            for i, r in enumerate(generator.generate(prompts(8), learner.sampling, samples))
        ]
        learner.score(rollouts, algorithm)  # what is done once per model is done
        counts.reset()
        batch = learner.score(rollouts, algorithm)
        scoring = Counter(counts.waits)
        experience = algorithm.experience(batch)
        counts.reset()
        learner.update(experience, algorithm)
        lengths = [len(r.prompt.ids) + len(r.response_ids) for r in rollouts]
        number = len(list(learner.process_group.micro_batches(lengths, micro_batch_tokens)))
        return number, scoring, Counter(counts.waits)


@pytest.mark.slow
@pytest.mark.parametrize("warm_up", [0, 1], ids=["both", "the critic alone"])
def test_actor_and_critic_have_their_activations_one_after_the_other(warm_up):
    """The peak of an update with a critic is that of the actor alone, and of the critic's gradients."""
    peaks = []
    for with_critic in (True, False):
        with pretended() as counts:
            actor = deeper(12)
            critic = ScalarModel.from_trunk(actor, None, seed=0) if with_critic else None
            for made in (actor, critic.model) if critic else (actor,):
                on_device(made)
            learner = Learner(
                Separate(actor, critic),
                None,
                Optim(minibatches=1, epochs=1, critic_warmup_steps=warm_up * with_critic),
                Sampling(max_new_tokens=12),
                steps=2,
            )
            algorithm = ALGORITHMS["ppo" if with_critic else "rloo"]
            algorithm = dataclasses.replace(algorithm, kl=NoKL())
            rollouts = [
                rollout(p, tuple(range(5, 15)) * 3, 1.0, group=i // 2, number=i)
                for i, p in enumerate(prompts(24))
            ]
            experience = algorithm.experience(learner.score(rollouts, algorithm))
            gradients = 4 * sum(p.numel() for p in actor.parameters())
            counts.reset_peak()
            before = counts.alive
            learner.update(experience, algorithm)
            peaks.append((counts.peak - before) / gradients)
    assert peaks[1] > 8, "activations are most of it"
    assert peaks[0] < peaks[1] + 4  # gradients and moments of the critic


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_the_host_waits_seldom(name):
    """Each wait lets the device run dry: none per micro-batch of an update, two per micro-batch of scoring and model, and a
    dozen per update with one optimizer step. These are ceilings, to be lowered when they are beaten."""
    few, scoring_few, update_few = counted(name, 10_000)
    many, scoring_many, update_many = counted(name, 60)
    assert few == 1 and many >= 3
    more = many - few
    assert (sum(update_many.values()) - sum(update_few.values())) / more <= 0, update_many
    assert (sum(scoring_many.values()) - sum(scoring_few.values())) / more <= 2, scoring_many
    assert sum(scoring_few.values()) <= 2 and sum(update_few.values()) <= 11, update_few


class Weighs(quartet.StageSource):
    """A user's stage that weights each response, on whatever device."""

    internal = True
    needs_reference = True

    def step(self, context):
        rollouts = context.sample(context.batch(), 2)
        log_ratios = context.logprobs(rollouts) - context.logprobs(rollouts, context.reference)
        advantages = [float(r.score) - 2 for r in rollouts]

        def loss(tokens):
            distance = tokens.logprobs - tokens.ref_logprobs + 0 * tokens.of(log_ratios)
            return distance.square() - tokens.of(advantages) * tokens.logprobs

        context.update(rollouts, loss)
        return {"distance": float(log_ratios.abs().max())}


@pytest.mark.slow
def test_a_users_stage_mixes_no_devices_and_seldom_waits():
    waits = {}
    for most in (10_000, 60):
        with pretended() as counts:
            policy = compute_in(on_device(deeper(3)), BF16)
            reference = on_device(compute_in(freeze(deeper(3)), BF16))
            reference.load_state_dict(policy.state_dict())
            generator = NativeGenerator(policy, tokenizer(), stop_ids(policy, tokenizer()), 0)
            responses = Responses(generator, Sampling(max_new_tokens=12), [Weighted(Length(), 1.0)])
            optimizer = Optimizer(list(policy.parameters()), OptimizerConfig(lr=1e-4), 2)
            rows = Sampler(prompts(8), 8, 0)
            context = StageContext(
                Weighs(steps=2), policy, reference, tokenizer(), rows, responses, optimizer,
                Budget(most),
            )  # fmt: skip
            metrics = context.take_step(1)
            assert metrics["distance"] < 0.02 and metrics["grad_norm/policy"] > 0
            rollouts = context.rollouts
            counts.reset()
            context._update([record(r) for r in rollouts], lambda tokens: -tokens.logprobs, most)
            lengths = [len(r.prompt.ids) + len(r.response_ids) for r in rollouts]
            number = len(list(context.process_group.micro_batches(lengths, most)))
            waits[number] = Counter(counts.waits)
    few, many = min(waits), max(waits)
    assert few == 1 and many >= 3
    more = sum(waits[many].values()) - sum(waits[few].values())
    assert more / (many - few) <= 2, waits


def test_a_decoded_token_costs_few_kernels_and_hardly_a_wait():
    layers = 6
    with pretended() as counts:
        made = compute_in(on_device(deeper(layers)), BF16)
        assert isinstance(make_decoder(made, 60), SlotDecoder)
        kernels, waits = cost_of_a_token(made, counts)
    assert kernels <= 13 * layers + 43 and waits <= 0.13


def test_stop_strings_and_a_smallest_length_mix_no_devices_and_add_a_wait_in_eight_tokens():
    sampling = Sampling(max_new_tokens=40, min_new_tokens=3, stop=("no such text",))
    with pretended() as counts:
        made = compute_in(on_device(deeper(1)), BF16)
        generator = NativeGenerator(made, tokenizer(), frozenset({1}), 0)
        answers = generator.generate(prompts(4), sampling)
        assert all(len(answer.response_ids) >= 3 for answer in answers)
        generator = NativeGenerator(made, tokenizer(), frozenset({10**6}), 0)

        def waits(tokens):
            counts.reset()
            changed = {"max_new_tokens": tokens, "min_new_tokens": 0}
            generator.generate(prompts(4), dataclasses.replace(sampling, **changed))
            return sum(counts.waits.values())

        waits(8)
        few, many = waits(8), waits(40)
    assert (many - few) / 32 <= 0.26


def test_back_ends_are_named_for_each_device_dtype_and_size_of_heads(monkeypatch):
    """Flash attention takes heads of a multiple of 8 coordinates, up to 256."""
    table = {
        ("cpu", torch.float32, 64): "rectangle",
        ("cpu", BF16, 64): "rectangle",
        ("cuda", BF16, 8): "varlen",
        ("cuda", BF16, 256): "varlen",
        ("cuda", BF16, 12): "efficient",
        ("cuda", BF16, 512): "efficient",
        ("cuda", torch.float16, 64): "varlen",
        ("cuda", torch.float32, 64): "efficient",
        ("mps", torch.float32, 64): "repeated",
        ("mps", BF16, 64): "repeated",
    }

    def found():
        return {key: backend(torch.device(key[0]), *key[1:]) for key in table}

    monkeypatch.setattr(attention, "HAS_VARLEN", True)
    assert found() == table and why_padded(CUDA, BF16) is None
    monkeypatch.setattr(attention, "HAS_VARLEN", False)
    flash = {key: "flash" if kind == "varlen" else kind for key, kind in table.items()}
    assert found() == flash and "rows are padded" in str(why_padded(CUDA, BF16))
    assert why_padded(CUDA, torch.float32) is why_padded(torch.device("cpu"), BF16) is None


def test_a_torch_without_rows_end_to_end_samples_and_learns_on_padded_rows(monkeypatch):
    with pretended():
        monkeypatch.setattr(attention, "HAS_VARLEN", False)
        made = compute_in(on_device(deeper(2)), BF16)
        assert isinstance(make_decoder(made, 60), RowDecoder)
        generator = NativeGenerator(made, tokenizer(), stop_ids(made, tokenizer()), 0)
        answers = generator.generate(prompts(4), Sampling(max_new_tokens=12))
        found = masked_logprobs(
            made,
            *(torch.tensor(x).to(CUDA) for x in ([[5, 6, 7, 8]], [[False, True, True, True]])),
        )
        found.sum().backward()
    assert all(answer.response_ids for answer in answers) and torch.isfinite(found).all()


def allowed():
    return (
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
    )


def test_float32_takes_the_plain_kernel_where_the_efficient_one_cannot_and_trust_regions_always():
    """Second derivatives exist for the plain kernel only, and a trust region asks for it around its forward passes."""
    with kernel("efficient"):
        assert allowed() == (True, True, False)
    with sdpa_kernel(SDPBackend.MATH), kernel("efficient"):
        assert allowed() == (False, True, False)
    with sdpa_kernel(SDPBackend.MATH), kernel("flash"):
        assert allowed() == (False, True, False)


def test_heads_that_flash_attention_does_not_take_are_decoded_and_trained():
    """Of 6 coordinates here. The attention that is pretended would refuse them, as flash attention does."""
    shape = Shape(type="llama", hidden_size=24, num_layers=1, num_heads=4, max_length=64)
    with pretended():
        made = compute_in(on_device(create(shape, tokenizer(), 0)), BF16)
        assert isinstance(make_decoder(made, 60), RowDecoder)
        tokens, mask = torch.randint(4, 20, (2, 9)), torch.arange(9).expand(2, 9) > 4
        masked_logprobs(made, tokens, mask).sum().backward()
        generator = NativeGenerator(made, tokenizer(), frozenset({1}), 0)
        assert len(generator.generate(prompts(2), Sampling(max_new_tokens=4))) == 2


def test_an_exact_kl_in_the_loss_has_a_gradient_in_half_precision():
    """torch has no derivative of a product of bfloat16 numbers that is kept in float32."""
    hidden, weight, upstream = (torch.randn(*shape) for shape in ((5, 16), (11, 16), (5, 11)))
    found = {}
    for place in ("cpu", "cuda"):
        with pretended():
            here = [x.to(BF16).to(place).requires_grad_() for x in (hidden, weight)]
            (head_logits(*here, None) * upstream.to(place)).sum().backward()
            found[place] = [each.grad.float().to("cpu") for each in here]
    for there, here in zip(found["cuda"], found["cpu"], strict=True):
        assert (there - here).norm() < 0.01 * here.norm()
    with pretended():
        algorithm, learner, collector = parts("grpo")
        algorithm = dataclasses.replace(algorithm, kl=KLInLoss(estimator="exact"))
        step = next(iter(rl(collector, learner, algorithm, 0)))
    assert step.metrics["grad_norm/actor"] > 0


def test_bf16_is_chosen_on_gpus_that_compute_in_it(monkeypatch):
    """torch says by default that a V100 or a T4 supports it: it converts each number."""
    place, words = torch.device("cuda"), ["run.precision='bf16'"]
    config = read_settings(recipe_path("reviews"), words, "recipe reviews").config
    models = Models(config, None, tokenizer(), place, SINGLE_PROCESS)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    for has_it in (True, False):
        emulates = lambda including_emulation=True, has_it=has_it: has_it or including_emulation  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulates)
        assert best_precision(place) == ("bf16" if has_it else "fp32")
        refused = pytest.raises(ModelError, match=r'run.precision = "bf16": this GPU \(Tesla T4\)')
        with contextlib.nullcontext() if has_it else refused:
            _check_precision(models)


def test_the_device_of_a_run_becomes_the_current_one(monkeypatch):
    """CUDA graphs are recorded on the current device, and cuda:1 may be the run's."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with pretended():
        found = device("cuda:0")
    assert chosen == [found]


def test_so_many_rows_are_decoded_together_as_their_logits_leave_room_for(monkeypatch):
    """Half of the free memory is for keys, values and logits: with a wide vocabulary logits are most of it."""
    free, width = 200 * 10**6, 248  # and 8 more, which are 256 columns
    with pretended(), torch.inference_mode():
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))
        made = compute_in(on_device(deeper(1, vocab_size=4096)), BF16)
        decoder = SlotDecoder(made, width)
    per_row = 256 * 2 * 2 * 8 * 2 + (SAMPLING_COPIES + 2) * 4 * 4096
    assert free / 2 - per_row < decoder.max_rows * per_row <= free / 2


def test_samples_of_one_prompt_may_be_more_rows_than_memory_is_for():
    with pretended():
        made = compute_in(on_device(deeper(1)), BF16)
        generator = NativeGenerator(made, tokenizer(), frozenset({1}), 0, max_rows=4)
        assert len(generator.generate(prompts(2), Sampling(max_new_tokens=4), 11)) == 22


def test_new_weights_are_drawn_without_a_word_about_several_gpus(monkeypatch):
    """torch warns where it is not told which devices' random numbers to keep; models are made on the CPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    add_adapter(model(), Lora(rank=2), "policy", 0)


def test_a_gpu_that_torch_has_no_kernels_for_is_refused(monkeypatch):
    """Memory can be had of it: the first kernel fails."""

    def no_kernel(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "ones", no_kernel)
    with pytest.raises(ModelError, match=r'"cuda:0": cannot be used here \(CUDA error: no kernel'):
        device("auto")


def test_a_gpu_that_torch_cannot_use_is_spoken_of(monkeypatch, tmp_path):
    """torch's wheels need a driver as new as their CUDA: with an older one, "auto" is the CPU."""
    monkeypatch.setattr("quartet.assembly.device.DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def notes(*words):
        words = ("data.rows=8", "data.held_out_rows=8", *words)
        config = read_settings(recipe_path("reviews"), words, "recipe reviews").config
        return [note for note in build(config).notes if "driver for NVIDIA GPUs" in note]

    assert notes() == []
    (tmp_path / "version").touch()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    [note] = notes()
    assert f"torch {torch.__version__} is built for CUDA 13.0" in note
    assert notes("run.device=cpu") == []


def test_a_run_says_which_attention_its_torch_lacks(monkeypatch):
    monkeypatch.setattr(
        "quartet.assembly.models.why_padded", lambda device, dtype: f"{device}, {dtype}: padded"
    )
    config = read_settings(
        recipe_path("reviews"), ("data.rows=8", "data.held_out_rows=8"), "reviews"
    ).config
    assert "cpu, torch.float32: padded" in build(config).notes


def decoded(steps=14):
    """The logits of some steps: of nine rows, and then of two."""
    torch.manual_seed(0)
    decoder = SlotDecoder(compute_in(on_device(deeper(2)), BF16), 40)
    logits = decoder.prefill([[3, 4, 5], [6, 7]], 5)
    found = []
    for number in range(steps):
        if number == steps // 2:
            decoder.keep(torch.arange(len(logits), device=CUDA) % 5 == 1)
            logits = logits[:2]
        logits = decoder.step(logits.argmax(-1))
        found.append(logits.float().cpu().clone())
    return found


def test_a_recorded_step_computes_what_a_step_without_a_graph_computes(monkeypatch):
    """Where a step had a Python number in it that changes, each replay would have that of the recording."""
    with pretended(), torch.inference_mode():
        expected = decoded()
        with monkeypatch.context() as patch, graphs(patch.setattr) as made:
            found = decoded()
    assert [graph.replays for graph in made] == [5, 5], "two steps before each recording"
    assert all(map(torch.equal, found, expected))


def test_a_step_is_recorded_beside_threads_that_train_and_on_one_stream(monkeypatch):
    """With a staleness the learner asks for memory while the sampler records, which "global" would refuse."""
    with pretended(), torch.inference_mode(), graphs(monkeypatch.setattr) as made:
        decoded()
    assert len(made) == 2 and {graph.mode for graph in made} == {"thread_local"}
    [stream] = {graph.stream for graph in made}
    assert stream.device == CUDA
    [main] = set(stream.waited)
    assert main.device == "main" and set(main.waited) == {stream}
    # before and after each step that is computed there, and each recording
    assert len(stream.waited) == len(main.waited) == 2 * slots.WARM_UPS + 2


def test_memory_that_ends_while_a_step_is_recorded_is_said_as_that(monkeypatch):
    """The end of the recording raises an error of its own, which says only that there was one before."""

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    begin = Graph.capture_begin

    def begun(graph, capture_error_mode):
        begin(graph, capture_error_mode)
        graph.attention, graph.real = full, graph.attention

    def ended(graph):
        graph.attention = graph.real
        end(graph)

    end = Graph.capture_end
    monkeypatch.setattr(Graph, "capture_begin", begun)
    monkeypatch.setattr(Graph, "capture_end", ended)
    with pretended(), torch.inference_mode(), graphs(monkeypatch.setattr):
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            decoded()
        assert not slots._NOT_RECORDED, "it may be recorded where there is more memory"


def test_what_ends_within_two_steps_is_not_recorded(monkeypatch):
    with pretended(), torch.inference_mode(), graphs(monkeypatch.setattr) as made:
        decoded(5)
    assert len(made) == 1, "nor are two rows, of which there are three steps, before the third"


@pytest.mark.parametrize("free", [10**6, 60 * 10**9])
def test_cached_memory_is_freed_for_a_recording_where_little_is_free(free, monkeypatch):
    """torch's allocator can free none while a step is recorded, and to free it always would cost each rollout."""
    freed = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(1))
    with pretended(), torch.inference_mode(), graphs(monkeypatch.setattr, free) as made:
        decoded()
    assert len(made) == 2 and len(freed) == (2 if free == 10**6 else 0)


def test_a_step_that_cannot_be_recorded_is_computed_without_a_graph(monkeypatch, caplog):
    """The first card may refuse what was only read about: the run goes on, and says that it is slower."""

    def waits(queries, cache, known, *more):
        assert int(known.max()) > 0  # the host asks the device
        return attended(queries, cache, known, *more)

    attended = slots.slot_attention
    monkeypatch.setattr(slots, "slot_attention", waits)
    with pretended(), torch.inference_mode():
        expected = decoded()
        with graphs(monkeypatch.setattr) as made:
            found = decoded()
    assert len(made) == 1 and all(map(torch.equal, found, expected))
    [said] = [r.message for r in caplog.records if r.name == "quartet.generation.slots"]
    assert "not permitted" in said and "Sampling goes on without graphs" in said


def test_the_pretended_device_tells_faults():
    """It raises where devices mix, and counts what a wait is."""
    with pretended() as counts:
        there = torch.ones(4, device=CUDA)
        with pytest.raises(RuntimeError, match="one device"):
            there + torch.ones(4)
        assert float(there.sum()) == 4.0 and sum(counts.waits.values()) == 1
        assert there[there > 0].shape == (4,) and sum(counts.waits.values()) == 2
        before = counts.alive
        more = torch.zeros(1000, device=CUDA)
        assert counts.alive == before + 4000
        del more
        assert counts.alive == before
    with pretended(forbid_float64=True), pytest.raises(TypeError, match="no float64"):
        torch.ones(2, device=CUDA).double()


def test_moments_that_were_saved_go_to_where_the_fused_kernel_reads_them():
    with pretended():
        _, learner, _ = parts("grpo")
        optimizer = learner.optimizers["actor"]
        loss = sum(p.sum() for p in optimizer.parameters)
        loss.backward()
        optimizer.step()
        state = optimizer.state()
        moments = [{name: m.cpu() for name, m in each.items()} for each in state["moments"]]
        saved = [p.detach().clone() for p in optimizer.parameters]
        optimizer.load_state(state | {"moments": moments, "parameters": saved})
        steps = {type(optimizer.moments(p)["step"]) for p in optimizer.parameters}
    assert optimizer.is_fused and steps == {Pretended}


def test_sums_in_parallel_draw_no_token_of_probability_zero(monkeypatch):
    """On a GPU the sum up to such a token can be larger than the sum before it, by rounding."""
    real = torch.Tensor.cumsum

    def rounded(weights, dim):
        sums = real(weights, dim)
        sums[:, 1] = sums[:, 2] + 0.1  # token 1 has probability 0
        return sums

    monkeypatch.setattr(torch.Tensor, "cumsum", rounded)
    with pretended():
        logits = torch.tensor([[0.0, -torch.inf, 0.0, 0.0]]).expand(50, 4).clone().to("cuda")
        drawn = draw(logits, Sampling(), torch.linspace(0, 0.999, 50).to("cuda"))
        tokens = drawn.tokens.tolist()
    assert set(tokens) == {0, 2, 3}


def test_a_gpu_sums_up_no_wide_vocabulary_in_a_row(monkeypatch):
    """It gives one row of a cumulative sum to one multiprocessor, of 132 on an H100: a pass took longer than a small model."""
    torch.manual_seed(0)
    logits, noise, widths = 3 * torch.randn(40, 70_001), torch.rand(40), []
    logits[0, ::2] = -torch.inf
    noise[:2] = torch.tensor([0.0, 1 - 2**-24])
    expected = draw(logits, Sampling(min_new_tokens=1), noise)
    for name in ("cumsum", "cummax"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda x, dim, real=real: widths.append(x.shape[-1]) or real(x, dim)
        )
    monkeypatch.setattr("quartet.generation.sampling.WIDE_LOGITS_ON_GPU", 16 * 70_001)
    with pretended() as counts:
        drawn = draw(logits.to("cuda"), Sampling(min_new_tokens=1), noise.to("cuda"))
        assert not counts.waits
        found = {name: getattr(drawn, name).cpu() for name in ("tokens", "logprobs", "entropies")}
    assert widths and max(widths) <= 512
    assert torch.equal(found["tokens"], expected.tokens)
    for name in ("logprobs", "entropies"):
        torch.testing.assert_close(found[name], getattr(expected, name), atol=1e-4, rtol=1e-4)


def test_a_wide_vocabulary_draws_no_token_of_probability_zero_either(monkeypatch):
    real = torch.Tensor.cumsum

    def rounded(weights, dim):
        """A weight of 0 raises the sum, and what follows it lowers it again."""
        sums = real(weights, dim)
        return sums + 1e-3 * sums[:, -1:] * (weights == 0)

    monkeypatch.setattr(torch.Tensor, "cumsum", rounded)
    monkeypatch.setattr("quartet.generation.sampling.WIDE_ON_GPU", 4 * 512 + 3)
    logits = torch.zeros(400, 4 * 512 + 3)
    logits[:, 512:1024] = logits[:, 5::7] = -torch.inf
    with pretended():
        noise = torch.linspace(0, 1 - 2**-24, 400).to("cuda")
        tokens = draw(logits.to("cuda"), Sampling(min_new_tokens=1), noise).tokens.cpu()
    assert logits[0, tokens].isfinite().all() and len(tokens.unique()) > 300
