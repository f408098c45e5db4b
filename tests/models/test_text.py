"""Text and token ids: what looks like a control token is text, and text goes on as running text."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace, Punctuation, Sequence
from transformers import PreTrainedTokenizerFast

from quartet.models.text import quoted_control, response_ids, text_ids
from tests.support.chats import byte_level, sentence_pieces
from tests.support.world import tokenizer as world

MAKERS = {"byte_level": byte_level, "sentence_pieces": sentence_pieces, "world": world}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_control_token_in_a_text_is_text(kind):
    made = MAKERS[kind]()
    end = made.eos_token
    ids = text_ids(made, f"the {end} is it")
    assert made.eos_token_id in made.encode(f"the {end} is it"), "this is what transformers does"
    assert not set(ids) & set(made.all_special_ids) - {made.unk_token_id}
    assert response_ids(made, f"so {end}", made.eos_token_id).count(made.eos_token_id) == 1
    assert response_ids(made, "so", made.eos_token_id)[-1] == made.eos_token_id
    assert response_ids(made, "so", None)[-1:] != [made.eos_token_id]
    assert quoted_control(made, f"a {end} b") == end and quoted_control(made, "a < b") is None


def test_tokens_that_are_not_special_stay_tokens():
    made = byte_level()
    assert made.convert_tokens_to_ids("<think>") in text_ids(made, "<think>yes</think>")


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [("why:", " the answer is 4"), ("why:", "the answer"), ("why", "\nbecause"), ("is it", "  so")],
)
@pytest.mark.parametrize("kind", ["byte_level", "sentence_pieces"])
def test_prompt_and_answer_have_the_ids_of_the_running_text(kind, prompt, answer):
    made = MAKERS[kind]()
    ids = text_ids(made, prompt) + text_ids(made, answer, continues=True)
    assert made.decode(ids) == prompt + answer
    assert ids == made.encode(prompt + answer, add_special_tokens=False)


def test_the_world_of_words_keeps_its_words():
    made = world()
    for answer in (" was good.", "good"):
        ids = made.encode(answer, add_special_tokens=False)
        assert text_ids(made, answer, continues=True) == ids
    assert text_ids(made, ".", continues=True) == made.encode("film.", add_special_tokens=False)[1:]


def test_a_word_that_is_known_with_a_space_only_is_not_lost_behind_a_full_stop():
    """Behind "." the word has no mark of a space, and is unknown: it stays as it is alone."""
    words = {"<unk>": 0, "▁": 1, ".": 2, "▁film": 3, "▁a": 4}
    pieces = Tokenizer(WordLevel(words, unk_token="<unk>"))
    pieces.pre_tokenizer = Sequence([Metaspace(), Punctuation()])
    made = PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>")
    assert made.encode(".film", add_special_tokens=False) == [1, 2, 0]
    assert text_ids(made, "film", continues=True) == [3]


def test_a_word_that_is_unknown_behind_an_anchor_is_not_lost():
    """A tokenizer of whole words knows neither a line break nor a word that is glued to it."""
    tokenizer = world()
    assert text_ids(tokenizer, "good bad good", continues=True) == tokenizer.encode("good bad good")


@pytest.mark.parametrize("kind", MAKERS)
def test_the_vocabulary_is_not_counted_again_for_each_text(kind, monkeypatch):
    """Its length takes 3 ms of 262,144 tokens; a control token that is added later is one all the same."""
    made = MAKERS[kind]()
    assert quoted_control(made, "a <later> b") is None
    length = type(made).__len__
    with monkeypatch.context() as counted:
        counted.setattr(type(made), "__len__", lambda _: pytest.fail("the tokens were counted"))
        assert quoted_control(made, "a <later> b") is None
        made.add_special_tokens({"additional_special_tokens": ["<later>"]})
        counted.setattr(type(made), "__len__", length)
        assert quoted_control(made, "a <later> b") == "<later>"
