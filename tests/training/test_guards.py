"""What stops a run, and what a run may do instead: skip, go back, try with less memory."""

import copy
import dataclasses

import pytest
import torch

from quartet.algorithms.preference import PREFERENCES
from quartet.algorithms.presets import ALGORITHMS
from quartet.assembly import build
from quartet.config.toml import read_settings
from quartet.data.sampler import Sampler
from quartet.distributed.process_group import TorchProcessGroup
from quartet.errors import NonFinite
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.loops.collect import Collector
from quartet.loops.preference import preference
from quartet.loops.progress import Progress
from quartet.loops.rl import rl
from quartet.loops.sft import sft
from quartet.models.actor_critic import Separate, freeze
from quartet.models.forward import masked_logprobs
from quartet.models.heads import ScalarModel
from quartet.recipes import recipe_path
from quartet.recording.run_folder import RunFolder
from quartet.recording.tokens import TokenTexts
from quartet.rewards.functions import TextReward
from quartet.rewards.protocol import Weighted, rewarded
from quartet.runs.doctor import Watch
from quartet.runs.reader import Run
from quartet.runs.rules import INVARIANTS
from quartet.runtime.events import Advanced, Finished, StageFailed, Warned
from quartet.runtime.pipeline import Pipeline
from quartet.runtime.saving import Saving
from quartet.runtime.worker import LocalWorkers, Worker
from quartet.stages.protocol import StageRun
from quartet.stages.sft import SftStage
from quartet.training import checksum, token_losses
from quartet.training.budget import MAX_HALVINGS, Budget
from quartet.training.checkpoint import read_checkpoint
from quartet.training.checksum import ReferenceChecksum
from quartet.training.learner import Learner
from quartet.training.optim import MAX_SKIPPED, Optim, Optimizer, OptimizerConfig
from quartet.training.optimizer_step import optimizer_step
from tests.loops.test_loops import END, comparisons, demonstrations, goodness
from tests.support.tiny_run import SMALL
from tests.support.world import model, prompts, tokenizer
from tests.training.test_learner import learner, rollouts, weights

PPO = ALGORITHMS["ppo"]


def experienced(made):
    return PPO.experience(made.score(rollouts(), PPO))


# --- not finite ----------------------------------------------------------------------------------------------------------------


def test_the_message_has_the_sample_and_what_it_says():
    made = learner()
    experience = experienced(made)
    broken = experience.advantages.clone()
    broken[3, int(experience.response_mask[3].int().argmax())] = torch.nan
    with pytest.raises(NonFinite) as caught:
        made.update(dataclasses.replace(experience, advantages=broken), PPO)
    assert caught.value.sample == experience.ids[3]
    assert caught.value.tokens == experience.tokens[3, : experience.lengths[3]].tolist()


def test_a_loss_that_is_not_finite_stops_though_its_gradient_is():
    weight = torch.tensor([1.0], requires_grad=True)
    optimizer = Optimizer([weight], OptimizerConfig(lr=0.1, schedule="constant"), 1)
    with pytest.raises(NonFinite, match="the loss is not finite"):
        optimizer_step([weight.sum() + torch.inf], {"w": optimizer})
    assert weight.item() == 1.0 and weight.grad is None


def test_skipping_leaves_weights_and_moments_alone_and_ends():
    weight = torch.tensor([1.0], requires_grad=True)
    optimizer = Optimizer(
        [weight], OptimizerConfig(lr=0.1, schedule="constant", on_nonfinite="skip"), 100
    )
    for count in range(1, MAX_SKIPPED + 1):
        assert optimizer_step([weight.sum() * torch.nan], {"w": optimizer}) == {"skipped": 1.0}
        assert (
            weight.item() == 1.0
            and weight.grad is None
            and optimizer.steps == 0
            and optimizer.skipped == count
        )
    assert "loss" in optimizer_step([weight.sum()], {"w": optimizer})
    with pytest.raises(NonFinite):
        optimizer_step([weight.sum() * torch.nan], {"w": optimizer})


