"""Token ids of conversations, by the tokenizer's chat template."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quartet.errors import QuartetError
from quartet.models.protocols import Tokenizer

Message = Mapping[str, Any]
"""A mapping with `role` and `content`; other keys (tool calls, a name) are passed to the
template."""

NAMED_TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% "
        "endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}


class ChatError(QuartetError, ValueError):
    """A conversation or a template that cannot be used."""


def set_chat_template(tokenizer: Tokenizer, template: str) -> None:
    """Give the tokenizer a template by name or from a file."""
    if template in NAMED_TEMPLATES:
        tokenizer.chat_template = NAMED_TEMPLATES[template]
    elif len(template) < 256 and Path(template).is_file():
        try:
            tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ChatError(f'policy.chat_template = "{template}": is not UTF-8 text.') from None
    else:
        raise ChatError(
            f'policy.chat_template = "{template}": neither a named template '
            f"({', '.join(NAMED_TEMPLATES)}) nor a file."
        )


def render(
    tokenizer: Tokenizer, messages: Sequence[Message], reply: Sequence[Message] = ()
) -> tuple[list[int], list[int]]:
    """Return the ids of the conversation up to where the assistant's reply begins, and the ids of
    the reply up to the end of its turn."""
    prompt, response, _ = render_turns(tokenizer, messages, reply)
    return prompt, response


def render_turns(
    tokenizer: Tokenizer, messages: Sequence[Message], turns: Sequence[Message]
) -> tuple[list[int], list[int], list[bool]]:
    """Return the ids of the conversation up to where the assistant's first turn begins; the ids of
    all that follows, up to the end of its last turn; and a mask of the latter that is True for the
    assistant's own tokens, the ends of its turns included."""
    if tokenizer.chat_template is None:
        raise ChatError(
            "the data are conversations, but the policy's tokenizer has no chat template. "
            'Set policy.chat_template = "chatml" or give a file.'
        )
    prompt = _ids(tokenizer, messages, add_generation_prompt=True)
    history, so_far = list(messages), prompt
    response: list[int] = []
    own: list[bool] = []
    for number, turn in enumerate(turns, 1):
        history.append(turn)
        if turn["role"] != "assistant":
            continue
        before = _ids(tokenizer, history[:-1], add_generation_prompt=True)
        whole = _ids(tokenizer, history, add_generation_prompt=False)
        between = _remainder(so_far, before)
        if turn["content"] and len(_remainder(before, whole)) == 0:
            raise ChatError(
                "the chat template does not write what the assistant says, so there would be "
                "nothing to learn. Look at "
                "policy.chat_template."
            )
        reply, rest = _to_its_end(
            _remainder(before, whole), tokenizer.eos_token_id, last=number == len(turns)
        )
        response += [*between, *reply, *rest]
        own += [False] * len(between) + [True] * len(reply) + [False] * len(rest)
        so_far = whole
    last = len(own) - own[::-1].index(True) if True in own else 0
    return prompt, response[:last], own[:last]


def after_reply(
    tokenizer: Tokenizer, history: Sequence[Message], reply: Message, messages: Sequence[Message]
) -> list[int]:
    """Return the ids between the end-of-sequence token of the assistant's reply and its next
    turn."""
    before = _ids(tokenizer, history, add_generation_prompt=True)
    whole = _ids(tokenizer, [*history, reply], add_generation_prompt=False)
    _, rest = _to_its_end(_remainder(before, whole), tokenizer.eos_token_id, last=False)
    return rest + _remainder(
        whole, _ids(tokenizer, [*history, reply, *messages], add_generation_prompt=True)
    )


def _remainder(start: list[int], whole: list[int]) -> list[int]:
    """Return what follows `start` in `whole`. Raises ChatError if `whole` does not begin with
    it."""
    if whole[: len(start)] != start:
        raise ChatError(
            "the chat template writes the prompt differently once a reply follows, so prompt and "
            "reply cannot be told "
            "apart. Use a template in which a conversation only grows."
        )
    return whole[len(start) :]


def _to_its_end(reply: list[int], end: int, last: bool) -> tuple[list[int], list[int]]:
    """Split a turn after its end-of-sequence token. If the template writes none, the whole turn is
    the first part, and the last turn gets one appended."""
    if end in reply:
        length = reply.index(end) + 1
        return reply[:length], reply[length:]
    return ([*reply, end] if last else reply), []


def _ids(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool
) -> list[int]:
    try:
        return list(
            tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                add_generation_prompt=add_generation_prompt,
                tokenize=True,
                return_dict=False,
            )
        )
    except Exception as error:  # a template is a program and may raise anything
        raise ChatError(f"the chat template refuses the conversation: {error}") from error
