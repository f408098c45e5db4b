"""Reward models on backbones of their own, and ensembles that one run trains."""

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

from quartet.assembly import build
from quartet.assembly.assembler import Assembler
from quartet.cli import app
from quartet.config.toml import ConfigError, read_settings
from quartet.data import DataError
from quartet.models.language_model import ModelError, save
from quartet.recording.run_folder import read_record
from tests.rewards.test_text_models import bert, bert_tokenizer, rollouts
from tests.support.tiny_run import carried_out
from tests.support.world import model, tokenizer, write_lines

WORDS = ("film", "story", "music", "end")
TABLES = """
recipe = ["reward_model", "ppo"]
policy.model = "lm"
data = { train = "pairs.jsonl", max_prompt_tokens = 8, max_response_tokens = 8 }
reward_model = { steps = 3, batch_size = 4, lr = 1e-2 }
rollout = { prompts_per_step = 4, max_new_tokens = 4 }
run = { steps = 1, checkpoint_every = 1, keep_last = 9 }
optim.epochs = 1
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a tiny policy, a tiny encoder, and pairs in which the good side wins."""
    monkeypatch.chdir(tmp_path)
    save(model(), tokenizer(), Path("lm"))
    bert("bert", AutoModelForMaskedLM)
    pairs = [
        {"prompt": f"the {a}", "chosen": f" was {b} good", "rejected": f" was {b} bad"}
        for a in WORDS
        for b in ("very", "not", "long", "short")
    ]
    write_lines(Path("pairs.jsonl"), *map(json.dumps, pairs))
    Path("run.toml").write_text(TABLES)
    return tmp_path


def config(*words):
    return read_settings(Path("run.toml"), words).config


def run(name, *words):
    """The folder of a run that has gone to its end."""
    return carried_out(read_settings(Path("run.toml"), words), Path("runs"), name).path


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def summary(path, stage):
    events = read_record(path).events
    [found] = [e["summary"] for e in events if (e["event"], e.get("stage")) == ("finished", stage)]
    return found


# --- another backbone


@pytest.mark.slow
def test_an_encoder_learns_to_score_and_scores_in_ppo(place):
    path = run("bert", 'reward_model.model="bert"', "reward_model.steps=30")
    found = summary(path, "reward_model")
    assert found["held_out_accuracy"] == 1.0
    trained = AutoModelForSequenceClassification.from_pretrained(path / "reward_model")
    assert type(trained).__name__ == "BertForSequenceClassification"
    [pair] = pq.read_table(path / "evaluation/pairs.parquet").slice(0, 1).to_pylist()
    assert pair["prompt"] == "the end" and pair["chosen"].startswith("was ")
    text = bert_tokenizer()(pair["prompt"], pair["chosen"], return_tensors="pt")
    raw = trained(**text).logits.item()
    assert pair["chosen_score"] == pytest.approx(raw - found["centre"], abs=1e-5)
    rows = pq.read_table(path / "rollouts/000001.parquet").to_pylist()
    prompt = "".join(r["text"] for r in rows if r["sample"] == 0 and not r["is_response"])
    said = "".join(r["text"] for r in rows if r["sample"] == 0 and r["is_response"])
    text = bert_tokenizer()(prompt, re.sub(r"<\w+>", "", said), return_tensors="pt")
    raw = trained(**text).logits.item()
    assert rows[0]["score/model"] == pytest.approx(raw - found["centre"], abs=1e-5)


@pytest.mark.slow
def test_a_decoder_of_the_policys_folder_is_the_reward_model_without_a_backbone(place):
    """The same weights and tokens by two ways."""
    plain, named = run("plain"), run("named", 'reward_model.model="lm"')
    assert same(weights(plain / "reward_model"), weights(named / "reward_model"))
    assert same(weights(plain / "critic"), weights(named / "critic")), "the critic starts from it"
    assert summary(plain, "reward_model") == summary(named, "reward_model")


