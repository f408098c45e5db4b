"""Token ids of conversations, by the tokenizer's chat template.

The template is rendered as text. Control tokens are those that the template writes: where a message
quotes one, the quotation is marked before the template sees it, and encoded as text.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

from quartet.errors import QuartetError
from quartet.models.protocols import Tokenizer
from quartet.models.text import continued, control_pattern, text_ids

Message = Mapping[str, Any]
"""A mapping with `role` and `content`; other keys (tool calls, a name) are passed to the
template."""
Columns = Mapping[str, Any]
"""The other columns of a conversation's row. The template is given `tools`, and what
`chat_template_kwargs` has."""
NO_COLUMNS: Columns = MappingProxyType({})

NAMED_TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% "
        "endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
RESERVED = frozenset(
    {
        "messages",
        "conversation",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "return_dict",
        "return_tensors",
        "return_assistant_tokens_mask",
        "sanitize_control_tokens",
        "tokenizer_kwargs",
        "padding",
        "truncation",
        "max_length",
    }
)
"""Names that `apply_chat_template` gives a meaning of its own, so no template's own variables."""
QUOTED = "\ufdd0"
"""Stands behind the first character of a control token that a message quotes. It is no character of
any text: Unicode leaves it to programs."""
PLACE = "\ufdd1"
"""Stands for a reply whose place in the rendered conversation is looked for."""


class ChatError(QuartetError, ValueError):
    """A conversation or a template that cannot be used."""


class HistoryRewritten(ChatError):
    """The template writes earlier turns differently once later ones follow, so that a conversation
    of several answers is not one text that only grows."""


# --- templates


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


def set_template_variables(tokenizer: Tokenizer, variables: Mapping[str, Any]) -> None:
    """Give variables of the tokenizer's template, such as `enable_thinking`, a value for where it
    is rendered without one.

    They are written at the beginning of the template, which is saved with the trained model: it is
    used in the format that it was trained in. Raises ChatError for a name that the template does
    not read.
    """
    key = "policy.chat_template_kwargs"
    if not variables:
        return
    if tokenizer.chat_template is None:
        raise ChatError(f"{key}: the policy's tokenizer has no chat template to read them.")
    check_variables(tokenizer, variables, key)
    beginning = "".join(
        f"{{%- if {name} is not defined %}}{{%- set {name} = {json.dumps(value)} %}}{{%- endif %}}"
        for name, value in variables.items()
    )
    # A block swallows the line end behind it; an expression does not.
    beginning += "{{- '' }}"
    template = tokenizer.chat_template
    tokenizer.chat_template = (
        beginning + template
        if isinstance(template, str)
        else {name: beginning + each for name, each in template.items()}
    )


def check_variables(
    tokenizer: Tokenizer, variables: Mapping[str, Any], key: str = "chat_template_kwargs"
) -> None:
    """Raise ChatError for a name that the tokenizer's template does not read. `key` is where the
    variables come from."""
    template: str | Mapping[str, str] | None = tokenizer.chat_template
    texts = [template or ""] if isinstance(template, str | None) else list(template.values())
    for name in variables:
        if name in RESERVED:
            raise ChatError(
                f"{key}.{name}: is not for the template to choose. Tools are a column of the data."
            )
        read = re.compile(rf"\b{re.escape(name)}\b")
        if template is not None and not any(read.search(text) for text in texts):
            raise ChatError(f"{key}.{name}: the chat template reads no {name}. Take it out.")


# --- conversations


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    reply: Sequence[Message] = (),
    columns: Columns = NO_COLUMNS,
) -> tuple[list[int], list[int]]:
    """Return the ids of the conversation up to where the assistant's reply begins, and the ids of
    the reply up to the end of its turn."""
    prompt, response, _ = render_turns(tokenizer, messages, reply, columns)
    return prompt, response


