import gzip
import json

import pytest

from quartet.assembly.data import weighted_places
from quartet.data import DataError
from quartet.data.encoding import Encoder
from quartet.data.report import report
from quartet.data.shapes import read_examples
from quartet.data.tokenizer import train_tokenizer
from quartet.models.chat import NAMED_TEMPLATES
from tests.runtime.test_runs import REAL
from tests.support.chats import CHATML, REASONING, byte_level, sentence_pieces
from tests.support.command import quartet
from tests.support.world import tokenizer as world_tokenizer
from tests.support.world import write_lines

USER, BOT = {"role": "user", "content": "was it good"}, {"role": "assistant", "content": "very"}
SHAREGPT = [{"from": "human", "value": "was it good"}, {"from": "gpt", "value": "very"}]
SHAPES = {
    "prompts": {"prompt": "a", "level": 3},
    "demonstrations": {"prompt": "a", "completion": "b"},
    "demonstrations, Alpaca's": {"instruction": "a", "input": "b", "output": "c"},
    "conversations": {"messages": [USER, BOT]},
    "conversations, ShareGPT's": {"conversations": SHAREGPT, "system": "be brief"},
    "comparisons": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "comparisons, whole dialogues": {
        "chosen": [USER, BOT],
        "rejected": [USER, {**BOT, "content": "no"}],
    },
    "comparisons, OpenAI's": {
        "input": {"messages": [USER]},
        "preferred_output": [BOT],
        "non_preferred_output": [{**BOT, "content": "no"}],
    },
    "unpaired preferences": {"prompt": "a", "completion": "b", "label": True},
    "demonstrations, OpenRLHF's": {"input": "a", "output": "b"},
    "comparisons, OpenRLHF's": {"input": "a", "chosen": "b", "rejected": "c"},
    "unpaired preferences, OpenRLHF's": {"input": "a", "output": "b", "label": 0},
    "texts": {"text": "was it good", "source": "a book"},
}


def lines(path, *rows):
    return write_lines(path, *(json.dumps(row) for row in rows))


@pytest.fixture(scope="module")
def chatty():
    made = train_tokenizer(
        ["was it good very no be brief <|im_start|> user assistant tool <|im_end|> why because 4"]
        * 5,
        330,
    )
    made.chat_template = NAMED_TEMPLATES["chatml"]
    return made


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_detected_and_serves_its_stage(shape, tmp_path, chatty):
    file = lines(tmp_path / "x.jsonl", SHAPES[shape], SHAPES[shape])
    made = report(file, {})
    assert made.shapes == {shape: 2} and made.problems == 0
    encoder = Encoder(chatty, 100, 100)
    purposes = {
        "prompts": ["prompts"],
        "demonstrations": ["prompts", "demonstrations"],
        "demonstrations, Alpaca's": ["prompts", "demonstrations"],
        "conversations": ["prompts", "demonstrations"],
        "conversations, ShareGPT's": ["prompts", "demonstrations"],
        "comparisons": ["prompts", "demonstrations", "comparisons", "preferences"],
        "comparisons, whole dialogues": ["prompts", "demonstrations", "comparisons", "preferences"],
        "comparisons, OpenAI's": ["prompts", "demonstrations", "comparisons", "preferences"],
        "unpaired preferences": ["prompts", "demonstrations", "preferences"],
        "demonstrations, OpenRLHF's": ["prompts", "demonstrations"],
        "comparisons, OpenRLHF's": ["prompts", "demonstrations", "comparisons", "preferences"],
        "unpaired preferences, OpenRLHF's": ["prompts", "demonstrations", "preferences"],
        "texts": ["demonstrations"],
    }[shape]
    for purpose in ("prompts", "demonstrations", "comparisons", "preferences"):
        if purpose not in purposes:
            with pytest.raises(DataError, match="found columns"):
                read_examples(file, purpose, {})
            continue
        encode = getattr(encoder, {"preferences": "comparisons"}.get(purpose, purpose))
        assert len(encode(read_examples(file, purpose, {}))) == 2


