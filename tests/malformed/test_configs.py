"""A run's file and the words of the command line: syntax, keys, types, ranges, and what does not go together."""

import pytest

from quartet.config.toml import ConfigError, read_settings
from tests.malformed.saying import refusal

REST = (
    '[policy]\nmodel = "m"\n[[reward]]\ntype = "model"\nmodel = "rm"\n[data]\ntrain = "p.jsonl"\n'
)
PPO = 'recipe = "ppo"\n' + REST
SFT = 'recipe = "sft"\n[policy]\nmodel = "m"\n[data]\ntrain = "p.jsonl"\n'
DPO = SFT.replace("sft", "dpo")
EXACT = PPO.replace('type = "model"\nmodel = "rm"', 'type = "exact"')
GRPO = EXACT.replace('"ppo"', '"grpo"') + "[rollout]\nsamples_per_prompt = 2\n"


def rewarded(table):
    return PPO.replace('type = "model"\nmodel = "rm"', table)


def made(table):
    """With a new model in the place of a folder."""
    return PPO.replace('model = "m"', table + '\ntokenizer = "t"')


def said_of(tmp_path, content, *words):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "run.toml").write_bytes(data)
    return refusal(ConfigError, lambda: read_settings(tmp_path / "run.toml", words, "run.toml"))


SYNTAX = {
    "text without quotes": ("recipe = ppo\n", ":1: not TOML: … (column 10). Write text in quotes."),
    "yaml": ('recipe: "ppo"\n', ":1: not TOML: … (column 7). Settings are written key = value."),
    "yaml document": ("---\nrecipe: ppo\n", ":1: not TOML: … (column 4). Settings are written key = value."),
    "json": ('{"recipe": "ppo"}\n', ":1: not TOML: … (column 1)."),
    "open text": ('recipe = "ppo\n', ":1: not TOML: … (column 14). Is a quote or a bracket missing?"),
    "open single quotes": ("recipe = 'ppo\n", ":1: not TOML: "),
    "open list": ('recipe = ["ppo"\n', ":1: not TOML: "),
    "open header": (PPO + "[optim\nlr = 1\n", ":9: not TOML: … (column 7). Is a quote or a bracket missing?"),
    "open table": (PPO + "[algorithm]\nkl = { coef = 1\n}\n", ":10: not TOML: … (column 16). Is a quote or a bracket missing?"),
    "a key twice": (PPO + 'train = "q.jsonl"\n', ":9: train is there twice in its table. Keep one of the two lines."),
    "a key of a table twice": (PPO + "[optim]\nlr = 1e-5\nlr = 1e-6\n", ":11: lr is there twice in its table. Keep one of the two lines."),
    "a table twice": (PPO + "[data]\nrows = 3\n", ":9: the table data is there twice. Put its keys under one header."),
    "a table in a table twice": (PPO + "[policy.create]\n[policy.create]\n", ":10: the table policy.create is there twice. Put its keys under one header."),
    "comma for a point": (PPO + "[optim]\nlr = 1,5\n", ":10: not TOML: … (column 7). Write numbers with a point."),
    "a number that begins with a point": (PPO + "[optim]\nlr = .5\n", ":10: not TOML: … (column 6). Write a 0 before the point."),
    "half a number": (PPO + "[optim]\nlr = 1e\n", ":10: not TOML: … (column 7)."),
    "no value": (PPO + "[optim]\nlr =\n", ":10: not TOML: … (column 5). Give a value, or leave the line out for the default."),
    "leading zero": (PPO + "[optim]\nepochs = 01\n", ":10: not TOML: … (column 11)."),
    "Python's True": (PPO + "[rollout]\ntop_k = True\n", ":10: not TOML: … (column 9). Write true and false in lower case."),
    "Python's None": (PPO + "[optim]\nlr = None\n", ":10: not TOML: … (column 6). TOML has no empty value: leave the line out for the default."),
    "unknown escape": ('recipe = "\\d"\n', ":1: not TOML: "),
    "half a surrogate pair": ('recipe = "\\ud800"\n', ":1: not TOML: "),
    "a NUL": ('recipe = "ppo"\x00\n', ":1: not TOML: … (column 15)."),
    "a zip file": (b"PK\x03\x04\x00", ":1: not TOML: "),
}  # fmt: skip


@pytest.mark.parametrize(("content", "sentence"), SYNTAX.values(), ids=SYNTAX)
def test_what_is_not_toml_is_said_with_its_place_and_a_remedy(tmp_path, content, sentence):
    """What stands for … are the words of Python's parser."""
    place, _, rest = sentence.partition("…")
    said = said_of(tmp_path, content)
    assert said.startswith(f"run.toml{place}") and said.endswith(rest)


