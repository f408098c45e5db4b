"""Each combination of settings that cannot work, and the one rule that refuses it."""

import copy
from typing import Any

import pytest

from quartet.config import rules
from quartet.config.toml import ConfigError, settings_of_table

MODEL = {"type": "model", "model": "rm"}
PPO = {
    "recipe": ["ppo"],
    "policy": {"model": "m"},
    "data": {"train": "p.jsonl"},
    "reward": [MODEL],
}
DPO = {"recipe": ["dpo"], "policy": {"model": "m"}, "data": {"train": "p.jsonl"}}
ILQL = {"recipe": ["ilql"], "policy": {"model": "m"}, "data": {"train": "p.jsonl"}}
DISTILLATION = {
    "recipe": ["on_policy_distillation"],
    "policy": {"model": "m"},
    "data": {"train": "p.jsonl"},
    "reference": {"model": "teacher"},
}
SHAPE = {"num_layers": 2, "max_length": 1024}
SERVERS = {"type": "vllm", "urls": ["http://127.0.0.1:8000"]}
TRUST_REGION = {"algorithm.update": {"type": "trust_region"}}

LABELLED = {
    **PPO,
    "recipe": ["label", "reward_model", "ppo"],
    "reward": [{"type": "model"}],
}

BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "recipe_needs_a_stage": (DPO, {"recipe": []}),
    "recipe_names_known_stages": (PPO, {"recipe": ["ppo", "pop"]}),
    "stages_stand_in_order": (PPO, {"recipe": ["ppo", "sft"]}),
    "preference_loss_is_the_stages": (DPO, {"preference.loss": {"type": "ipo"}}),
    "kto_needs_two_comparisons": (DPO, {"recipe": ["kto"], "preference.batch_size": 1}),
    "evaluation_needs_a_policy": (DPO, {"recipe": ["evaluation"]}),
    "evaluation_needs_a_reward": (DPO, {"recipe": ["dpo", "evaluation"]}),
    "custom_needs_its_table": (DPO, {"recipe": ["custom"]}),
    "labels_are_for_a_reward_model": (PPO, {"recipe": ["label", "ppo"]}),
    "labels_are_the_reward_models_data": (LABELLED, {"reward_model.epochs": 2}),
    "labels_do_not_exceed_pairs": (LABELLED, {"label.labels": 301}),
    "simulated_labels_need_a_gold_reward": (LABELLED, {"label.simulated": 0.1}),
    "labels_are_awaited_by_one_process": (LABELLED, {"launch.processes": 2}),
    "ilql_trains_a_whole_model": (ILQL, {"policy.adapter": {"type": "lora"}}),
    "ilql_needs_scores": (
        ILQL,
        {"policy": {"create": SHAPE}, "data": {"world": "guess"}},
    ),
    "data_train_lists_a_file": (PPO, {"data.train": []}),
    "paths_are_not_empty": (PPO, {"data.eval": ""}),
    "run_name_is_no_path": (PPO, {"run.name": "a/b"}),
    "policy_has_one_origin": (PPO, {"policy.create": SHAPE}),
    "data_have_one_origin": (PPO, {"data.world": "reviews"}),
    "adapter_excludes_frozen_layers": (
        PPO,
        {"policy.adapter": {"type": "lora"}, "policy.frozen_layers": 1},
    ),
    "some_layers_are_trained": (
        PPO,
        {"policy": {"create": SHAPE, "tokenizer": "t", "frozen_layers": 2}},
    ),
    "every_file_has_a_weight": (PPO, {"data.weights": [1.0, 2.0]}),
    "new_model_needs_a_tokenizer": (PPO, {"policy": {"create": SHAPE}}),
    "reward_model_needs_comparisons": (
        PPO,
        {"recipe": ["reward_model", "ppo"], "data": {"world": "sums"}},
    ),
    "labelled_texts_have_a_file": (PPO, {"data": {"world": "labelled_texts"}}),
    "teacher_is_named": (DISTILLATION, {"algorithm.kl.coef": 0.0}),
    "learning_needs_a_reward": (PPO, {"reward": []}),
    "reward_model_has_an_origin": (PPO, {"reward": [{"type": "model"}]}),
    "reward_is_what_is_trained": (
        PPO,
        {"recipe": ["reward_model", "ppo"], "reward": [{"type": "ensemble"}]},
    ),
    "other_backbone_is_whole": (
        PPO,
        {
            "recipe": ["reward_model", "ppo"],
            "reward": [{"type": "model"}],
            "reward_model": {"model": "bert"},
            "launch": {"processes": 2, "shard": True},
        },
    ),
    "rewards_have_different_names": (PPO, {"reward": [MODEL, MODEL]}),
    "some_reward_counts": (PPO, {"reward": [MODEL | {"weight": 0.0}]}),
    "pairwise_judge_needs_two_answers": (
        PPO,
        {"reward": [{"type": "judge", "url": "http://h/", "model": "j", "mode": "pairwise"}]},
    ),
    "gold_reward_needs_a_world": (PPO, {"reward": [{"type": "gold"}]}),
    "preference_stage_needs_comparisons": (DPO, {"data": {"world": "sums"}}),
    "environment_reward_needs_an_environment": (PPO, {"reward": [{"type": "environment"}]}),
    "greedy_baseline_needs_one_turn": (
        PPO,
        {"recipe": ["remax"], "environment": {"function": "x.py:X"}},
    ),
    "continuations_need_the_native_generator": (
        PPO,
        {"recipe": ["vineppo"], "generator": {"type": "vllm", "urls": ["http://127.0.0.1:1"]}},
    ),
    "groups_need_two_answers": (PPO, {"recipe": ["grpo"], "rollout.samples_per_prompt": 1}),
    "own_loop_samples_and_learns_in_turn": (
        PPO,
        {"run.loop": "mine.py:loop", "rollout.staleness": 1},
    ),
    "critic_starts_from_something": (
        PPO,
        {"reward": [{"type": "exact"}], "critic": {"init": "reward_model"}},
    ),
    "token_rewards_need_token_scores": (
        PPO,
        {
            "reward": [{"type": "exact"}],
            "algorithm": {"rewards": {"type": "every_token"}, "scores": []},
        },
    ),
    "critic_is_created_or_starts_from_weights": (
        PPO,
        {"critic": {"create": SHAPE, "init": "policy"}},
    ),
    "trust_region_needs_a_critic": (
        PPO,
        {"recipe": ["grpo"], "rollout.samples_per_prompt": 8, **TRUST_REGION},
    ),
    "trust_region_excludes_ptx": (PPO, {"algorithm.ptx": {"coef": 1.0}, **TRUST_REGION}),
    "trust_region_excludes_masked_responses": (
        PPO,
        {"algorithm.mask_truncated": True, **TRUST_REGION},
    ),
    "trust_region_needs_fp32": (PPO, {"run.precision": "bf16", **TRUST_REGION}),
    "reference_on_the_trunk_has_its_precision": (
        PPO,
        {"policy.adapter": {"type": "lora"}, "run.precision": {"reference": "fp32"}},
    ),
    "reference_is_compared_with": (DPO, {"recipe": ["simpo"], "reference.model": "m"}),
    "served_adapter_needs_an_adapter": (PPO, {"generator": SERVERS | {"adapter": True}}),
    "sent_weights_are_whole": (
        PPO,
        {
            "generator": SERVERS | {"transfer": "nccl", "adapter": True},
            "policy.adapter": {"type": "lora"},
        },
    ),
    "sent_weights_need_gpus_of_the_servers": (
        PPO,
        {"generator": SERVERS | {"transfer": "nccl", "sleep": True}},
    ),
    "sglang_excludes_filters": (
        PPO,
        {"generator": SERVERS | {"type": "sglang"}, "rollout.top_k": 5},
    ),
    "kept_mask_needs_a_filter": (PPO, {"rollout.keep_mask": True}),
    "smallest_length_is_below_the_largest": (
        PPO,
        {"rollout": {"min_new_tokens": 9, "max_new_tokens": 8, "keep_mask": True}},
    ),
    "servers_keep_no_mask": (
        PPO,
        {"generator": SERVERS, "rollout": {"top_p": 0.9, "keep_mask": True}},
    ),
    "sleeping_servers_sample_in_turn": (
        PPO,
        {"generator": SERVERS | {"sleep": True}, "rollout.staleness": 1},
    ),
    "critic_warmup_needs_a_critic": (
        PPO,
        {"recipe": ["rloo"], "rollout.samples_per_prompt": 4, "optim.critic_warmup_steps": 3},
    ),
    "minibatches_have_responses": (PPO, {"optim.minibatches": 65}),
    "new_model_is_long_enough": (
        PPO,
        {"policy": {"create": SHAPE | {"max_length": 64}, "tokenizer": "t"}},
    ),
    "length_is_given_once": (DPO, {"preference.steps": 3, "preference.epochs": 1.0}),
    "choosing_needs_evaluations": (DPO, {"preference.patience": 2}),
    "evaluations_need_held_out_rows": (
        DPO,
        {
            "recipe": ["online_dpo"],
            "reward": [MODEL],
            "preference.eval_every": 5,
        },
    ),
    "warmup_is_given_once": (PPO, {"optim.warmup_steps": 3, "optim.warmup_ratio": 0.1}),
    "constant_rate_falls_to_nothing": (PPO, {"optim.min_lr_ratio": 0.1}),
    "moments_in_parts_need_a_type_that_takes_them": (
        PPO,
        {"optim.optimizer": "adamw_8bit", "launch.shard": True},
    ),
    "adapters_need_a_type_that_takes_them": (
        PPO,
        {"optim.optimizer": "muon", "policy.adapter": {"type": "lora"}},
    ),
    "address_needs_ray": (PPO, {"launch.address": "head:6379"}),
    "torchrun_restarts_itself": (PPO, {"launch.type": "torchrun", "launch.restarts": 1}),
    "every_rank_has_a_part": (PPO, {"launch.processes": 3, "launch.shard": 2}),
    "trust_region_excludes_compile": (PPO, {"policy.compile": True, **TRUST_REGION}),
    "trust_region_excludes_balancing": (PPO, {"policy.router_aux_loss_coef": 0.1, **TRUST_REGION}),
    "compile_excludes_balancing": (
        PPO,
        {"policy.router_aux_loss_coef": 0.1, "policy.compile": True},
    ),
    "trust_region_excludes_sharding": (
        PPO,
        {"launch.processes": 2, "launch.shard": True, **TRUST_REGION},
    ),
    "quantize_needs_an_adapter": (PPO, {"policy.quantize": "nf4"}),
    "quantize_holds_one_trunk_whole": (
        PPO,
        {
            "policy.quantize": "nf4",
            "policy.adapter": {"type": "lora"},
            "launch.processes": 2,
            "launch.shard": True,
        },
    ),
    "quantize_needs_linear_layers": (
        PPO,
        {
            "policy": {
                "create": SHAPE | {"type": "gpt2"},
                "tokenizer": "t",
                "quantize": "nf4",
                "adapter": {"type": "lora"},
            }
        },
    ),
}
"""A config that works and what is changed in it, by the rule that this breaks."""