def test_a_skipped_minibatch_is_counted_and_the_others_are_learnt_from():
    made = learner(on_nonfinite="skip")
    forward_passes, calls = made.models.forward_passes, []
    experience = experienced(made)

    def sometimes(request):
        calls.append(1)
        of_actor, of_critic = forward_passes(request)
        if len(calls) == 2:
            of_actor = dataclasses.replace(of_actor, logprobs=of_actor.logprobs * torch.nan)
        return iter((of_actor, of_critic))

    made.models.forward_passes = sometimes
    update = made.update(experience, PPO)
    assert update.step_stats["skipped"] == 1.0
    assert all(o.steps == 3 for o in made.optimizers.values()), (
        "two epochs of two minibatches, one of them left out"
    )


def test_a_reward_that_is_no_number_takes_its_own_sample_out_and_not_the_group(caplog):
    made = rollouts(8)

    class Odd:
        name = "odd"

        def score(self, rollouts):
            return [1.0, float("nan"), 0.5, 1e308, float("inf"), 2.0, None, -1e308]

    with caplog.at_level("WARNING"):
        scored = rewarded(made, [Weighted(Odd())])
    assert [r.score for r in scored] == [1.0, None, 0.5, None, None, 2.0, None, None]
    assert len([r for r in caplog.records if "which is left out" in r.message]) == 3
    assert "no finite number for 1 more" in caplog.text
    assert made[1].id in caplog.text


@pytest.mark.parametrize("preset", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("size", [2, 3, 7, 16, 33])
def test_groups_of_equal_rewards_have_an_advantage_of_exactly_zero(preset, size):
    made = learner("none")
    algorithm = ALGORITHMS[preset]
    for value in (0.1, 1 / 3, -2.7e-5, 1e-30, 123456.78, 3e37):
        group = [dataclasses.replace(r, score=value, group=0) for r in (rollouts(8) * 5)[:size]]
        batch = made.score(group, algorithm)
        batch = dataclasses.replace(batch, ref_logprobs=batch.old_logprobs)  # no KL: scores alone
        assert not algorithm.experience(batch).advantages.any()


# --- target KL, memory -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_further_epoch_begins_above_the_target_kl():
    far, near, free = (learner(epochs=8, lr=5e-3, target_kl=target) for target in (1e-6, 1e3, None))
    updates = [made.update(experienced(made), PPO) for made in (far, near, free)]
    assert updates[0].step_stats["policy/epochs"] == 1.0, (
        "its second minibatch is away from π_old already"
    )
    assert (
        updates[1].step_stats["policy/epochs"] == 8.0
        and "policy/epochs" not in updates[2].step_stats
    )
    assert far.optimizers["actor"].steps == 2 and near.optimizers["actor"].steps == 16
    assert all(torch.equal(a, b) for a, b in zip(weights(near), weights(free), strict=True))


def starved(made, limit):
    """As if a forward pass of more than so many tokens did not fit."""
    forward_passes = made.models.forward_passes

    def tight(request):
        if request.tokens.numel() > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward_passes(request)

    made.models.forward_passes = tight
    return made


@pytest.mark.slow
def test_out_of_memory_is_tried_again_with_half_and_gives_the_same_update():
    roomy, tight = learner(tokens=256), starved(learner(tokens=256), 60)
    updates = [made.update(experienced(made), PPO) for made in (roomy, tight)]
    assert (
        tight.budget.tokens == 256 // 2**tight.budget.halvings
        and 1 <= tight.budget.halvings <= MAX_HALVINGS
    )
    assert (
        "out of memory in scoring with 256 tokens at once; retried with 128."
        in tight.budget.notes[0]
    )
    for a, b in zip(weights(roomy), weights(tight), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    for name, value in updates[0].losses.items():
        assert updates[1].losses[name] == pytest.approx(value, rel=1e-4)
    assert (
        updates[1].clip_fraction == updates[0].clip_fraction
        and roomy.rng.getstate() == tight.rng.getstate()
    )


def test_halved_tokens_of_passes_without_a_gradient_stay_those_of_a_micro_batch_at_least():
    budget = Budget(256, scoring_tokens=1000)
    assert budget.run_within("the update", lambda tokens: tokens) == 256
    assert budget.run_within("scoring", lambda tokens: tokens, scoring=True) == 1000

    def tight(tokens):
        if tokens > 500:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return tokens

    assert budget.run_within("scoring", tight, scoring=True) == 500 and budget.tokens == 128
    assert "with 1,000 tokens at once; retried with 500. " in budget.notes[0]
    resumed = Budget(256, scoring_tokens=1000)
    resumed.load_state(budget.state())
    assert (resumed.tokens, resumed.scoring_tokens) == (128, 500)
    assert Budget(256, scoring_tokens=100).scoring_tokens == 256 == Budget(256).scoring_tokens


def test_memory_that_ends_in_the_critics_pass_leaves_no_gradient_of_the_actor():
    """The actor's backward pass is over by then; the step begins again with half the tokens."""
    whole, halved = learner(tokens=32), learner(tokens=64)
    experience, values, calls = experienced(whole), halved.models.values, []

    def tight(tokens, mask):
        calls.append(halved.models.actor.lm_head.weight.grad is not None)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return values(tokens, mask)

    halved.models.values = tight
    updates = [made.update(experience, PPO) for made in (whole, halved)]
    assert calls[0] and halved.budget.tokens == 32
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(halved), strict=True))
    assert updates[0].losses == updates[1].losses
    assert updates[0].step_stats == updates[1].step_stats


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory",
        "DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_memory_that_a_library_does_not_get_is_memory_that_ran_out(words):
    """cuBLAS allocates beside torch's allocator, which has kept all of a GPU, and torch raises no OutOfMemoryError then."""

    def tight(tokens):
        if tokens > 64:
            raise RuntimeError(words)
        return tokens

    assert Budget(256).run_within("the update", tight) == 64


