"""Reward models with another tokenizer or another architecture than the policy's."""

import dataclasses

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    PreTrainedTokenizerFast,
)

from quartet.models.heads import ScalarModel
from quartet.models.language_model import ModelError
from quartet.rewards.combine import EnsembleReward
from quartet.rewards.protocol import RewardError, Weighted, rewarded
from quartet.rewards.text_models import StepReward, TextModelReward, step_ends
from tests.support.world import WORDS, model, prompts, rollout, tokenizer


def rollouts(count=5):
    made = []
    for i, prompt in enumerate(prompts(count)):
        ids = (5 + i, 6, 7)[: 1 + i % 3]
        made.append(rollout(prompt, ids, 0.0, i))
    return made


def bert_tokenizer():
    words = {w: i for i, w in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", ".", *WORDS])}
    backend = Tokenizer(models.WordLevel(words, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
    )


def bert(folder, auto=AutoModelForSequenceClassification, labels=1):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        num_labels=labels,
        pad_token_id=0,
    )
    made = auto.from_config(config).eval()
    made.save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    return made


def test_an_encoder_reads_prompt_and_response_as_a_pair_whatever_the_micro_batch(tmp_path):
    theirs = bert(tmp_path)
    asked = rollouts()
    with torch.no_grad():
        expected = [
            theirs(**bert_tokenizer()(r.prompt.text, r.response, return_tensors="pt")).logits.item()
            for r in asked
        ]
    assert len(set(expected)) == len(asked)
    for tokens in (1, 4096):
        assert TextModelReward.load("m", tmp_path, None, tokens).score(asked) == pytest.approx(
            expected, abs=1e-5
        )


def test_a_decoder_with_another_tokenizer_reads_the_text_again(tmp_path):
    scalar = ScalarModel.from_trunk(model(), 0, seed=0)
    other = tokenizer()
    other.add_tokens(["unheard"])
    scalar.save(tmp_path, other)
    asked = rollouts()
    ids = [
        [*tokenizer().encode(r.prompt.text + r.response), tokenizer().eos_token_id] for r in asked
    ]
    expected = [scalar.scores(torch.tensor([row]), torch.tensor([len(row)])).item() for row in ids]
    assert TextModelReward.load("m", tmp_path, None, 4096).score(asked) == pytest.approx(
        expected, abs=1e-5
    )


def test_one_of_several_labels_can_be_the_score(tmp_path):
    theirs = bert(tmp_path, labels=3)
    asked = rollouts(2)
    with torch.no_grad():
        logits = [
            theirs(**bert_tokenizer()(r.prompt.text, r.response, return_tensors="pt")).logits[0]
            for r in asked
        ]
    assert TextModelReward.load("m", tmp_path, 2, 4096).score(asked) == pytest.approx(
        [x[2].item() for x in logits], abs=1e-5
    )
    with pytest.raises(
        ModelError,
        match="has 3 labels; a reward model needs 1. To use the first: reward.label = 0.",
    ):
        TextModelReward.load("m", tmp_path, None, 4096)
    with pytest.raises(ModelError, match="reward.label = 3: .* has 3 labels, counted from 0"):
        TextModelReward.load("m", tmp_path, 3, 4096)


def test_a_language_model_is_no_reward_model(tmp_path):
    model().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        ModelError,
        match="has no weights for score.weight, so it is no trained model for SequenceClassification",
    ):
        ScalarModel.load(tmp_path)


def test_text_that_is_too_long_is_refused_not_cut(tmp_path):
    bert(tmp_path)
    long = dataclasses.replace(rollouts(1)[0], response=" ".join(["film"] * 40))
    with pytest.raises(
        RewardError, match=r"have \d+ tokens for reward model .*, which reads at most 32"
    ):
        TextModelReward.load("m", tmp_path, None, 4096).score([long])


class Says:
    name = "says"

    def __init__(self, *scores):
        self.scores = scores

    def score(self, rollouts):
        return list(self.scores)


def test_ensembles_by_hand():
    members = [Says(1.0, None), Says(2.0, 1.0), Says(6.0, 1.0)]
    assert EnsembleReward("e", members).score(rollouts(2)) == [3.0, None]
    assert EnsembleReward("e", members, combine="min").score(rollouts(2)) == [1.0, None]
    deviation = ((4 + 1 + 9) / 3) ** 0.5
    assert EnsembleReward("e", members, combine="lower_bound").score(rollouts(2))[
        0
    ] == pytest.approx(3 - deviation)
    assert EnsembleReward("e", members, weights=[2.0, 1.0, 1.0]).score(rollouts(2))[0] == 2.5
    weighted = (2 * 1.5**2 + 0.5**2 + 3.5**2) / 4
    lower = EnsembleReward("e", members, [2.0, 1.0, 1.0], "lower_bound", k=2.0).score(rollouts(2))[
        0
    ]
    assert lower == pytest.approx(2.5 - 2 * weighted**0.5)


