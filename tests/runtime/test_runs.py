"""Whole runs in processes of their own: what they leave behind, that they repeat, and how they end."""

import csv
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from quartet import __version__
from quartet.models.heads import ScalarModel
from quartet.models.language_model import create, load_model, load_tokenizer, save
from quartet.models.shape import Shape
from quartet.runs.reader import Run
from quartet.worlds import WORLDS
from tests.support.command import environment, quartet
from tests.support.tiny_run import SMALL, SMALL_REVIEWS, make_run

QUARTET = str(Path(sys.executable).parent / "quartet")
REAL = Path(__file__).parents[3] / "shared" / "data" / "hh_harmless.jsonl.gz"
TINY = [*SMALL, "run.steps=3"]
TINY_REVIEWS = ["run", "reviews", *SMALL_REVIEWS, "run.steps=3"]
TINY_SUMS = ["run", "sums", *TINY, "policy.create.max_length=32"]
COLUMNS = (
    "step sample id group prompt response score score/model score/gold ended position token_id text is_response logprob old_logprob ref_logprob kl "
    "reward penalty value td_error raw_advantage advantage return change ratio clipped entropy"
).split()


def fresh_quartet(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, imports included."""
    return subprocess.run(
        [QUARTET, *words], capture_output=True, text=True, cwd=cwd, env=environment(), check=False
    )


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def metrics(run: Path) -> list[dict]:
    return [e["metrics"] for e in events(run) if e["event"] == "metrics"]


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reviews")
    done = fresh_quartet(*TINY_REVIEWS, cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


def test_the_screen_tells_the_story(reviews):
    lines = (reviews / "stdout").read_text().splitlines()
    assert lines[0].startswith(f"quartet {__version__} · ")
    assert lines[1].startswith("plan   policy")
    for stage in ("1/4 sft", "2/4 reward model", "3/4 ppo", "4/4 evaluation"):
        assert any(line.startswith(stage) for line in lines)
    assert any(
        "pair accuracy" in line and "held out" in line and "possible" in line for line in lines
    )
    assert any(line.startswith("gold reward (what was meant)") for line in lines)


def test_the_run_folder_has_what_was_promised(reviews):
    run = reviews / "runs" / "latest"
    assert run.is_symlink()
    names = {p.name for p in run.iterdir()}
    assert names >= {
        "config.toml",
        "config.resolved.toml",
        "env.json",
        "run.log",
        "events.jsonl",
        "rollouts",
    }
    assert names >= {
        "sft",
        "policy",
        "reward_model",
        "critic",
        "evaluation",
        "probes",
        "report.html",
    }
    assert json.loads((run / "env.json").read_text())["packages"]["torch"]
    kinds = [e["event"] for e in events(run)]
    assert kinds.count("finished") == 4 and kinds[-1] == "done"
    assert len([e for e in events(run) if e["event"] == "metrics" and e["stage"] == "ppo"]) == 3


def test_rollouts_have_a_row_per_token_that_adds_up(reviews):
    table = pq.read_table(reviews / "runs" / "latest" / "rollouts" / "000001.parquet")
    assert table.column_names == COLUMNS
    rows = table.to_pylist()
    assert len({r["sample"] for r in rows}) == 8
    first = [r for r in rows if r["sample"] == 0]
    assert [r["position"] for r in first] == list(range(len(first)))
    response = [r for r in first if r["is_response"]]
    assert all(r["logprob"] is None for r in first if not r["is_response"])
    for r in response:
        assert r["kl"] == pytest.approx(r["old_logprob"] - r["ref_logprob"], abs=1e-2)
        assert r["ratio"] == pytest.approx(math.exp(r["logprob"] - r["old_logprob"]), rel=1e-2)
    score = max(-5.0, min(5.0, first[0]["score"]))
    assert sum(r["reward"] for r in response) == pytest.approx(
        score - 0.12 * sum(r["kl"] for r in response), abs=1e-2
    )
    assert (
        "".join(r["text"] for r in first)
        .strip()
        .startswith(("this", "my", "the", "in", "on", "last", "after", "over", "yesterday"))
    )


def test_what_comes_out_loads_in_transformers_alone(reviews):
    run = reviews / "runs" / "latest"
    tokenizer = AutoTokenizer.from_pretrained(run / "policy")
    ids = tokenizer("this film is about a poet who learns to swim.", return_tensors="pt").input_ids
    policy = AutoModelForCausalLM.from_pretrained(run / "policy")
    assert policy.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
    for name in ("reward_model", "critic"):
        scorer = AutoModelForSequenceClassification.from_pretrained(run / name)
        assert scorer(input_ids=ids).logits.shape == (1, 1)


def test_the_reward_model_is_centred_on_the_policy_that_rl_starts_from(reviews):
    run = reviews / "runs" / "latest"
    config = json.loads((run / "reward_model" / "config.json").read_text())
    finished = next(
        e for e in events(run) if e["event"] == "finished" and e["stage"] == "reward_model"
    )
    assert config["quartet_reward_centre"] == pytest.approx(finished["summary"]["centre"])
    summary = json.loads((run / "evaluation" / "final.json").read_text())
    assert abs(summary["before"]["reward/model"]) < 0.5


@pytest.mark.slow
def test_the_same_seed_gives_bitwise_the_same_metrics(reviews):
    done = quartet(*TINY_REVIEWS, cwd=reviews)
    assert done.returncode == 0, done.stderr
    runs = sorted(p for p in (reviews / "runs").iterdir() if not p.is_symlink())
    assert len(runs) == 2
    assert metrics(runs[0]) == metrics(runs[1])
    assert metrics(runs[0])


@pytest.mark.slow
def test_chat_compares_before_and_after(reviews):
    done = subprocess.run(
        [QUARTET, "chat", "runs/latest", "--max-new-tokens", "5"],
        input="/compare\nthis film is about a poet who learns to swim.\n/quit\n",
        capture_output=True,
        text=True,
        cwd=reviews,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "before " in done.stdout and "after  " in done.stdout


@pytest.mark.slow
def test_a_critic_on_the_actors_trunk(reviews):
    done = quartet(*TINY_REVIEWS, "critic.type=shared", "run.name=shared", cwd=reviews)
    assert done.returncode == 0, done.stderr
    run = next((reviews / "runs").glob("*-shared"))
    assert AutoModelForSequenceClassification.from_pretrained(run / "critic").config.num_labels == 1
    assert "value/explained_variance" in metrics(run)[-3]


@pytest.mark.slow
def test_sums_runs_without_a_reward_model_and_without_a_critic(tmp_path):
    done = quartet(*TINY_SUMS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "latest"
    assert (
        (run / "policy").is_dir()
        and not (run / "critic").exists()
        and not (run / "reward_model").exists()
    )
    table = pq.read_table(run / "rollouts" / "000001.parquet")
    assert table["value"].null_count == len(table) and len(set(table["group"].to_pylist())) == 8


@pytest.mark.slow
def test_the_policys_average_is_saved_beside_it_and_pretraining_texts_are_mixed_in(tmp_path):
    words = [w for w in TINY_REVIEWS if w not in {"run", "reviews"}]
    recipe = [
        'recipe=["sft", "reward_model", "instructgpt"]',
        "algorithm.preset=instructgpt",
        "optim.ema=0.9",
    ]
    done = quartet("run", "reviews", *words, *recipe, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "latest"
    averaged, last, first = (
        AutoModelForCausalLM.from_pretrained(run / name) for name in ("policy_ema", "policy", "sft")
    )
    for a, b, c in zip(averaged.parameters(), last.parameters(), first.parameters(), strict=True):
        assert (a - c).norm() < (b - c).norm() or torch.equal(b, c)
    assert all("loss/ptx" in m for m in metrics(run) if "kl" in m)


@pytest.mark.parametrize("stage", ["dpo", "online_dpo"])
@pytest.mark.slow
def test_comparisons_straight_into_the_policy(tmp_path, stage):
    words = [w for w in TINY if not w.startswith("run.steps")]
    (tmp_path / "file.toml").write_text(
        f'recipe = ["sft", "{stage}", "evaluation"]\n[data]\nworld = "reviews"\nmax_response_tokens = 64\n'
        + '[policy]\ncreate = { type = "llama", max_length = 128 }\n'
        + ('[[reward]]\ntype = "gold"\n' if stage == "online_dpo" else "")
        + "[preference]\nsteps = 3\nbatch_size = 8\n"
    )
    done = quartet("run", "file.toml", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "latest"
    assert "pair accuracy" in done.stdout
    assert ("reward (what was trained on)" in done.stdout) == (stage == "online_dpo")
    AutoModelForCausalLM.from_pretrained(run / "policy")
    finished = next(e for e in events(run) if e["event"] == "finished" and e["stage"] == stage)
    assert ("held_out_accuracy" in finished["summary"]) == (stage == "dpo")
    sampled = Run(run)
    assert sampled.steps() == ([1, 2, 3] if stage == "online_dpo" else [])
    assert all(len(sampled.samples(number)) == 16 for number in sampled.steps())


def test_the_command_lists_presets_and_prints_one(tmp_path):
    listed = quartet("algorithms", cwd=tmp_path)
    assert listed.returncode == 0
    for name in ("ppo", "grpo", "trpo", "deepspeed_chat", "minimal", "dpo", "kto"):
        assert any(line.startswith(name) for line in listed.stdout.splitlines())
    assert 'estimator = "k1"' in quartet("algorithms", "ppo", cwd=tmp_path).stdout
    assert (
        json.loads(quartet("algorithms", "--json", cwd=tmp_path).stdout)["rloo"]["advantage"][
            "type"
        ]
        == "leave_one_out"
    )
    assert quartet("algorithms", "ipo", cwd=tmp_path).stdout.splitlines()[0] == "[preference.loss]"
    wrong = quartet("algorithms", "ppoo", cwd=tmp_path)
    assert wrong.returncode == 2 and "Did you mean ppo?" in wrong.stderr


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_ppo_leaves_a_readable_folder(tmp_path):
    words = [w for w in TINY_REVIEWS if not w.startswith("run.steps")] + ["run.steps=5000"]
    # A shell's background job would ignore the signal, and so would its children: this one heeds it again.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from quartet.cli import main; main()"
    command = [sys.executable, "-c", heed, *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    rollouts = tmp_path / "runs" / "latest" / "rollouts" / "000006.parquet"
    deadline = time.monotonic() + 120
    while not rollouts.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "Traceback" not in stderr and "stopped by Ctrl-C" in stdout
    run = tmp_path / "runs" / "latest"
    assert events(run)[-1]["event"] == "interrupted"
    for path in (run / "rollouts").iterdir():
        assert path.suffix == ".parquet" and pq.read_table(path).num_rows > 0


@pytest.mark.slow
def test_a_reward_model_that_is_not_finite_stops_the_run_and_is_named(reviews, tmp_path):
    """A reward model with a NaN in its head, given to PPO as a folder."""
    broken = tmp_path / "broken"
    shutil.copytree(reviews / "runs" / "latest" / "reward_model", broken)
    model = AutoModelForSequenceClassification.from_pretrained(broken)
    with torch.no_grad():
        model.score.weight[0, 0] = torch.nan
    model.save_pretrained(broken)
    words = [
        "run",
        "reviews",
        *TINY,
        'recipe=["sft","ppo"]',
        f'reward.0.model="{broken}"',
        "critic.init=policy",
    ]
    done = quartet(*words, "run.name=broken", cwd=tmp_path)
    assert done.returncode == 1
    assert f"{broken}: score.weight is not finite: the weights are damaged." in done.stderr
    assert "Traceback" not in done.stderr
    run = next((tmp_path / "runs").glob("*-broken"))
    assert events(run)[-1]["event"] == "failed" and not (run / "policy").exists()


# --- real files --------------------------------------------------------------------------------------------------------


DIALOGUE = [
    'policy.create={type = "llama", hidden_size = 16, num_layers = 1, num_heads = 2}',
    'policy.tokenizer={type = "train", vocab_size = 400}',
    "policy.adapter=none",
    "sft.steps=2",
    "reward_model.steps=2",
    "rollout.prompts_per_step=8",
    "rollout.max_new_tokens=8",
    "evaluation.prompts=8",
    "run.steps=2",
]


@pytest.mark.skipif(not REAL.exists(), reason="the shared HH file is not beside this checkout")
@pytest.mark.slow
def test_the_real_hh_file_goes_the_whole_way(tmp_path):
    done = quartet("run", "dialogue", f"data.train={REAL}", *DIALOGUE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rows cannot be used and were left out" in done.stdout
    run = tmp_path / "runs" / "latest"
    assert {p.name for p in run.iterdir()} >= {"sft", "reward_model", "policy", "critic"}
    assert json.loads((run / "evaluation" / "final.json").read_text())["judge"] == "reward"


@pytest.fixture
def users_model(tmp_path) -> Path:
    """A folder as a user has it: written by transformers, with a tokenizer that pads with its end of sequence."""
    world = WORLDS["sums"](0)
    tokenizer = world.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    shape = Shape(type="qwen2", hidden_size=16, num_layers=1, num_heads=2, max_length=1024)
    save(create(shape, tokenizer, 0), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def write_table(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_conversations_are_learnt_through_a_chat_template(tmp_path):
    talk = [
        {"role": "user", "content": "what is one and one"},
        {"role": "assistant", "content": "two"},
    ]
    write_table(tmp_path / "talk.jsonl", [{"messages": talk}] * 20)
    (tmp_path / "talk.toml").write_text(
        """
recipe = "sft"
data.train = "talk.jsonl"
sft = { steps = 2, batch_size = 4 }
[policy]
create = { hidden_size = 16, num_layers = 1, num_heads = 2, max_length = 1024 }
tokenizer = { type = "train", vocab_size = 320 }
"""
    )
    refused = quartet("run", "talk.toml", cwd=tmp_path)
    assert (
        refused.returncode == 2
        and 'Set policy.chat_template = "chatml" or give a file.' in refused.stderr
    )
    done = quartet("run", "talk.toml", "policy.chat_template=chatml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    saved = load_tokenizer(tmp_path / "runs" / "latest" / "sft")
    assert (
        saved.apply_chat_template(talk[:1], tokenize=False)
        == "<|im_start|>user\nwhat is one and one<|im_end|>\n"
    )


@pytest.mark.parametrize("file", ["pairs.jsonl", pytest.param("pairs.csv", marks=pytest.mark.long)])
@pytest.mark.slow
def test_from_a_folder_and_a_file_that_the_user_has(tmp_path, users_model, file):
    pairs = [
        {"prompt": f"{a}+{a}=", "chosen": str(a + a), "rejected": str(a)} for a in range(1, 31)
    ]
    write_table(tmp_path / file, pairs)
    (tmp_path / "mine.toml").write_text(
        f"""
recipe = ["sft", "reward_model", "ppo", "evaluation"]
policy = {{ model = "{users_model}" }}
data = {{ train = "{file}" }}
sft = {{ steps = 2, batch_size = 4 }}
reward_model = {{ steps = 2, batch_size = 4 }}
rollout = {{ prompts_per_step = 4, max_new_tokens = 4 }}
run = {{ steps = 2 }}
evaluation = {{ prompts = 3 }}
"""
    )
    done = quartet("run", "mine.toml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "masks come from lengths, so nothing is lost" in done.stdout
    assert load_tokenizer(tmp_path / "runs" / "latest" / "policy").eos_token == "<eos>"
    single = [
        'recipe="ppo"',
        'reward=[{type="model", model="runs/latest/reward_model"}]',
        "run.name=alone",
    ]
    again = quartet("run", "mine.toml", *single, cwd=tmp_path)
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (['{"prompt": "1+1=", "chosen": "2", "rejected": "3"}', '{"prompt": "1+2'], "p.jsonl:2: not JSON (line ends inside a string)."),
        (['{"question": "1+1=", "good": "2", "bad": "3"}'] * 3, "Add data.columns"),
        (['{"prompt": "", "chosen": "2", "rejected": "3"}'] * 3, "p.jsonl:1: the prompt is empty. 1 more row of 2 cannot be used."),
        (['{"prompt": "1+1=", "chosen": "2", "rejected": "2"}'] * 3, "p.jsonl:1: chosen and rejected are identical"),
        (['{"prompt": "1+1=", "chosen": "", "rejected": "2"}'] * 3, "p.jsonl:1: the chosen is empty, a response of zero tokens."),
        (['{"prompt": "' + "1" * 600 + '", "chosen": "2", "rejected": "3"}'] * 3, "the prompt has 600 tokens, the limit is 512"),
        (['{"prompt": "1+1=", "chosen": "2", "rejected": "3"}'], "has one row; to hold some out it needs two or more."),
        (['{"prompt": [{"role": "user", "content": "hi"}], "chosen": "2", "rejected": "3"}'] * 3, 'Set policy.chat_template = "chatml"'),
        ([""], "has no rows."),
    ],
)  # fmt: skip
def test_bad_data_are_refused_before_anything_is_written(tmp_path, users_model, lines, sentence):
    (tmp_path / "p.jsonl").write_text("\n".join(lines) + "\n")
    words = ['recipe="reward_model"', f'policy.model="{users_model}"', 'data.train="p.jsonl"']
    (tmp_path / "x.toml").write_text("")
    done = quartet("run", "x.toml", *words, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert sentence in done.stderr
    assert done.stderr.strip().count("\n") == 0 and not (tmp_path / "runs").exists()


def test_a_model_too_short_for_its_answers_is_said(tmp_path, users_model):
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1=", "chosen": "2", "rejected": "3"}\n' * 5)
    words = [
        'recipe="reward_model"',
        f'policy.model="{users_model}"',
        'data.train="p.jsonl"',
        "rollout.max_new_tokens=1024",
    ]
    (tmp_path / "x.toml").write_text("")
    done = quartet("run", "x.toml", *words, cwd=tmp_path)
    assert (
        done.returncode == 2
        and "leaves no room for a prompt" in done.stderr
        and "reads at most 1024 tokens" in done.stderr
    )


@pytest.mark.slow
def test_a_folder_without_a_tokenizer_or_without_weights_is_refused(tmp_path, users_model):
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n' * 5)
    (tmp_path / "x.toml").write_text(
        f'recipe = "sft"\npolicy.model = "{users_model}"\ndata.train = "p.jsonl"\n'
    )
    (users_model / "tokenizer.json").rename(tmp_path / "aside.json")
    (users_model / "tokenizer_config.json").unlink()
    done = quartet("run", "x.toml", cwd=tmp_path)
    assert (
        done.returncode == 2 and "model: has no tokenizer. Save one beside the model" in done.stderr
    )
    missing = quartet("run", "x.toml", "policy.model=./nowhere", cwd=tmp_path)
    assert (
        missing.returncode == 2 and 'policy.model = "./nowhere": no such folder.' in missing.stderr
    )
    (users_model / "model.safetensors").unlink()
    (tmp_path / "aside.json").rename(users_model / "tokenizer.json")
    empty = quartet("run", "x.toml", cwd=tmp_path)
    assert empty.returncode == 2 and "has no .safetensors weights" in empty.stderr
    assert not (tmp_path / "runs").exists()


LOAD = """
import json, sys, torch, transformers
folder, ids = sys.argv[1], torch.tensor([json.loads(sys.argv[2])])
made = {}
for name, auto in (("policy", "CausalLM"), ("reward_model", "SequenceClassification"), ("critic", "TokenClassification")):
    model, report = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(f"{folder}/{name}", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], (name, report)
    assert transformers.AutoTokenizer.from_pretrained(f"{folder}/{name}").eos_token_id is not None
    with torch.no_grad():
        made[name] = model.eval()(input_ids=ids).logits.flatten().tolist()
    if name != "policy":
        assert model.config.num_labels == 1 and model.config.pad_token_id is not None, name
assert "quartet" not in sys.modules
import peft
base = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/sft")
with torch.no_grad():
    made["adapter"] = peft.PeftModel.from_pretrained(base, f"{folder}/policy/adapter").eval()(input_ids=ids).logits.flatten().tolist()
print("RESULT" + json.dumps(made))
"""


@pytest.mark.slow
def test_one_trunk_with_four_roles_and_what_comes_out_loads_elsewhere_without_us(tmp_path):
    done = quartet(*TINY_REVIEWS, 'policy.adapter={type="lora",rank=2}', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "critic (adapter)" in done.stdout
    run = tmp_path / "runs" / "latest"
    first = next(m for m in metrics(run) if "kl" in m)
    assert first["kl"] == 0.0 and first["ratio/first_error"] < 1e-5
    ids = [5, 9, 12, 7, 20]
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, str(run), json.dumps(ids)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert loaded.returncode == 0, loaded.stderr
    theirs = json.loads(loaded.stdout.partition("RESULT")[2])
    tokens = torch.tensor([ids])
    every = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        reward_model, critic = (
            ScalarModel.load(run / "reward_model"),
            ScalarModel.load(run / "critic"),
        )
        ours = {
            "policy": load_model(run / "policy")(input_ids=tokens).logits.flatten(),
            "reward_model": reward_model(tokens, every)[-1:] + reward_model.centre,
            "critic": critic(tokens, every),
        }
    for name, logits in ours.items():
        torch.testing.assert_close(torch.tensor(theirs[name]), logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.tensor(theirs["adapter"]), ours["policy"], atol=1e-5, rtol=1e-5
    )
    card = (run / "policy" / "README.md").read_text()
    assert (
        "library_name: transformers" in card
        and "wins 0." in card
        and "`adapter/` is the LoRA adapter alone" in card
    )
    assert (
        "ppo"
        not in (run / "sft" / "README.md")
        .read_text()
        .partition("---\n\n")[2]
        .partition("Made by")[0]
    )


@pytest.mark.slow
def test_a_critic_can_be_smaller_than_the_actor(tmp_path):
    shape = "{type='llama', hidden_size=8, num_layers=1, num_heads=2}"
    words = [
        *SMALL_REVIEWS,
        f"critic.create={shape}",
        "run.steps=2",
        'recipe=["sft","reward_model","ppo"]',
    ]
    run = make_run(tmp_path, "reviews", *words)
    sizes = {
        name: json.loads((run.path / name / "config.json").read_text())["hidden_size"]
        for name in ("policy", "critic", "reward_model")
    }
    assert sizes == {"policy": 16, "critic": 8, "reward_model": 16}
    assert run.status == "done"


@pytest.mark.slow
@pytest.mark.parametrize(
    "critic", ["init='policy'", "create={type='llama', hidden_size=8, num_layers=1, num_heads=2}"]
)
@pytest.mark.parametrize("adapter", [(), ("policy.adapter={type='lora', rank=2}",)])
def test_a_critic_that_is_no_reward_model_begins_with_values_of_0(tmp_path, critic, adapter):
    words = [
        *SMALL_REVIEWS,
        *adapter,
        f"critic={{type='separate', {critic}}}",
        "reward=[{type='gold'}]",
        "run.steps=2",
        "recipe=ppo",
    ]
    run = make_run(tmp_path, "reviews", *words)
    first, second = run.series["ppo"].columns["value/mean"]
    assert first == 0 and second != 0