def test_memory_that_is_never_enough_fails_after_a_few_times():
    made = starved(learner(tokens=2048), 1)
    with pytest.raises(torch.OutOfMemoryError):
        made.score(rollouts(), PPO)
    assert made.budget.halvings == MAX_HALVINGS


@pytest.mark.parametrize("world_size", [1, 2])
def test_memory_that_ends_on_ranks_is_not_tried_again_and_what_to_set_is_said(world_size):
    """Other ranks would wait, and the FSDP of a single rank would not wait for gradients any more."""
    budget, attempts = Budget(256, TorchProcessGroup(0, world_size)), []

    def tight(tokens):
        attempts.append(tokens)
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried hard.")

    sentence = "in the update with 256 tokens at once .CUDA out of memory.. .* = 128, and resume"
    with pytest.raises(torch.OutOfMemoryError, match=sentence):
        budget.run_within("the update", tight)
    assert attempts == [256]


def test_a_resumed_run_may_have_smaller_micro_batches():
    for saved, halvings, now, expected in (
        (256, 0, 128, 128),
        (64, 2, 256, 64),
        (256, 0, 1024, 256),
    ):
        budget = Budget(now)
        budget.load_state({"tokens": saved, "halvings": halvings})
        assert budget.tokens == expected


def test_sft_retries_with_less_memory_and_other_errors_pass(monkeypatch):
    def tight(model, tokens, mask, *rest):
        if len(tokens) > 1:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"
            )
        return masked_logprobs(model, tokens, mask, *rest)

    monkeypatch.setattr(token_losses, "masked_logprobs", tight)
    made, budget = model(), Budget(100)
    optimizer = Optimizer(list(made.parameters()), OptimizerConfig(lr=1e-2), 1)
    [step] = sft(made, Sampler(demonstrations(), 2, 0), optimizer, 1, budget)
    assert step.metrics["loss"] > 0 and budget.halvings > 0 and optimizer.steps == 1
    with pytest.raises(RuntimeError, match="something else"):
        budget.run_within("x", lambda tokens: (_ for _ in ()).throw(RuntimeError("something else")))


# --- invariants ------------------------------------------------------------------------------------------------------------


class Spoiled(NativeGenerator):
    """A sampler with one of the usual mistakes."""

    def __init__(self, mistake, actor):
        super().__init__(actor, tokenizer(), frozenset({END}), 0)
        self.mistake = mistake
        if mistake == "stale weights":
            self.model = copy.deepcopy(actor)

    def generate(self, asked, sampling, samples_per_prompt=1):
        if self.mistake == "temperature":
            sampling = dataclasses.replace(sampling, temperature=0.7)
        if self.mistake == "top-p":
            sampling = dataclasses.replace(sampling, top_p=0.8)
        read = asked
        if self.mistake == "template":  # what is before the prompt is there twice
            read = [dataclasses.replace(p, ids=(p.ids[0], *p.ids)) for p in asked]
        if self.mistake == "pad side":  # padding on the left counts as text
            longest = max(len(p.ids) for p in asked) + 1
            read = [
                dataclasses.replace(p, ids=(0,) * (longest - len(p.ids)) + p.ids) for p in asked
            ]
        made = super().generate(read, sampling, samples_per_prompt)
        made = [dataclasses.replace(r, prompt=asked[r.group]) for r in made]
        if self.mistake == "shift by one":
            made = [dataclasses.replace(r, logprobs=(*r.logprobs[1:], r.logprobs[0])) for r in made]
        if self.mistake == "dropout":
            noise = torch.Generator().manual_seed(0)
            made = [
                dataclasses.replace(
                    r,
                    logprobs=tuple(
                        p + 0.1 * float(torch.randn((), generator=noise)) for p in r.logprobs
                    ),
                )
                for r in made
            ]
        return made