def test_foreign_shapes_say_what_ours_say(tmp_path, chatty):
    encoder = Encoder(chatty, 100, 100)
    [ours] = encoder.demonstrations(
        read_examples(lines(tmp_path / "a.jsonl", SHAPES["conversations"]), "demonstrations", {})
    )
    sharegpt = {"conversations": SHAREGPT}
    [theirs] = encoder.demonstrations(
        read_examples(lines(tmp_path / "b.jsonl", sharegpt), "demonstrations", {})
    )
    assert (ours.prompt_ids, ours.response_ids) == (theirs.prompt_ids, theirs.response_ids)
    assert chatty.decode(ours.response_ids) == "very<|im_end|>\n<eos>"
    pair = {"prompt": [USER], "chosen": [BOT], "rejected": [{**BOT, "content": "no"}]}
    [one] = encoder.comparisons(read_examples(lines(tmp_path / "c.jsonl", pair), "comparisons", {}))
    [other] = encoder.comparisons(
        read_examples(
            lines(tmp_path / "d.jsonl", SHAPES["comparisons, OpenAI's"]), "comparisons", {}
        )
    )
    assert (one.prompt_ids, one.chosen_ids, one.rejected_ids) == (
        other.prompt_ids,
        other.chosen_ids,
        other.rejected_ids,
    )


def test_in_a_long_conversation_the_loss_is_on_what_the_assistant_wrote(tmp_path, chatty):
    calls = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}],
    }
    chatty.chat_template = NAMED_TEMPLATES["chatml"].replace(
        "m['content']", "m['content'] or 'look'"
    )
    talk = [
        USER,
        calls,
        {"role": "tool", "content": "4"},
        BOT,
        {"role": "user", "content": "why"},
        {**BOT, "content": "because"},
    ]
    file = lines(tmp_path / "x.jsonl", {"messages": talk})
    [made] = Encoder(chatty, 100, 100).demonstrations(read_examples(file, "demonstrations", {}))
    chatty.chat_template = NAMED_TEMPLATES["chatml"]
    pieces, current = [], None
    for token, mine in zip(made.response_ids, made.loss_mask, strict=True):
        if mine != current:
            pieces.append((mine, ""))
            current = mine
        pieces[-1] = (mine, pieces[-1][1] + chatty.decode([token]))
    assert pieces == [
        (True, "look<|im_end|>\n"),
        (False, "<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n"),
        (True, "very<|im_end|>\n"),
        (False, "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"),
        (True, "because<|im_end|>\n<eos>"),
    ]
    [prompt] = Encoder(chatty, 100, 100).prompts(read_examples(file, "prompts", {}))
    assert prompt.messages[-1]["content"] == "why" and prompt.messages[1]["tool_calls"]


def test_the_mask_is_what_is_trained(chatty):
    import torch

    from quartet.data.records import Demonstration
    from quartet.models.forward import masked_logprobs
    from quartet.training.imitation import imitation_losses
    from tests.support.world import model

    made, tokens = model(), torch.tensor([[5, 6, 7, 8, 9, 10]])
    demo = Demonstration("d", (5, 6), (7, 8, 9, 10), (True, False, False, True))
    expected = (
        -masked_logprobs(
            made, tokens, torch.tensor([[False, False, True, False, False, True]])
        ).sum()
        / 2
    )
    torch.testing.assert_close(sum(imitation_losses(made, [demo], 4096)), expected)


def test_folders_and_json_lists(tmp_path):
    folder = tmp_path / "rows"
    (folder / "deep").mkdir(parents=True)
    lines(folder / "b.jsonl", {"prompt": "b"})
    (folder / "deep" / "c.json").write_text(
        json.dumps([{"prompt": "c"}, {"prompt": "d"}], indent=1)
    )
    (folder / "a.csv").write_text("prompt\na\n")
    (folder / "notes.txt").write_text("not data")
    assert [e.prompt for e in read_examples(folder, "prompts", {})] == ["a", "b", "c", "d"]
    with pytest.raises(DataError, match="is a folder without"):
        read_examples(_empty(tmp_path), "prompts", {})


