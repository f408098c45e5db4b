"""Configs: what is said of mistakes, and where values come from. `make` in the tables below is the whole file."""

import math

import pytest

from quartet.algorithms.correction import (
    Masked,
    NoCorrection,
    SequenceTruncated,
    Truncated,
)
from quartet.algorithms.kl import KLInLoss, KLInReward
from quartet.algorithms.policy_loss import Clip
from quartet.algorithms.preference import PREFERENCES
from quartet.algorithms.presets import ALGORITHMS
from quartet.algorithms.rewards import ClipScore
from quartet.config.toml import ConfigError, preset_toml, read_settings, resolved_toml
from quartet.recipes import recipe_names, recipe_path, template_names, template_path
from tests.support.world import write_lines

HEAD = 'recipe = "ppo"\n[policy]\nmodel = "m"\n[[reward]]\ntype = "model"\nmodel = "rm"\n[data]\ntrain = "p.jsonl"\n'


def settings(tmp_path, text=HEAD, *words):
    return read_settings(write_lines(tmp_path / "run.toml", text), words, "run.toml")


def refusal(tmp_path, text, *words):
    with pytest.raises(ConfigError) as error:
        settings(tmp_path, text, *words)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (HEAD + "[optim]\nlearnig_rate = 1e-6", "run.toml:10: optim.learnig_rate: no such key. Did you mean optim.lr?"),
        (HEAD + "[optim]\nmini_batches = 2", "run.toml:10: optim.mini_batches: no such key. Did you mean optim.minibatches?"),
        (HEAD + "[rollout]\nmax_tokens = 2", "run.toml:10: rollout.max_tokens: no such key. Did you mean rollout.max_new_tokens?"),
        (HEAD + "temprature = 3", "run.toml:9: data.temprature: no such key. Did you mean rollout.temperature?"),
        (HEAD + "[optmi]\nlr = 1", "run.toml:10: optmi: no such key. Did you mean optim?"),
        (
            HEAD + "[algorithm]\nkl = { coef = -5 }",
            "run.toml:10: algorithm.kl.coef = -5: must be ≥ 0. It multiplies a penalty; a negative value rewards leaving the "
            "reference model. Typical: 0.01 to 0.2.",
        ),
        (HEAD + '[optim]\nlr = "1e-6"', 'run.toml:10: optim.lr = "1e-6" is text. Write lr = 1e-6, without quotes.'),
        (HEAD + "[optim]\nepochs = 1.5", "run.toml:10: optim.epochs = 1.5: must be a whole number."),
        (HEAD + "[optim]\nlr = true", "run.toml:10: optim.lr = true: must be a number."),
        (HEAD + '[algorithm]\nkl = { type = "in_rewrd" }', "not one of none, in_reward, in_loss. Did you mean in_reward?"),
        (HEAD + '[algorithm]\npreset = "pop"', 'run.toml:10: algorithm.preset = "pop": no such preset. Did you mean ppo?'),
        (HEAD + '[algorithm]\npreset = "grpo"', 'algorithm.preset = "grpo", but the recipe says "ppo". Make them the same.'),
        (HEAD + '[algorithm.advantage]\ntype = "gae"\nlam = 1.5', "algorithm.advantage.lam = 1.5: must be ≤ 1."),
        ('recipe = "pppo"\n' + HEAD[15:], 'run.toml:1: recipe: "pppo" is no stage. Did you mean ppo? Known are sft, label, reward_model'),
        ('recipe = "reviews"\n' + HEAD[15:], 'run.toml:1: recipe: "reviews" is no stage, but a recipe that ships with Quartet: quartet init reviews writes its file.'),
        ('recipe = ["ppo", "sft"]\n' + HEAD[15:], "recipe: ppo, sft: stages run in the order sft, label, reward_model, one RL, preference, ilql or custom stage, evaluation, each at most once, such as [\"sft\", \"ppo\"]."),
        ('recipe = ["sft", "evaluation"]\n' + HEAD[15:], "evaluation compares an RL, preference, ilql or custom stage's policy"),
        ("recipe = []\n" + HEAD[15:], "recipe: is empty."),
        (HEAD[15:], "recipe: is missing."),
        (HEAD.replace('model = "m"\n', ""), "policy.model: name a folder or hub id, or describe a new model in policy.create"),
        (HEAD.replace('train = "p.jsonl"\n', ""), "data.train: name a file, or an embedded world in data.world"),
        (HEAD.replace('model = "rm"\n', ""), "reward.model: name the reward model's folder, or put reward_model before ppo"),
        ('recipe = "ppo"\n[policy]\nmodel = "m"\n[data]\ntrain = "p"', "reward: ppo needs one."),
        (HEAD.replace('"ppo"', '"grpo"'), "rollout.samples_per_prompt = 1: grpo compares several answers to one prompt, so it must be ≥ 2"),
        (HEAD + "[optim]\nminibatches = 65", "run.toml:10: optim.minibatches = 65: a step has only 64 responses."),
        (HEAD.replace('"model"\nmodel = "rm"', '"gold"'), 'reward.type: "gold" is known in an embedded world only.'),
        (HEAD.replace('"model"\nmodel = "rm"', '"exact"') + '[critic]\ninit = "reward_model"', "there is no reward model here"),
        (HEAD.replace('model = "m"', "create = {}"), "policy.tokenizer: a new model needs one."),
        (HEAD.replace('model = "m"', "create = { hidden_size = 30 }"), "hidden_size = 30 is not a multiple of num_heads = 4"),
        (HEAD.replace('"ppo"', '"sft"') + "[algorithm]\nkl = { coef = 1 }", "the recipe (sft) has no RL stage that would read it"),
        (HEAD + "[algorithm]\nkl = 3", "run.toml:10: algorithm.kl = 3: must be a table."),
        (HEAD + "[algorithm.scores.3]\nlimit = 1", "algorithm.scores.3: scores has 1 parts, counted from 0."),
        (HEAD + "[run\nsteps = 1", "run.toml:9: not TOML:"),
        (HEAD + '[algorithm]\nvalue_loss = { type = "none" }', 'run.toml:10: algorithm: advantage.type = "gae" uses a critic, and no value_loss trains it.'),
        (HEAD + '[algorithm]\nadvantage = { type = "leave_one_out" }', 'value_loss.type = "clipped" trains a critic that advantage.type = "leave_one_out" never reads.'),
        (HEAD + '[algorithm]\nrewards = { type = "every_token" }', 'scores: shape the score of a response, and rewards.type = "every_token" does not read it. Use scores = [].'),
        (HEAD + '[algorithm]\ngroups = { type = "dynamic_sampling" }', "drops groups of equal scores"),
        (HEAD + '[algorithm]\nkl = { type = "in_loss", estimator = "k2", weight = "token" }', 'kl.weight = "token" corrects k1, k3 and exact only'),
        (HEAD.replace('"model"\nmodel = "rm"', '"exact"') + '[algorithm]\nscores = []\nrewards = { type = "every_token" }', 'the reward exact gives one per response'),
        (HEAD + '[[algorithm.scores]]\ntype = "clip"\nlimit = -1', "run.toml:11: algorithm.scores.0.limit = -1: must be > 0."),
        (HEAD.replace('"ppo"', '"rloo"'), "rollout.samples_per_prompt = 1: rloo compares several answers"),
        (HEAD.replace('"ppo"', '["dpo", "ppo"]'), "one RL, preference, ilql or custom stage"),
        (HEAD.replace('"ppo"', '"dpo"') + "[preference.loss]\nbta = 1", "preference.loss.bta: no such key. Did you mean preference.loss.beta?"),
        (HEAD.replace('"ppo"', '"online_dpo"').replace('[[reward]]\ntype = "model"\nmodel = "rm"\n', ""), "reward: online_dpo needs one."),
        ('recipe = ["dpo", "evaluation"]\n[policy]\nmodel = "m"\n[data]\ntrain = "p"', "evaluation needs a [[reward]] or a world"),
    ],
)  # fmt: skip
def test_mistakes_get_one_sentence_with_their_place(tmp_path, text, sentence):
    said = refusal(tmp_path, text)
    assert sentence in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("optim.lrr=1", "command line: optim.lrr: no such key. Did you mean optim.lr?"),
        ("optim.lr=-1", "command line: optim.lr = -1: must be > 0."),
        (
            "nonsense",
            '"nonsense": not understood. Settings are written key=value, such as optim.lr=1e-5.',
        ),
        ("seed=9223372036854775808", "seed = 9223372036854775808: must be ≤ 9.22337e+18"),
        ("seed.x=1", "command line: seed = { x = 1 }: must be a whole number."),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, word, sentence):
    assert sentence in refusal(tmp_path, HEAD + "[run]\nsteps = 1", word)


