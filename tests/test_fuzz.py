"""Whatever is in a file, it is read or refused in a sentence. QUARTET_FUZZ=20000 looks longer."""

import gzip
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quartet.config.toml import ConfigError, read_settings, resolved_toml
from quartet.data import DataError
from quartet.data.shapes import examples_in
from quartet.recipes import recipe_names, recipe_path, template_names, template_path
from quartet.training.checkpoint import DamagedCheckpoint, read_checkpoint, write_checkpoint

EXAMPLES = int(os.environ.get("QUARTET_FUZZ", "60"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES < 1000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FILES = [recipe_path(name).read_text() for name in recipe_names()] + [
    template_path(name.removesuffix(".toml")).read_text() for name in template_names()
]
VALUES = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.text(max_size=20), st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)  # fmt: skip


@st.composite
def mangled(draw) -> str:
    """A file of ours, with some of its lines lost, doubled, moved, cut or given another value."""
    lines = draw(st.sampled_from(FILES)).splitlines()
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(lines) - 1))
        key = lines[at].partition("=")[0]
        match draw(st.integers(0, 5)):
            case 0:
                del lines[at : at + 1]
                lines = lines or [""]
            case 1:
                lines.insert(at, lines[at])
            case 2:
                lines[at] = lines[at][: draw(st.integers(0, len(lines[at])))]
            case 3:
                lines[at] = f"{key}= {draw(VALUES)!r}"
            case 4:
                lines[at] = f"{key}= {json.dumps(draw(VALUES))}"
            case 5:
                lines[at] += draw(st.text(max_size=10))
    return "\n".join(lines)


def short(error: Exception) -> bool:
    return 0 < len(str(error)) < 1500 and "Traceback" not in str(error)


@fuzz
@given(text=mangled())
def test_a_config_is_read_or_refused(tmp_path, text):
    file = tmp_path / "a.toml"
    file.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    try:
        made = read_settings(file)
    except ConfigError as error:
        assert short(error)
    else:
        again = tmp_path / "b.toml"
        again.write_text(resolved_toml(made), encoding="utf-8")
        assert read_settings(again).config == made.config, "what is resolved is the same run"


@fuzz
@given(
    word=st.one_of(
        st.text(max_size=30),
        st.builds(
            "{}={}".format,
            st.sampled_from(
                [
                    "seed",
                    "optim.lr",
                    "run.steps",
                    "algorithm.kl.coef",
                    "recipe",
                    "reward.0.weight",
                    "policy.create",
                ]
            ),
            st.one_of(VALUES.map(str), st.text(max_size=15)),
        ),
    )
)
def test_a_word_is_read_or_refused(word):
    try:
        read_settings(recipe_path("reviews"), [word])
    except ConfigError as error:
        assert short(error)


CELLS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
ROWS = st.dictionaries(
    st.sampled_from(
        [
            "prompt",
            "completion",
            "chosen",
            "rejected",
            "messages",
            "label",
            "margin",
            "answer",
            "text",
        ]
    ),
    CELLS,
    max_size=4,
)


@fuzz
@given(
    lines=st.lists(
        st.one_of(ROWS.map(json.dumps).map(str.encode), st.binary(max_size=40)), max_size=6
    ),
    name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"]),
    purpose=st.sampled_from(["demonstrations", "comparisons", "preferences", "prompts"]),
)
def test_a_data_file_is_read_or_refused(tmp_path, lines, name, purpose):
    content = b"\n".join(lines)
    file = tmp_path / name
    file.write_bytes(gzip.compress(content) if name.endswith("gz") and len(lines) % 2 else content)
    try:
        for _ in examples_in(file, purpose, {}):
            pass
    except DataError as error:
        assert short(error)


@fuzz
@given(data=st.data())
def test_a_checkpoint_is_what_was_written_or_damaged(tmp_path, data):
    folder = write_checkpoint(tmp_path / "ppo-000001", {"a": 1}, {"stage": "ppo", "step": 1})
    file = data.draw(st.sampled_from(sorted(folder.iterdir())))
    file.write_bytes(
        data.draw(st.one_of(st.binary(max_size=60), CELLS.map(json.dumps).map(str.encode)))
    )
    with pytest.raises(DamagedCheckpoint) as caught:
        read_checkpoint(folder)
    assert short(caught.value)