@pytest.mark.parametrize(
    ("mistake", "rule"),
    [
        ("temperature", "sampler_disagrees"),
        ("top-p", "sampler_disagrees"),
        ("dropout", "sampler_disagrees"),
        ("template", "sampler_disagrees"),
        ("shift by one", "sampler_disagrees"),
        ("pad side", "sampler_disagrees"),
        ("wrong reference", "reference_differs"),
        ("a reference that learns", "reference_moved"),
        ("stale weights", "ratio_is_not_one"),
        (None, None),
    ],
)
def test_the_usual_mistakes_are_refused_at_the_first_step_that_can_show_them(mistake, rule):
    """Old weights are the right ones at step 1: they are seen at step 2."""
    actor = model()
    reference = freeze(copy.deepcopy(model(seed=3) if mistake == "wrong reference" else actor))
    critic = ScalarModel.from_trunk(actor, 0, seed=0)
    made = Learner(
        Separate(actor, critic),
        reference,
        Optim(lr=1e-2, critic_lr=1e-2, epochs=2),
        Sampling(max_new_tokens=12),
        3,
    )
    if mistake == "a reference that learns":
        made.reference = actor
        made.reference_checksum = ReferenceChecksum(actor)
    rewards = [Weighted(TextReward("goodness", goodness))]
    steps = rl(Collector(Sampler(prompts(16), 16, 0), Spoiled(mistake, actor), rewards), made, PPO)
    watch, said = Watch(), {}
    for step in steps:
        for found, _ in watch.see(step.metrics):
            if found.__name__ in INVARIANTS:
                said.setdefault(found.__name__, step.number)
    if rule is None:
        assert said == {}
    else:
        assert said[rule] == (2 if mistake == "stale weights" else 1)


def test_dpo_starts_at_its_reference_and_a_loss_of_ln_2():
    made, loss = model(), PREFERENCES["dpo"]
    for reference, held in ((freeze(copy.deepcopy(made)), True), (freeze(model(seed=5)), False)):
        optimizer = Optimizer(list(made.parameters()), OptimizerConfig(lr=1e-9), 1)
        [step] = preference(
            made, reference, Sampler(comparisons(), 4, 0), loss, optimizer, 1, Budget(4096)
        )
        said = [rule.__name__ for rule, _ in Watch().see(step.metrics)]
        assert (abs(step.metrics["loss"] - 0.693147) < 1e-4) == held
        assert ("does_not_start_at_the_reference" in said) == (not held)


# --- the run stops, or goes back -------------------------------------------------------------------------------------------------


def stage(monkeypatch, broken_at):
    """SFT whose loss is no number at some of its calls."""
    calls = []

    def broken(*arguments):
        calls.append(torch.is_grad_enabled())
        logprobs = masked_logprobs(*arguments)
        return logprobs * torch.nan if calls[-1] and sum(calls) in broken_at else logprobs

    monkeypatch.setattr(token_losses, "masked_logprobs", broken)
    return SftStage(
        demonstrations=demonstrations(),
        held_out=demonstrations()[:2],
        tokenizer=tokenizer(),
        load_policy=lambda folder: model(),
        optimizer=lambda made: Optimizer(
            list(made.parameters()), OptimizerConfig(lr=1e-2, schedule="constant"), 6
        ),
        num_steps=6,
        batch_size=4,
        micro_batch_tokens=4096,
        seed=0,
    )