FILES = {
    "empty": (
        b"",
        'run.toml: recipe: is missing. The stages of the run in order, such as ["sft", "reward_model", "ppo"]. '
        "Of label, reward_model and an RL stage there may be several rounds.",
    ),
    "only comments": (
        b"\n\n# nothing yet\n",
        'run.toml: recipe: is missing. The stages of the run in order, such as ["sft", "reward_model", "ppo"]. '
        "Of label, reward_model and an RL stage there may be several rounds.",
    ),
    "random bytes": (
        b"\x00\x01\xff\xfe",
        "run.toml:1: not UTF-8 text (byte 2 of the file). Save it as UTF-8.",
    ),
    "utf-16": (
        'recipe = "ppo"\n'.encode("utf-16"),
        "run.toml:1: not UTF-8 text (byte 0 of the file). It looks like UTF-16. Save it as UTF-8.",
    ),
    "latin-1": (
        PPO.encode() + b'[run]\nname = "\xe9"\n',
        "run.toml:10: not UTF-8 text (byte 114 of the file). Save it as UTF-8.",
    ),
}


@pytest.mark.parametrize(("content", "sentence"), FILES.values(), ids=FILES)
def test_files_that_are_no_config(tmp_path, content, sentence):
    assert said_of(tmp_path, content) == sentence


def test_a_link_to_nowhere_is_no_file(tmp_path):
    (tmp_path / "run.toml").symlink_to(tmp_path / "gone.toml")
    assert (
        refusal(ConfigError, lambda: read_settings(tmp_path / "run.toml", (), "run.toml"))
        == "run.toml: no such file."
    )


UNKNOWN = {
    "top": ('reciep = "ppo"\n' + REST, "run.toml:1: reciep: no such key. Did you mean recipe?"),
    "spaces": ('"a b" = 1\n' + PPO, "run.toml:1: a b: no such key. The top level has algorithm, critic, custom, data"),
    "in a part": (PPO + "[algorithm.kl]\ncof = 1\n", "run.toml:10: algorithm.kl.cof: no such key. Did you mean algorithm.kl.coef?"),
    "another library's word": (PPO + "[rollout]\nnum_generations = 4\n", "no such key. Did you mean rollout.samples_per_prompt?"),
    "another table's word": (PPO + "[optim]\nbatch_size = 3\n", "optim.batch_size: no such key. Did you mean rollout.prompts_per_step?"),
    "in a shape": (made("create = { hiden_size = 32 }"), "run.toml:3: policy.create.hiden_size: no such key. Did you mean policy.create.hidden_size?"),
    "in an adapter": (PPO.replace('"m"', '"m"\nadapter = { type = "lora", r = 3 }'), "run.toml:4: policy.adapter.r: no such key. Did you mean policy.adapter.rank?"),
    "a part that is none": (PPO + "[algorithm.kl]\ntarget = 6\n", "algorithm.kl.target: no such key. Did you mean algorithm.kl.controller.target?"),
    "a dotted key in a table": (PPO + 'policy.model = "x"\n', "run.toml:9: data.policy.model: no such key. Did you mean policy.model? [data] has no keys of other tables."),
}  # fmt: skip


