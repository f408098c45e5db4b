"""Reward models on backbones of their own: encoders of several families, and decoders."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from quartet.algorithms.preference import LastTokenLoss
from quartet.data.records import Comparison
from quartet.data.sampler import Sampler
from quartet.experience import Prompt
from quartet.loops.reward_model import pair_accuracy, reward_model
from quartet.models.heads import ScalarModel
from quartet.models.language_model import ModelError, save
from quartet.models.text_classifier import TextReader, load_scorer, new_scorer, segment_separator
from quartet.training.budget import Budget
from quartet.training.optim import Optimizer, OptimizerConfig
from tests.rewards.test_text_models import bert_tokenizer
from tests.support.world import WORDS, model, tokenizer

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 34,
    "pad_token_id": 0,
}
ENCODERS = {
    "bert": SIZES,
    "roberta": SIZES | {"type_vocab_size": 1},
    "modernbert": SIZES | {"cls_token_id": 1, "sep_token_id": 2},
    "distilbert": {
        "vocab_size": 32,
        "dim": 16,
        "n_layers": 1,
        "n_heads": 2,
        "hidden_dim": 16,
        "max_position_embeddings": 34,
        "pad_token_id": 0,
    },
}


def plain_tokenizer():
    """The tokenizer of an encoder without token types."""
    made = bert_tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    made.model_max_length = 32
    return made


def typed(made):
    """The tokenizer, which says the types of tokens when it encodes."""
    made.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return made


def encoder(folder, kind):
    """Write a tiny pretrained encoder, which has no head of a classifier."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **ENCODERS[kind])
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    (typed(bert_tokenizer()) if kind == "bert" else plain_tokenizer()).save_pretrained(folder)
    return TextReader.of(folder)


def comparisons(reader):
    """Pairs of different lengths whose better side says "good"."""
    made = []
    for i, word in enumerate(WORDS[:8]):
        prompt = Prompt(str(i), (), "the " + " ".join([word] * (1 + i % 3)))
        sides = (tuple(reader.ids(prompt, f"is {w} very", True)) for w in ("good", "bad"))
        made.append(Comparison(str(i), (), *sides))
    return made


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_learns_what_separates_the_sides_and_is_saved_as_its_class(kind, tmp_path):
    reader = encoder(tmp_path / "base", kind)
    scalar = new_scorer(tmp_path / "base", reader.tokenizer, CPU, seed=0)
    pairs = comparisons(reader)
    optimizer = Optimizer(list(scalar.parameters()), OptimizerConfig(lr=1e-2), 20)
    sampler = Sampler(pairs, 4, 0)
    steps = list(reward_model(scalar, sampler, LastTokenLoss(), optimizer, 20, Budget(4096)))
    losses = [step.metrics["loss"] for step in steps]
    assert losses[-1] < 0.8 * losses[0] and pair_accuracy(scalar, pairs, 4096) == 1.0
    scalar.centre = 0.5
    scalar.save(tmp_path / "trained", reader.tokenizer)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "trained")
    again = load_scorer(tmp_path / "trained", CPU)
    prompts = ["the film", "the very long film", "a"]
    rows = [reader.ids(Prompt("p", (), text), "is good", True) for text in prompts]
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.tensor([row + [0] * (int(lengths.max()) - len(row)) for row in rows])
    for row, text in enumerate(prompts):
        pair = reader.tokenizer(text, "is good", return_tensors="pt")
        with torch.no_grad():
            expected = theirs(**pair).logits.item() - 0.5
            assert scalar.scores(padded, lengths)[row].item() == pytest.approx(expected, abs=1e-5)
            assert again.scores(padded, lengths)[row].item() == pytest.approx(expected, abs=1e-5)


def test_new_weights_depend_on_the_seed_alone(tmp_path):
    reader = encoder(tmp_path, "bert")

    def head(seed):
        torch.manual_seed(torch.randint(1000, ()).item())
        state = torch.get_rng_state()
        made = new_scorer(tmp_path, reader.tokenizer, CPU, seed).model.classifier.weight
        assert torch.equal(state, torch.get_rng_state())
        return made

    assert torch.equal(head(3), head(3)) and not torch.equal(head(3), head(4))


def test_a_decoder_gets_the_head_that_the_policys_copy_gets(tmp_path):
    save(model(), tokenizer(), tmp_path)
    named = new_scorer(tmp_path, tokenizer(), CPU, seed=5)
    copied = ScalarModel.from_trunk(model(), tokenizer().pad_token_id, seed=5)
    ids, lengths = torch.tensor([[4, 5, 6], [7, 8, 0]]), torch.tensor([3, 2])
    assert torch.equal(named.scores(ids, lengths), copied.scores(ids, lengths))
    named.save(tmp_path / "trained", tokenizer())
    other = new_scorer(tmp_path / "trained", tokenizer(), CPU, seed=9)
    assert torch.equal(other.head.weight, copied.head.weight), "the head is kept"


def test_the_longest_text_of_an_encoder_is_its_tokenizers(tmp_path):
    """RoBERTa has two more positions than tokens that it reads."""
    reader = encoder(tmp_path, "roberta")
    assert reader.limit == 32 and not reader.too_long([1] * 32) and reader.too_long([1] * 33)


def test_token_types_are_those_of_the_tokenizer():
    assert segment_separator(typed(bert_tokenizer())) == 2
    assert segment_separator(typed(plain_tokenizer())) is None
    odd = typed(bert_tokenizer())
    odd.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A $B:1 [CLS]:2", special_tokens=[("[CLS]", 1)]
    )
    with pytest.raises(ModelError, match=r"by the token types \[0, 1, 2\], which Quartet cannot"):
        segment_separator(odd)


def test_what_is_no_backbone_is_refused(tmp_path):
    reader = encoder(tmp_path, "bert")
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {n: w for n, w in weights.items() if "attention.self.query.weight" not in n},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ModelError, match=r"has no weights for bert.*query.weight, which would be"):
        new_scorer(tmp_path, reader.tokenizer, CPU, 0)
    transformers.T5Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"is an encoder with a decoder \(t5\)"):
        new_scorer(tmp_path, reader.tokenizer, CPU, 0)
