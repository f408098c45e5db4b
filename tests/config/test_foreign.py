"""Configurations of other libraries become run files; nothing of them is executed."""

import json
import tomllib
from pathlib import Path

import pytest

from quartet.config.explain import headlines, types_of
from quartet.config.foreign.read import ForeignError, read_foreign, stage_in
from quartet.config.foreign.translate import translate
from quartet.config.foreign.values import WORDS
from quartet.config.toml import read_settings

PPO_TRL = '''
import os
os.system("touch was_run")
from trl import PPOConfig, PPOTrainer
"""
python examples/scripts/ppo/ppo.py \\
    --dataset_name rows/of-prompts \\
    --dataset_test_split validation \\
    --sft_model_path a/sft-model \\
    --reward_model_path a/reward-model \\
    --model_name_or_path a/base-model \\
    --per_device_train_batch_size 4 --gradient_accumulation_steps 8 \\
    --missing_eos_penalty 1.5 --response_length 53 --no_such_option 3
"""
config = parser.parse_args_into_dataclasses()
model = AutoModelForCausalLM.from_pretrained(config.model)
'''
GRPO_TRL = """
from trl import GRPOConfig, GRPOTrainer
from peft import LoraConfig
MODEL = "a/model"
args = GRPOConfig(
    learning_rate=1e-6, num_generations=4, per_device_train_batch_size=8, gradient_accumulation_steps=4,
    max_completion_length=64, beta=0.04, epsilon=0.1, bf16=True, report_to="wandb", max_steps=20,
    output_dir=os.path.join("a", "b"), use_vllm=True,
)
trainer = GRPOTrainer(model=MODEL, args=args, peft_config=LoraConfig(r=8, lora_alpha=32, lora_dropout=0.05))
"""
OPENRLHF = """
set -x
ROWS=rows/of-prompts   # a comment
deepspeed --module openrlhf.cli.train_ppo_ray \\
   --pretrain a/model --critic_pretrain a/critic --remote_rm_url /rewards/mine.py \\
   --prompt_data $ROWS --input_key question \\
   --rollout_batch_size 256 --n_samples_per_prompt 4 --train_batch_size 128 \\
   --advantage_estimator rloo --init_kl_coef 0.02 --kl_estimator k2 --eps_clip_low_high 0.2 0.27 \\
   --normalize_reward --zero_stage 3 --use_wandb {token} --actor_num_gpus_per_node 8 --max_len 512
"""
VERL = """
python3 -m verl.trainer.main_ppo algorithm.adv_estimator=grpo \\
    data.train_files=$HOME/rows.parquet data.train_batch_size=256 data.max_prompt_length=300 \\
    actor_rollout_ref.model.path=a/model actor_rollout_ref.actor.ppo_mini_batch_size=64 \\
    actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.003 \\
    actor_rollout_ref.actor.kl_loss_type=low_var_kl actor_rollout_ref.actor.clip_ratio_high=0.28 \\
    algorithm.use_kl_in_reward=False actor_rollout_ref.rollout.n=5 trainer.save_freq=-1 \\
    reward_model.rollout.response_length=9 trainer.total_epochs=15 "trainer.logger=['console','wandb']" $@
"""
VERL_YAML = """
data: {train_files: rows.jsonl, train_batch_size: 32, max_response_length: "${data.longest}", longest: 77}
actor_rollout_ref:
  model: {path: a/model}
  actor: {use_kl_loss: false, kl_loss_coef: 0.001}
algorithm: {adv_estimator: gae, lam: 0.95, use_kl_in_reward: false, kl_ctrl: {kl_coef: 0.001}}
"""


