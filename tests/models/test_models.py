import copy

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from quartet.algorithms.algorithm import Forward
from quartet.models.actor_critic import ForwardRequest, Separate, Shared, pad_token_id
from quartet.models.forward import (
    forward_positions,
    has_linear_head,
    logits_of,
    masked_logprobs,
    policy_logprobs,
)
from quartet.models.heads import ScalarModel, ValueHead, initialise
from quartet.models.language_model import ModelError, create, load_model, load_tokenizer, save
from quartet.models.padding import response_mask, right_pad
from quartet.models.shape import Shape
from tests.support.world import SHAPES, model, prompts, tokenizer

KINDS = pytest.mark.parametrize("kind", sorted(SHAPES))
ROWS = [[5, 6, 7, 8, 9, 10], [8, 9, 4], [11, 5]]


@KINDS
def test_a_shape_knows_its_number_of_parameters(kind):
    assert SHAPES[kind].parameters(len(tokenizer())) == sum(
        p.numel() for p in model(kind).parameters()
    )


def test_the_same_seed_gives_the_same_weights():
    one, same, other = (
        create(SHAPES["llama"], tokenizer(), seed).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not all(torch.equal(one[k], other[k]) for k in one)


@KINDS
def test_logprobs_in_a_padded_batch_are_those_of_each_row_alone(kind):
    made = model(kind)
    tokens, lengths = right_pad(ROWS)
    mask = response_mask(torch.ones_like(lengths), lengths, tokens.shape[1])
    together = policy_logprobs(made, tokens, lengths, mask, 0.7, micro_batch_tokens=10_000)
    apart = policy_logprobs(made, tokens, lengths, mask, 0.7, micro_batch_tokens=1)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)
    for i, row in enumerate(ROWS):
        logits = made(input_ids=torch.tensor([row])).logits[0] / 0.7
        by_hand = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0]
        torch.testing.assert_close(together[i, 1 : len(row)], by_hand, atol=1e-5, rtol=0)
        assert (together[i, len(row) :] == 0).all()


@KINDS
def test_entry_t_does_not_see_token_t(kind):
    """The value of a token, and the log-prob of another choice, come from what stands before it."""
    made, critic = model(kind), ScalarModel.from_trunk(model(kind), 0, seed=0)
    tokens = torch.tensor([[5, 6, 7, 8]])
    other = torch.tensor([[5, 6, 9, 8]])
    for models in (Separate(made, critic), Shared(made, head(made))):
        mask = torch.tensor([[False, True, True, True]])
        first, second = (
            Forward.joined(models.forward_passes(ForwardRequest(t, mask, 1.0))).values
            for t in (tokens, other)
        )
        torch.testing.assert_close(first[:, 1:3], second[:, 1:3])
        assert not torch.allclose(first[:, 3:], second[:, 3:])


def head(made):
    made_head = ValueHead(made.config.hidden_size)
    torch.nn.init.normal_(made_head.linear.weight)
    return made_head


@KINDS
def test_a_reward_model_reads_the_last_real_token_and_loads_in_transformers(kind, tmp_path):
    scalar = ScalarModel.from_trunk(model(kind), 0, seed=3)
    tokens, lengths = right_pad(ROWS)
    scores = scalar.scores(tokens, lengths)
    for row, score in zip(ROWS, scores, strict=True):
        alone = scalar.scores(torch.tensor([row]), torch.tensor([len(row)]))
        torch.testing.assert_close(score, alone[0], atol=1e-5, rtol=0)
    scalar.centre = 0.5
    scalar.save(tmp_path / "rm", tokenizer())
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    assert loaded.config.num_labels == 1 and loaded.config.id2label == {0: "reward"}
    theirs = loaded(
        input_ids=tokens, attention_mask=(torch.arange(6) < lengths[:, None]).long()
    ).logits[:, 0]
    torch.testing.assert_close(theirs, scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        ScalarModel.load(tmp_path / "rm").scores(tokens, lengths), scores - 0.5, atol=1e-5, rtol=0
    )