def _empty(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("x.json", '{"prompt": "a"}', "x.json: is an object, not a list of rows."),
        (
            "x.json",
            '{"prompt": "a"}\n{"prompt": "b"}\n',
            "x.json:2: not JSON (extra data). Is it JSON lines? Call it .jsonl.",
        ),
        (
            "x.json",
            '[{"prompt": "a"}, 3]',
            "x.json:2: is a number, not an object with named columns. The row before it is fine.",
        ),
        (
            "x.jsonl",
            '{"conversations": "hello"}',
            "x.jsonl:1: conversations must be a list of turns with from and value.",
        ),
        (
            "x.jsonl",
            '{"messages": [{"role": "user", "content": 3}]}',
            "is not of the form {role, content}",
        ),
        (
            "x.jsonl",
            '{"prompt": "a", "completion": "b", "label": "good"}',
            "label is 'good'; it must be true for a good completion",
        ),
        (
            "x.jsonl",
            '{"messages": [{"role": "assistant", "content": "x"}]}',
            "the first message is the assistant's",
        ),
        ("x.jsonl", '{"prompt": 7}', "prompt is 7; it must be text or a list of messages."),
    ],
)
def test_what_is_wrong_with_a_file_is_in_its_report(tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    try:
        said = " ".join(report(tmp_path / name, {}).findings)
    except DataError as error:
        said = str(error)
    assert sentence in said


def test_lints(tmp_path):
    good = [
        {"prompt": f"p{i} ", "chosen": "long answer " * 3 + str(i), "rejected": f"short {i}"}
        for i in range(30)
    ]
    rows = [
        *good,
        good[0],
        {"prompt": "p ", "chosen": "same", "rejected": "same"},
        {"prompt": "q ", "chosen": "", "rejected": "b"},
    ]
    rows += [
        {"prompt": "cafÃ© ", "chosen": "a", "rejected": "b"},
        {"prompt": "only"},
        {"prompt": 3, "chosen": "a", "rejected": "b"},
    ]
    held_out = lines(tmp_path / "eval.jsonl", {"prompt": "p1 "}, {"prompt": "new"})
    made = report(lines(tmp_path / "x.jsonl", *rows), {}, held_out=held_out)
    said = "\n".join(made.findings)
    assert made.rows == 36 and made.problems == 1
    for sentence in (
        "1 of 36 rows cannot be used, the first: x.jsonl:36: prompt is 3; it must be text or a list of messages.",
        "rows of several shapes: 35 comparisons, 1 prompts.",
        "empty chosen in 1 of 36 rows (x.jsonl:33).",
        "chosen and rejected are identical in 1 of 36 rows (x.jsonl:32)",
        "1 of 36 rows (x.jsonl:31) repeat an earlier row.",
        "damaged characters (such as � or â€™) in 1 of 36 rows (x.jsonl:34)",
        "the chosen side is longer in",
        "1 of 2 prompts of eval.jsonl are in x.jsonl too",
    ):
        assert sentence in said, (sentence, said)


def test_prompts_and_answers_that_run_into_each_other(tmp_path):
    made = report(
        lines(
            tmp_path / "x.jsonl",
            *({"prompt": "what is it", "completion": "this"} for _ in range(3)),
        ),
        {},
    )
    assert any("they are joined as they are" in f for f in made.findings)


@pytest.mark.slow
def test_in_tokens_with_the_mask_visible_and_limits(tmp_path, chatty):
    chatty.save_pretrained(tmp_path / "tok")
    file = lines(
        tmp_path / "x.jsonl",
        *({"messages": [USER, {**BOT, "content": "very good " * n}]} for n in (1, 2, 30)),
    )
    done = quartet(
        "data",
        str(file),
        "--tokenizer",
        str(tmp_path / "tok"),
        "--max-response-tokens",
        "20",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "user\nwas it good<|im_end|>\n<|im_start|>assistant\n⟦very good <|im_end|>\n<eos>⟧"
        in done.stdout
    )
    assert "33.3% over the limit" in done.stdout
    found = json.loads(quartet("data", str(file), "--json", cwd=tmp_path).stdout)
    assert found["unit"] == "words" and found["lengths"]["completion"]["longest"] == 60
    bare = quartet("data", str(file), "--tokenizer", str(tmp_path / "none"), cwd=tmp_path)
    assert bare.returncode == 2 and len(bare.stderr.strip().splitlines()) == 1


GOOD, CUT = {"prompt": "was it", "completion": " good"}, b'{"prompt": "was it", "compl'


@pytest.mark.parametrize("place", ["in the middle", "at the end"])
@pytest.mark.parametrize("option", [(), ("--eval",)], ids=["to train on", "held out"])
def test_a_file_whose_reading_stops_has_not_passed(tmp_path, place, option):
    """A run could not read it either."""
    file, good = lines(tmp_path / "x.jsonl", GOOD, GOOD), lines(tmp_path / "good.jsonl", GOOD)
    rest = json.dumps(GOOD).encode() if place == "in the middle" else b""
    file.write_bytes(file.read_bytes() + CUT + b"\n" + rest)
    done = quartet("data", *([str(good), *option] if option else []), str(file), cwd=tmp_path)
    assert done.returncode == 3, done.stdout
    assert "stopped: x.jsonl:3: not JSON (line ends inside a string)" in done.stdout
    assert "2 rows before it are fine." in done.stdout


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_row_of_no_known_shape_is_named_by_its_columns(tmp_path, at):
    rows = [GOOD, GOOD]
    rows.insert(at, {"question": "was it"})
    made = report(lines(tmp_path / "x.jsonl", *rows), {})
    assert made.problems == 1
    assert f"x.jsonl:{at + 1}: has columns question, which are no known shape." in made.findings[0]


def test_the_command_answers_without_torch_and_says_by_its_code_that_rows_are_unusable(tmp_path):
    file = lines(tmp_path / "x.jsonl", {"prompt": "a"}, {"prompt": None})
    done = quartet("data", str(file), cwd=tmp_path)
    assert done.returncode == 3 and "1 of 2 rows cannot be used" in done.stdout
    assert quartet("data", "none.jsonl", cwd=tmp_path).returncode == 2
    named = lines(tmp_path / "y.jsonl", {"question": "a", "answer": "b"})
    unknown = quartet("data", str(named), cwd=tmp_path)
    assert "Say which are: --columns prompt=…" in unknown.stdout
    mapped = quartet(
        "data",
        str(named),
        "--columns",
        "prompt=question",
        "--columns",
        "completion=answer",
        cwd=tmp_path,
    )
    assert "shape      demonstrations" in mapped.stdout


@pytest.mark.skipif(not REAL.is_file(), reason="no HH data here")
def test_real_dialogues():
    made = report(REAL, {})
    with gzip.open(REAL) as file:
        assert made.rows == sum(1 for _ in file) == 1800
    assert made.shapes == {"comparisons, whole dialogues": 1800} and made.problems == 0
    assert any("empty chosen in 4" in f for f in made.findings)


def test_weights_of_sources():
    def often(weight, seed=0):
        return list(weighted_places(range(10), weight, seed))

    assert often(1.0) == list(range(10)) and often(2.0) == list(range(10)) * 2
    assert len(often(0.5)) == len(set(often(0.5))) == 5 and often(0.5) == often(0.5, 0) != often(
        0.5, 1
    )
    assert often(0.0) == []


def in_tokens(file, tokenizer, **options):
    encoder = Encoder(tokenizer, 10**9, 10**9)
    return report(
        file, {}, encoder.sizes, "tokens", encoder.pieces, oddities=encoder.oddities, **options
    )


def test_a_row_is_counted_once_whether_it_can_be_used_or_not(tmp_path):
    """The second row's template refuses it after its shape is known."""
    made = byte_level("{% if messages[0].content == 'no' %}{{ 1 / 0 }}{% endif %}" + CHATML)
    talks = [[{**USER, "content": text}, BOT] for text in ("why", "no", "so")]
    found = in_tokens(lines(tmp_path / "x.jsonl", *({"messages": t} for t in talks)), made)
    assert found.rows == 3 and found.shapes == {"conversations": 3} and found.problems == 1
    assert found.findings[0].startswith(
        "1 of 3 rows cannot be used, the first: x.jsonl:2: the chat template refuses"
    )
    assert len(found.findings) == 1 and len(found.examples) == 2
    assert found.lengths["completion"].longest == len(made.encode("very<|im_end|>"))


def test_rows_and_lengths_are_counted_as_a_run_counts_them(tmp_path):
    """Tools and the ends of turns count; of a rewritten conversation, so does all up to its last
    answer; an answer that the template refuses makes a row unusable."""
    drops = "{% if messages[-1].content == 'no' %}{{ 1 / 0 }}{% endif %}" + REASONING
    made, tools = byte_level(drops), [{"type": "function", "function": {"name": "look"}}]
    thought = {**BOT, "content": "<think>\nso\n</think>\n\nvery"}
    talks = [
        {"messages": [USER, BOT], "tools": tools},
        {"messages": [USER, thought, USER, thought]},
        {"messages": [USER, {**BOT, "content": "no"}]},
    ]
    file = lines(tmp_path / "x.jsonl", *talks)
    found = in_tokens(file, made)
    encoder = Encoder(made, 10**9, 10**9, unusable="drop")
    first, *_, last = encoder.demonstrations(read_examples(file, "demonstrations", {}))
    assert list(encoder.dropped) == ["x.jsonl:3"] and found.problems == 1
    assert found.lengths["prompt"].longest == len(first.prompt_ids)
    before = len(made.apply_chat_template([USER], add_generation_prompt=True, return_dict=False))
    longest = len(last.prompt_ids) - before + len(last.response_ids)
    assert found.lengths["completion"].longest == longest
    for limit, over in ((longest, 0), (longest - 1, 1)):
        limits = {"prompt": 10**9, "response": limit}
        said = [f for f in in_tokens(file, made, limits=limits).findings if "limits" in f]
        assert len(said) == over
        encoder = Encoder(made, 10**9, limit, unusable="drop")
        encoder.demonstrations(read_examples(file, "demonstrations", {}))
        assert len(encoder.dropped) == 1 + over


def test_rows_that_quote_control_tokens_or_have_unknown_text_are_counted(tmp_path):
    rows = [
        {"prompt": "why", "completion": " the answer is </s>"},
        {"prompt": "why", "completion": " the answer"},
    ]
    found = in_tokens(lines(tmp_path / "x.jsonl", *rows), sentence_pieces())
    assert "1 of 2 rows (x.jsonl:1: </s>) quote a control token. It is encoded as text" in "".join(
        found.findings
    )
    found = in_tokens(
        lines(tmp_path / "y.jsonl", {"prompt": "the film", "completion": " was zzz"}),
        world_tokenizer(),
    )
    assert (
        "1 of 1 rows (y.jsonl:1: <unk>) have text that the tokenizer has no token for"
        in "".join(found.findings)
    )


def test_labels_that_are_all_alike_are_told(tmp_path):
    row = SHAPES["unpaired preferences"]
    alike = report(lines(tmp_path / "x.jsonl", row, row), {}).findings
    assert any("every label is true" in finding for finding in alike)
    both = report(lines(tmp_path / "y.jsonl", row, row | {"label": False}), {}).findings
    assert not any("every label" in finding for finding in both)


def test_the_first_row_is_not_told_of_rows_before_it(tmp_path):
    found = report(lines(tmp_path / "x.jsonl", {"a": 1}), {}).findings
    assert "x.jsonl:1: has columns a, which are no known shape." in found[0]