def imported(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    made = translate(read_foreign(path))
    target = tmp_path / "ours.toml"
    target.write_text(made.toml())
    return made, tomllib.loads(target.read_text())


def test_a_trl_script_with_its_options_in_a_command_is_read_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made, ours = imported(tmp_path, "ppo.py", PPO_TRL)
    assert not (tmp_path / "was_run").exists()
    assert ours["recipe"] == ["ppo"] and ours["policy"]["model"] == "a/sft-model"
    assert ours["reward"] == [{"type": "model", "model": "a/reward-model"}]
    assert ours["rollout"] == {"prompts_per_step": 32, "max_new_tokens": 53}  # 4 × 8
    assert ours["algorithm"]["scores"] == [{"type": "missing_eos", "penalty": 1.5}]
    assert ours["data"] == {"train": "rows/of-prompts"} and "dataset_test_split" in made.differs
    assert made.unknown == ["no_such_option"] and made.refusal is None
    assert "multiply it by their number" in made.needs[0]


def test_a_trl_script_with_a_config_class_is_read(tmp_path):
    made, ours = imported(tmp_path, "train.py", GRPO_TRL)
    assert ours["recipe"] == ["grpo"]
    assert ours["policy"]["adapter"] == {"type": "lora", "rank": 8, "alpha": 32}
    assert ours["rollout"] == {"samples_per_prompt": 4, "max_new_tokens": 64, "prompts_per_step": 8}
    assert ours["algorithm"]["policy_loss"] == {"low": 0.1, "high": 0.1}
    assert ours["algorithm"]["kl"]["coef"] == 0.04
    assert ours["run"] == {"precision": "bf16", "track": ["wandb"], "steps": 20}
    assert "lora_dropout" in made.missing and "output_dir" not in made.taken
    assert {need.partition(",")[0] for need in made.needs} >= {"data.train", "[[reward]]"}
    assert made.refusal is None


@pytest.mark.parametrize(
    ("scale", "std"), [("False", "none"), ("True", "sample"), ("'group'", "sample")]
)
def test_what_divides_advantages_in_trl_does_so_here(tmp_path, scale, std):
    text = f"from trl import GRPOConfig\nargs = GRPOConfig(scale_rewards={scale})\n"
    made, ours = imported(tmp_path, "train.py", text)
    assert ours["algorithm"]["advantage"]["std"] == std and made.refusal is None


def test_values_are_called_what_the_keys_here_call_them():
    for key, words in WORDS.items():
        said = "\n".join([*headlines(key), *types_of(key.removesuffix(".type"))])
        for value in words.values():
            assert value in said, (key, value)


def test_a_deviation_of_the_whole_batch_is_not_taken_for_another(tmp_path):
    text = "from trl import GRPOConfig\nargs = GRPOConfig(scale_rewards='batch', max_steps=3)\n"
    made, ours = imported(tmp_path, "train.py", text)
    assert "algorithm" not in ours and "has no 'batch'" in made.differs["scale_rewards"]


def test_a_command_of_openrlhf_is_read(tmp_path):
    made, ours = imported(tmp_path, "train.sh", OPENRLHF)
    assert ours["recipe"] == ["rloo"] and ours["policy"]["model"] == "a/model"
    assert ours["data"]["train"] == "rows/of-prompts"
    assert ours["data"]["columns"] == {"prompt": "question"}
    assert ours["rollout"] == {"prompts_per_step": 256, "samples_per_prompt": 4}
    assert ours["optim"]["minibatches"] == 8  # 256 · 4 / 128
    assert ours["reward"] == [{"type": "function", "function": "/rewards/mine.py:reward_func"}]
    assert ours["algorithm"]["kl"] == {"coef": 0.02, "estimator": "k2"}
    assert ours["algorithm"]["scores"] == [{"type": "running_scale"}]
    assert ours["run"]["track"] == ["wandb"]
    assert "no such key" in made.differs["eps_clip_low_high"]  # RLOO here has no clip
    assert {"zero_stage", "actor_num_gpus_per_node"} <= made.differs.keys()
    assert made.refusal is None


def test_a_command_of_verl_is_read(tmp_path):
    made, ours = imported(tmp_path, "run.sh", VERL)
    assert ours["recipe"] == ["grpo"]
    assert ours["algorithm"]["kl"] == {"type": "in_loss", "coef": 0.003, "estimator": "k3"}
    assert ours["algorithm"]["policy_loss"]["high"] == 0.28
    assert ours["optim"]["minibatches"] == 4  # 256 / 64, both in prompts
    assert ours["data"]["max_prompt_tokens"] == 300
    assert "max_new_tokens" not in ours["rollout"]  # that of the reward model's server is not ours
    assert "only known when that program runs" in made.differs["data.train_files"]
    assert ours["data"]["train"] == "path/to/data.jsonl"
    assert "passes over the data" in made.differs["trainer.total_epochs"]
    assert "checkpoint_every" not in ours["run"] and made.refusal is None


def test_a_yaml_file_of_verl_has_no_kl_where_both_switches_are_off(tmp_path):
    made, ours = imported(tmp_path, "ppo_trainer.yaml", VERL_YAML)
    assert ours["recipe"] == ["ppo"] and ours["algorithm"]["kl"] == {"type": "none"}
    assert ours["algorithm"]["advantage"]["lam"] == 0.95
    assert ours["rollout"] == {"prompts_per_step": 32, "max_new_tokens": 77}
    assert "no effect" in made.differs["algorithm.kl_ctrl.kl_coef"]
    assert made.refusal is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("openrlhf.cli.train_dpo --pretrain m --dataset d --beta 0.2 --train_batch_size 16 --learning_rate 5e-7",
         {"recipe": ["dpo"], "preference": {"loss": {"beta": 0.2}, "batch_size": 16, "lr": 5e-7}}),
        ("openrlhf.cli.train_ppo --pretrain m --prompt_data d --eps_clip_low_high 0.2 0.27",
         {"recipe": ["ppo"], "algorithm": {"policy_loss": {"low": 0.2, "high": 0.27}}}),
        ("openrlhf.cli.train_rm --pretrain m --dataset d --max_epochs 2 --l2 0.1",
         {"recipe": ["reward_model"], "reward_model": {"epochs": 2, "weight_decay": 0.1}}),
        ("trl sft --model_name_or_path m --dataset_name d --max_steps 7 --warmup_ratio 0.1",
         {"recipe": ["sft"], "sft": {"steps": 7, "warmup_ratio": 0.1}}),
    ],
)  # fmt: skip
def test_a_stage_has_its_own_tables(tmp_path, text, expected):
    made, ours = imported(tmp_path, "x.sh", text)
    assert made.refusal is None
    assert {key: ours[key] for key in expected} == expected
    assert ("reward" in ours) == (ours["recipe"] == ["ppo"])


