"""Folders of models, tokenizers and adapters that cannot be used."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: F401  a slow import, out of the times

from quartet.assembly import build
from quartet.config.toml import read_settings
from quartet.data import DataError
from quartet.models.adapters import POLICY, AdapterError, add_adapter
from quartet.models.chat import ChatError
from quartet.models.heads import ScalarModel
from quartet.models.language_model import ModelError, load_model, load_tokenizer, read_config, save
from quartet.models.lora import Lora
from tests.malformed.saying import refusal
from tests.support.world import model, tokenizer

EVIL = "from pathlib import Path\nPath('ran').touch()\nclass C: pass\n"
ROW = {"prompt": "the film", "completion": " was", "answer": "a"}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A language model, a reward model and a critic, whole."""
    root = tmp_path_factory.mktemp("models")
    save(model(), tokenizer(), root / "lm")
    scalar = ScalarModel.from_trunk(model(), 0, seed=0)
    scalar.save(root / "rm", tokenizer())
    scalar.save_per_token(root / "critic", tokenizer())
    return root


@pytest.fixture
def place(originals, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text((json.dumps(ROW) + "\n") * 4)

    def put(kind, change=lambda folder: None):
        shutil.copytree(originals / kind, kind, dirs_exist_ok=True)
        change(Path(kind))
        return kind

    return put


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def holding(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def saying(name="config.json", **keys):
    """A JSON file of the folder with other values; `...` takes a key out."""

    def change(folder):
        table = json.loads((folder / name).read_text()) | keys
        (folder / name).write_text(json.dumps({k: v for k, v in table.items() if v is not ...}))

    return change


def pickled(name):
    def change(folder):
        (folder / "model.safetensors").unlink()
        torch.save({}, folder / name)

    return change


def with_code(name="config.json", **keys):
    def change(folder):
        saying(name, **keys)(folder)
        (folder / "evil.py").write_text(EVIL)

    return change


def sharded(index):
    def change(folder):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text(index)

    return change


CODE = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}
CONFIGS = {
    "no config": (without("config.json"), "lm: has no config.json, so it is not a Hugging Face model folder."),
    "an empty folder": (lambda folder: [file.unlink() for file in folder.iterdir()], "lm: has no config.json"),
    "half a config": (holding("config.json", b"{"), "lm: its config cannot be read (It looks like the config file at"),
    "an empty config": (holding("config.json", b""), "lm: its config cannot be read (It looks like the config file at"),
    "a config in latin-1": (holding("config.json", b'{"a": "\xe9"}'), "lm: its config cannot be read (It looks like"),
    "a config of nothing": (holding("config.json", b"{}"), "lm: its config cannot be read (Unrecognized model in lm."),
    "a config that is a list": (holding("config.json", b"[]"), "lm: its config cannot be read ("),
    "no model_type": (saying(model_type=...), "Should have a `model_type` key in its config.json"),
    "unknown architecture": (saying(model_type="nosuch"), "lm: its config cannot be read (The checkpoint you are trying to load has model type `nosuch`"),
    "code of its own": (with_code(model_type="mine", auto_map=CODE), "lm: its config cannot be read (The repository lm contains custom code"),
    "no weights": (without("model.safetensors"), "lm: has no .safetensors weights. Other formats can run code when they are read, so they are not."),
    "pickled weights": (pickled("pytorch_model.bin"), "lm: has no .safetensors weights. Other formats can run code"),
    "weights in .pt": (pickled("model.pt"), "lm: has no .safetensors weights. Other formats can run code"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), CONFIGS.values(), ids=CONFIGS)
def test_folders_that_are_no_model(place, change, sentence):
    assert sentence in refusal(ModelError, lambda: read_config(place("lm", change)))
    assert not Path("ran").exists()


WEIGHTS = {
    "under another name": (lambda folder: (folder / "model.safetensors").rename(folder / "other.safetensors"), "no file named model.safetensors"),
    "half an index": (sharded("{"), "cannot be loaded as a language model (Expecting property name"),
    "a part that is not there": (sharded(json.dumps({"metadata": {}, "weight_map": {"model.embed_tokens.weight": "model-00002-of-00002.safetensors"}})), "model-00002-of-00002.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_are_not_there(place, change, sentence):
    said = refusal(ModelError, lambda: load_model(place("lm", change)))
    assert said.startswith("lm: cannot be loaded as a language model") and sentence in said


TABLE, END = (
    "tokenizer_config.json",
    "lm: its tokenizer has no end-of-sequence token, so no answer could ever end. Set eos_token in it.",
)
NONE = "Save one beside the model, or name another folder in policy.tokenizer."
TOKENIZERS = {
    "none": (without("tokenizer.json"), "lm: has no tokenizer. " + NONE),
    "half of one": (holding("tokenizer.json", b"{"), "lm: has no tokenizer that transformers can load (Expecting property name"),
    "an empty one": (holding("tokenizer.json", b""), NONE),
    "zeros": (holding("tokenizer.json", b"\0" * 100), NONE),
    "half of its config": (holding(TABLE, b"{"), "lm: has no tokenizer that transformers can load (Expecting property name"),
    "its config in latin-1": (holding(TABLE, b'{"a": "\xe9"}'), "lm: has no tokenizer that transformers can load ('utf-8' codec"),
    "no end": (saying(TABLE, eos_token=None), END),
    "nothing said of an end": (saying(TABLE, eos_token=...), END),
    "without its config": (without(TABLE), END),
    "code of its own": (with_code(TABLE, tokenizer_class="Mine", auto_map={"AutoTokenizer": ["evil.C", None]}), "contains custom code"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_folders_that_are_no_tokenizer(place, change, sentence):
    assert sentence in refusal(ModelError, lambda: load_tokenizer(place("lm", change)))
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("kind", "change"), [("lm", lambda folder: None)], ids=["a language model"]
)
def test_a_reward_model_without_its_head(place, kind, change):
    said = refusal(ModelError, lambda: ScalarModel.load(place(kind, change)))
    assert (
        said
        == "lm: has no weights for score.weight, so it is no trained model for SequenceClassification."
    )


TWO = {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
REWARD_MODELS = {
    "a language model": ("lm", lambda folder: None, (), "lm: is a LlamaForCausalLM, not a reward model."),
    "a critic": ("critic", lambda folder: None, (), "critic: is a LlamaForTokenClassification, not a reward model."),
    "a head for questions": ("rm", saying(architectures=["LlamaForQuestionAnswering"]), (), "rm: is a LlamaForQuestionAnswering, not a reward model."),
    "two labels": ("rm", saying(**TWO), (), "rm has 2 labels; a reward model needs 1. To use the first: reward.label = 0."),
    "a label that is not there": ("rm", lambda folder: None, ("reward.0.label=3",), "has 1 label, counted from 0."),
    "no config": ("rm", without("config.json"), (), "rm: has no config.json, so it is not a Hugging Face model folder."),
    "half a config": ("rm", holding("config.json", b"{"), (), "its config cannot be read"),
    "pickled weights": ("rm", pickled("pytorch_model.bin"), (), "rm: has no .safetensors weights."),
    "no tokenizer": ("rm", without("tokenizer.json"), (), "rm: has no tokenizer."),
}  # fmt: skip


def started(words=(), reward='type = "length"\nmost = 3'):
    """What `quartet run` makes before anything is trained."""
    text = f'recipe = "ppo"\n[policy]\nmodel = "lm"\n[[reward]]\n{reward}\n[data]\ntrain = "p.jsonl"\n[rollout]\nmax_new_tokens = 8\n'
    Path("run.toml").write_text(text)
    return build(read_settings(Path("run.toml"), words).config)


@pytest.mark.parametrize(
    ("kind", "change", "words", "sentence"), REWARD_MODELS.values(), ids=REWARD_MODELS
)
def test_folders_that_are_no_reward_model(place, kind, change, words, sentence):
    place("lm")
    place(kind, change)
    assert sentence in refusal(
        ModelError, lambda: started(words, f'type = "model"\nmodel = "{kind}"')
    )


REQUESTS = {
    "policy.model=a/b/c": 'policy.model = "a/b/c": no such folder.',
    "policy.model=./x": 'policy.model = "./x": no such folder.',
    "policy.model=~/x": 'policy.model = "~/x": no such folder.',
    "critic.init=./x": 'critic.init = "./x": no such folder.',
    "policy.chat_template=nope": 'policy.chat_template = "nope": neither a named template (chatml) nor a file.',
    "policy.chat_template=lm": 'policy.chat_template = "lm": neither a named template (chatml) nor a file.',
    "policy.tokenizer={type='train'}": "tokens, but lm knows only 20. Use the model's own tokenizer.",
    "rollout.max_new_tokens=64": "rollout.max_new_tokens = 64: leaves no room for a prompt, lm reads at most 64 tokens.",
    "rollout.max_new_tokens=99999999999": "rollout.max_new_tokens = 99999999999: leaves no room for a prompt",
    "data.max_prompt_tokens=1": "p.jsonl:1: the prompt has 2 tokens, the limit is 1 (data.max_prompt_tokens).",
    "data.eval=none.jsonl": "none.jsonl: no such file.",
    "rollout.max_new_tokens=63": "p.jsonl:1: the prompt has 2 tokens, the limit is 1 = 64 (lm) - 63 (rollout.max_new_tokens).",
    "run.device=cuda:99": 'run.device = "cuda:99": ',
    "run.device=mps": 'run.device = "mps": torch finds no Apple GPU on this machine. Write "cpu", or leave it out: "auto" takes a GPU where there is one.',
    "run.device=": 'run.device = "": cannot be used here (Device string must not be empty).',
}


@pytest.mark.parametrize("word", REQUESTS)
def test_requests_that_do_not_fit_the_model(place, word):
    place("lm")
    assert REQUESTS[word] in refusal((ModelError, ChatError, DataError), lambda: started([word]))


SHORT = {
    "an end that is no token": (
        saying(TABLE, eos_token="<nosuch>"),
        "policy.tokenizer has 21 tokens, but lm knows only 20.",
    ),
    "a smaller vocabulary": (
        saying(vocab_size=10),
        "policy.tokenizer has 20 tokens, but lm knows only 10. Use the model's own tokenizer.",
    ),
    "a model that reads four tokens": (
        saying(max_position_embeddings=4),
        "leaves no room for a prompt, lm reads at most 4 tokens.",
    ),
}


@pytest.mark.parametrize(("change", "sentence"), SHORT.values(), ids=SHORT)
def test_models_that_do_not_fit_the_request(place, change, sentence):
    place("lm", change)
    assert sentence in refusal(ModelError, started)


def test_an_adapter_for_layers_that_are_not_there():
    said = refusal(
        AdapterError,
        lambda: add_adapter(model(), Lora(targets=("nosuch",)), POLICY, 0),
    )
    assert said.startswith(
        "policy.adapter.targets: the model has no layer nosuch. It has down_proj, gate_proj,"
    )
