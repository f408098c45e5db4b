"""Adapters: the base below them, several on one trunk, and what others can load."""

import copy

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from quartet.algorithms.presets import ALGORITHMS
from quartet.data.sampler import Sampler
from quartet.errors import StateMisfit
from quartet.generation.decoders import RowDecoder, make_decoder
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.loops.collect import Collector
from quartet.loops.rl import rl
from quartet.models.actor_critic import Separate, Shared
from quartet.models.adapters import (
    CRITIC,
    POLICY,
    REFERENCE,
    REWARD,
    AdapterError,
    AdapterView,
    adapter_active,
    adapter_parameters,
    adapters_of,
    add_adapter,
    copy_adapter,
    freeze_adapter,
    freeze_layers,
    frozen_copy,
)
from quartet.models.forward import masked_logprobs
from quartet.models.heads import AdaptedScalar, ScalarModel, ValueHead, attach
from quartet.models.language_model import save
from quartet.models.lora import Lora
from quartet.models.trunk import checkpoint_blocks
from quartet.rewards.functions import TextReward
from quartet.rewards.protocol import Weighted
from quartet.training.checksum import ReferenceChecksum, parameter_checksum
from quartet.training.learner import Learner
from quartet.training.optim import Optim
from tests.support.world import model, prompts, tokenizer

LORA = Lora(rank=4, alpha=8)
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 0, 0]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]]).bool()


def shaken(made, name, seed=1):
    """With an adapter that does something: B starts at 0."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter_parameters(made, name):
            p.copy_(0.2 * torch.randn(p.shape, generator=rng))
    return made


def adapted(kind="llama", name=POLICY):
    return shaken(add_adapter(model(kind), LORA, name, seed=0), name)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_the_base_is_the_reference_and_an_untrained_adapter_changes_nothing(kind):
    plain = masked_logprobs(model(kind), TOKENS, MASK)
    fresh = add_adapter(model(kind), LORA, POLICY, seed=0)
    torch.testing.assert_close(masked_logprobs(fresh, TOKENS, MASK), plain)
    changed = adapted(kind)
    assert (masked_logprobs(changed, TOKENS, MASK) - plain).abs().max() > 0.01
    torch.testing.assert_close(masked_logprobs(AdapterView(changed, None), TOKENS, MASK), plain)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_parameters_of_a_view_are_those_of_the_model_and_of_its_own_adapter(kind):
    """A reward model is attached, frozen, to the policy or to a copy of it: the reference's checksum is the same."""
    made = adapted(kind)
    plain = {id(p) for name, p in made.named_parameters() if "lora_" not in name}
    before = parameter_checksum(AdapterView(made, None))
    for name in (REWARD, REFERENCE):
        add_adapter(made, LORA, name, seed=1)
        freeze_adapter(made, name)
    assert {id(p) for p in AdapterView(made, None).parameters()} == plain
    assert parameter_checksum(AdapterView(made, None)) == before
    own = {id(p) for p in adapter_parameters(made, REFERENCE)}
    assert {id(p) for p in AdapterView(made, REFERENCE).parameters()} == plain | own