def changed(table: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    table = copy.deepcopy(table)
    for key, value in changes.items():
        *path, last = key.split(".")
        inner = table
        for name in path:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return table


def test_every_rule_has_a_config_that_breaks_it():
    assert list(BROKEN) == [rule.__name__ for rule in rules.RULES]


@pytest.mark.parametrize("base", [PPO, DPO, DISTILLATION], ids=["ppo", "dpo", "distillation"])
def test_the_configs_work_before_they_are_changed(base):
    assert settings_of_table(base, "x", "here").config.recipe == tuple(base["recipe"])


@pytest.mark.parametrize("name", BROKEN)
def test_a_rule_refuses_what_cannot_work_with_a_sentence(monkeypatch, name):
    """The sentence is the rule's: without the rule, the config works or gets another one."""
    table = changed(*BROKEN[name])
    with pytest.raises(ConfigError) as refused:
        settings_of_table(table, "x", "here")
    others = [rule for rule in rules.RULES if rule.__name__ != name]
    monkeypatch.setattr(rules, "RULES", others)
    try:
        settings_of_table(table, "x", "here")
    except ConfigError as another:
        assert str(another) != str(refused.value)
    sentence = str(refused.value)
    assert sentence.startswith("here: ") and sentence.endswith(".")


def test_a_teacher_takes_the_place_of_a_reward_only_where_it_is_learnt_from():
    watched = changed(DISTILLATION, {"reward": [MODEL | {"weight": 0.0}]})
    exact = {"type": "in_loss", "estimator": "exact", "coef": 1.0}
    two = {"recipe": ["grpo"], "rollout.samples_per_prompt": 2}
    for works in (watched, changed(DISTILLATION, two | {"algorithm.kl": exact})):
        assert settings_of_table(works, "x", "here").config.reference.model == "teacher"
    for sentence, changes in {
        "reference.model: on_policy_distillation learns from a teacher": {
            "reference": {},
            "reward": [MODEL],
        },
        "algorithm.kl.coef = 0: on_policy_distillation learns from": {"algorithm.kl.coef": 0.0},
        "reward: grpo needs one": {"recipe": ["grpo"], "reference": {}},
        "reward: online_dpo needs one": {"recipe": ["online_dpo"]},
    }.items():
        with pytest.raises(ConfigError, match=sentence):
            settings_of_table(changed(DISTILLATION, changes), "x", "here")


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mixtral"])
def test_a_folder_that_cannot_be_held_in_4_bits_is_refused_unloaded(kind, tmp_path):
    (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}"}}', encoding="utf-8")
    quantized = {"model": str(tmp_path), "quantize": "nf4", "adapter": {"type": "lora"}}
    table = PPO | {"policy": quantized}
    if kind == "llama":
        settings_of_table(table, "x", "here")
        return
    why = "the experts of mixtral, nearly" if kind == "mixtral" else "gpt2 has no linear layers in"
    with pytest.raises(ConfigError, match=why):
        settings_of_table(table, "x", "here")