@pytest.mark.slow
def test_all_weights_are_trained_under_a_policy_with_an_adapter(place):
    words = ("policy.adapter.type=lora", "policy.adapter.rank=2", 'reward_model.model="bert"')
    trained = weights(run("adapter", *words) / "reward_model")
    before = weights(Path("bert"))
    common = [n for n in before if n in trained and "embeddings.token_type" not in n]
    moved = {n for n in common if not torch.equal(before[n], trained[n])}
    assert {n for n in common if "layer.0" in n} <= moved


def test_what_a_row_quotes_of_the_encoders_control_tokens_is_text(place):
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    rows[0]["prompt"] = "the [SEP] film"
    write_lines(Path("pairs.jsonl"), *map(json.dumps, rows))
    words = (
        'reward_model.model="bert"',
        'policy.tokenizer="bytes"',
        "policy.resize_embeddings=true",
    )
    from tests.support.chats import byte_level

    byte_level().save_pretrained("bytes")
    comparisons = Assembler(
        config(*words, "data.max_prompt_tokens=64", "data.max_response_tokens=64")
    ).comparisons
    [sides] = [c for c in comparisons.train if c.id.endswith(":1")]
    separator, unknown = 2, bert_tokenizer().unk_token_id
    assert sides.chosen_ids.count(separator) == 2 and unknown in sides.chosen_ids
    [shown] = comparisons.shown[:1]
    assert shown.id == comparisons.held_out[0].id and shown.prompt_ids