@pytest.mark.parametrize(("text", "sentence"), UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_keys_are_said_with_what_was_meant(tmp_path, text, sentence):
    assert sentence in said_of(tmp_path, text)


TYPES = {
    "a list for a number": (PPO + "[optim]\nlr = [1e-5]\n", "run.toml:10: optim.lr = [1e-05]: must be a number."),
    "a table for a number": (PPO + "[optim]\nlr = {}\n", "run.toml:10: optim.lr = {}: must be a number."),
    "a date for a number": (PPO + "[optim]\nlr = 2020-01-01\n", 'run.toml:10: optim.lr = "2020-01-01": must be a number.'),
    "16.0 tokens": (PPO + "[rollout]\nmax_new_tokens = 16.0\n", "run.toml:10: rollout.max_new_tokens = 16.0: must be a whole number."),
    "a seed in quotes": ('seed = "0"\n' + PPO, 'run.toml:1: seed = "0" is text. Write seed = 0, without quotes.'),
    "a seed that is true": ("seed = true\n" + PPO, "run.toml:1: seed = true: must be a whole number."),
    "a number for a file": (PPO.replace('"p.jsonl"', "3"), "run.toml:8: data.train = 3: must be text."),
    "a number among files": (PPO.replace('"p.jsonl"', '["a", 3]'), 'run.toml:8: data.train = ["a", 3]: must be text.'),
    "a number for a table": ("optim = 3\n" + PPO, "run.toml:1: optim = 3: must be a table."),
    "a list for a table": ("optim = []\n" + PPO, "run.toml:1: optim = []: must be a table."),
    "a text for a table": ('recipe = "ppo"\ndata = "p.jsonl"\n', 'run.toml:2: data = "p.jsonl": must be a table.'),
    "tables for a table": ('recipe = "ppo"\n[[policy]]\nmodel = "m"\n', 'policy = [{ model = "m" }]: must be a table.'),
    "a recipe that is true": ("recipe = true\n" + REST, "run.toml:1: recipe = true: must be a list."),
    "a recipe of numbers": ("recipe = [3]\n" + REST, "run.toml:1: recipe.0 = 3: must be text."),
    "a reward that is text": ('recipe = "ppo"\nreward = "gold"\n', 'run.toml:2: reward = "gold": must be a list.'),
    "rewards that are texts": ('recipe = "ppo"\nreward = ["exact"]\n', 'run.toml:2: reward.0 = "exact": must be a table.'),
    "an algorithm that is text": ('algorithm = "ppo"\n' + PPO, "algorithm: is a table. Write [algorithm] and its keys below."),
    "a loss that is text": (DPO + '[preference]\nloss = "dpo"\n', 'run.toml:7: preference.loss = "dpo": must be a table, such as loss = { type = "dpo" }.'),
    "columns in a list": (PPO + 'columns = ["a"]\n', 'run.toml:9: data.columns = ["a"]: must be a table.'),
    "a column that is a number": (PPO + "columns = { prompt = 3 }\n", "run.toml:9: data.columns.prompt = 3: must be text."),
    "one weight": (PPO + "weights = 3\n", "run.toml:9: data.weights = 3: must be a list."),
    "an adapter that is text": (PPO.replace('"m"', '"m"\nadapter = "lora"'), 'run.toml:4: policy.adapter = "lora": must be a table, such as adapter = { type = "lora" }.'),
    "a shape that is text": (made('create = "llama"'), 'run.toml:3: policy.create = "llama": must be a table, such as create = { type = "llama" }.'),
    "a precision that there is not": (PPO + '[run]\nprecision = "fp8"\n', 'run.toml:10: run.precision = "fp8": not one of auto, fp32, bf16.'),
    "several lines of text": (PPO + '[optim]\nlr = """\nabc\n"""\n', 'run.toml:10: optim.lr = "abc\\n": must be a number.'),
}  # fmt: skip


@pytest.mark.parametrize(("text", "sentence"), TYPES.values(), ids=TYPES)
def test_wrong_types_are_said_with_the_right_one(tmp_path, text, sentence):
    assert sentence in said_of(tmp_path, text)


RANGES = {
    "optim.lr=0": "optim.lr = 0: must be > 0. The actor's highest learning rate.",
    "optim.lr=nan": "optim.lr = nan: must be a finite number.",
    "optim.lr=-inf": "optim.lr = -inf: must be a finite number.",
    "optim.lr=1e-400": "optim.lr = 0.0: must be > 0.",
    "optim.epochs=0": "optim.epochs = 0: must be ≥ 1. Passes over the experience of one step.",
    "optim.micro_batch_tokens=0": "optim.micro_batch_tokens = 0: must be ≥ 1. Tokens per forward pass",
    "optim.max_grad_norm=nan": "optim.max_grad_norm = nan: must be > 0. Longer gradients are scaled down to this",
    "optim.weight_decay=-1": "optim.weight_decay = -1: must be ≥ 0.",
    "optim.warmup_steps=-1": "optim.warmup_steps = -1: must be ≥ 0.",
    "rollout.temperature=0": "rollout.temperature = 0: must be > 0. Logits are divided by it. PPO samples, so it is never 0.",
    "rollout.top_p=1.5": "rollout.top_p = 1.5: must be ≤ 1. Keep the most probable tokens of this mass.",
    "rollout.top_p=nan": "rollout.top_p = nan: must be a finite number.",
    "rollout.top_k=-1": "rollout.top_k = -1: must be ≥ 0. Keep the k most probable tokens; 0 keeps all.",
    "rollout.samples_per_prompt=0": "rollout.samples_per_prompt = 0: must be ≥ 1.",
    "data.held_out=1": "data.held_out = 1: must be < 1. The share of data.train that is held out",
    "data.held_out=nan": "data.held_out = nan: must be a finite number.",
    "run.steps=-5": "run.steps = -5: must be ≥ 1. How many RL steps the run takes.",
    "run.steps=1e3": "run.steps = 1000.0: must be a whole number.",
    "run.steps=ten": 'run.steps = "ten": must be a whole number.',
    "run.max_minutes=nan": "run.max_minutes = nan: must be a finite number.",
    "run.keep_last=0": "run.keep_last = 0: must be ≥ 1. How many of the newest checkpoints are kept",
    "algorithm.kl.coef=nan": "algorithm.kl.coef = nan: must be a finite number.",
    "algorithm.advantage.gamma=2": "algorithm.advantage.gamma = 2: must be ≤ 1. The discount of later rewards.",
    "algorithm.policy_loss.low=1.5": "algorithm.policy_loss.low = 1.5: must be < 1. Ratios below 1 − low are clipped.",
    "algorithm.value_loss.coef=-1": "algorithm.value_loss.coef = -1: must be > 0.",
    "algorithm.entropy.coef=-1": "algorithm.entropy.coef = -1: must be ≥ 0. A negative value would reward certainty.",
    "policy.adapter.rank=0": "policy.adapter.rank = 0: must be ≥ 1.",
    "policy.adapter.alpha=nan": "policy.adapter.alpha = nan: must be a finite number.",
    "evaluation.prompts=1": "evaluation.prompts = 1: must be ≥ 2.",
    "optim.schedule=linaer": 'optim.schedule = "linaer": not one of linear, cosine, constant. Did you mean linear?',
    "data.world=review": 'data.world = "review": not one of reviews, sums, guess, labelled_texts. Did you mean reviews?',
    "data.unusable=ignore": 'data.unusable = "ignore": not one of refuse, drop.',
    "critic.type=seperate": 'critic.type = "seperate": not one of separate, shared. Did you mean separate?',
    "policy.adapter.type=dora": 'policy.adapter.type = "dora": not one of lora. Did you mean lora?',
    'run.track=["wadb"]': 'run.track.0 = "wadb": not one of tensorboard, wandb, trackio, mlflow. Did you mean wandb?',
    "algorithm.policy_loss.type=clipp": "Did you mean clip?",
    "algorithm.kl.estimator=k4": 'algorithm.kl.estimator = "k4": not one of k1, k2, k3, abs, squared, exact.',
    "policy.gradient_checkpointing=yes": 'policy.gradient_checkpointing = "yes": must be true or false.',
}


@pytest.mark.parametrize("word", RANGES)
def test_values_out_of_range_are_said_with_the_range(tmp_path, word):
    said = said_of(tmp_path, PPO, word)
    assert said.startswith("command line: ") and RANGES[word] in said


WORDS = {
    "optim.lr": '"optim.lr": not understood. Settings are written key=value, such as optim.lr=1e-5.',
    "=1": '"=1": not understood.',
    "optim/lr=1": '"optim/lr=1": not understood.',
    "--lr=1": '"--lr=1": not understood.',
    "optim.lr =1": '"optim.lr =1": not understood.',
    "[optim]=3": '"[optim]=3": not understood.',
    "reward.-1.weight=1": '"reward.-1.weight=1": not understood.',
    "optim.lr=": 'command line: optim.lr = "": must be a number.',
    "optim.lr==1": 'command line: optim.lr = "=1": must be a number.',
    "optim.lr=1e-5 optim.epochs=2": 'command line: optim.lr = "1e-5 optim.epochs=2": must be a number.',
    "seed=": 'command line: seed = "": must be a whole number.',
    'optim.lr="1e-5"': 'command line: optim.lr = "1e-5" is text. Write lr = 1e-5, without quotes.',
    "optim={ lr = 1 ": 'command line: optim = "{ lr = 1 ": must be a table.',
    "optim.lr.x=1": "command line: optim.lr = { x = 1 }: must be a number.",
    "policy=m": 'command line: policy = "m": must be a table.',
    "policy.model.x=1": "policy.model.x: policy.model is a value, not a table.",
    "recipe.0=sft": "recipe.0: recipe is a value, not a table.",
    "reward.weight=1": "reward.weight: name one of the list by its number, such as reward.0.weight.",
    "recipe=sft,ppo": 'command line: recipe: "sft,ppo" is no stage. Did you mean sft?',
    "recipe=[sft,ppo]": 'command line: recipe: "[sft,ppo]" is no stage.',
    "reward=[]": "command line: reward: ppo needs one. Add [[reward]]",
    "algorithm.kl=in_loss": 'command line: algorithm.kl = "in_loss": must be a table, such as kl = { type = "in_loss" }.',
    "algorithm.preset=3": "command line: algorithm.preset = 3: no such preset. `quartet algorithms` lists them.",
    "é=1": "command line: é: no such key.",
    "data.columns.prompt.x=3": "command line: data.columns.prompt = { x = 3 }: must be text.",
}


@pytest.mark.parametrize("word", WORDS)
def test_words_that_cannot_be_understood(tmp_path, word):
    assert WORDS[word] in said_of(tmp_path, PPO, word)


ORDER = "stages run in the order sft, label, reward_model, one RL, preference, ilql or custom stage, evaluation, each at most once, such as "
TOGETHER = {
    "a stage twice": ('recipe = ["sft", "sft"]\n' + REST, 'recipe: sft, sft: ' + ORDER + '["sft"].'),
    "two RL stages": ('recipe = ["ppo", "grpo"]\n' + REST, 'recipe: ppo, grpo: ' + ORDER + '["ppo"].'),
    "evaluation first": ('recipe = ["evaluation", "ppo"]\n' + REST, 'recipe: evaluation, ppo: ' + ORDER + '["ppo", "evaluation"].'),
    "a reward model before SFT": ('recipe = ["reward_model", "sft", "ppo"]\n' + REST, 'recipe: reward_model, sft, ppo: ' + ORDER + '["sft", "reward_model", "ppo"].'),
    "evaluation alone": ('recipe = ["evaluation"]\n' + REST, "run.toml:1: recipe: evaluation compares an RL, preference, ilql or custom stage's policy"),
    "an empty name": ('recipe = ["sft", "", "ppo"]\n' + REST, 'run.toml:1: recipe: "" is no stage. Known are sft, label, reward_model'),
    "a stage misspelt": ('recipe = ["reward_modell", "ppo"]\n' + REST, 'recipe: "reward_modell" is no stage. Did you mean reward_model?'),
    "a world and a file": (PPO + 'world = "reviews"\n', "data.train: name a file, or an embedded world in data.world; exactly one of the two."),
    "a folder and a shape": (PPO.replace('"m"', '"m"\ncreate = {}'), "policy.model: name a folder or hub id, or describe a new model in policy.create; exactly one"),
    "KTO of one": (DPO.replace("dpo", "kto") + "[preference]\nbatch_size = 1\n", "run.toml:7: preference.batch_size = 1: KTO estimates the KL from answers under other prompts"),
    "a reward for DPO": (DPO + '[[reward]]\ntype = "exact"\n', "run.toml:7: reward.0.type: no stage of this recipe reads it (dpo). Take it out."),
    "a temperature for DPO": (DPO + "[rollout]\ntemperature = 1\n", "run.toml:7: rollout.temperature: no stage of this recipe reads it (dpo)."),
    "a preset for SFT": (SFT + '[algorithm]\npreset = "ppo"\n', "run.toml:7: algorithm: the recipe (sft) has no RL stage that would read it."),
    "a preference's name as preset": (PPO + '[algorithm]\npreset = "dpo"\n', 'run.toml:10: algorithm.preset = "dpo": no such preset.'),
    "weights of other files": (PPO + "weights = [1, 2]\n", "run.toml:9: data.weights = [1.0, 2.0]: needs one number ≥ 0 for each of 1 files in data.train."),
    "a weight of nothing": (PPO + "weights = [0]\n", "run.toml:9: data.weights = [0.0]: needs one number ≥ 0"),
    "heads that do not divide": (made("create = { num_heads = 3 }"), "run.toml:3: policy.create: hidden_size = 128 is not a multiple of num_heads = 3"),
    "an architecture that is not made": (made('create = { type = "mamba" }'), 'policy.create.type = "mamba": not one of llama, qwen2, gpt2.'),
    "a model too short": (made("create = { max_length = 64 }"), "policy.create.max_length = 64: too short for data.max_prompt_tokens = 512 and rollout.max_new_tokens = 64"),
    "all layers frozen": (made("create = { max_length = 4096 }\nfrozen_layers = 4"), "run.toml:4: policy.frozen_layers = 4: the model has 4 layers."),
    "an adapter and frozen layers": (PPO.replace('"m"', '"m"\nadapter = { type = "lora" }\nfrozen_layers = 1'), "policy.frozen_layers: an adapter freezes all layers already. Take one of the two out."),
    "comparisons of sums": (PPO.replace('train = "p.jsonl"', 'world = "sums"').replace('"ppo"', '["reward_model", "ppo"]'), "recipe: the world sums has no comparisons to train a reward model on"),
    "DPO on sums": (DPO.replace('train = "p.jsonl"', 'world = "sums"'), "recipe: the world sums has no comparisons to learn from; its answers are checked."),
    "PTX in a trust region": (PPO + '[algorithm]\nupdate = { type = "trust_region" }\nptx = { coef = 1.0 }\n', 'algorithm.ptx: is not mixed into update.type = "trust_region". Use "first_order".'),
    "a trust region without critic": (GRPO + '[algorithm]\nupdate = { type = "trust_region" }\n', 'is written for algorithms with a critic, and advantage.type = "group_mean" has none.'),
    "a warm-up of no critic": (GRPO + "[optim]\ncritic_warmup_steps = 3\n", "run.toml:11: optim.critic_warmup_steps = 3: grpo has no critic."),
    "a critic from no reward model": (EXACT + '[critic]\ninit = "reward_model"\n', 'critic.init = "reward_model": there is no reward model here. Use "policy" or a folder.'),
    "a turn too few": (PPO + '[environment]\nfunction = "x.py:X"\nmax_turns = 0\n', "run.toml:11: environment.max_turns = 0: must be ≥ 1. Turns of the policy in one episode."),
}  # fmt: skip


@pytest.mark.parametrize(("text", "sentence"), TOGETHER.values(), ids=TOGETHER)
def test_what_does_not_go_together(tmp_path, text, sentence):
    assert sentence in said_of(tmp_path, text)


REWARDS = {
    "no type": ("weight = 1", "run.toml:5: reward.0: needs a type."),
    "a type that is a number": ("type = 3", "run.toml:5: reward.0.type = 3: not one of model, ensemble, function, exact"),
    "a function without function": ('type = "function"', "run.toml:5: reward.0.function: is missing. file.py:name, or package.module.name."),
    "a server without url": ('type = "server"', "run.toml:5: reward.0.url: is missing. http:// or https://, the whole address that is posted to."),
    "a server asked never": ('type = "server"\nurl = "http://h/"\ntries = 0', "run.toml:7: reward.0.tries = 0: must be ≥ 1."),
    "a server's other protocol": ('type = "server"\nurl = "http://h/"\nprotocol = "trl"', 'reward.0.protocol = "trl": not one of quartet, openrlhf.'),
    "a server in no time": ('type = "server"\nurl = "http://h/"\ntimeout = nan', "run.toml:7: reward.0.timeout = nan: must be a finite number."),
    "a judge without model": ('type = "judge"\nurl = "http://h/"', "run.toml:5: reward.0.model: is missing. What the endpoint calls the judge."),
    "a judge of pairs of one": ('type = "judge"\nurl = "http://h/"\nmodel = "x"\nmode = "pairwise"', "rollout.samples_per_prompt must be ≥ 2."),
    "an ensemble of nothing": ('type = "ensemble"', "reward.models: name the reward models' folders, or put reward_model before"),
    "an ensemble's weights": ('type = "ensemble"\nmodels = ["a", "b"]\nweights = [1, -1]', "weights = [1.0, -1.0]: needs one number ≥ 0 for each of 2 models"),
    "no pattern": ('type = "pattern"', "run.toml:5: reward.0.pattern: is missing."),
    "lengths the wrong way round": ('type = "length"\nleast = 5\nmost = 3', "run.toml:5: reward.0: least = 5 is more than most = 3"),
    "programs in no time": ('type = "code"\nseconds = 0', "run.toml:6: reward.0.seconds = 0: must be > 0. Wall time of one program."),
    "an environment that is none": ('type = "environment"', 'reward.type: "environment" needs an environment. Add [environment]'),
    "all weights 0": ('type = "exact"\nweight = 0', "reward.weight: is 0 for every reward, so there is nothing to learn from."),
    "a name twice": ('type = "exact"\n[[reward]]\ntype = "exact"', 'two rewards are called exact. Give each a name of its own, name = "…".'),
}  # fmt: skip


@pytest.mark.parametrize(("table", "sentence"), REWARDS.values(), ids=REWARDS)
def test_rewards_that_cannot_be_asked(tmp_path, table, sentence):
    assert sentence in said_of(tmp_path, rewarded(table))
