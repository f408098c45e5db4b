"""Conversations become token ids through the tokenizer's chat template, once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NAMED_TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}


class ChatError(ValueError):
    """A conversation or a template that cannot be used."""


def set_chat_template(tokenizer: Any, template: str) -> None:
    """Give the tokenizer a template by name or from a file."""
    if template in NAMED_TEMPLATES:
        tokenizer.chat_template = NAMED_TEMPLATES[template]
    elif Path(template).is_file():
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    else:
        raise ChatError(
            f'policy.chat_template = "{template}": neither a named template ({", ".join(NAMED_TEMPLATES)}) nor a file.'
        )


def render(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], reply: Sequence[Mapping[str, str]] = ()
) -> tuple[list[int], list[int]]:
    """Ids of the conversation up to where the assistant speaks, and ids of its reply with the end of its turn."""
    if tokenizer.chat_template is None:
        raise ChatError(
            "the data are conversations, but the policy's tokenizer has no chat template. "
            'Set policy.chat_template = "chatml" or give a file.'
        )
    prompt = _ids(tokenizer, messages, add_generation_prompt=True)
    if not reply:
        return prompt, []
    whole = _ids(tokenizer, [*messages, *reply], add_generation_prompt=False)
    if whole[: len(prompt)] != prompt:
        raise ChatError(
            "the chat template writes the prompt differently once a reply follows, so prompt and reply cannot be told "
            "apart. Use a template in which a conversation only grows."
        )
    response, end = whole[len(prompt) :], tokenizer.eos_token_id
    if end in response:
        return prompt, response[: response.index(end) + 1]
    return prompt, [*response, end]


def _ids(tokenizer: Any, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> list[int]:
    try:
        return list(
            tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                add_generation_prompt=add_generation_prompt,
                tokenize=True,
                return_dict=False,
            )
        )
    except Exception as error:  # a template is a program: whatever it raises is about this conversation
        raise ChatError(f"the chat template refuses the conversation: {error}") from error