def test_a_run_stops_with_phase_sample_and_text_and_saves_nothing_of_it(tmp_path, monkeypatch):
    folder = RunFolder.create(tmp_path, "x", {})
    with pytest.raises(StageFailed) as caught:
        list(
            Pipeline(
                [stage(monkeypatch, {4})], folder, TokenTexts(tokenizer()), Saving(every=1)
            ).run()
        )
    folder.close()
    message = str(caught.value)
    assert message.startswith("sft, step 4: the loss is not finite in sample ") and ': "' in message
    assert Run(folder.path).series["sft"].steps[-1] == 3
    assert sorted(p.name for p in (folder.path / "checkpoints").iterdir())[-1] == "sft-000003"


def test_a_run_that_may_goes_back_to_its_last_checkpoint_with_half_the_learning_rate(
    tmp_path, monkeypatch
):
    folder = RunFolder.create(tmp_path, "x", {})
    told = list(
        Pipeline(
            [stage(monkeypatch, {5})], folder, TokenTexts(tokenizer()), Saving(every=2, rollbacks=1)
        ).run()
    )
    folder.close()
    run = Run(folder.path)
    assert list(run.series["sft"].steps) == [1, 2, 3, 4, 5, 6], "no step is in the record twice"
    [warned] = [event for event in told if isinstance(event, Warned)]
    assert warned.sentence.startswith(
        "rolled back to sft-000004, learning rates × 0.5, because of step 5: the loss is not finite"
    )
    assert [w["rule"] for w in run.warnings] == ["rolled_back"]
    assert list(run.series["sft"].columns["lr"]) == [0.01] * 4 + [0.005] * 2
    again = RunFolder.create(tmp_path, "y", {})
    with pytest.raises(
        StageFailed,
        match="step 5: the loss is not finite.*rolled back 2 times .run.rollbacks., with the learning",
    ):
        list(
            Pipeline(
                [stage(monkeypatch, {5, 6, 7})],
                again,
                TokenTexts(tokenizer()),
                Saving(every=2, rollbacks=2),
            ).run()
        )
    again.close()


def test_where_nothing_has_been_learnt_yet_the_run_says_why_it_cannot_go_back(
    tmp_path, monkeypatch
):
    folder = RunFolder.create(tmp_path, "x", {})
    with pytest.raises(
        StageFailed,
        match=r"step 1: the loss is not finite.* \(run.rollbacks\) cannot help, because nothing",
    ):
        list(
            Pipeline(
                [stage(monkeypatch, {1})],
                folder,
                TokenTexts(tokenizer()),
                Saving(every=1, rollbacks=3),
            ).run()
        )
    folder.close()


def test_where_other_ranks_may_have_learnt_already_the_stage_begins_again(tmp_path, monkeypatch):
    """Whether weights have moved in the failed step is known before the next call to the ranks, and not after it."""

    class Ranks(LocalWorkers):
        busy = False

        def call(self, name, *arguments):
            self.busy = True
            results = super().call(name, *arguments)
            self.busy = False
            return results

        def untouched(self):
            return not self.busy

    sft, folder = stage(monkeypatch, {1}), RunFolder.create(tmp_path, "x", {})
    pipeline = Pipeline([sft], folder, TokenTexts(tokenizer()), Saving(every=6, rollbacks=1))
    told = list(pipeline.run(workers=Ranks(Worker([sft], folder.path))))
    folder.close()
    [warned] = [event for event in told if isinstance(event, Warned)]
    assert warned.sentence.startswith("rolled back to sft-000000") and isinstance(
        told[-1], Finished
    )


@pytest.mark.slow
def test_before_its_first_checkpoint_a_stage_begins_again(tmp_path, monkeypatch):
    """The checkpoint of step 0 holds no weights; written again it does, with the halved learning rate."""
    folder = RunFolder.create(tmp_path, "x", {})
    pipeline = Pipeline(
        [stage(monkeypatch, {4})],
        folder,
        TokenTexts(tokenizer()),
        Saving(every=6, last=9, rollbacks=1),
    )
    told = list(pipeline.run())
    folder.close()
    [warned] = [event for event in told if isinstance(event, Warned)]
    assert warned.sentence.startswith(
        "rolled back to sft-000000, learning rates × 0.5, because of step 4: the loss is not"
    )
    run = Run(folder.path)
    assert list(run.series["sft"].steps) == [1, 2, 3, 4, 5, 6], "no step is in the record twice"
    assert list(run.series["sft"].columns["lr"]) == [0.005] * 6
    first = [event.progress.metrics["loss"] for event in told if isinstance(event, Advanced)]
    assert first[3] == first[0] and first[4] != first[1], (
        "the same weights and rows again, and then smaller steps"
    )
    start = read_checkpoint(folder.path / "checkpoints" / "sft-000000")
    assert start.state()["work"]["optimizer"]["scale"] == 0.5
    rest = RunFolder.create(tmp_path, "y", {})
    resumed = list(
        Pipeline([stage(monkeypatch, set())], rest, TokenTexts(tokenizer()), Saving(every=6)).run(
            start
        )
    )
    rest.close()
    assert [e.progress.metrics["loss"] for e in resumed if isinstance(e, Advanced)] == first[3:]


