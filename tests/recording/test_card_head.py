"""Model cards as huggingface_hub's own parser reads them."""

import pytest
from huggingface_hub import ModelCard

from quartet.recording.card_head import card_head, is_hub_id


def read(text):
    return ModelCard(f"{text}# A model\n", ignore_metadata_errors=False).data


def test_the_cards_of_a_run_are_read_with_what_was_measured(ppo_run):
    summaries = {e["stage"]: e["summary"] for e in ppo_run.events if e["event"] == "finished"}
    policy = ModelCard.load(ppo_run.path / "policy" / "README.md").data
    assert policy.library_name == "transformers" and policy.pipeline_tag == "text-generation"
    assert policy.tags == ["quartet", "sft", "reward_model", "ppo", "evaluation"]
    assert policy.base_model is None and policy.datasets is None
    found = {each.metric_type: each for each in policy.eval_results}
    evaluation = summaries["evaluation"]
    assert {name: each.metric_value for name, each in found.items()} == {
        "win_rate": evaluation["win_rate"]["mean"],
        "kl": evaluation["kl"]["mean"],
        "reward": evaluation["after"]["reward"],
        "gold": evaluation["after"]["gold"],
    }
    assert found["kl"].dataset_name == "held-out rows of the embedded world reviews"
    model = ModelCard.load(ppo_run.path / "reward_model" / "README.md").data
    [accuracy] = model.eval_results
    assert accuracy.metric_type == "accuracy" and accuracy.task_type == "text-classification"
    assert accuracy.metric_value == summaries["reward_model"]["held_out_accuracy"]
    assert ModelCard.load(ppo_run.path / "critic" / "README.md").data.eval_results is None


def test_names_of_the_hub_are_named_and_files_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "rm").mkdir(parents=True)
    config = {"policy": {"model": "Qwen/Qwen2.5-0.5B"}, "recipe": ["ppo"]}
    config["data"] = {"train": ["trl-lib/tldr", "here/rows.jsonl"]}
    config["reward_model"] = {"model": "runs/rm"}
    policy = read(card_head("policy", config, [], "x: policy"))
    assert policy.base_model == "Qwen/Qwen2.5-0.5B" and policy.datasets == ["trl-lib/tldr"]
    assert read(card_head("reward_model", config, [], "x")).base_model is None
    assert not is_hub_id("./a/b") and not is_hub_id("a/b/c") and not is_hub_id("/a")


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: other\nlicense_name: gemma\ntags: [a]\n---\n# M\n", ("other", "gemma")),
        ("---\nlicense: [a\n---\n", (None, None)),
        ("---\nlicense: 3\n---\n", (None, None)),
        ("# without a head\n", (None, None)),
        (b"\xff\xfe", (None, None)),
        (None, (None, None)),
    ],
)
def test_the_licence_of_the_base_model_is_kept(tmp_path, card, licence):
    if card is not None:
        (tmp_path / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    data = read(card_head("policy", {"policy": {"model": str(tmp_path)}}, [], 'a "title": x'))
    assert (data.license, data.get("license_name")) == licence
