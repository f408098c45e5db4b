"""A reference that is another model than the one that a stage starts from (`reference.model`)."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from quartet.assembly import build
from quartet.assembly.reference import check_reference
from quartet.config.toml import read_settings
from quartet.data.records import Comparison
from quartet.models.forward import masked_logprobs
from quartet.models.language_model import ModelError, create, load_model, save
from quartet.models.shape import Shape
from quartet.planning.plan import plan
from quartet.recipes import recipe_path
from quartet.recording.run_folder import read_record
from quartet.runs.doctor import examine
from quartet.runs.reader import Run
from quartet.runtime.worker import Worker
from quartet.training.checkpoint import DamagedCheckpoint
from tests.generation.test_servers import served
from tests.support.command import quartet
from tests.support.tiny_run import carried_out
from tests.support.world import WORDS, model, tokenizer, write_lines

DPO = 'recipe = ["dpo"]\npreference = { steps = 3, batch_size = 4, lr = 1e-2 }\n'
GRPO = """recipe = ["grpo"]
reward = [{ type = "length", most = 3 }]
rollout = { prompts_per_step = 2, samples_per_prompt = 2, max_new_tokens = 4 }
run.steps = 2
optim = { lr = 1e-2, epochs = 1 }
algorithm.kl.coef = 0.1
"""
PPO = """recipe = ["ppo"]
reward = [{ type = "length", most = 3 }]
rollout = { prompts_per_step = 4, max_new_tokens = 4 }
critic = { init = "policy" }
run.steps = 2
run.checkpoint_every = 1
optim = { lr = 1e-2, critic_lr = 1e-2, epochs = 1 }
"""
DISTILLATION = """recipe = ["on_policy_distillation"]
reference.model = "teacher"
rollout = { prompts_per_step = 16, samples_per_prompt = 2, max_new_tokens = 4 }
run.steps = 20
run.checkpoint_every = 10
optim = { lr = 2e-2, epochs = 2, schedule = "constant", warmup_steps = 0 }
"""
TABLES = """policy.model = "lm"
data = { train = "pairs.jsonl", max_prompt_tokens = 8, max_response_tokens = 8 }
run.folder = "runs"
run.precision = "fp32"
"""


GAMES = read_settings(
    recipe_path("guess"), ["data.max_prompt_tokens=4", "rollout.max_new_tokens=4"]
).config
"""Of several turns, each of which is short enough for any model here."""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a tiny policy, another model with its tokenizer, and pairs."""
    monkeypatch.chdir(tmp_path)
    save(model(), tokenizer(), Path("lm"))
    save(model(seed=1), tokenizer(), Path("other"))
    nouns, ends = ("film", "story", "music", "end"), ("very", "not", "long", "short")
    pairs = [
        {"prompt": f"the {a}", "chosen": f" was {b} good", "rejected": f" was {b} bad and long"}
        for a in nouns
        for b in ends
    ]
    write_lines(Path("pairs.jsonl"), *map(json.dumps, pairs))
    Path("dpo.toml").write_text(DPO + TABLES)
    Path("grpo.toml").write_text(GRPO + TABLES)
    Path("ppo.toml").write_text(PPO + TABLES)
    Path("distillation.toml").write_text(DISTILLATION + TABLES)
    return tmp_path


def settings(name, *words):
    return read_settings(Path(f"{name}.toml"), words)


def run(name, *words):
    """The record of a run that has gone to its end."""
    return carried_out(settings(name, *words), Path("runs"), name)


def metrics(record):
    timed = ("time/", "tokens_per", "memory/")
    return [
        {k: v for k, v in event["metrics"].items() if not k.startswith(timed)}
        for event in read_record(record.path).events
        if event["event"] == "metrics"
    ]


def numbers(record):
    """The metrics that do not depend on the clock or the machine."""
    return [
        {k: v for k, v in step.items() if not any(w in k for w in ("second", "time", "memory"))}
        for step in metrics(record)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "grpo", "ppo"])
def test_the_start_by_its_name_gives_the_same_numbers(place, name):
    plain, named = run(name), run(name, 'reference.model="lm"')
    assert numbers(plain) == numbers(named) and numbers(plain)


def pair_logprobs(folder, pairs):
    """Σ log π of each side, by a model of a folder."""
    made = load_model(folder)

    def side(prompt, response):
        tokens = torch.tensor([[*prompt, *response]])
        mask = torch.arange(tokens.shape[1])[None] >= len(prompt)
        return float(masked_logprobs(made, tokens, mask).detach().sum())

    return [(side(c.prompt_ids, c.chosen_ids), side(c.prompt_ids, c.rejected_ids)) for c in pairs]


