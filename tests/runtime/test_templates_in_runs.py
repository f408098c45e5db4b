"""Chat templates, tools and vocabularies of models from elsewhere, through a run's file."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from quartet.assembly import build
from quartet.assembly.assembler import Assembler
from quartet.assembly.serving import TextScorer
from quartet.config.toml import ConfigError, read_settings, resolved_toml
from quartet.models.chat import ChatError
from quartet.models.heads import ScalarModel
from quartet.models.language_model import ModelError, create, load_model, save
from quartet.models.shape import Shape
from quartet.models.support import support_of
from quartet.rewards.serve import ScoringRequest
from tests.support.chats import CHATML, REASONING, byte_level
from tests.support.tiny_run import carried_out
from tests.support.world import write_lines

USER, BOT = {"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}
SHAPE = Shape(type="qwen2", hidden_size=16, num_layers=1, num_heads=2, max_length=512)
PADDING = 9


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a model of a padded vocabulary and a file of conversations."""
    monkeypatch.chdir(tmp_path)
    words = byte_level(REASONING)
    made = create(SHAPE, words, seed=0)
    made.resize_token_embeddings(len(words) + PADDING)
    save(made, words, Path("lm"))
    write_lines(Path("talks.jsonl"), *[json.dumps({"messages": [USER, BOT]})] * 8)
    return tmp_path


def settings(*words):
    Path("run.toml").write_text(
        'recipe = ["sft"]\nsft = { steps = 1, batch_size = 2 }\ndata.train = "talks.jsonl"\n'
        'policy.model = "lm"\n'
    )
    return read_settings(Path("run.toml"), words)


def ran(*words):
    return carried_out(settings(*words), Path("runs"), "talks").path


def test_the_templates_variables_are_set_in_the_file_and_saved_with_the_policy(place):
    path = ran("policy.chat_template_kwargs={enable_thinking=false}")
    theirs = AutoTokenizer.from_pretrained(path / "sft")
    asked = theirs.apply_chat_template([USER], add_generation_prompt=True, tokenize=False)
    assert asked.endswith("<think>\n\n</think>\n\n")
    again = settings("policy.chat_template_kwargs.enable_thinking=false")
    assert again.config.policy.chat_template_kwargs == {"enable_thinking": False}
    Path("resolved.toml").write_text(resolved_toml(again))
    assert read_settings(Path("resolved.toml")).config == again.config
    with pytest.raises(ChatError, match=r"kwargs.enable_thinkng: the chat template reads no"):
        build(settings("policy.chat_template_kwargs={enable_thinkng=false}").config)
    with pytest.raises(ConfigError, match="chat_template_kwargs"):
        settings("policy.chat_template_kwargs=true")


def test_the_policies_of_a_run_have_the_support_of_the_tokenizer(place):
    size = len(byte_level())
    assembler = Assembler(settings().config)
    model = assembler.models.trainable_policy(None)
    assert support_of(model) == size == model.config.vocab_size - PADDING
    reference = assembler.models.reference_of(model, None)
    assert support_of(reference) == size
    assert support_of(assembler.models.trained_policy("lm")) == size


def test_tokens_that_the_model_lacks_are_refused_or_get_embeddings(place):
    words = byte_level(REASONING)
    words.add_tokens([f"<new{i}>" for i in range(PADDING + 2)])
    words.save_pretrained("words")
    with pytest.raises(ModelError, match="knows only .* Or set policy.resize_embeddings = true"):
        build(settings('policy.tokenizer="words"').config)
    path = ran('policy.tokenizer="words"', "policy.resize_embeddings=true")
    assert load_model(path / "sft").config.vocab_size == len(words)
    assert len(AutoTokenizer.from_pretrained(path / "sft")) == len(words)


def test_the_run_says_what_is_odd_about_its_rows(place):
    odd = {"messages": [{**USER, "content": "so <|im_end|>"}, BOT]}
    two = {"messages": [USER, BOT, USER, BOT]}
    write_lines(Path("talks.jsonl"), *map(json.dumps, [odd, two, *[{"messages": [USER, BOT]}] * 6]))
    notes = build(settings().config).notes
    assert any("1 rows quote a control token, the first: talks.jsonl:1" in n for n in notes)
    assert any("1 conversations became 2 demonstrations" in n for n in notes)


def test_a_served_reward_model_reads_a_quotation_as_text(place):
    words = byte_level(CHATML)
    scalar = ScalarModel.from_trunk(create(SHAPE, words, 0), words.pad_token_id, 0)
    scalar.save(Path("judge"), words)
    scorer = TextScorer(Path("judge"), None)
    prompt, ids = scorer._ids([{**USER, "content": "<|im_end|>"}], "so <|im_end|>", True)
    assert prompt.count(words.eos_token_id) == 1 and ids.count(words.eos_token_id) == 1
    assert ids[-1] == words.eos_token_id
    [score] = scorer(ScoringRequest([[USER]], ["so"], [True]))
    assert isinstance(score, float)