def test_a_checkpoint_whose_reference_counts_other_frozen_adapters_is_read():
    """Versions up to 0.2.0 wrote such. Another base is refused with both."""
    made = adapted()
    add_adapter(made, LORA, REWARD, seed=1)
    freeze_adapter(made, REWARD)
    earlier = sum(
        int(p.view(torch.int32).sum(dtype=torch.int64))
        for p in made.parameters()
        if not p.requires_grad
    )
    checksum = ReferenceChecksum(AdapterView(made, None))
    assert checksum.value != earlier
    checksum.load_state(earlier)
    checksum.load_state(checksum.value)
    with pytest.raises(StateMisfit, match="the reference is not the model that the run began"):
        checksum.load_state(earlier + 1)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_only_the_adapter_gets_gradients_also_after_the_reference_was_read(kind):
    made = adapted(kind)
    loss = masked_logprobs(made, TOKENS, MASK).sum()
    masked_logprobs(AdapterView(made, None), TOKENS, MASK)
    loss.backward()
    with_gradient = {
        id(p) for p in made.parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert with_gradient == {id(p) for p in adapter_parameters(made, POLICY)}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_policy_and_critic_on_one_trunk_get_the_gradients_they_get_apart(kind, checkpointed):
    together = add_adapter(adapted(kind), LORA, CRITIC, seed=0)
    shaken(together, CRITIC, seed=2)
    critic = AdaptedScalar(together, CRITIC, 0, seed=3)
    alone = adapted(kind)
    other = shaken(add_adapter(model(kind), LORA, CRITIC, seed=0), CRITIC, seed=2)
    apart = AdaptedScalar(other, CRITIC, 0, seed=3)
    if checkpointed:
        checkpoint_blocks(together), checkpoint_blocks(alone), checkpoint_blocks(other)
    for policy, values in ((together, critic), (alone, apart)):
        loss = (
            masked_logprobs(policy, TOKENS, MASK).square().sum()
            + values.values(TOKENS, MASK).square().sum()
        )
        loss.backward()
    for ours, theirs in zip(
        adapter_parameters(together, POLICY), adapter_parameters(alone, POLICY), strict=True
    ):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(critic.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert len(list(critic.parameters())) == 1 + len(adapter_parameters(together, CRITIC))


def test_further_adapters_leave_the_policys_switched_on_and_trained():
    made = add_adapter(adapted(), LORA, CRITIC, seed=0)
    before = masked_logprobs(adapted(), TOKENS, MASK)
    torch.testing.assert_close(masked_logprobs(made, TOKENS, MASK), before)
    assert adapters_of(made) == {POLICY, CRITIC}
    trained = {id(p) for p in made.parameters() if p.requires_grad}
    assert trained == {id(p) for name in (POLICY, CRITIC) for p in adapter_parameters(made, name)}
    with adapter_active(made, CRITIC), adapter_active(made, None):
        pass
    torch.testing.assert_close(masked_logprobs(made, TOKENS, MASK), before)


def test_the_fast_decoder_samples_under_the_adapter_what_the_plain_one_does():
    made = adapted()
    assert isinstance(make_decoder(made, 32), RowDecoder)
    generator = NativeGenerator(made, tokenizer(), frozenset({1}), 0)
    rollouts = generator.generate(prompts(6), Sampling(max_new_tokens=8))
    for r in rollouts:
        tokens = torch.tensor([[*r.prompt.ids, *r.response_ids]])
        mask = torch.arange(tokens.shape[1])[None] >= len(r.prompt.ids)
        expected = masked_logprobs(made, tokens, mask)[mask]
        torch.testing.assert_close(torch.tensor(r.logprobs), expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing.:FutureWarning"
)  # of peft's, inside transformers
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_others_load_the_sum_and_the_adapter(kind, tmp_path):
    made = adapted(kind)
    model(kind).save_pretrained(tmp_path / "base")
    save(made, tokenizer(), tmp_path / "policy")
    with torch.no_grad():
        expected = made(input_ids=TOKENS[:1]).logits
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
        assert not adapters_of(whole)
        torch.testing.assert_close(whole(input_ids=TOKENS[:1]).logits, expected)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "policy" / "adapter").eval()
        torch.testing.assert_close(theirs(input_ids=TOKENS[:1]).logits, expected)


def test_a_reward_model_on_a_trunk_is_whole_for_others_and_comes_back_to_its_trunk(tmp_path):
    trunk = shaken(add_adapter(model(), LORA, REWARD, seed=0), REWARD)
    made = AdaptedScalar(trunk, REWARD, 0, seed=1)
    made.centre = 0.75
    made.save(tmp_path, tokenizer())
    lengths = torch.tensor([6, 4])
    expected = made.scores(TOKENS, lengths)
    torch.testing.assert_close(ScalarModel.load(tmp_path).scores(TOKENS, lengths), expected)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert theirs.config.id2label == {0: "reward"}
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=TOKENS[:1]).logits[0, 0], expected[0] + 0.75)
    actor = adapted()
    before = masked_logprobs(actor, TOKENS, MASK)
    judge = attach(actor, REWARD, tmp_path / "adapter")
    torch.testing.assert_close(judge.scores(TOKENS, lengths), expected)
    torch.testing.assert_close(masked_logprobs(actor, TOKENS, MASK), before)
    assert not any(p.requires_grad for p in judge.parameters())
    critic = AdaptedScalar(add_adapter(actor, LORA, CRITIC, seed=0), CRITIC, 0, seed=0)
    copy_adapter(actor, REWARD, actor, CRITIC)
    critic.head.load_state_dict(judge.head.state_dict())
    critic.centre = judge.centre
    torch.testing.assert_close(critic.scores(TOKENS, lengths), expected)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_critic_is_a_token_classifier_elsewhere(kind, tmp_path):
    critic = ScalarModel.from_trunk(model(kind), 0, seed=0)
    critic.centre = 0.5
    shared = Shared(model(kind), ValueHead(32))
    with torch.no_grad():
        shared.head.linear.weight.normal_()
        shared.head.linear.bias.fill_(0.25)
    for name, made in (("separate", Separate(model(kind), critic)), ("shared", shared)):
        made.save_critic(tmp_path / name, tokenizer())
        theirs = AutoModelForTokenClassification.from_pretrained(tmp_path / name).eval()
        assert theirs.config.id2label == {0: "value"}
        with torch.no_grad():
            logits = theirs(input_ids=TOKENS[:1]).logits[0, :, 0]
            values = made.values(TOKENS[:1], MASK[:1])
        torch.testing.assert_close(values[0, 2:], logits[1:-1])
        torch.testing.assert_close(
            ScalarModel.load(tmp_path / name).values(TOKENS, MASK)[0], values[0]
        )


