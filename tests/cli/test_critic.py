"""quartet critic: of a run that is there, of runs that have nothing to audit."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import quartet
from quartet.assembly.assembler import Assembler
from quartet.assembly.critic import _audited
from quartet.cli import app
from quartet.config.toml import read_settings
from quartet.experience import Prompt, Rollout
from quartet.runs.critic_audits import critic_audits
from quartet.training.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow

FEW = ("--prompts", "3", "--prefixes", "2", "--continuations", "3")


def critic(*words):
    done = CliRunner().invoke(app, ["critic", *map(str, words)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def contents(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def run(ppo_run, tmp_path):
    """A copy of the run with its models."""
    return shutil.copytree(ppo_run.path, tmp_path / "run")


def changed(run, before, after):
    path = run / "config.resolved.toml"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


@pytest.mark.slow
def test_the_verb_keeps_its_results_and_changes_nothing_else(run):
    before = contents(run)
    done = critic(run, *FEW)
    assert done.exit_code == 0, done.output
    assert "On average" in done.output and "λ = 0.95 (the run’s)" in done.output
    file = run / "critic_audits" / "ppo-000014.json"
    after = contents(run)
    assert after.pop(file.relative_to(run)) and after == before
    audits, problems = critic_audits(run)
    assert problems == [] and audits[0]["step"] == 14 and audits[0]["prompts"] == 3
    assert any("KL penalty" in phrase for phrase in audits[0]["compared"])
    audit = quartet.critic_audit(run, prompts=3, prefixes=2, continuations=3)
    assert audit.numbers == json.loads(file.read_text()) == audits[0]
    assert audit.sentences[0] in done.output and len(audit.figures()) == 3
    text = (Path(__file__).parents[2] / "docs" / "critic.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    few = f'"{run}", prompts=3, prefixes=2, continuations=3'
    exec(block.replace('"runs/latest", step=8', few), {})
    again = critic(run, *FEW, "--json", "--seed", 5)
    assert json.loads(again.stdout)["seed"] == 5


@pytest.mark.slow
def test_the_critic_of_the_checkpoint_is_what_is_audited(ppo_run):
    """Its values, rewards and log-probs of the probes are those that the run recorded after that step."""
    path = ppo_run.path / "checkpoints" / "ppo-000014"
    checkpoint = read_checkpoint(path)
    config = read_settings(ppo_run.path / "config.resolved.toml").config
    audited = _audited(Assembler(config), ppo_run.path, checkpoint)
    recorded = ppo_run.sample(14, 0, "probes")
    begin = recorded["is_response"].index(True)
    ids = recorded["token_id"]
    response = tuple(ids[begin:])
    rollout = Rollout(
        "probe",
        Prompt("probe", tuple(ids[:begin]), ""),
        0,
        response,
        "".join(recorded["text"][begin:]),
        (0.0,) * len(response),
        "stop",
        0,
        score=recorded["score"][0],
    )
    batch = audited.score([rollout])
    for name, numbers in (("value", batch.values), ("logprob", batch.old_logprobs)):
        found = numbers[0, begin:].tolist()  # files of rollouts hold numbers in half precision
        assert found == pytest.approx(recorded[name][begin:], abs=2e-3, rel=2e-3)
        earlier = ppo_run.sample(1, 0, "probes")[name][begin:]
        assert found != pytest.approx(earlier, abs=2e-3, rel=2e-3)
    rewards = audited.algorithm.token_rewards(batch)[0, begin:].tolist()
    assert rewards == pytest.approx(recorded["reward"][begin:], abs=2e-3)


def test_a_run_without_a_critic(grpo_run):
    done = critic(grpo_run.path)
    assert done.exit_code == 2 and "grpo trains no critic" in done.output


def test_a_run_without_checkpoints(run):
    shutil.rmtree(run / "checkpoints")
    done = critic(run)
    assert done.exit_code == 2 and "has no checkpoint of ppo" in done.output


def test_a_step_without_a_checkpoint_names_those_that_are_there(run):
    done = critic(run, "--step", 3)
    assert done.exit_code == 2
    assert "has no checkpoint ppo-000003. There are ppo-000014" in done.output


def test_a_damaged_checkpoint(run):
    state = run / "checkpoints" / "ppo-000014" / "state.json"
    state.write_text(state.read_text()[:-5])
    done = critic(run)
    assert done.exit_code == 2 and "ppo-000014: state.json has" in done.output


def test_a_run_with_servers(run):
    changed(
        run,
        '[generator]\ntype = "native"',
        '[generator]\ntype = "vllm"\nurls = ["http://127.0.0.1:1"]',
    )
    done = critic(run)
    assert done.exit_code == 2 and 'samples with generator.type = "vllm"' in done.output


def test_no_run_at_all(tmp_path):
    done = critic(tmp_path / "nothing")
    assert done.exit_code == 2 and len(done.output.strip().splitlines()) == 1