REFUSED = {
    "a gone folder": (
        'reward_model.model="./gone"',
        'reward_model.model = "./gone": no such folder',
    ),
    "shards": (
        "launch={ processes = 2, shard = true }",
        "launch.shard: a reward model on a backbone of its own is held whole by each rank",
    ),
    "a score for each token": (
        'reward_model.loss.type="per_token"',
        'reward_model.loss.type = "per_token": reads a score at every token, and .*bert has one',
    ),
    "rewards for each token": (
        "algorithm={ rewards = { type = 'every_token' }, scores = [] }",
        "reward_model.model = .*bert: policy and reward model use different tokenizers",
    ),
    "a critic of other tokens": (
        "critic.init=reward_model",
        'critic.init = "reward_model": .*bert does not read the policy\'s tokens',
    ),
    "a classifier": (
        'reward_model.model="three"',
        "three is a classifier with 3 labels, and a reward",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_another_backbone_cannot_do_is_refused_in_a_sentence(place, case):
    word, sentence = REFUSED[case]
    bert("three", labels=3)
    with pytest.raises((ConfigError, ModelError), match=sentence):
        build(config('reward_model.model="bert"', word))


def test_rows_that_another_backbone_cannot_tell_apart_or_read_are_refused(place):
    rows = [{"prompt": "the film", "chosen": " was good", "rejected": " was  good"}] * 4
    write_lines(Path("pairs.jsonl"), *map(json.dumps, rows))
    with pytest.raises(DataError, match="identical for the tokenizer of reward_model.model"):
        build(config('reward_model.model="bert"'))
    rows = [{"prompt": "the film " * 12, "chosen": " was good", "rejected": " was bad " * 4}] * 4
    write_lines(Path("pairs.jsonl"), *map(json.dumps, rows))
    words = ("data.max_prompt_tokens=30", "data.max_response_tokens=20")
    with pytest.raises(DataError, match="for reward_model.model, which reads at most 32"):
        build(config('reward_model.model="bert"', *words))


# --- ensembles


@pytest.mark.slow
def test_members_are_the_reward_models_of_separate_runs_and_ppo_scores_by_all(place):
    combine = "reward=[{ type = 'ensemble', combine = 'min' }]"
    path = run("members", "reward_model.members=2", combine)
    alone = [run(f"alone-{seed}", f"seed={seed}", "recipe=['reward_model']") for seed in (0, 1000)]
    members = [path / "reward_model-1", path / "reward_model-2"]
    for member, other in zip(members, alone, strict=True):
        assert same(weights(member), weights(other / "reward_model"))
    assert not same(weights(members[0]), weights(members[1]))
    for number, other in enumerate(alone, 1):
        pairs = pq.read_table(path / f"evaluation/pairs-{number}.parquet")
        assert pairs.equals(pq.read_table(other / "evaluation/pairs.parquet"))
    assert summary(path, "reward_model-2") == summary(alone[1], "reward_model")
    stages = [e["stage"] for e in read_record(path).events if e["event"] == "started"]
    assert stages == ["reward_model-1", "reward_model-2", "ppo"]
    critics = {n: w for n, w in weights(path / "critic").items() if "embed" in n}
    assert critics, "which starts from the first member"


@pytest.mark.slow
def test_members_on_one_trunk_score_as_members_apart(place):
    """Adapters are attached to the policy's trunk; the folders hold whole models."""
    words = ("policy.adapter.type=lora", "policy.adapter.rank=2", "reward_model.members=3")
    path = run("adapters", *words)
    assembler = Assembler(config(*words))
    from quartet.assembly.components import load_components

    made = load_components(assembler, path)
    attached = next(w.reward for w in made.rewards if w.reward.name == "ensemble")
    [apart] = [w.reward for w in assembler.weighted_rewards(path) if w.reward.name == "ensemble"]
    trunks = {id(m.model.view.model) for m in attached.members}
    assert len(attached.members) == len(apart.members) == 3 and len(trunks) == 1
    asked = rollouts(3)
    scores = [m.score(asked) for m in attached.members]
    assert scores[0] != scores[1] != scores[2]
    assert torch.tensor(scores).allclose(
        torch.tensor([m.score(asked) for m in apart.members]), atol=1e-5
    )


@pytest.mark.slow
def test_a_run_killed_in_its_second_member_goes_on_in_it_to_the_same_bits(place):
    words = ("reward_model.members=3", "reward_model.steps=2", "recipe=['reward_model']")
    whole = run("whole", *words)
    cut = Path(shutil.copytree(whole, "runs/cut"))
    for name in ("reward_model-2", "reward_model-3"):
        shutil.rmtree(cut / name)
    for checkpoint in (cut / "checkpoints").iterdir():
        if (
            checkpoint.name.startswith("reward_model-3")
            or checkpoint.name == "reward_model-2-000002"
        ):
            shutil.rmtree(checkpoint)
    done = CliRunner().invoke(app, ["run", str(cut), "--resume"])
    assert done.exit_code == 0, done.output
    assert "reward model, member 2 of 3" in done.output
    for name in ("reward_model-1", "reward_model-2", "reward_model-3"):
        assert same(weights(whole / name), weights(cut / name))
    first = [(e["stage"], e["step"]) for e in read_record(cut).events if e["event"] == "metrics"]
    assert first == [(f"reward_model-{m}", s) for m in (1, 2, 3) for s in (1, 2)]


def test_settings_of_ensembles_are_checked(place):
    assert config("reward_model.members=2").reward[0].type == "ensemble"
    assert config("reward_model.members=2").stages == ("reward_model-1", "reward_model-2", "ppo")
    with pytest.raises(ConfigError, match='reward.type = "model": the run trains 2 reward models'):
        config("reward_model.members=2", "reward=[{ type = 'model' }]")
    with pytest.raises(ConfigError, match="reward.models: the run trains one reward model"):
        config("reward=[{ type = 'ensemble' }]")
    with pytest.raises(
        ConfigError, match=r"reward.weights = \[1.0\]: needs one number ≥ 0 for each of 2"
    ):
        config("reward_model.members=2", "reward=[{ type = 'ensemble', weights = [1] }]")
    with pytest.raises(ConfigError, match='"reward_model-1" is no stage'):
        config("recipe=['reward_model-1']")
