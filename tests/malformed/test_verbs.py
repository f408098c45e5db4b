"""Verbs with wrong arguments, chat templates that cannot be used, environments that are none."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quartet.assembly import build
from quartet.cli import app
from quartet.config.toml import read_settings
from quartet.data import DataError
from quartet.data.tokenizer import train_tokenizer
from quartet.models.chat import ChatError, render, set_chat_template
from quartet.rewards.protocol import RewardError
from tests.malformed.saying import readable, refusal

RECIPES = "no such recipe, and not a .toml file. Recipes are dialogue, film-reviews, guess, labelled-reviews, reviews, sums."
NO_RUN = "is no run folder, it has no events.jsonl."
VERBS = {
    "run a": f'"a": {RECIPES}',
    "run ppo.tom": f'"ppo.tom": {RECIPES}',
    "run p.jsonl": f'"p.jsonl": {RECIPES}',
    "run sft": '"sft": is a stage. quartet init sft writes a file for it; name the file.',
    "plan kto": '"kto": is a stage. Write a file with recipe = "kto", and name the file.',
    "data p.jsonl --tokenizer small": "small: is a run's folder. Its models are small/policy and small/sft.",
    "run REVIEWS": f'"REVIEWS": {RECIPES.replace("Recipes", "Did you mean reviews? Recipes")}',
    "run empty": f'"empty": {RECIPES}',
    "run reviews.toml": "reviews.toml: no such file.",
    "run seed=-1": "command line: seed = -1: must be ≥ 0.",
    "run reviews nonsense": '"nonsense": not understood.',
    "run reviews --break nosuch": "--break nosuch: known are temperature, greedy, eos",
    "run reviews --accept seed": "--accept: needs --resume.",
    "run nowhere --resume": "nowhere: no such run folder, and no recipe. `quartet runs` lists the runs in runs/.",
    "run --resume": "runs/latest: there is no run to resume. Name one: quartet run runs/… --resume",
    "plan nosuch": f'"nosuch": {RECIPES}',
    "plan reviews data.rows=0": "command line: data.rows = 0: must be ≥ 1. How many rows a world makes for each stage.",
    "sweep nosuch": '"nosuch": no such sweep, and not a .toml file. Sweeps are epsilon-beta.',
    "sweep epsilon-beta sweep.trails=3": "command line: sweep.trails: no such key. Did you mean trials?",
    "sweep epsilon-beta optim.lrr=3": "command line: optim.lrr: no such key. Did you mean optim.lr?",
    "sweep empty --resume": '"empty": no such sweep, and not a .toml file.',
    "sweep reviews.toml": "reviews.toml: no such file.",
    "init nosuch": '"nosuch": no such file to start from. Known are dpo, grpo, ilql, on_policy_distillation, ppo, reward_model, sft, dialogue, ',
    "init pppo": '"pppo": no such file to start from. Did you mean ppo?',
    "init": "quartet init: RECIPE is missing: sft, reward_model, ppo, grpo, dpo, ilql or on_policy_distillation, or a recipe or a sweep that ships with Quartet, such as reviews. See quartet init --help.",
    "resume": "resume: no such command. quartet run RUN --resume goes on with a run.",
    "reprot": "reprot: no such command. Did you mean report?",
    "nosuch": "nosuch: no such command. quartet --help lists the commands.",
    "export small": "quartet export: --to is missing: the folder to write. See quartet export --help.",
    "studio --port abc": "quartet studio: --port: ",
    "studio --port 80000": "quartet studio: --port: ",
    "export small --to x --dtype int8": "quartet export: --dtype: 'int8' is not one of 'float32', 'bfloat16', 'float16'.",
    "plan reviews --modle x": "quartet plan: no such option: --modle. Did you mean --model?",
    "chat --nosuch": "quartet chat: no such option: --nosuch. See quartet chat --help.",
    "algorithms gpro": '"gpro": no such preset. Did you mean grpo?',
    "run empty --resume": "empty: is no run's folder, and no recipe.",
    "init ppo empty": "empty: exists already. Give another name: quartet init ppo NAME.toml",
    "algorithms pppo": '"pppo": no such preset. Did you mean ppo? `quartet algorithms` lists them.',
    "chat nowhere": "nowhere: no such folder.",
    "chat file": "file: has no policy/ or sft/ to talk to, and is no model's folder.",
    "export nowhere --to x": "nowhere: no such folder.",
    "export small --to empty": "empty: exists already. Give another place with --to.",
    "export small --to x --part critic": "small: has no model called critic. It has policy, sft.",
    "export small --to x --part ../x": "small: has no model called ../x. It has policy, sft.",
    "serve-reward nowhere": "nowhere: no such folder.",
    "serve-reward small --token-env NO_SUCH_TOKEN": "--token-env NO_SUCH_TOKEN: no such environment variable. Set it to the token.",
    "studio nowhere": "nowhere: no such folder.",
    "studio file": "file: is a file, not a folder.",
    "report nowhere": "nowhere: no such folder.",
    "report empty": f"empty: {NO_RUN}",
    "inspect file": f"file: {NO_RUN}",
    "inspect small --step 99": "small: has no rollouts of step 99. There are 2, from 1 to 2.",
    "inspect small --step 1 --sample 999": "small: step 1 has no sample 999.",
    "inspect small --probes --step 77": "small: has no probes of step 77.",
    "runs nowhere": "nowhere: no such folder.",
    "compare small": "compare needs two runs or more.",
    "compare small nowhere": "nowhere: no such folder.",
    "replay small --step 9": "small: grpo has the steps 1 to 2, not 9.",
    "replay small rollout.temperature=1": "only algorithm.* and optim.* can be changed.",
    "replay small algorithm.kl.coef=-1": "command line: algorithm.kl.coef = -1: must be ≥ 0.",
    "doctor empty": f"empty: {NO_RUN}",
    "reward rw.py:f --on none.jsonl": "none.jsonl: no such file.",
    "reward rw.py:g --on p.jsonl": 'reward.function = "rw.py:g": rw.py has no g. It defines f.',
    "reward exacct --on p.jsonl": 'reward.function = "exacct": write file.py:name, or package.module.name.',
    "reward exact --on p.jsonl": "p.jsonl:1: has no column answer, which exact compares with.",
    "reward rw.py:f --on p.jsonl --columns prompt": '--columns "prompt": write ours=theirs, such as prompt=question.',
    "reward rw.py:f --on empty": "empty: is a folder without .jsonl",
    "data none.jsonl": "none.jsonl: no such file.",
    "data half.jsonl": "half.jsonl:1: not JSON (expecting property name enclosed in double quotes at character 2).",
    "data file": "file: not a format that is read here. Use .jsonl",
    "data p.jsonl --tokenizer empty": "empty: is no model's folder, it has no config.json and no tokenizer. Name one that save_pretrained wrote.",
    "data p.jsonl --columns prompt=q": "p.jsonl: --columns names q, but the columns are prompt, completion.",
    "data p.jsonl --eval none.jsonl": "none.jsonl: no such file.",
}  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    Path("half.jsonl").write_text("{")
    Path("file").write_text("x")
    Path("rw.py").write_text("def f(responses): return [1.0] * len(responses)\n")
    Path("empty").mkdir()


@pytest.mark.parametrize("words", VERBS)
def test_verbs_with_wrong_arguments(place, small_run, words):
    """Exit code 2, one sentence, and nothing is left behind."""
    if "small" in words:
        shutil.copytree(small_run, "small")
    before = sorted(Path().rglob("*"))
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 2, done.output
    assert VERBS[words] in readable(done.stderr.strip())
    assert sorted(Path().rglob("*")) == before


# --- chat templates ----------------------------------------------------------------------------------------------------------

QUESTION, REPLY = [{"role": "user", "content": "hello"}], [{"role": "assistant", "content": "good"}]
REFUSED = "the chat template refuses the conversation: "
GROWS = "the chat template writes the prompt differently once a reply follows, so prompt and reply cannot be told apart."
TEMPLATES = {
    "none": (None, 'has no chat template. Set policy.chat_template = "chatml" or give a file.'),
    "no end of a loop": ("{% for m in messages %}", REFUSED + "Unexpected end of template."),
    "a complaint of its own": ("{{ raise_exception('Only users are supported!') }}", REFUSED + "Only users are supported!"),
    "an unknown function": ("{{ nosuch() }}", REFUSED + "'nosuch' is undefined"),
    "a message that is not there": ("{{ messages[5]['content'] }}", REFUSED + "list object has no element 5"),
    "a way out of the sandbox": ("{{ ''.__class__.__mro__ }}", REFUSED + "access to attribute '__class__' of 'str' object is unsafe."),
    "another file": ("{% include '/etc/passwd' %}", REFUSED + "no loader for this environment specified"),
    "a list that it changes": ("{{ messages.append(1) }}", REFUSED + "access to attribute 'append' of 'list' object is unsafe."),
    "a long loop": ("{% for i in range(10000000) %}x{% endfor %}", REFUSED + "Range too big."),
    "a division by zero": ("{{ 1 / 0 }}", REFUSED + "division by zero"),
    "the last message alone": ("{{ messages[-1].content }}", GROWS),
    "another history": ("{% for m in messages %}{{ m.content if loop.last else '...' }}|{% endfor %}", GROWS),
}  # fmt: skip


@pytest.mark.parametrize(("template", "sentence"), TEMPLATES.values(), ids=TEMPLATES)
def test_chat_templates_that_cannot_be_used(template, sentence):
    tokenizer = train_tokenizer(["hello good day"] * 5, 300)
    tokenizer.chat_template = template
    assert sentence in refusal(ChatError, lambda: render(tokenizer, QUESTION, REPLY))


@pytest.mark.parametrize("named", ["none.jinja", "empty", "", "ChatML"])
def test_templates_that_are_not_there(place, named):
    said = refusal(ChatError, lambda: set_chat_template(None, named))
    assert (
        said == f'policy.chat_template = "{named}": neither a named template (chatml) nor a file.'
    )


# --- environments --------------------------------------------------------------------------------------------------------------

WHOLE = "class E:\n    def reset(self, prompt): return []\n    def step(self, response): return [], 1.0, True\n"
KEY = 'environment.function = "{}": '
ENVIRONMENTS = {
    "no step": ("class E:\n    def reset(self, prompt): return []\n", "env.py:E", KEY.format("env.py:E") + "has no method step."),
    "no reset": ("class E:\n    pass\n", "env.py:E", KEY.format("env.py:E") + "has no method reset."),
    "a reset that is 3": (WHOLE + "    reset = 3\n", "env.py:E", KEY.format("env.py:E") + "has no method reset."),
    "a function": ("def E(): return 3\n", "env.py:E", KEY.format("env.py:E") + "has no method reset."),
    "no Python": ("class E(:\n", "env.py:E", KEY.format("env.py:E") + "env.py is not Python: invalid syntax"),
    "another name": (WHOLE, "env.py:F", KEY.format("env.py:F") + "env.py has no F. It defines E."),
    "another file": (WHOLE, "none.py:E", KEY.format("none.py:E") + "none.py: no such file."),
    "no reference": (WHOLE, "x", KEY.format("x") + "write file.py:name, or package.module.name."),
    "plain text": (WHOLE, "env.py:E", "p.jsonl:1: is plain text, and an environment speaks in conversations. Give the rows messages."),
}  # fmt: skip
RUN = """recipe = "reinforce"
[policy]
create = { max_length = 128, hidden_size = 16, num_layers = 1, num_heads = 2 }
tokenizer = { type = "train", vocab_size = 300 }
chat_template = "chatml"
[environment]
function = "REFERENCE"
[[reward]]
type = "environment"
[data]
train = "p.jsonl"
max_prompt_tokens = 64
[rollout]
max_new_tokens = 8
"""


@pytest.mark.parametrize(
    ("source", "reference", "sentence"), ENVIRONMENTS.values(), ids=ENVIRONMENTS
)
def test_environments_that_are_none(tmp_path, monkeypatch, source, reference, sentence):
    monkeypatch.chdir(tmp_path)
    prompt = "hi" if sentence.startswith("p.jsonl") else QUESTION
    Path("p.jsonl").write_text((json.dumps({"prompt": prompt}) + "\n") * 4)
    Path("env.py").write_text(source)
    Path("run.toml").write_text(RUN.replace("REFERENCE", reference))
    assert sentence in refusal(
        (RewardError, DataError), lambda: build(read_settings(Path("run.toml")).config)
    )