def test_the_members_disagreement_is_recorded_beside_the_score():
    """Scores 1, 2 and 6 have the mean 3 and the deviation √(14/3)."""
    members = [Says(1.0, None), Says(2.0, 1.0), Says(6.0, 1.0)]
    ensemble = EnsembleReward("e", members, combine="min")
    first, second = rewarded(rollouts(2), [Weighted(ensemble, 2.0)])
    deviation = pytest.approx((14 / 3) ** 0.5)
    assert first.score == 2.0 and first.components == {"e": 1.0, "deviation/e": deviation}
    assert second.score is None and second.components == {"e": None, "deviation/e": None}


def test_where_steps_end():
    assert step_ends("a\n\nb", "\n\n") == [1, 4]
    assert step_ends("a \n\n\n\n b\n\n", "\n\n") == [1, 8]
    assert step_ends("", "\n\n") == [] and step_ends(" \n\n ", "\n\n") == []


@pytest.mark.parametrize("labels", [1, 2])
def test_steps_are_scored_at_their_last_token_and_stand_on_ours(tmp_path, labels):
    theirs = bert(tmp_path, AutoModelForTokenClassification, labels)
    texts = {4: "the ", 5: "film", 6: ".", 7: "good "}
    asked = dataclasses.replace(
        rollouts(1)[0],
        prompt=dataclasses.replace(prompts(1)[0], text="was it "),
        response_ids=(4, 5, 6, 7, 5),
        response="the film.good film",
    )
    encoded = bert_tokenizer()("was it the film.good film", return_offsets_mapping=True)
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor([encoded.input_ids])).logits[0]
    worth = logits[:, 0] if labels == 1 else logits.softmax(-1)[:, 1]
    ends = [
        next(i for i, (a, b) in enumerate(encoded.offset_mapping) if b == at) for at in (15, 25)
    ]
    first, second = worth[ends[0]].item(), worth[ends[1]].item()

    def made(combine):
        return StepReward("s", tmp_path, ".", None, combine, lambda ids: [texts[i] for i in ids])

    assert made("min").score([asked]) == [pytest.approx(min(first, second))]
    assert made("mean").score([asked]) == [pytest.approx((first + second) / 2)]
    assert made("last").score([asked]) == [pytest.approx(second)]
    assert made("min").token_scores([asked]) == [pytest.approx([0, first, 0, 0, second])]
    nothing = dataclasses.replace(asked, response="", response_ids=(1,))
    assert made("min").score([nothing]) == [None]


def test_text_that_reads_like_the_end_is_not_the_end_for_another_tokenizer(tmp_path):
    """The policy wrote ordinary tokens that decode to <eos>."""
    scalar = ScalarModel.from_trunk(model(), 0, seed=0)
    other = tokenizer()
    other.add_tokens(["unheard"])
    scalar.save(tmp_path, other)
    reward = TextModelReward.load("m", tmp_path, None, 4096)
    [asked] = rollouts(1)
    ids = reward._ids(dataclasses.replace(asked, response=" was <eos> good"))
    assert ids.count(other.eos_token_id) == 1 and ids[-1] == other.eos_token_id
    cut = dataclasses.replace(asked, response=" was <eos>", finish_reason="length")
    assert other.eos_token_id not in reward._ids(cut)


@pytest.mark.parametrize("kind", ["text", "steps", "ensemble"])
def test_a_model_whose_score_is_not_finite_stops_the_run(kind, tmp_path):
    auto = (
        AutoModelForTokenClassification if kind == "steps" else AutoModelForSequenceClassification
    )
    bert(tmp_path, auto)
    if kind == "steps":
        reward = StepReward("m", tmp_path, "\n\n", None, "mean", lambda ids: ["a"] * len(ids))
    else:
        reward = TextModelReward.load("m", tmp_path, None, 4096)
    with torch.no_grad():
        reward.model.classifier.bias.fill_(torch.nan)
    if kind == "ensemble":
        reward = EnsembleReward("e", [TextModelReward.load("good", tmp_path, None, 4096), reward])
    with pytest.raises(RewardError, match="reward m: the score of tiny:0/0 is not finite"):
        reward.score(rollouts(2))
