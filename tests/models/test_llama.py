"""The Llama family written out, against transformers' own forward: in float64, where only mistakes differ."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from quartet.generation.decoders import PlainDecoder, RowDecoder, make_decoder
from quartet.generation.slots import SlotDecoder
from quartet.models import packing
from quartet.models.forward import masked_logprobs
from quartet.models.fused import has_fused_forward, packed_hidden_states
from quartet.models.heads import ScalarModel
from quartet.models.packing import pack, pack_rows, repacked, unpacked
from tests.support.world import model

MODELS = {
    "llama": ("llama", {}),
    "shared keys": ("mistral", {"num_key_value_heads": 2}),
    "biases": ("qwen2", {"num_key_value_heads": 1}),
    "normed heads": ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "all biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "other activation": ("llama", {"hidden_act": "gelu"}),
    "own head": ("llama", {"tie_word_embeddings": False}),
    "yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
}
FAMILY = pytest.mark.parametrize("name", sorted(MODELS))


def config(name, **more):
    kind, settings = MODELS[name]
    shape = {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
    }
    return AutoConfig.for_model(kind, **(shape | settings | more))


def disturbed(made, dtype):
    """Norms and biases that are not what they start as, so that none can be forgotten unnoticed."""
    for parameter in made.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return made.to(dtype).eval()


def language_model(name, dtype=torch.float32, **more):
    return disturbed(
        AutoModelForCausalLM.from_config(config(name, **more), dtype=torch.float32), dtype
    )


def ragged():
    """Rows of 5, 30, 17 and 2 tokens in a rectangle, asked about their second halves."""
    lengths, columns = torch.tensor([5, 30, 17, 2]), torch.arange(33)
    asked = (columns < lengths[:, None]) & (columns >= lengths[:, None] // 2)
    return torch.randint(40, (4, 33)), asked


def with_shared_prompts():
    """Answers of 6, 12 and 3 tokens to a prompt of 9, of 7 and 9 to one of 5, and of 8 to one of
    14, mixed, each asked about from the last token of its prompt on."""
    torch.manual_seed(1)
    prompts, answers = [9, 5, 14], [(0, 6), (1, 7), (0, 12), (2, 8), (0, 3), (1, 9)]
    texts = [torch.randint(40, (n,)) for n in prompts]
    tokens, asked = torch.randint(40, (6, 33)), torch.zeros(6, 33, dtype=torch.bool)
    for row, (number, length) in enumerate(answers):
        tokens[row, : prompts[number]] = texts[number]
        asked[row, prompts[number] - 1 : prompts[number] - 1 + length] = True
    return tokens, asked


ROWS = pytest.mark.parametrize("rows", [ragged, with_shared_prompts])


@ROWS
@FAMILY
def test_hidden_states_and_gradients_are_transformers_own(name, rows):
    trunk = language_model(name, torch.float64).base_model
    assert has_fused_forward(trunk, 33)
    tokens, asked = rows()
    assert (pack(tokens, asked).repeats is None) == (rows is ragged)
    ours = packed_hidden_states(trunk, pack(tokens, asked))
    theirs = trunk(input_ids=tokens, use_cache=False).last_hidden_state[asked]
    # transformers keeps the angles of the rotation in float32 also here
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(theirs)
    for a, b in zip(
        *(
            torch.autograd.grad((weights * h).sum(), list(trunk.parameters()))
            for h in (ours, theirs)
        ),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=0)


@ROWS
@FAMILY
def test_packed_or_not_or_with_checkpoints_nothing_else_changes(name, rows, monkeypatch):
    trunk = language_model(name, torch.float64).base_model
    tokens, asked = rows()

    def gradients():
        h = packed_hidden_states(trunk, pack(tokens, asked))
        return [h, *torch.autograd.grad(h.sin().sum(), list(trunk.parameters()))]

    expected = gradients()
    assert pack(tokens, asked).places is not None
    monkeypatch.setattr(packing, "WORTH_PACKING", 1.0)
    assert pack(tokens, asked).places is None
    for a, b in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    for block in trunk.layers:
        block.gradient_checkpointing = True
    for a, b in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@FAMILY
def test_second_derivatives_exist(name):
    """Trust regions take them."""
    trunk = language_model(name, torch.float64, num_hidden_layers=1).base_model
    tokens = torch.randint(40, (2, 4))
    asked = torch.ones_like(tokens, dtype=torch.bool)
    weights = [trunk.layers[0].input_layernorm.weight, trunk.layers[0].mlp.gate_proj.weight]

    def slope(forward):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            gradients = torch.autograd.grad(forward().sin().sum(), weights, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in gradients), weights)

    ours = slope(lambda: packed_hidden_states(trunk, pack(tokens, asked)))
    theirs = slope(lambda: trunk(input_ids=tokens, use_cache=False).last_hidden_state)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max()), rtol=0)


@FAMILY
@pytest.mark.parametrize("kind", [RowDecoder, SlotDecoder])
def test_sampling_gives_the_logits_of_transformers_token_by_token(name, kind):
    """Both decoders, given the same tokens; rows leave, others come, samples share their prompt."""
    made = language_model(name)
    ours, plain = kind(made, 48), PlainDecoder(made)
    assert isinstance(make_decoder(made, 48), RowDecoder)
    prompts = [torch.randint(40, (n,)).tolist() for n in (3, 9, 5, 14)]
    texts = [list(p) for p in prompts for _ in range(3)]
    first, theirs = ours.prefill(prompts, 3), plain.prefill(prompts, 3)
    torch.testing.assert_close(first, theirs, atol=1e-5, rtol=1e-5)
    rows = list(range(12))  # the text that each row of ours belongs to
    for step in range(16):
        if step % 4 == 2:
            going = torch.rand(len(rows)) > 0.15
            going[-1] = False
            rows = [rows[i] for i in ours.keep(going).tolist()]
        if step == 9:
            texts += [[7, 8, 9, 10, 11], [4]]
            rows += [12, 13]
            late = ours.prefill(texts[12:], 1)
            for text, logits in zip(texts[12:], late, strict=True):
                torch.testing.assert_close(
                    logits, made(input_ids=torch.tensor([text])).logits[0, -1], atol=1e-5, rtol=1e-5
                )
        tokens = torch.randint(40, (len(rows),))
        for row, token in zip(rows, tokens.tolist(), strict=True):
            texts[row].append(token)
        logits = ours.step(tokens)
        for i, row in enumerate(rows):
            alone = made(input_ids=torch.tensor([texts[row]])).logits[0, -1]
            torch.testing.assert_close(logits[i], alone, atol=1e-5, rtol=1e-5)
    assert len(rows) > 1


def test_other_architectures_go_the_plain_way():
    other = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gptj", vocab_size=40, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    )
    assert not has_fused_forward(other.base_model, 10)
    assert isinstance(make_decoder(other, 10), PlainDecoder)


def test_texts_longer_than_the_window_are_computed_under_it():
    windowed = language_model("shared keys", sliding_window=16)
    assert has_fused_forward(windowed.base_model, 30)
    tokens = torch.randint(40, (2, 30))
    mask = torch.arange(30).expand(2, 30) > 3
    theirs = (
        windowed(input_ids=tokens)
        .logits.log_softmax(-1)[:, :-1]
        .gather(-1, tokens[:, 1:, None])[..., 0]
    )
    ours = masked_logprobs(windowed, tokens, mask)[:, 1:]
    torch.testing.assert_close(ours, torch.where(mask[:, 1:], theirs, 0.0), atol=1e-5, rtol=1e-5)


def test_products_that_are_more_than_a_matrix_are_sampled_from_as_they_are():
    """As under an adapter: its own weight is not all there is to it."""

    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + x.sum(-1, keepdim=True)

    made = language_model("llama")
    old = made.base_model.layers[0].self_attn.q_proj
    new = Adapted(old.in_features, old.out_features, bias=False)
    new.load_state_dict(old.state_dict())
    made.base_model.layers[0].self_attn.q_proj = new
    assert has_fused_forward(made.base_model, 10)
    assert isinstance(make_decoder(made, 10), PlainDecoder)
    prompt = [[5, 6, 7]]
    torch.testing.assert_close(
        make_decoder(made, 10).prefill(prompt, 1)[0],
        made(input_ids=torch.tensor(prompt)).logits[0, -1],
    )


def test_a_model_that_computes_something_else_is_found_out():
    made = model("llama")
    made.base_model.norm.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert not has_fused_forward(made.base_model, 10)


def test_a_reward_model_is_read_at_the_last_token_by_the_same_code():
    made = AutoModelForSequenceClassification.from_config(
        config("biases", num_labels=1, pad_token_id=None)
    )
    scalar = ScalarModel(disturbed(made, torch.float32))
    tokens, _ = ragged()
    lengths = torch.tensor([5, 30, 17, 2])
    scores = scalar.scores(tokens, lengths)
    for row, length, score in zip(tokens, lengths.tolist(), scores.tolist(), strict=True):
        assert score == pytest.approx(made(input_ids=row[None, :length]).logits.item(), abs=1e-4)


# --- packing -------------------------------------------------------------------------------------------------------------


def test_rows_are_packed_as_far_as_they_are_asked_for():
    tokens = torch.tensor([[5, 6, 7, 8, 0, 0], [9, 4, 0, 0, 0, 0]])
    asked = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0]]).bool()
    packed = pack(tokens, asked)
    assert packed.tokens.tolist() == [5, 6, 7, 8, 9, 4] and packed.positions.tolist() == [
        0,
        1,
        2,
        3,
        0,
        1,
    ]
    assert (
        packed.lengths == (4, 2) and packed.width == 4 and packed.output_index.tolist() == [2, 3, 5]
    )
    rectangle = unpacked(packed.tokens, packed)
    assert (
        rectangle.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
        and repacked(rectangle, packed).tolist() == packed.tokens.tolist()
    )


def test_a_prompt_that_rows_have_in_common_is_packed_once():
    """But for its last token, whose output each row needs for itself. Rows 0 and 2 begin with 5, 6,
    7; row 1 with other tokens, row 3 as they do, but its answer begins earlier."""
    tokens = torch.tensor([[5, 6, 7, 8, 0], [9, 4, 7, 1, 0], [5, 6, 7, 2, 3], [5, 6, 1, 1, 1]])
    asked = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 1, 1, 0, 0]])
    packed = pack(tokens, asked.bool())
    assert packed.tokens.tolist() == [5, 6, 7, 9, 4, 7, 7, 2, 5, 6, 1]
    assert packed.positions.tolist() == [0, 1, 2, 0, 1, 2, 2, 3, 0, 1, 2]
    assert packed.lengths == (3, 3, 2, 3) and packed.starts.tolist() == [0, 3, 6, 8, 11]
    assert packed.output_index.tolist() == [2, 5, 6, 7, 9, 10]
    repeats = packed.repeats
    assert packed.tokens[repeats.keys].tolist() == [5, 6, 7, 9, 4, 7, 5, 6, 7, 2, 5, 6, 1]
    assert repeats.key_starts.tolist() == [0, 3, 6, 10, 13]
    whole = unpacked(packed.tokens, packed, repeats)
    assert whole.tolist() == [[5, 6, 7, 0], [9, 4, 7, 0], [5, 6, 7, 2], [5, 6, 1, 0]]
    assert unpacked(packed.tokens, packed).tolist()[2] == [0, 0, 7, 2]
    assert repacked(whole, packed).tolist() == packed.tokens.tolist()


def test_prompts_are_asked_about_their_last_tokens():
    packed = pack_rows([[5, 6, 7], [8]], torch.device("cpu"))
    assert packed.tokens.tolist() == [5, 6, 7, 8] and packed.positions.tolist() == [0, 1, 2, 0]
    assert packed.output_index.tolist() == [2, 3] and packed.places.tolist() == [0, 1, 2, 3]
    assert pack_rows([[5, 6], [8, 9]], torch.device("cpu")).places is None


def test_a_forward_pass_that_differs_is_not_taken_and_the_log_says_so(monkeypatch, caplog):
    """It would be seen by its speed alone."""
    monkeypatch.setattr("quartet.models.fused.DIFFERENCE", -1.0)
    trunk = model().base_model
    assert not has_fused_forward(trunk, 10) and not has_fused_forward(trunk, 10)
    [record] = caplog.records
    assert record.message.startswith("llama: Quartet's forward pass and transformers' differ")