def test_log_ratios_of_dpo_begin_at_the_distance_of_the_two_models(place):
    job = build(settings("dpo", 'reference.model="other"').config)
    held_out: list[Comparison] = job.stages[0].held_out
    assert held_out
    record = run("dpo", 'reference.model="other"')
    distances = [
        abs(a - b)
        for policy, reference in zip(
            pair_logprobs("lm", held_out), pair_logprobs("other", held_out), strict=True
        )
        for a, b in zip(policy, reference, strict=True)
    ]
    before = record.summary("dpo")["held_out_logratio/abs_before"]
    assert before == pytest.approx(sum(distances) / len(distances), rel=1e-4)
    assert before > 0.1
    assert not [f for f in examine(record) if "log-ratios to the reference" in f.sentence], (
        "it was asked for"
    )


@pytest.mark.parametrize("adapter", [False, True])
def test_the_reference_of_rl_is_the_model_that_is_named(place, adapter):
    words = ["policy.adapter.type=lora", "policy.adapter.rank=2"] if adapter else []
    config = settings("grpo", 'reference.model="other"', *words).config
    [stage] = build(config).stages
    learner = stage.load_components(place).learner
    tokens = torch.randint(4, 20, (2, 6))
    mask = torch.arange(6).expand(2, 6) > 1
    with torch.no_grad():
        ours = masked_logprobs(learner.reference, tokens, mask)
        theirs = masked_logprobs(load_model("other"), tokens, mask)
    torch.testing.assert_close(ours, theirs)
    assert not any(p.requires_grad for p in learner.reference.parameters())
    models = plan(config).models
    assert models["reference"] == model().num_parameters()
    assert ("adapter" in models) == adapter


def check_reference_logprobs(record, reference):
    """The recorded log-probs of the reference are those of the model in a folder."""
    other = load_model(reference)
    samples = record.samples(1)
    assert samples
    for sample in samples:
        columns = record.sample(1, sample.number)
        tokens, mask = torch.tensor([columns["token_id"]]), torch.tensor([columns["is_response"]])
        expected = masked_logprobs(other, tokens, mask).detach()[mask].tolist()
        recorded = [x for x in columns["ref_logprob"] if x is not None]
        assert recorded == pytest.approx(expected, rel=3e-3)  # the record is rounded to 0.2%


def test_ppo_with_a_critic_is_held_to_the_model_that_is_named(place):
    record = run("ppo", 'reference.model="other"')
    check_reference_logprobs(record, "other")
    first = metrics(record)[0]
    assert first["kl/token_k3"] > 0.01 and "value/explained_variance" in first
    assert (record.path / "critic").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_a_run_goes_on_with_the_reference_that_it_began_with_only(place, name):
    words = ['reference.model="other"', "run.checkpoint_every=1"]
    path = run(name, *words).path
    checkpoint = str(max((path / "checkpoints").glob(f"{name}-*")))
    config = settings(name, *words).config
    Worker(build(config).stages, path).begin(name, checkpoint)
    save(model(seed=2), tokenizer(), Path("other"))
    with pytest.raises(DamagedCheckpoint, match="the reference is not the model that the run be"):
        Worker(build(config).stages, path).begin(name, checkpoint)


def test_a_checkpoint_of_dpo_that_does_not_tell_its_reference_is_gone_on_from(place):
    [stage] = build(settings("dpo").config).stages
    begun = stage.begin(place)
    state = begun.state()
    del state["reference"]
    begun.load_state(state)


def test_responses_of_servers_are_held_to_the_model_that_is_named(place):
    with served(place / "lm") as (url, _):
        where = f'generator={{type="vllm", urls=["{url}"], shared="{place / "shared"}"}}'
        record = run("ppo", 'reference.model="other"', where)
    check_reference_logprobs(record, "other")


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("launch.shard=true",)], ids=["whole", "sharded"])
def test_two_ranks_hold_the_policy_to_the_model_that_is_named(place, words):
    told = ["ppo.toml", 'reference.model="other"', "launch.processes=2", *words]
    outcome = quartet("run", *told, cwd=place)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    two = Run(Path("runs/latest").resolve())
    check_reference_logprobs(two, "other")
    alone = numbers(run("ppo", 'reference.model="other"'))
    for ours, theirs in zip(alone, numbers(two), strict=True):
        assert theirs["kl/token_k3"] == pytest.approx(ours["kl/token_k3"], rel=1e-3)
        assert theirs["value/mean"] == pytest.approx(ours["value/mean"], rel=1e-3, abs=1e-4)


