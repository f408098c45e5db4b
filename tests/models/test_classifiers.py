"""Reward models and critics of architectures for which transformers has no classifier."""

import pytest
import torch
from transformers import AutoConfig

from quartet.models.classifiers import define_classifier
from quartet.models.export import export
from quartet.models.heads import ScalarModel, scores_last_token
from quartet.models.language_model import ModelError
from tests.models.test_families import language_model, ragged
from tests.support.world import tokenizer


@pytest.mark.parametrize("name", ["granite", "olmo 3"])
def test_what_transformers_has_no_classifier_for_gets_one_that_is_loaded_again(name, tmp_path):
    policy = language_model(name)
    scalar = ScalarModel.from_trunk(policy, None, seed=0)
    tokens, _ = ragged()
    lengths = torch.tensor([5, 30, 17, 2])
    scores = scalar.scores(tokens, lengths)
    hidden = policy.base_model(input_ids=tokens[1:2, :30]).last_hidden_state[0, -1]
    assert scores[1].item() == pytest.approx((scalar.head.weight @ hidden).item(), abs=1e-4)
    scalar.centre = 0.25
    scalar.save(tmp_path / "saved", tokenizer())
    again = ScalarModel.load(tmp_path / "saved")
    assert scores_last_token(again.model.config)
    torch.testing.assert_close(again.scores(tokens, lengths), scores - 0.25)
    scalar.save_per_token(tmp_path / "critic", tokenizer())
    torch.testing.assert_close(
        ScalarModel.load(tmp_path / "critic").scores(tokens, lengths), scores - 0.25
    )
    export(tmp_path / "saved", tmp_path / "half", "bfloat16")
    assert (tmp_path / "half" / "model.safetensors").is_file()


def test_an_encoder_and_decoder_is_refused():
    with pytest.raises(ModelError, match="no sequence classifier for the architecture pegasus"):
        define_classifier(AutoConfig.for_model("pegasus"))
