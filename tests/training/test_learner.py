import copy
import dataclasses

import pytest
import torch

from quartet.algorithms.entropy import EntropyBonus
from quartet.algorithms.presets import ALGORITHMS
from quartet.distributed.offload import NO_OFFLOAD
from quartet.errors import NonFinite
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.models.actor_critic import ForwardRequest, Separate, Shared, freeze
from quartet.models.heads import ScalarModel, ValueHead
from quartet.training.finite import check_finite
from quartet.training.learner import Learner
from quartet.training.optim import Optim, Optimizer, OptimizerConfig
from quartet.training.optimizer_step import optimizer_step
from tests.support.world import model, prompts, rollout, tokenizer

SETTINGS = Optim(lr=1e-3, critic_lr=1e-3, epochs=2, minibatches=2)


def rollouts(count=8):
    rng = torch.Generator().manual_seed(3)
    made = []
    for number, prompt in enumerate(prompts(count // 2) * 2):
        length = int(torch.randint(1, 9, (), generator=rng))
        ids = tuple(torch.randint(4, 20, (length,), generator=rng).tolist())
        made.append(
            rollout(
                prompt, ids, float(torch.randn((), generator=rng)), number % (count // 2), number
            )
        )
    return made


def actor_critic(kind="separate"):
    actor = model()
    if kind == "shared":
        return Shared(actor, ValueHead(actor.config.hidden_size))
    return Separate(
        actor, ScalarModel.from_trunk(model(seed=1), 0, seed=0) if kind == "separate" else None
    )


def learner(kind="separate", tokens=2048, placement=NO_OFFLOAD, scoring_tokens=None, **settings):
    reference = freeze(copy.deepcopy(model(seed=2)))
    optim = dataclasses.replace(SETTINGS, **settings)
    sampling = Sampling(max_new_tokens=8, temperature=0.8)
    return Learner(
        actor_critic(kind),
        reference,
        optim,
        sampling,
        4,
        micro_batch_tokens=tokens,
        placement=placement,
        scoring_tokens=scoring_tokens,
    )


def weights(made):
    return [
        p.detach().clone()
        for p in (*made.models.actor_parameters(), *made.models.critic_parameters())
    ]


def test_score_gives_each_token_three_opinions_and_none_outside_the_response():
    made = learner()
    batch = made.score(rollouts(), ALGORITHMS["ppo"])
    outside = ~batch.response_mask
    for numbers in (batch.old_logprobs, batch.ref_logprobs, batch.values):
        assert (numbers[outside] == 0).all()
        assert (numbers[batch.response_mask] != 0).all()
    assert not torch.allclose(batch.old_logprobs, batch.ref_logprobs)


def test_passes_without_a_gradient_take_more_tokens_than_micro_batches(monkeypatch):
    """Actor, critic and reference score in one pass each where an update takes several."""
    one, several = learner(tokens=40, scoring_tokens=4096), learner(tokens=40)
    batch, as_before = (made.score(rollouts(), ALGORITHMS["ppo"]) for made in (one, several))
    for name in ("old_logprobs", "ref_logprobs", "values"):
        torch.testing.assert_close(getattr(batch, name), getattr(as_before, name))
    widths = []
    forward_passes = one.models.forward_passes

    def seen(request):
        widths.append(request.tokens.numel())
        return forward_passes(request)

    monkeypatch.setattr(one.models, "forward_passes", seen)
    experience = ALGORITHMS["ppo"].experience(one.score(rollouts(), ALGORITHMS["ppo"]))
    assert widths == [batch.tokens.numel()] and widths[0] > 40
    widths.clear()
    one.update(experience, ALGORITHMS["ppo"])
    assert len(widths) > 1 and max(widths) <= 40


def test_without_a_critic_or_a_reference_there_are_no_such_numbers():
    made = Learner(actor_critic("none"), None, SETTINGS, Sampling(max_new_tokens=8), steps=1)
    batch = made.score(rollouts(), ALGORITHMS["ppo"])
    assert batch.values is None and batch.ref_logprobs is None


@pytest.mark.parametrize("kind", ["separate", "shared", "none"])
def test_the_ratio_is_1_before_the_first_step_and_moves_after(kind):
    made = learner(kind)
    algorithm = ALGORITHMS["grpo" if kind == "none" else "ppo"]
    update = made.update(algorithm.experience(made.score(rollouts(), algorithm)), algorithm)
    assert update.first_ratio_error < 1e-5
    again = made.score(rollouts(), algorithm)
    assert (again.old_logprobs - update.logprobs).abs().max() > 1e-4
    assert made.version == made.weights().version == 1


@pytest.mark.parametrize("kind", ["separate", "shared", "none"])
@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_micro_batches_change_nothing(kind, name):
    if name == "ppo" and kind == "none":
        pytest.skip("PPO needs a critic")
    algorithm = dataclasses.replace(ALGORITHMS[name], entropy=EntropyBonus(coef=0.01))
    results = []
    for tokens in (10_000, 20):
        made = learner(kind, tokens=tokens)
        made.update(algorithm.experience(made.score(rollouts(), algorithm)), algorithm)
        results.append(weights(made))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=0)


def test_one_minibatch_is_one_step_by_hand():
    """The whole update against AdamW on a loss written out here."""
    made = learner(epochs=1, minibatches=1, max_grad_norm=float("inf"))
    algorithm = ALGORITHMS["ppo"]
    experience = algorithm.experience(made.score(rollouts(), algorithm))
    expected = copy.deepcopy(made.models.actor)
    logits = expected(input_ids=experience.tokens).logits[:, :-1] / 0.8
    logprobs = logits.log_softmax(-1).gather(-1, experience.tokens[:, 1:, None])[..., 0]
    ratio = (logprobs - experience.old_logprobs[:, 1:]).exp()
    advantages, mask = experience.advantages[:, 1:], experience.response_mask[:, 1:]
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)[mask].mean()
    loss.backward()
    torch.optim.AdamW(
        expected.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0
    ).step()
    made.update(experience, algorithm)
    for one, other in zip(expected.parameters(), made.models.actor_parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_a_head_on_the_actors_trunk_steps_towards_the_returns():
    """Its values are 0 at first, so the gradient is −mean(R h), and Adam's first step lr · mean(R h) / |mean(R h)|."""
    made = learner("shared", epochs=1, minibatches=1)
    algorithm = ALGORITHMS["ppo"]
    experience = algorithm.experience(made.score(rollouts(), algorithm))
    returns, mask = experience.returns[:, 1:], experience.response_mask[:, 1:]
    with torch.no_grad():
        hidden = made.models.actor.base_model(input_ids=experience.tokens).last_hidden_state
    made.update(experience, algorithm)
    towards = (returns[..., None] * hidden[:, :-1])[mask].mean(0)
    head = made.models.head.linear
    clear = towards.abs() > 1e-2
    assert clear.sum() > 16
    torch.testing.assert_close(
        head.weight[0, clear], 1e-3 * towards[clear].sign(), atol=2e-5, rtol=0
    )
    assert head.bias.item() == pytest.approx(1e-3 * returns[mask].mean().sign().item(), rel=0.02)


def test_during_the_critics_warm_up_the_actor_stands_still():
    made = learner(critic_warmup_steps=1)
    algorithm = ALGORITHMS["ppo"]
    actor = [p.detach().clone() for p in made.models.actor_parameters()]
    critic = [p.detach().clone() for p in made.models.critic_parameters()]
    made.update(algorithm.experience(made.score(rollouts(), algorithm)), algorithm)
    assert all(
        torch.equal(a, b) for a, b in zip(actor, made.models.actor_parameters(), strict=True)
    )
    assert not all(
        torch.equal(a, b) for a, b in zip(critic, made.models.critic_parameters(), strict=True)
    )


def test_the_reference_never_moves():
    made = learner()
    before = copy.deepcopy(made.reference.state_dict())
    made.update(
        ALGORITHMS["ppo"].experience(made.score(rollouts(), ALGORITHMS["ppo"])), ALGORITHMS["ppo"]
    )
    assert all(torch.equal(before[k], v) for k, v in made.reference.state_dict().items())


def test_a_reward_that_is_not_a_number_stops_with_its_sample():
    broken = [*rollouts()[:3], dataclasses.replace(rollouts()[3], score=float("nan"))]
    with pytest.raises(NonFinite, match=f"the reward is not finite in sample {broken[3].id}"):
        learner().score(broken, ALGORITHMS["ppo"])


@pytest.mark.parametrize("what", ["advantages", "returns"])
def test_a_loss_that_is_not_finite_stops_before_any_weight_has_changed(what):
    made = learner()
    experience = ALGORITHMS["ppo"].experience(made.score(rollouts(), ALGORITHMS["ppo"]))
    numbers = getattr(experience, what).clone()
    numbers[2, int(experience.response_mask[2].int().argmax())] = torch.inf
    before = weights(made)
    with pytest.raises(
        NonFinite, match=f"the {what[:-1]} is not finite in sample {experience.ids[2]}"
    ):
        made.update(dataclasses.replace(experience, **{what: numbers}), ALGORITHMS["ppo"])
    assert all(torch.equal(a, b) for a, b in zip(before, weights(made), strict=True))


def test_a_weight_that_is_not_finite_is_seen_in_the_first_forward():
    made = learner()
    with torch.no_grad():
        next(iter(made.models.actor_parameters()))[5] = torch.nan
    with pytest.raises(NonFinite, match="the log-probability is not finite in sample tiny"):
        made.score(rollouts(), ALGORITHMS["ppo"])


def test_descend_adds_gradients_and_reports_their_norm():
    weight = torch.tensor([3.0], requires_grad=True)
    optimizer = Optimizer(
        [weight],
        OptimizerConfig(lr=0.1, schedule="constant", max_grad_norm=float("inf")),
        total_steps=1,
    )
    # losses w² and 2w: gradient 2·3 + 2 = 8, loss 9 + 6 = 15
    assert optimizer_step(
        (loss for loss in (weight.square().sum(), 2 * weight.sum())), {"w": optimizer}
    ) == {
        "loss": 15.0,
        "grad_norm/w": 8.0,
    }
    assert weight.item() == pytest.approx(2.9)


def test_check_finite_names_the_first_bad_row():
    with pytest.raises(NonFinite, match="x is not finite in sample b"):
        check_finite(
            "x", torch.tensor([[1.0, 2.0], [1.0, torch.inf], [torch.nan, 0.0]]), ["a", "b", "c"]
        )


def test_the_entropy_has_a_gradient_only_where_it_is_asked_for():
    made = actor_critic("none")
    tokens = torch.tensor([[5, 6, 7]])
    mask = torch.arange(tokens.shape[1])[None] > 0
    [silent] = made.forward_passes(ForwardRequest(tokens, mask, 1.0))
    assert not silent.entropy.requires_grad
    [asked] = made.forward_passes(ForwardRequest(tokens, mask, 1.0, entropy_gradient=True))
    assert asked.entropy.requires_grad


def sampled(made, count=6):
    """Rollouts of the learner's own actor, with a reward each."""
    generator = NativeGenerator(
        made.models.actor, tokenizer(), frozenset({tokenizer().eos_token_id}), 0
    )
    generator.load_weights(made.weights())
    answers = generator.generate(
        prompts(count), Sampling(max_new_tokens=8, temperature=made.sampling.temperature)
    )
    return [dataclasses.replace(r, score=float(len(r.response_ids))) for r in answers]


@pytest.mark.parametrize("kind", ["separate", "shared", "none"])
def test_what_the_sampler_saw_is_not_computed_again_once_it_was_checked(kind, monkeypatch):
    made, checked = learner(kind), learner(kind)
    algorithm = ALGORITHMS["grpo" if kind == "none" else "ppo"]
    first = sampled(made)
    made.score(first, algorithm)
    assert made.sampler_agrees is True
    checked.sampler_agrees = False
    expected = checked.score(first, algorithm)
    monkeypatch.setattr(made.models, "forward_passes", None)  # would fail if it were asked again
    batch = made.score(first, algorithm)
    assert torch.equal(batch.old_logprobs, batch.rollout_logprobs)
    for name in ("old_logprobs", "entropy", "values", "ref_logprobs"):
        ours, theirs = getattr(batch, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("tokens", [2048, 20], ids=["one micro-batch", "one for each prompt"])
def test_a_prompt_is_computed_once_for_all_of_its_answers(tokens):
    """Two prompts with three answers each, mixed: scoring and an update read each prompt once, but for its last
    token, which each answer reads, and an answer but for its last, which predicts nothing."""
    made = learner("none", tokens, minibatches=1, epochs=1)
    first, second = prompts(2)
    answers = [
        dataclasses.replace(rollout(p, ids, 1.0), group=g, id=f"{g}/{n}")
        for n, ids in enumerate([(5, 6, 7), (8, 9), (10, 11, 12, 13)])
        for g, p in enumerate((first, second))
    ]
    made.score(answers, ALGORITHMS["grpo"])  # compares two forwards, once
    read = []
    for each in (made.models.actor, made.reference):
        each.base_model.embed_tokens.register_forward_hook(
            lambda _, args, __: read.append(args[0].numel())
        )
    batch = made.score(answers, ALGORITHMS["grpo"])
    by_answer = sum(len(r.prompt.ids) + len(r.response_ids) - 1 for r in answers)
    shared = 2 * (len(first.ids) - 1 + len(second.ids) - 1)
    assert sum(read) == 2 * (by_answer - shared)  # the actor and the reference
    read.clear()
    made.update(ALGORITHMS["grpo"].experience(batch), ALGORITHMS["grpo"])
    assert sum(read) == by_answer - shared


@pytest.mark.parametrize(
    "changed",
    [{"temperature": 1.0}, {"top_k": 3}, {"top_p": 0.5}],
    ids=["temperature", "top_k", "top_p"],
)
def test_a_sampler_that_disagrees_is_not_believed(changed):
    made = learner("none")
    generator = NativeGenerator(
        made.models.actor, tokenizer(), frozenset({tokenizer().eos_token_id}), 0
    )
    sampling = Sampling(
        **({"max_new_tokens": 8, "temperature": made.sampling.temperature} | changed)
    )
    answers = [dataclasses.replace(r, score=1.0) for r in generator.generate(prompts(6), sampling)]
    made.score(answers, ALGORITHMS["grpo"])
    assert made.sampler_agrees is False
    batch = made.score(answers, ALGORITHMS["grpo"])
    assert not torch.allclose(batch.old_logprobs, batch.rollout_logprobs, atol=1e-3)


def test_rollouts_of_other_weights_are_read_again():
    made = learner("none")
    old = sampled(made)
    algorithm = ALGORITHMS["grpo"]
    made.update(algorithm.experience(made.score(old, algorithm)), algorithm)
    batch = made.score(old, algorithm)  # sampled at version 0, and now it is 1
    assert (batch.old_logprobs - batch.rollout_logprobs).abs().max() > 1e-4
