"""Models with images: the language model in them is read, trained and saved by itself."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
)

from quartet.config.toml import read_settings
from quartet.models.architectures import why_not_fused
from quartet.models.language_model import language_config, load_model, save
from quartet.models.loading import FolderWeights, fill, weights_for
from quartet.models.skeleton import skeleton
from quartet.planning.memory import folder_sizes, policy_parameters
from quartet.recipes import recipe_path
from quartet.worlds import make_world
from tests.support.tiny_run import make_run
from tests.support.world import tokenizer

TEXT = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 48, "max_position_embeddings": 256, "bos_token_id": None,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
EYES = {"hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 14}
CASES = {
    "gemma3": (
        TEXT,
        EYES | {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28},
        {"mm_tokens_per_image": 4},
    ),
    "qwen3_5": (TEXT | LINEAR, EYES | {"depth": 1, "out_hidden_size": 32}, {}),
    "mistral3": (
        TEXT | {"model_type": "mistral"},
        EYES | {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "head_dim": 8},
        {},
    ),
}
EACH = pytest.mark.parametrize("kind", list(CASES))
TOKENS = torch.arange(4, 16)[None]


def with_images(kind, words):
    text, vision, more = CASES[kind]
    ids = {"pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id}
    text = text | ids | {"vocab_size": len(words) + 4}
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, **more)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


@EACH
def test_it_has_the_logits_of_the_whole_and_nothing_for_images(kind, tmp_path):
    whole = with_images(kind, tokenizer())
    whole.generation_config = GenerationConfig(eos_token_id=[2, 7])
    save(whole, tokenizer(), tmp_path)
    made = load_model(tmp_path)
    assert type(made.config) is type(language_config(tmp_path))
    assert not [name for name, _ in made.named_parameters() if "vision" in name or "visual" in name]
    torch.testing.assert_close(made(TOKENS).logits, whole(input_ids=TOKENS).logits)
    assert made.generation_config.eos_token_id == [tokenizer().eos_token_id, 2, 7]
    assert why_not_fused(made.config) is None or kind == "qwen3_5"


@EACH
def test_its_weights_are_read_from_the_folder_by_the_names_that_they_have_there(kind, tmp_path):
    """One by one: nothing for images is read, and no whole model is made."""
    whole = with_images(kind, tokenizer())
    save(whole, tokenizer(), tmp_path)
    made = skeleton(language_config(tmp_path))
    weights = weights_for(made, tmp_path)
    assert isinstance(weights, FolderWeights)
    made = fill(made, weights, torch.device("cpu"), tmp_path)
    torch.testing.assert_close(made(TOKENS).logits, whole(input_ids=TOKENS).logits)


@EACH
def test_the_planner_counts_the_language_model(kind, tmp_path):
    save(with_images(kind, tokenizer()), tokenizer(), tmp_path)
    made, found = load_model(tmp_path), folder_sizes(str(tmp_path))
    assert found is not None and (found.hidden, found.layers) == (32, 4)
    assert found.is_fused == (kind != "qwen3_5")
    config = read_settings(recipe_path("reviews"), []).config
    policy = dataclasses.replace(config.policy, create=None, model=str(tmp_path))
    config = dataclasses.replace(config, policy=policy)
    assert policy_parameters(config, None) == sum(p.numel() for p in made.parameters())


@EACH
def test_it_is_saved_as_a_language_model(kind, tmp_path):
    save(with_images(kind, tokenizer()), tokenizer(), tmp_path / "whole")
    made = load_model(tmp_path / "whole")
    save(made, tokenizer(), tmp_path / "text")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.float32)
    assert again.config.get_text_config() is again.config
    torch.testing.assert_close(again(TOKENS).logits, made(TOKENS).logits)
    assert load_model(tmp_path / "text").config.model_type == made.config.model_type


@pytest.mark.slow
def test_a_run_trains_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = make_world("reviews", 0, None).tokenizer()
    save(with_images("gemma3", words), words, tmp_path / "lm")
    run = make_run(
        tmp_path / "runs", "reviews", f'policy.model="{tmp_path / "lm"}"', "run.steps=2",
        'recipe=["sft","reward_model","ppo"]', "sft.steps=3", "sft.batch_size=8",
    )  # fmt: skip
    config = json.loads((run.path / "policy" / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert not [n for n in load_file(run.path / "policy" / "model.safetensors") if "vision" in n]