@pytest.mark.parametrize(
    ("text", "words", "sentence"),
    [
        (
            HEAD + "[sft]\nlr = 1e-3",
            [],
            "run.toml:10: sft.lr: no stage of this recipe reads it (ppo). Take it out.",
        ),
        (
            HEAD,
            ["preference.steps=3"],
            "command line: preference.steps: no stage of this recipe reads it (ppo). Take it out.",
        ),
        (
            'recipe = "sft"\n[policy]\nmodel = "m"\n[data]\ntrain = "d.jsonl"\n[run]\nsteps = 3',
            [],
            "run.toml:7: run.steps: no stage of this recipe reads it (sft). Take it out.",
        ),
        (
            'recipe = "sft"\n[policy]\nmodel = "m"\n[data]\ntrain = "d.jsonl"\n[algorithm.kl]\ncoef = 3',
            [],
            "run.toml:7: algorithm: the recipe (sft) has no RL stage that would read it.",
        ),
        (
            HEAD.replace('"ppo"', '"ppoo"') + "[algorithm]\nkl = { coef = 0.1 }",
            [],
            'run.toml:1: recipe: "ppoo" is no stage. Did you mean ppo? Known are sft, label, reward_model, ilql, custom, evaluation, and what '
            "`quartet algorithms` lists.",
        ),
        (
            HEAD,
            ["recipe=sft", "data.sampling=pass_rate"],
            "command line: data.sampling: no stage of this recipe reads it (sft). Take it out.",
        ),
        (
            HEAD,
            ["recipe=sft", "run.steps=3"],
            "command line: run.steps: no stage of this recipe reads it (sft). Take it out.",
        ),
        (HEAD, ["optim.lr=abc"], 'command line: optim.lr = "abc": must be a number.'),
    ],
)
def test_what_nobody_reads_is_refused(tmp_path, text, words, sentence):
    assert refusal(tmp_path, text, *words) == sentence