def render_turns(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    turns: Sequence[Message],
    columns: Columns = NO_COLUMNS,
) -> tuple[list[int], list[int], list[bool]]:
    """Return the ids of the conversation up to where the assistant's first turn begins; the ids of
    all that follows, up to the end of its last turn; and a mask of the latter that is True for the
    assistant's own tokens, the ends of its turns included.

    Raises HistoryRewritten where the template writes an earlier turn differently once a later one
    follows; each answer alone can then be rendered.
    """
    text = partial(_text, tokenizer, columns=columns)
    prompt = text(messages, add_generation_prompt=True)
    history, so_far = list(messages), prompt
    response: list[int] = []
    own: list[bool] = []
    for number, turn in enumerate(turns, 1):
        history.append(turn)
        if turn["role"] != "assistant":
            continue
        before = text(history[:-1], add_generation_prompt=True)
        whole = text(history, add_generation_prompt=False)
        if not before.startswith(so_far):
            raise HistoryRewritten(
                "the chat template writes earlier answers differently once later turns follow."
            )
        said = _remainder(before, whole)
        if turn["content"] and not said:
            raise ChatError(NOT_WRITTEN)
        reply, rest = _to_its_end(
            _ids(tokenizer, said, after=before),
            (turn_end(tokenizer), tokenizer.eos_token_id),
            last=number == len(turns),
        )
        between = _ids(tokenizer, before[len(so_far) :], after=so_far)
        response += [*between, *reply, *rest]
        own += [False] * len(between) + [True] * len(reply) + [False] * len(rest)
        so_far = whole
    last = len(own) - own[::-1].index(True) if True in own else 0
    return _ids(tokenizer, prompt), response[:last], own[:last]


def conversation_ids(
    tokenizer: Tokenizer, messages: Sequence[Message], columns: Columns = NO_COLUMNS
) -> list[int]:
    """Return the ids of a whole conversation, as a reward model reads it."""
    return _ids(tokenizer, _text(tokenizer, messages, add_generation_prompt=False, columns=columns))


def after_reply(
    tokenizer: Tokenizer,
    history: Sequence[Message],
    messages: Sequence[Message],
    end: int | None,
    columns: Columns = NO_COLUMNS,
) -> list[int]:
    """Return the ids between the token `end`, which ended the assistant's reply to the history, and
    its next turn, which follows `messages`. `end` is None where no such token was sampled.

    Only what is new is rendered: the template may write the reply, and turns before it, otherwise
    once messages follow; what was sampled stays as it was.
    """
    reply = {"role": "assistant", "content": PLACE}
    whole = _text(
        tokenizer, [*history, reply, *messages], add_generation_prompt=True, columns=columns
    )
    new = _behind_place(whole)
    ids = _ids(tokenizer, new, after=PLACE)
    if end in ids:
        return ids[ids.index(end) + 1 :]
    if turn_end(tokenizer) in ids:  # the policy ended with another token, so the turn is still open
        return ids
    # The template writes no token that ends a turn; the policy wrote what ends it itself.
    alone = _text(tokenizer, [*history, reply], add_generation_prompt=False, columns=columns)
    closing = _behind_place(alone)
    return _ids(tokenizer, _remainder(closing, new), after=PLACE + closing)


NOT_WRITTEN = (
    "the chat template does not write what the assistant says, so there would be nothing to learn. "
    "Look at policy.chat_template."
)


def _behind_place(text: str) -> str:
    _, place, behind = text.rpartition(PLACE)
    if not place:
        raise ChatError(NOT_WRITTEN)
    return behind


def _remainder(start: str, whole: str) -> str:
    """Return what follows `start` in `whole`. Raises ChatError if `whole` does not begin with
    it."""
    if not whole.startswith(start):
        raise ChatError(
            "the chat template writes the prompt differently once a reply follows, so prompt and "
            "reply cannot be told apart. Use a template that only adds the reply."
        )
    return whole[len(start) :]


def turn_end(tokenizer: Tokenizer) -> int:
    """Return the token that ends an assistant's turn: the first control token that the chat
    template writes behind an answer, such as Gemma's `<end_of_turn>`. It is the end-of-sequence
    token if the template writes none or there is no template."""
    template = tokenizer.chat_template
    known = _TURN_ENDS.get(tokenizer)
    if known is None or known[0] != template:
        known = _TURN_ENDS[tokenizer] = (template, _turn_end(tokenizer))
    return known[1]


_TURN_ENDS: "WeakKeyDictionary[Tokenizer, tuple[Any, int]]" = WeakKeyDictionary()
"""The end of a turn of each tokenizer, and the template that it was found with."""


