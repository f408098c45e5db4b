from functools import partial

import pytest
from tokenizers.processors import TemplateProcessing

from quartet.data import DataError
from quartet.data.encoding import Encoder
from quartet.data.examples import Example
from tests.support.chats import GEMMA, REASONING, byte_level, sentence_pieces
from tests.support.world import tokenizer


def encoder(**settings):
    return Encoder(tokenizer(), **{"max_prompt_tokens": 8, "max_response_tokens": 8, **settings})


def test_a_demonstration_ends_with_the_end_of_sequence():
    made = encoder().demonstrations([Example("x:1", "the film", completion=" was good.")])[0]
    words = tokenizer()
    assert words.decode(made.prompt_ids + made.response_ids) == "the film was good.<eos>"
    assert words.decode(made.prompt_ids) == "the film"


def test_demonstrations_and_comparisons_of_conversations_end_as_the_template_ends_a_turn():
    made = byte_level(GEMMA, "<eos>", ("<start_of_turn>", "<end_of_turn>"), "<bos>")
    asked = [{"role": "user", "content": "why"}]
    yes, no = ([{"role": "assistant", "content": c}] for c in ("because", "no"))
    encode = Encoder(made, 64, 64)
    [shown] = encode.demonstrations([Example("x:1", asked, completion=yes)])
    [pair] = encode.comparisons([Example("x:2", asked, chosen=yes, rejected=no)])
    assert made.decode(shown.response_ids) == "because<end_of_turn>"
    assert [made.decode(i) for i in (pair.chosen_ids, pair.rejected_ids)] == [
        "because<end_of_turn>",
        "no<end_of_turn>",
    ]
    [plain] = encode.demonstrations([Example("x:3", "why", completion=" because")])
    assert made.decode(plain.response_ids) == " because<eos>"


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

    bos_token, bos_token_id, eos_token_id, chat_template = "<s>", 1, 2, None

    def encode(self, text, add_special_tokens, split_special_tokens=False):
        ids = [3 + len(word) for word in text.split()]
        return [1, *ids] if add_special_tokens else ids


def test_the_beginning_of_sequence_comes_once_even_where_the_text_has_it():
    made = Encoder(Beginning(), 8, 8)
    assert made.prompt_ids("the film") == made.prompt_ids("<s> the film") == [1, 6, 7]


# --- what transformers' tokenizers and templates do

ASK, SAY = {"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}
THOUGHT = {"role": "assistant", "content": "<think>\nthink\n</think>\n\nthe answer"}


def test_an_answer_that_quotes_the_end_is_not_cut_there_and_is_told():
    made = byte_level()
    encoder = Encoder(made, 100, 100)
    answer = "the answer <|im_end|> and so on"
    plain = Example("x:1", "why", completion=answer)
    chat = Example("x:2", [ASK], completion=[{**SAY, "content": answer}])
    for row in encoder.demonstrations([plain, chat]):
        assert made.decode(row.response_ids[:-1]) == answer
        assert row.response_ids.index(made.eos_token_id) == len(row.response_ids) - 1
        assert row.loss_mask is None
    [note] = encoder.notes()
    assert note.startswith("2 rows quote a control token, the first: x:1 (<|im_end|>).")


def test_a_conversation_that_is_rewritten_becomes_a_row_for_each_answer():
    made = byte_level(REASONING)
    encoder = Encoder(made, 100, 100)
    talk = [THOUGHT, ASK, THOUGHT]
    first, second = encoder.demonstrations([Example("x:1", [ASK], completion=talk)])
    whole = partial(made.apply_chat_template, return_dict=False)
    assert first.prompt_ids + first.response_ids == tuple(whole([ASK, THOUGHT])[:-1])
    assert second.prompt_ids + second.response_ids == tuple(whole([ASK, *talk])[:-1])
    assert made.decode(second.response_ids) == f"{THOUGHT['content']}<|im_end|>"
    assert "think" not in made.decode(second.prompt_ids) and second.loss_mask is None
    assert [first.id, second.id] == ["x:1, answer 1", "x:1, answer 2"]
    [note] = encoder.notes()
    assert note.startswith("1 conversations became 2 demonstrations, one for each answer")
    pieces = encoder.pieces(Example("x:1", [ASK], completion=talk))
    assert pieces[-1] == (f"{THOUGHT['content']}<|im_end|>", True)


def test_the_rows_of_a_rewritten_conversation_are_bounded_as_one_row_is():
    talk = [THOUGHT, ASK, THOUGHT]
    example = Example("x:1", [ASK], completion=talk)
    with pytest.raises(DataError, match="the completion has .* tokens, the limit is 20"):
        Encoder(byte_level(REASONING), 100, 20).demonstrations([example])
    pair = Example("x:1", [ASK], chosen=talk, rejected=[SAY])
    with pytest.raises(DataError, match="the chosen has several turns after the prompt"):
        Encoder(byte_level(REASONING), 100, 100).comparisons([pair])


def test_tools_and_variables_of_a_row_are_in_its_prompt():
    made = byte_level(REASONING)
    tool = {"type": "function", "function": {"name": "look"}}
    extra = {"tools": [tool], "chat_template_kwargs": {"enable_thinking": False}}
    [prompt] = Encoder(made, 100, 100).prompts([Example("x:1", [ASK], extra=extra)])
    assert list(prompt.ids) == made.apply_chat_template(
        [ASK], tools=[tool], enable_thinking=False, add_generation_prompt=True, return_dict=False
    )


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("enable_thinkng", "x:1: chat_template_kwargs.enable_thinkng: the chat template reads no"),
        ("tokenize", "x:1: chat_template_kwargs.tokenize: is not for the template to choose"),
    ],
)
def test_a_variable_of_a_row_that_its_template_does_not_read_is_refused(name, sentence):
    example = Example("x:1", [ASK], extra={"chat_template_kwargs": {name: False}})
    with pytest.raises(DataError, match=sentence):
        Encoder(byte_level(REASONING), 100, 100).prompts([example])