def test_a_recipe_cut_short_on_the_command_line_leaves_its_settings_unread(tmp_path):
    of_others = ["reward=[]", "rollout.max_new_tokens=8"]
    made = settings(tmp_path, HEAD + "[run]\nsteps = 3", 'recipe="sft"', *of_others)
    assert made.config.recipe == ("sft",)
    assert "[rollout]" not in resolved_toml(made) and "steps = 3" not in resolved_toml(made)
    assert "[optim]\nmicro_batch_tokens" in resolved_toml(made)


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_settings(tmp_path / "none.toml")


def test_every_value_knows_its_origin(tmp_path):
    made = settings(
        tmp_path,
        HEAD + "[algorithm]\nkl = { coef = 0.2 }\n[optim]\nlr = 1e-5",
        "optim.epochs=2",
        "algorithm.kl.coef=0.3",
    )
    lines = resolved_toml(made).splitlines()
    for line in (
        "lr = 1e-05  # run.toml:12",
        "epochs = 2  # command line",
        "coef = 0.3  # command line",
        "lam = 0.95  # preset ppo",
        "minibatches = 1  # default",
    ):
        assert line in lines
    assert made.config.algorithm.kl == KLInReward(coef=0.3)


def test_the_resolved_file_gives_the_same_run_again(tmp_path):
    needed = {
        "dialogue": ["data.train=x.jsonl", "policy.model=m"],
        "film-reviews": ["data.texts=x.jsonl", "policy.model=m"],
    }
    for name in recipe_names():
        words = needed.get(name, [])
        first = read_settings(recipe_path(name), words)
        (tmp_path / "again.toml").write_text(resolved_toml(first))
        assert read_settings(tmp_path / "again.toml").config == first.config


def test_a_model_on_the_command_line_replaces_the_one_that_a_file_creates():
    policy = read_settings(recipe_path("reviews"), ["policy.model=m"]).config.policy
    assert policy.model == "m" and policy.create is None and policy.tokenizer is None
    with pytest.raises(ConfigError, match="exactly one"):
        read_settings(recipe_path("reviews"), ["policy.model=m", "policy.create.num_layers=2"])


def test_none_on_the_command_line_takes_a_setting_away():
    words = ["data.train=x.jsonl", "policy.model=m", "data.eval=y.jsonl"]
    given = read_settings(recipe_path("dialogue"), words).config
    assert given.policy.adapter.rank == 16 and given.data.eval == "y.jsonl"
    words += ["policy.adapter=none", 'data.eval="none"', "critic.init=none"]
    left = read_settings(recipe_path("dialogue"), words)
    assert left.config.policy.adapter is None and left.config.data.eval is None
    assert not any(key.startswith(("policy.adapter", "data.eval")) for key in left.origins)
    words.append("policy.adapter.rank=4")  # later words count
    assert read_settings(recipe_path("dialogue"), words).config.policy.adapter.rank == 4