def test_what_is_written_can_be_read_as_a_run_file(tmp_path):
    for name, text in {
        "a.py": GRPO_TRL,
        "b.sh": OPENRLHF,
        "c.sh": VERL,
        "d.yaml": VERL_YAML,
    }.items():
        imported(tmp_path, name, text)
        assert read_settings(tmp_path / "ours.toml").config.policy.model == "a/model"


def test_a_value_that_the_check_refuses_is_taken_out_and_listed(tmp_path):
    made, ours = imported(tmp_path, "x.sh", OPENRLHF + " --lambd 7 --actor_learning_rate -3")
    assert made.refusal is None and "lr" not in ours.get("optim", {})
    assert "must be > 0" in made.differs["actor_learning_rate"]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("x.py", "def f(:", "cannot be understood"),
        ("x.py", "print(1)", "no options were found"),
        ("x.yaml", "a: !!python/object/apply:os.system ['touch was_run']", "cannot be understood"),
        ("x.yaml", "- 1", "it is no mapping"),
        ("x.json", "{}", "name a .py script"),
        ("x.sh", "\xff\xfe", "not UTF-8"),
    ],
)
def test_other_files_are_refused_in_a_sentence(tmp_path, monkeypatch, name, text, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ForeignError, match=sentence):
        read_foreign(tmp_path / name)
    assert not Path("was_run").exists()
    with pytest.raises(ForeignError, match="No such file"):
        read_foreign(Path("none.sh"))


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("train_ppo_with_reward_fn", "ppo"),
        ("reward_modeling", "reward_model"),
        ("dpo_online", "online_dpo"),
        ("run_qwen2_7b", None),
    ],
)
def test_the_name_of_a_script_says_what_it_trains(name, stage):
    assert stage_in(name) == stage