def _turn_end(tokenizer: Tokenizer) -> int:
    pattern = control_pattern(tokenizer)
    if tokenizer.chat_template is None or pattern is None:
        return tokenizer.eos_token_id
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PLACE}]
    try:
        closing = _behind_place(_text(tokenizer, talk, add_generation_prompt=False))
    except ChatError:  # said where a conversation of the user's is rendered
        return tokenizer.eos_token_id
    control = pattern.search(closing)
    return tokenizer.eos_token_id if control is None else _ids(tokenizer, control[1])[0]


def _to_its_end(reply: list[int], ends: Sequence[int], last: bool) -> tuple[list[int], list[int]]:
    """Split a turn after the first of the tokens that end one. If the template writes none of them,
    the whole turn is the first part, and the last turn gets the first of `ends` appended."""
    length = next((place for place, token in enumerate(reply, 1) if token in ends), None)
    if length is not None:
        return reply[:length], reply[length:]
    return ([*reply, ends[0]] if last else reply), []


def _text(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    columns: Columns = NO_COLUMNS,
) -> str:
    """Return the conversation as the template writes it, quoted control tokens marked."""
    if tokenizer.chat_template is None:
        raise ChatError(
            "the data are conversations, but the policy's tokenizer has no chat template. "
            'Set policy.chat_template = "chatml" or give a file.'
        )
    pattern = control_pattern(tokenizer)
    variables = columns.get("chat_template_kwargs") or {}
    try:
        rendered: str = tokenizer.apply_chat_template(
            [_marked(pattern, dict(message)) for message in messages],
            tools=_marked(pattern, columns.get("tools") or None),
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **_marked(pattern, dict(variables)),
        )
    except Exception as error:  # a template is a program and may raise anything
        raise ChatError(f"the chat template refuses the conversation: {error}") from error
    return rendered


def _marked(pattern: "re.Pattern[str] | None", value: Any) -> Any:
    """Return a value with the control tokens that its texts quote marked."""
    if pattern is None:
        return value
    if isinstance(value, str):
        while pattern.search(value):
            value = pattern.sub(lambda token: token[1][0] + QUOTED + token[1][1:], value)
        return value
    if isinstance(value, Mapping):
        return {_marked(pattern, k): _marked(pattern, v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(pattern, item) for item in value]
    return value


def _ids(tokenizer: Tokenizer, text: str, after: str = "") -> list[int]:
    """Return the ids of text that a template rendered, and that stands behind the text `after`."""
    encode = partial(tokenizer.encode, add_special_tokens=False)
    continues = _continues(tokenizer, after)
    if QUOTED not in text:
        return continued(tokenizer, text, encode) if continues else encode(text)
    return [
        token
        for segment, is_control, follows in _segments(tokenizer, text, continues)
        for token in (
            encode(segment) if is_control else text_ids(tokenizer, segment, continues=follows)
        )
    ]


def _segments(tokenizer: Tokenizer, text: str, continues: bool) -> Iterator[tuple[str, bool, bool]]:
    """Yield the control tokens of a rendered text and the texts between them, as the tokenizer cuts
    it; whether each is a control token; and whether a text continues another one."""
    pattern = control_pattern(tokenizer)
    assert pattern is not None, "quotations were marked by it"
    parts = pattern.split(text)
    known = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    for place, part in enumerate(parts):
        if place % 2:
            yield part, True, False
            continue
        plain = part.replace(QUOTED, "")
        # Some control tokens swallow the spaces around them.
        if place and getattr(known.get(parts[place - 1]), "rstrip", False):
            plain = plain.lstrip()
        if place + 1 < len(parts) and getattr(known.get(parts[place + 1]), "lstrip", False):
            plain = plain.rstrip()
        if plain:
            follows = continues if place == 0 else _continues(tokenizer, parts[place - 1])
            yield plain, False, follows


def _continues(tokenizer: Tokenizer, after: str) -> bool:
    """Return whether text behind `after` is encoded as its continuation, and not as the beginning
    of a text. Behind a control token, tokenizers with a dummy prefix differ."""
    pattern = control_pattern(tokenizer)
    parts = [after] if pattern is None else pattern.split(after)
    if len(parts) == 1 or parts[-1]:
        return bool(after)
    encode = partial(tokenizer.encode, add_special_tokens=False)
    return encode(parts[-2] + "a")[1:] != encode("a")