@pytest.mark.parametrize("word", ["optim.lr=none", "rollout.max_new_tokens=none"])
def test_none_is_no_value_of_a_setting_that_always_has_one(word):
    words = ["data.train=x.jsonl", "policy.model=m", word]
    with pytest.raises(ConfigError, match='= "none": must be a'):
        read_settings(recipe_path("dialogue"), words)


def test_a_part_of_another_type_starts_from_its_own_defaults(tmp_path):
    made = settings(tmp_path, HEAD + '[algorithm]\nkl = { type = "in_loss" }')
    assert made.config.algorithm.kl == KLInLoss()


def test_infinity_turns_a_clip_off(tmp_path):
    made = settings(tmp_path, HEAD + "[algorithm]\nvalue_loss = { clip = inf }")
    assert math.isinf(made.config.algorithm.value_loss.clip)


def test_a_reward_model_stage_provides_the_reward(tmp_path):
    text = 'recipe = ["reward_model", "ppo"]\n[policy]\nmodel = "m"\n[data]\ntrain = "p.jsonl"'
    assert settings(tmp_path, text).config.reward_model_source is not None


@pytest.mark.parametrize("name", template_names())
def test_what_init_writes_is_valid_and_short(name):
    path = template_path(name)
    assert read_settings(path).config.recipe == (name,)
    assert 15 <= len(path.read_text().splitlines()) <= 35


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_what_the_command_prints_recreates_the_preset(tmp_path, name):
    """The record as TOML, under the name of another preset with the same needs: nothing is left to the preset."""
    algorithm = ALGORITHMS[name]
    head = HEAD.replace('"ppo"', '"ppo"' if algorithm.needs_critic else '"rloo"')
    words = ["rollout.samples_per_prompt=4"]
    words += ["reference.model=teacher"] if algorithm.needs_teacher else []
    made = settings(tmp_path, head + preset_toml(algorithm), *words)
    assert made.config.algorithm == algorithm


@pytest.mark.parametrize("name", sorted(PREFERENCES))
def test_a_preference_stage_has_the_loss_of_its_name(tmp_path, name):
    head = (
        HEAD
        if name == "online_dpo"
        else HEAD.replace('[[reward]]\ntype = "model"\nmodel = "rm"\n', "")
    )
    made = settings(tmp_path, head.replace('"ppo"', f'"{name}"'))
    assert made.config.preference.loss == PREFERENCES[name]
    assert made.config.preference_stage == name and made.config.rl_stage is None


def test_a_part_can_be_replaced_from_the_command_line(tmp_path):
    made = settings(
        tmp_path,
        HEAD,
        "algorithm.kl.type=in_loss",
        "algorithm.scores.0.limit=3",
        "algorithm.policy_loss.high=0.3",
    )
    assert made.config.algorithm.kl == KLInLoss()
    assert made.config.algorithm.scores == (ClipScore(limit=3),)
    assert made.config.algorithm.policy_loss == Clip(high=0.3)
    assert made.origins["algorithm.scores.0.limit"] == "command line"


SERVED = "generator={type='vllm', urls=['http://127.0.0.1:8000']}"


@pytest.mark.parametrize(
    ("words", "correction", "origin"),
    [
        ([], NoCorrection(), "preset ppo"),
        ([SERVED], Truncated(), "default with servers"),
        ([SERVED, "recipe=gspo", "rollout.samples_per_prompt=2"], SequenceTruncated(), "default with servers"),
        ([SERVED, "algorithm.policy_loss={type='sequence_clip', ratio='product'}"], SequenceTruncated(ratio="product"), "default with servers"),
        ([SERVED, "recipe=trpo"], Truncated(), "default with servers"),
        ([SERVED, "algorithm.policy_loss={type='gmpo'}"], SequenceTruncated(), "default with servers"),
        ([SERVED, "algorithm.correction={type='none'}"], NoCorrection(), "command line"),
        ([SERVED, "algorithm.correction={cap=3.0}"], Truncated(cap=3.0), "default with servers"),
        ([SERVED, "algorithm.correction={type='masked'}"], Masked(), "command line"),
    ],
)  # fmt: skip
def test_what_servers_sample_is_corrected_unless_the_file_says_otherwise(
    tmp_path, words, correction, origin
):
    made = settings(tmp_path, HEAD, *words)
    assert made.config.algorithm.correction == correction
    assert made.origins["algorithm.correction.type"] == origin
    (tmp_path / "resolved.toml").write_text(text := resolved_toml(made))
    assert f'type = "{correction.type}"  # {origin}' in text
    assert read_settings(tmp_path / "resolved.toml").config == made.config
