"""The heads of ILQL, and the policy that is extracted with them."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.models.forward import forward_positions
from quartet.models.language_model import ModelError, save
from quartet.models.q_heads import QHeads, extract_policy, extracted_with, save_heads
from tests.support.world import model, prompts, tokenizer

TOKENS = torch.tensor([[4, 5, 6, 7, 8, 9]])


def heads_of(made, seed=1):
    heads, rng = QHeads(made), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        heads.q.weight.normal_(0, 0.5, generator=rng)
        heads.target.normal_(0, 0.5, generator=rng)
    return heads


def tilted(made, q, beta):
    """log π_β + β Q, normalized, with all numbers of the vocabulary written out."""
    with torch.no_grad():
        hidden = made.base_model(input_ids=TOKENS).last_hidden_state
        logprobs = made(input_ids=TOKENS).logits.log_softmax(-1)
        return (logprobs + beta * hidden @ q.T).log_softmax(-1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "tied"])
def test_the_policy_is_a_model_that_transformers_loads_alone(tmp_path, kind):
    made = model("llama" if kind == "tied" else kind)
    if kind == "tied":
        made.config.tie_word_embeddings = True
        made.tie_weights()
        assert made.get_output_embeddings().weight is made.get_input_embeddings().weight
    heads = heads_of(made)
    wanted, imitated = tilted(made, heads.q.weight, 3.0), tilted(made, heads.q.weight, 0.0)
    save_heads(heads, 3.0, tmp_path / "q_heads")
    extract_policy(made, heads.q.weight, 3.0)
    save(made, tokenizer(), tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    with torch.no_grad():
        found = loaded(input_ids=TOKENS).logits.log_softmax(-1)
        again = extracted_with(tmp_path, 0.0)(input_ids=TOKENS).logits.log_softmax(-1)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(again, imitated, atol=1e-5)
    assert not torch.allclose(found, imitated, atol=0.1)


def test_the_generator_samples_that_policy():
    made = model()
    heads = heads_of(made)
    with torch.no_grad():
        heads.q.weight.zero_()
        heads.q.weight[7] = 1.0  # Q(h, 7) is the sum of the hidden state
    [prompt] = prompts(1)
    with torch.no_grad():
        hidden = made.base_model(input_ids=torch.tensor([prompt.ids])).last_hidden_state[0, -1]
    beta = 50.0 * float(hidden.sum().sign())
    extract_policy(made, heads.q.weight, beta)
    generator = NativeGenerator(made, tokenizer(), frozenset({1}), 0)
    [rollout] = generator.generate([prompt], Sampling(max_new_tokens=1))
    assert rollout.response_ids == (7,) and rollout.logprobs[0] > -0.01


def test_the_granite_s_divided_logits_are_those_of_the_policy():
    made = model()
    made.config.logits_scaling = 1.0  # Llama reads no such key; the arithmetic is what is tested
    heads = heads_of(made)
    made.config.logits_scaling = 4.0
    before = made.get_output_embeddings().weight.clone()
    extract_policy(made, heads.q.weight, 2.0)
    added = made.get_output_embeddings().weight - before
    assert torch.allclose(added, 8.0 * heads.q.weight, atol=1e-5)  # β / scale = 2 · 4


def test_capped_logits_are_refused():
    made = model()
    made.config.final_logit_softcapping = 30.0
    with pytest.raises(ModelError, match="no linear function"):
        QHeads(made)


def test_the_gradient_of_the_conservative_term_is_softmax_less_the_token():
    made = model()
    heads = heads_of(made)
    mask = torch.tensor([[False, False, True, False, False, False]])
    outputs = forward_positions(made, TOKENS, mask)
    q, target_q, logprobs, value = heads(outputs, TOKENS[mask])
    (-logprobs.sum()).backward()
    hidden = outputs.hidden.detach()[0]
    all_q = heads.q.weight.detach() @ hidden
    by_hand = all_q.softmax(-1)
    by_hand[6] -= 1
    assert torch.allclose(heads.q.weight.grad, by_hand[:, None] * hidden, atol=1e-5)
    assert q.item() == pytest.approx(all_q[6].item(), abs=1e-5)
    assert target_q.item() == pytest.approx(float(heads.target[6] @ hidden), abs=1e-5)
    assert value.item() == 0.0 and not target_q.requires_grad


def test_the_target_network_follows():
    heads = QHeads(model())
    with torch.no_grad():
        heads.q.weight.fill_(1.0)
    heads.follow(0.25)
    heads.follow(0.25)
    assert heads.target.unique().tolist() == [1 - 0.75**2]
    other = QHeads(model())
    other.load_state(heads.state())
    assert bool((other.target == heads.target).all())


def test_a_run_without_heads_has_no_beta(tmp_path):
    with pytest.raises(ModelError, match="has no q_heads"):
        extracted_with(tmp_path, 1.0)
    (tmp_path / "q_heads").mkdir()
    (tmp_path / "q_heads" / "q_heads.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot be read"):
        extracted_with(tmp_path, 1.0)


def test_new_heads_give_0_everywhere_and_a_uniform_policy_over_the_support():
    made = model()
    rows = made.get_output_embeddings().weight.shape[0]
    for size in (None, 10):
        if size is not None:
            made.quartet_support = size
        heads = QHeads(made)
        assert heads.support == (size or rows)
        mask = torch.arange(6)[None] > 0
        outputs = forward_positions(made, TOKENS, mask)
        q, target, logprobs, value = heads(outputs, TOKENS[mask])
        assert not q.any() and not target.any() and not value.any()
        assert torch.allclose(logprobs, torch.tensor(1 / (size or rows)).log())