def test_the_kl_of_rl_begins_above_0_and_stops_nothing(place):
    first = metrics(run("grpo", 'reference.model="other"'))[0]
    assert first["kl/token_k3"] > 0.01


def test_a_plan_counts_a_reference_of_another_size(place):
    small = Shape(type="llama", hidden_size=16, num_layers=1, num_heads=2, max_length=64)
    save(create(small, tokenizer(), 0), tokenizer(), Path("small"))
    count = load_model("small").num_parameters()
    words = ("policy.adapter.type=lora", "policy.adapter.rank=2")
    for name, stage in (("grpo", "grpo update"), ("dpo", "dpo")):
        for extra in ((), words):
            planned = plan(settings(name, 'reference.model="small"', *extra).config)
            own = plan(settings(name, *extra).config)
            assert planned.models["reference"] == count
            held = 0 if extra else model().num_parameters()
            difference = planned.memory[stage] - own.memory[stage]
            assert difference == pytest.approx(4 * (count - held))


def another_tokenizer():
    from quartet.worlds.tokenizers import word_tokenizer

    return word_tokenizer([*WORDS[1:], "zebra"], ".")


def test_a_reference_that_reads_other_tokens_or_shorter_texts_is_refused(place):
    save(model(), another_tokenizer(), Path("foreign"))
    short = Shape(type="llama", hidden_size=16, num_layers=1, num_heads=2, max_length=8)
    save(create(short, tokenizer(), 0), tokenizer(), Path("short"))
    with pytest.raises(ModelError, match="foreign has another tokenizer than the policy"):
        build(settings("dpo", 'reference.model="foreign"').config)
    with pytest.raises(ModelError, match="short reads at most 8 tokens, .* can have 16"):
        build(settings("dpo", 'reference.model="short"').config)
    check_reference(GAMES, "short", tokenizer(), 8)
    with pytest.raises(ModelError, match="short reads at most 8 tokens, .* the 9 that the policy"):
        check_reference(GAMES, "short", tokenizer(), 9)
    with pytest.raises(ModelError, match=r'reference.model = "./gone": no such folder'):
        build(settings("dpo", 'reference.model="./gone"').config)


def test_a_policy_that_is_a_critic_is_refused_before_anything_is_written(place):
    """Its trunk would be loaded, under a head that was never trained."""
    path = Path("lm/config.json")
    kind = {"architectures": ["LlamaForTokenClassification"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | kind))
    with pytest.raises(ModelError, match="lm: is a LlamaForTokenClassification, which scores text"):
        build(settings("dpo").config)


def exact_kl_to(teacher, policy):
    """The mean KL(policy ‖ teacher) of the token after each prompt, over the whole vocabulary."""
    prompts = [tokenizer()(f"the {noun}")["input_ids"] for noun in ("film", "story", "music")]
    ours, theirs = (
        torch.stack(
            [load_model(f)(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in prompts]
        )
        for f in (policy, teacher)
    )
    return float((ours.exp() * (ours - theirs)).sum(-1).mean().detach())


@pytest.mark.slow
def test_a_small_student_approaches_its_teacher_without_a_reward(place):
    """The teacher writes what it was taught by SFT; the student is smaller and has seen nothing."""
    small = Shape(type="llama", hidden_size=16, num_layers=1, num_heads=2, max_length=64)
    save(create(small, tokenizer(), 0), tokenizer(), Path("small"))
    taught = ["recipe=sft", "sft.steps=30", "sft.lr=2e-2", "sft.batch_size=8"]
    Path("sft.toml").write_text(TABLES)
    shutil.copytree(run("sft", *taught).path / "sft", "teacher")
    record = run("distillation", 'policy.model="small"')
    steps = metrics(record)
    kl = [step["kl/token_k3"] for step in steps]
    assert kl[0] > 4 and max(kl[-5:]) < kl[0] / 2, kl
    assert exact_kl_to("teacher", "small") > 4
    assert exact_kl_to("teacher", record.path / "policy") < 0.1
    assert not any("reward" in step for step in steps), "there is none"
    for step in steps:  # the advantage of a token is its log-ratio, and nothing else
        assert step["advantage/raw_mean"] == pytest.approx(-step["kl/token_k1"], rel=1e-4)