# --- a policy that diverged, found where it samples


def grpo_run(root, *words):
    small = [word for word in SMALL if not word.startswith("sft.")]
    chosen = [
        'recipe=["grpo"]',
        *small,
        "policy.create.max_length=32",
        "run.steps=4",
        "run.checkpoint_every=1",
        *words,
    ]
    settings = read_settings(recipe_path("sums"), chosen, "recipe sums")
    job, folder = build(settings.config), RunFolder.create(root, "sums", {})
    try:
        list(
            Pipeline(
                job.stages, folder, TokenTexts(job.tokenizer), job.saving(settings.config.run)
            ).run()
        )
    finally:
        folder.close()
    return Run(folder.path)


@pytest.fixture
def diverges_once(monkeypatch):
    """Generators whose model overflows once, as it might after two steps with a high learning rate."""
    generate, left = NativeGenerator.generate, [1]

    def diverging(self, *arguments, **named):
        if self.version == 2 and left:
            left.pop()
            with torch.no_grad():
                self.model.base_model.norm.weight.fill_(3e38)
        return generate(self, *arguments, **named)

    monkeypatch.setattr(NativeGenerator, "generate", diverging)


@pytest.mark.slow
def test_a_run_goes_back_to_weights_whose_logits_were_finite(tmp_path, diverges_once):
    run = grpo_run(tmp_path, "run.rollbacks=1")
    [warned] = [warning for warning in run.warnings if warning["rule"] == "rolled_back"]
    assert (
        "the log-probability is not finite in sample sums:" in warned["sentence"]
        and ': "' in warned["sentence"]
    )
    assert list(run.series["grpo"].steps) == [1, 2, 3, 4]


def test_a_run_that_may_not_go_back_stops_and_names_the_sample(tmp_path, diverges_once):
    with pytest.raises(
        StageFailed, match="grpo, step [23]: the log-probability is not finite in sample sums:"
    ):
        grpo_run(tmp_path)


def test_where_nothing_learns_nothing_is_said_of_rollbacks(tmp_path):
    """As in an evaluation of a policy that gives no finite numbers."""

    class Evaluation:
        name, title, num_steps = "evaluation", "evaluation", 2

        def begin(self, folder):
            def steps(done):
                yield Progress(1, {})
                raise NonFinite("the log-probability", "sums:1/0", [5])

            return StageRun(steps, dict)

    folder = RunFolder.create(tmp_path, "x", {})
    with pytest.raises(
        StageFailed, match="evaluation, step 2: the log-probability is not finite"
    ) as caught:
        list(
            Pipeline(
                [Evaluation()], folder, TokenTexts(tokenizer()), Saving(every=1, rollbacks=2)
            ).run()
        )
    folder.close()
    assert "rolled back" not in str(caught.value) and "run.rollbacks" not in str(caught.value)


def test_the_checksum_is_the_sum_of_the_bits_over_pieces_of_any_size(monkeypatch):
    model = torch.nn.Linear(5, 3)
    model.register_parameter("none", torch.nn.Parameter(torch.empty(0)))
    bits = sum(int(p.detach().view(torch.int32).sum(dtype=torch.int64)) for p in model.parameters())
    assert checksum.parameter_checksum(model) == bits
    for piece in (1, 4, 15):
        monkeypatch.setattr(checksum, "PIECE", piece)
        assert checksum.parameter_checksum(model) == bits
    model.weight.data[0, 0] = torch.nextafter(model.weight.data[0, 0], torch.tensor(9.0))
    assert checksum.parameter_checksum(model) != bits
