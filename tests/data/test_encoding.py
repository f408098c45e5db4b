import pytest

from quartet.data import DataError
from quartet.data.encoding import Encoder
from quartet.data.examples import Example
from tests.support.world import tokenizer


def encoder(**settings):
    return Encoder(tokenizer(), **{"max_prompt_tokens": 8, "max_response_tokens": 8, **settings})


def test_a_demonstration_ends_with_the_end_of_sequence():
    made = encoder().demonstrations([Example("x:1", "the film", completion=" was good.")])[0]
    words = tokenizer()
    assert words.decode(made.prompt_ids + made.response_ids) == "the film was good.<eos>"
    assert words.decode(made.prompt_ids) == "the film"


def test_the_chosen_side_serves_as_a_demonstration():
    example = Example("x:1", "the film", chosen=" good", rejected=" bad")
    made = encoder().demonstrations([example])[0]
    assert made.response_ids == encoder().comparisons([example])[0].chosen_ids


@pytest.mark.parametrize(
    ("example", "kind", "sentence"),
    [
        (Example("x:4", "  "), "prompts", "x:4: the prompt is empty."),
        (
            Example("x:4", ("the " * 9).strip()),
            "prompts",
            "x:4: the prompt has 9 tokens, the limit is 8 (data.max_prompt_tokens).",
        ),
        (
            Example("x:4", "the", completion=" "),
            "demonstrations",
            "x:4: the completion is empty, a response of zero tokens.",
        ),
        (
            Example("x:4", "the", completion=" the" * 8),
            "demonstrations",
            "x:4: the completion has 9 tokens, the limit is 8 (data.max_response_tokens).",
        ),
        (
            Example("x:4", "the", chosen=" good", rejected=" good"),
            "comparisons",
            "x:4: chosen and rejected are identical, so there is nothing to learn from this row.",
        ),
        (
            Example("x:4", "the", chosen=" good", rejected=""),
            "comparisons",
            "x:4: the rejected is empty",
        ),
        (
            Example("x:4", [{"role": "user", "content": "hi"}]),
            "prompts",
            'Set policy.chat_template = "chatml" or give a file.',
        ),
    ],
)
def test_rows_that_cannot_be_used_are_refused(example, kind, sentence):
    with pytest.raises(DataError) as error:
        getattr(encoder(), kind)([example])
    assert sentence in str(error.value)


def test_prompt_and_answer_must_fit_the_model_together():
    with pytest.raises(
        DataError, match="prompt and response have 7 tokens together, the model reads at most 6"
    ):
        encoder(max_tokens=6).demonstrations(
            [Example("x:1", "the film", completion=" was good very good")]
        )


def test_the_refusal_counts_the_others_and_names_the_way_on():
    good, bad = Example("x:1", "the film"), [Example(f"x:{i}", "") for i in (2, 3, 4)]
    with pytest.raises(DataError) as error:
        encoder().prompts([good, *bad])
    assert str(error.value) == (
        "x:2: the prompt is empty. 2 more rows of 4 cannot be used. "
        'Mend the data, or set data.unusable = "drop" to go on without such rows.'
    )


def test_dropping_keeps_the_rest_and_remembers_why():
    made = encoder(unusable="drop")
    kept = made.prompts([Example("x:1", "the film"), Example("x:2", "")])
    assert [p.id for p in kept] == ["x:1"]
    assert made.dropped == {"x:2": "the prompt is empty."}


def test_dropping_everything_is_refused_all_the_same():
    with pytest.raises(DataError, match="the prompt is empty"):
        encoder(unusable="drop").prompts([Example("x:1", "")])


class Beginning:
    """A tokenizer that wants a beginning-of-sequence token, as Llama's do."""

    bos_token_id, eos_token_id, chat_template = 1, 2, None

    def encode(self, text, add_special_tokens):
        ids = [1 if word == "<s>" else 3 + len(word) for word in text.split()]
        return [1, *ids] if add_special_tokens else ids


def test_the_beginning_of_sequence_comes_once_even_where_the_text_has_it():
    made = Encoder(Beginning(), 8, 8)
    assert made.prompt_ids("the film") == made.prompt_ids("<s> the film") == [1, 6, 7]