@pytest.mark.parametrize("place", ["a call", "the tools", "what was thought"])
def test_quotations_that_are_no_content_are_counted(place):
    quoted, extra, say = {"name": "look", "description": "</s> <|im_end|>"}, {}, SAY
    if place == "the tools":
        extra = {"tools": [{"type": "function", "function": quoted}]}
    elif place == "a call":
        say = {**SAY, "tool_calls": [{"function": {"name": "look", "arguments": quoted}}]}
    else:
        say = {**SAY, "reasoning_content": quoted["description"]}
    example = Example("x:1", [ASK], completion=[say], extra=extra)
    encoder = Encoder(byte_level(REASONING), 200, 200)
    encoder.demonstrations([example, Example("x:2", [ASK], completion=[SAY])])
    assert encoder.quoting == {"x:1": "<|im_end|>"}
    assert encoder.oddities(example) == {"control": "<|im_end|>"}


def test_a_text_is_learnt_whole_behind_a_first_token():
    [row] = Encoder(tokenizer(), 8, 8).demonstrations(
        [Example("x:1", "", completion="the film was good", is_text=True)]
    )
    words = tokenizer()
    assert words.decode(row.prompt_ids + row.response_ids) == "the film was good<eos>"
    assert len(row.prompt_ids) == 1 and row.loss_mask is None
    pieces = sentence_pieces_with_beginning()
    [row] = Encoder(pieces, 8, 8).demonstrations(
        [Example("x:1", "", completion="the answer", is_text=True)]
    )
    assert row.prompt_ids == (pieces.bos_token_id,)
    assert pieces.decode(row.response_ids) == "the answer</s>"


def sentence_pieces_with_beginning():
    made = sentence_pieces()
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    return made


def test_text_without_a_token_is_told():
    encoder = Encoder(tokenizer(), 8, 8)
    encoder.prompts([Example("x:1", "the film"), Example("x:2", "the zzz")])
    assert encoder.unknown == ["x:2"]
    assert "1 rows have text that the tokenizer has no token for, the first: x:2" in "".join(
        encoder.notes()
    )


def test_preferences_with_one_label_only_are_told():
    good, bad = Example("x:1", "the", chosen=" good"), Example("x:2", "the", rejected=" bad")
    encoder = Encoder(tokenizer(), 8, 8)
    encoder.comparisons([good, good])
    [note] = encoder.notes()
    assert note.startswith("every label is true: KTO learns from the difference")
    encoder.comparisons([bad])
    assert not list(encoder.notes())