@KINDS
def test_a_saved_policy_loads_in_transformers_with_the_same_logits(kind, tmp_path):
    made = model(kind)
    save(made, tokenizer(), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([ROWS[0]])
    torch.testing.assert_close(theirs(input_ids=ids).logits, made(input_ids=ids).logits)
    assert load_tokenizer(tmp_path).decode(prompts(1)[0].ids) == prompts(1)[0].text


@KINDS
def test_a_shared_critic_is_saved_as_a_folder_of_its_own(kind, tmp_path):
    shared = Shared(model(kind), head(model(kind)))
    torch.nn.init.constant_(shared.head.linear.bias, 0.25)
    shared.save_critic(tmp_path / "critic", tokenizer())
    tokens = torch.tensor([ROWS[0]])
    mask = torch.arange(tokens.shape[1])[None] > 0
    [outputs] = shared.forward_passes(ForwardRequest(tokens, mask, 1.0))
    values = outputs.values
    torch.testing.assert_close(
        ScalarModel.load(tmp_path / "critic").values(tokens, mask), values, atol=1e-5, rtol=0
    )


def test_a_critic_from_the_reward_model_values_the_end_as_the_reward_model_scores_it():
    reward_model = ScalarModel.from_trunk(model(), 0, seed=3)
    critic = copy.deepcopy(reward_model)
    tokens, lengths = right_pad([[5, 6, 7]])
    after_the_last = critic.values(
        torch.tensor([[5, 6, 7, 8]]), torch.tensor([[False, False, False, True]])
    )[:, 3]
    torch.testing.assert_close(after_the_last, reward_model.scores(tokens, lengths))


def test_a_new_head_of_size_d_has_the_deviation_of_one_over_the_root_of_d_plus_1():
    head = torch.nn.Linear(3, 40_000)
    initialise(head, seed=0)
    # of 120,000 numbers, whose deviation has a standard error of 0.001
    assert head.weight.std().item() == pytest.approx(1 / 2, abs=0.005)
    assert head.weight.mean().item() == pytest.approx(0.0, abs=0.007)


def test_dropout_is_off_for_life():
    made = create(
        Shape(type="gpt2", hidden_size=32, num_layers=2, num_heads=4, max_length=64), tokenizer(), 0
    )
    assert made.config.resid_pdrop > 0 and not any(m.training for m in made.modules())
    assert not any(m.training for m in ScalarModel.from_trunk(made, 0, 0).model.modules())


def test_a_model_with_two_labels_is_refused(tmp_path):
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=2,
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has 2 labels; a reward model needs 1"):
        ScalarModel.load(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    model().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no tokenizer. Save one beside the model"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no config.json, so it is not a Hugging Face model"):
        load_model(tmp_path)


def test_a_tokenizer_that_pads_with_its_end_gives_the_reward_model_no_pad_id():
    padded, unpadded = tokenizer(), tokenizer(pad=False)
    assert pad_token_id(padded) == 0
    assert pad_token_id(unpadded) is None
    unpadded.pad_token = unpadded.eos_token
    assert pad_token_id(unpadded) is None


@pytest.mark.parametrize(
    "architecture",
    [
        {
            "model_type": "gemma2",
            "num_key_value_heads": 4,
            "head_dim": 8,
            "final_logit_softcapping": 2.0,
        },
        {"model_type": "cohere", "num_key_value_heads": 4, "logit_scale": 0.5},
        {"model_type": "granite", "num_key_value_heads": 4, "logits_scaling": 3.0},
        {"model_type": "phi", "num_key_value_heads": 4},  # its head has a bias
        {"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32},
        {"model_type": "mistral", "num_key_value_heads": 2},
        {"model_type": "gpt2"},
    ],
)
def test_any_head_is_read_as_the_model_means_it(architecture):
    """Log-probs of masked tokens against the model's own logits, whatever it does to them after the head."""
    sizes = {
        "vocab_size": 24,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    config = AutoConfig.for_model(
        **{**sizes, **architecture, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    )
    made = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(3)  # far enough from 0 for a scale or a cap to show
    tokens = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 0, 0]])
    mask = torch.tensor([[False, False, True, True, True], [False, True, True, False, False]])
    logits = made(input_ids=tokens).logits
    expected = torch.nn.functional.pad(
        logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0], (1, 0)
    )
    measured = masked_logprobs(made, tokens, mask)
    torch.testing.assert_close(measured, torch.where(mask, expected, 0.0), atol=1e-5, rtol=1e-5)
    assert has_linear_head(made)
    outputs = forward_positions(made, tokens, mask)
    torch.testing.assert_close(
        logits_of(made, outputs), logits[:, :-1][mask[:, 1:]], atol=1e-5, rtol=1e-5
    )


def test_a_head_that_is_more_than_a_scale_and_a_cap_is_left_to_the_model(monkeypatch):
    made = model()
    real = made.forward

    def shifted(**inputs):
        output = real(**inputs)
        output.logits = output.logits + torch.arange(output.logits.shape[-1])
        return output

    monkeypatch.setattr(made, "forward", shifted)
    assert not has_linear_head(made)
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    mask = torch.tensor([[False, False, True, True, True]])
    expected = made(input_ids=tokens).logits[0, 1:4].log_softmax(-1)
    measured = masked_logprobs(made, tokens, mask)[mask]
    torch.testing.assert_close(measured, expected.gather(-1, tokens[0, 2:, None])[:, 0])
