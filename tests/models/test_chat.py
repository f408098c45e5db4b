import pytest

from quartet.data.tokenizer import train_tokenizer
from quartet.models.chat import NAMED_TEMPLATES, ChatError, render, set_chat_template

QUESTION = [{"role": "user", "content": "hello there"}]
REPLY = [{"role": "assistant", "content": "good day"}]


@pytest.fixture
def chatty():
    made = train_tokenizer(["hello there good day <|im_start|> user assistant <|im_end|>"] * 5, 320)
    made.chat_template = NAMED_TEMPLATES["chatml"]
    return made


def test_prompt_and_reply_are_the_rendered_conversation_cut_in_two(chatty):
    prompt, response = render(chatty, QUESTION, REPLY)
    assert (
        chatty.decode(prompt) == "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chatty.decode(response) == "good day<|im_end|>\n<eos>"


def test_without_a_reply_there_is_only_the_prompt(chatty):
    assert render(chatty, QUESTION) == (render(chatty, QUESTION, REPLY)[0], [])


def test_a_reply_ends_at_the_end_of_sequence_of_the_template(chatty):
    chatty.chat_template = NAMED_TEMPLATES["chatml"].replace("<|im_end|>", "<eos>")
    assert chatty.decode(render(chatty, QUESTION, REPLY)[1]) == "good day<eos>"


def test_a_tokenizer_without_a_template_says_what_to_set(chatty):
    chatty.chat_template = None
    with pytest.raises(ChatError, match='Set policy.chat_template = "chatml" or give a file'):
        render(chatty, QUESTION)


def test_a_template_may_come_by_name_or_from_a_file(chatty, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ messages[0]['content'] }}")
    set_chat_template(chatty, str(tmp_path / "t.jinja"))
    assert chatty.decode(render(chatty, QUESTION)[0]) == "hello there"
    with pytest.raises(ChatError, match="neither a named template"):
        set_chat_template(chatty, "nonsense")