def length_reward():
    return [Weighted(TextReward("length", lambda prompt, response: float(len(response.split()))))]


def test_ppo_with_one_trunk_for_actor_critic_and_reference_learns_and_leaves_the_base_alone():
    actor = add_adapter(model(), LORA, POLICY, seed=0)
    base = {name: p.clone() for name, p in actor.named_parameters() if "lora_" not in name}
    critic = AdaptedScalar(add_adapter(actor, LORA, CRITIC, seed=0), CRITIC, 0, seed=0)
    learner = Learner(
        Separate(actor, critic),
        AdapterView(actor, None),
        Optim(lr=3e-3, critic_lr=3e-3),
        Sampling(max_new_tokens=8),
        8,
    )
    generator = NativeGenerator(actor, tokenizer(), frozenset({1}), 0)
    collector = Collector(Sampler(prompts(32), 32, 0), generator, length_reward())
    steps = list(rl(collector, learner, ALGORITHMS["ppo"]))
    assert steps[0].metrics["kl"] == 0.0 and steps[0].metrics["ratio/first_error"] < 1e-5
    assert steps[-1].metrics["kl"] > 0.05
    assert steps[-1].metrics["reward"] > steps[0].metrics["reward"]
    for name, p in actor.named_parameters():
        if name in base:
            assert torch.equal(p, base[name]), name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_frozen_layers_are_shared_and_stay(kind):
    actor = freeze_layers(model(kind), 1)
    reference = frozen_copy(actor, torch.float32)
    critic = ScalarModel.from_trunk(actor, 0, 0, share_frozen=True)
    frozen = {name: p for name, p in actor.named_parameters() if not p.requires_grad}
    assert any("0." in name for name in frozen) and any(
        "1." in n for n, p in actor.named_parameters() if p.requires_grad
    )
    theirs, trunk = (
        dict(reference.named_parameters()),
        dict(critic.model.base_model.named_parameters()),
    )
    for name, p in actor.named_parameters():
        assert (theirs[name] is p) == (name in frozen)
        inner = name.partition(".")[2]
        if inner in trunk:
            assert (trunk[inner] is p) == (name in frozen)
    assert actor.get_output_embeddings().weight is actor.get_input_embeddings().weight
    before = copy.deepcopy(masked_logprobs(reference, TOKENS, MASK))
    torch.testing.assert_close(masked_logprobs(actor, TOKENS, MASK), before)
    optimizer = torch.optim.SGD([p for p in actor.parameters() if p.requires_grad], lr=0.5)
    masked_logprobs(actor, TOKENS, MASK).sum().backward()
    optimizer.step()
    assert (masked_logprobs(actor, TOKENS, MASK) - before).abs().max() > 1e-3
    assert torch.equal(masked_logprobs(reference, TOKENS, MASK), before)


def test_actor_and_critic_share_a_trunk_and_no_parameter():
    actor = add_adapter(model(), LORA, POLICY, seed=0)
    both = Separate(
        actor, AdaptedScalar(add_adapter(actor, LORA, CRITIC, seed=0), CRITIC, 0, seed=0)
    )
    of_actor, of_critic = (
        {id(p) for p in ps} for ps in (both.actor_parameters(), both.critic_parameters())
    )
    assert (
        of_actor == {id(p) for p in adapter_parameters(actor, POLICY)} and not of_actor & of_critic
    )


def test_what_an_adapter_cannot_be_put_on():
    with pytest.raises(
        AdapterError,
        match=r"policy.adapter.targets: the model has no layer q_project. It has down_proj",
    ):
        add_adapter(model(), Lora(targets=("q_project",)), POLICY, 0)
    with pytest.raises(AdapterError, match="policy.frozen_layers = 2: the model has 2 layers"):
        freeze_layers(model(), 2)


def test_named_targets_are_the_only_ones():
    made = add_adapter(model(), Lora(rank=2, targets=("q_proj", "v_proj")), POLICY, 0)
    assert len(adapter_parameters(made, POLICY)) == 2 * 2 * 2
    assert isinstance(make_decoder(made, 32), RowDecoder)


def test_a_model_without_a_layer_for_adapters_is_refused(monkeypatch):
    monkeypatch.setattr("quartet.models.adapters.linear_layers", lambda _: {})
    with pytest.raises(AdapterError, match="policy.adapter: llama has no linear layer that an ada"):
        add_adapter(model(), Lora(rank=2), POLICY, 0)
