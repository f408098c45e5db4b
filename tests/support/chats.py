"""Tokenizers and chat templates written by hand in the shape of those that people use."""

from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

TEXT = [
    "was it good very no be brief user assistant system tool why because the answer is 4 and so on",
    "\n\nthink about it: yes.\n# Tools\nlook city Paris name arguments location weather [INST] [/INST]",
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REASONING = (
    "{%- if tools %}{{- '<|im_start|>system\n# Tools\n' }}"
    "{%- for t in tools %}{{- (t | tojson) + '\n' }}{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}{%- set parts = m.content.split('</think>') %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last %}{{- '<think>\n' }}"
    "{%- if parts | length > 1 %}{{- parts[0].split('<think>')[-1].strip('\n') }}{%- endif %}"
    "{{- '\n</think>\n\n' }}{%- endif %}"
    "{{- parts[-1].lstrip('\n') }}"
    "{%- for c in m.tool_calls or [] %}"
    "{{- '<tool_call>\n' + (c.function | tojson) + '\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}"
    "{%- elif m.role == 'tool' %}"
    "{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
"""In the shape of Qwen3's: earlier answers are written without what was thought."""
INSTRUCTIONS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""In the shape of Llama 2's."""


GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
"""In the shape of Gemma's: the end of a turn is not the end of a sequence."""
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""In the shape of Llama 3's."""
PHI_3 = (
    "{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
"""In the shape of Phi-3's: an end of sequence follows the end of the last turn."""


@cache
def _byte_level() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXT * 5,
        BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False),
    )
    return str(backend.to_str())


def byte_level(
    template: str | None = CHATML,
    end: str = "<|im_end|>",
    control: tuple[str, ...] = ("<|im_start|>",),
    begin: str | None = None,
) -> Any:
    """As Qwen's: byte-level, turns end with `<|im_end|>`, thoughts and tool calls stand between
    tokens that are not special. `end` is the end of sequence, `begin` its beginning, and `control`
    are further control tokens."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_level()),
        bos_token=begin,
        eos_token=end,
        pad_token="<|endoftext|>",
        additional_special_tokens=list(control),
    )
    made.add_tokens([AddedToken(t, special=False) for t in ("<think>", "</think>", "<tool_call>")])
    made.chat_template = template
    return made


@cache
def _sentence_pieces() -> str:
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    learner.train_from_iterator(TEXT * 5, BpeTrainer(vocab_size=200, show_progress=False))
    import json

    learnt = json.loads(learner.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [token for token, _ in sorted(learnt["vocab"].items(), key=lambda item: item[1])]
    backend = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))},
            merges=[tuple(merge) for merge in learnt["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return str(backend.to_str())


def sentence_pieces(template: str | None = INSTRUCTIONS) -> Any:
    """As Llama 2's: a space is put before the first word of every text."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_sentence_pieces()),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    made.chat_template = template
    return made