def test_the_command_writes_the_file_lists_all_and_writes_over_none(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from quartet.cli import app

    monkeypatch.chdir(tmp_path)
    Path("run.sh").write_text(VERL)
    done = CliRunner().invoke(app, ["import", "run.sh"])
    assert done.exit_code == 0, done.output
    for words in (
        "taken over (",
        "means something else here",
        "to fill in",
        "quartet plan run.toml",
    ):
        assert words in done.output
    assert CliRunner().invoke(app, ["import", "run.sh"]).exit_code == 2
    told = CliRunner().invoke(app, ["import", "run.sh", "--output", "b.toml", "--json"])
    assert json.loads(told.output)["taken"]["algorithm.adv_estimator"]["value"] == ["grpo"]


@pytest.mark.parametrize(
    ("mode", "preset"),
    [("cispo", "cispo"), ("gspo", "gspo"), ("geo_mean", "gmpo"), ("vanilla", "grpo")],
)
@pytest.mark.parametrize("estimator_first", [False, True])
def test_a_policy_loss_of_verl_is_the_preset_with_it(tmp_path, mode, preset, estimator_first):
    words = [
        f"actor_rollout_ref.actor.policy_loss.loss_mode={mode}",
        "algorithm.adv_estimator=grpo",
    ]
    words = words[::-1] if estimator_first else words
    text = f"python3 -m verl.trainer.main_ppo {' '.join(words)} data.train_batch_size=8\n"
    made, ours = imported(tmp_path, "train.sh", text)
    assert ours["recipe"] == [preset]
    assert not any("none of our presets" in why for why in made.differs.values())


def test_an_estimator_beside_a_policy_loss_of_another_preset_is_listed(tmp_path):
    words = "actor_rollout_ref.actor.policy_loss.loss_mode=cispo algorithm.adv_estimator=rloo"
    made, ours = imported(tmp_path, "t.sh", f"python3 -m verl.trainer.main_ppo {words}\n")
    assert ours["recipe"] == ["cispo"]
    assert (
        made.differs["algorithm.adv_estimator"]
        == "The recipe is cispo, and rloo is our preset rloo."
    )


TRL_GSPO = """
GRPOConfig(importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4, use_peft=True,
           model_name_or_path="m", lora_target_modules="q_proj, v_proj")
"""


@pytest.mark.parametrize("high_first", [False, True])
def test_ratios_of_sequences_in_trl_are_gspo_with_both_sides_of_the_clip(tmp_path, high_first):
    text = TRL_GSPO
    if high_first:
        text = text.replace("epsilon=3e-4, epsilon_high=4e-4", "epsilon_high=4e-4, epsilon=3e-4")
    _, ours = imported(tmp_path, "train.py", text)
    assert ours["recipe"] == ["gspo"]
    assert ours["algorithm"]["policy_loss"] == {"low": 3e-4, "high": 4e-4}


def test_what_is_refused_takes_nothing_else_away(tmp_path):
    made, ours = imported(tmp_path, "train.py", TRL_GSPO)
    assert "lora_target_modules" in made.differs and ours["policy"]["adapter"] == {"type": "lora"}


def test_shares_of_steps_and_scores_without_an_rl_stage(tmp_path):
    text = "OnlineDPOConfig(warmup_steps=0.1, missing_eos_penalty=1.0, learning_rate=5e-7)\n"
    made, ours = imported(tmp_path, "online_dpo.py", text)
    assert ours["preference"] == {"warmup_ratio": 0.1, "lr": 5e-7} and made.refusal is None
    assert made.differs["missing_eos_penalty"] == "It is of RL stages, and online_dpo is none."


def test_the_length_of_prompt_and_answer_together_is_none_of_ours(tmp_path):
    text = "python -m openrlhf.cli.train_ppo_ray --data.max_len 2048 --actor.adam.lr 1e-6\n"
    made, ours = imported(tmp_path, "train_ppo.sh", text)
    assert "max_response_tokens" not in ours.get("data", {})
    assert made.differs["data.max_len"].startswith("It bounds prompt and answer together")
