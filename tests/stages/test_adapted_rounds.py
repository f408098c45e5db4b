"""Rounds of labels with adapters, ensembles, frozen layers, encoders and servers: a later round goes on from the models that the
round before wrote, and measures from the SFT policy, as whole models do."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from quartet.assembly import Assembler, stage
from quartet.assembly.checkpoint_models import write_models
from quartet.config.toml import read_settings
from quartet.models.adapters import POLICY, REFERENCE, adapter_parameters, adapters_of
from quartet.models.forward import masked_logprobs
from quartet.models.heads import ScalarModel
from quartet.models.language_model import load_model
from quartet.models.text_classifier import load_scorer
from tests.generation.test_servers import served
from tests.rewards.test_text_models import bert
from tests.support.tiny_run import ROUND, TWO_ROUNDS, make_run

pytestmark = pytest.mark.slow
LORA = 'policy.adapter={type="lora", rank=2}'
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
LENGTHS = torch.tensor([6, 4])


def run_of(root, *words):
    return make_run(root, "labelled-reviews", *TWO_ROUNDS, *words)


def assembler_of(run):
    return Assembler(read_settings(run.path / "config.resolved.toml").config)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two rounds with an adapter and two reward models, which are adapters, too."""
    return run_of(tmp_path_factory.mktemp("adapted"), LORA, "reward_model.members=2")


@pytest.fixture(scope="module")
def learner(run):
    """The learner of the second round's PPO, before its first step."""
    return stage(assembler_of(run), "ppo.2").load_components(run.path).learner


@torch.no_grad()
def logprobs(model):
    mask = torch.arange(6) < LENGTHS[:, None]
    mask[:, 0] = False
    return masked_logprobs(model, TOKENS, mask, 1.0)


@torch.no_grad()
def scores(model):
    return model.scores(TOKENS, LENGTHS)


def test_the_policy_goes_on_under_the_adapter_of_the_round_before(run, learner):
    actor, before = learner.models.actor, run.path / "round-1" / "policy"
    assert adapters_of(actor) >= {POLICY}
    saved = load_file(before / "adapter" / "adapter_model.safetensors")
    mine = [p.detach() for p in adapter_parameters(actor, POLICY)]
    assert len(mine) == len(saved)
    assert all(any(torch.equal(p, q) for q in saved.values()) for p in mine)
    assert all(p.requires_grad for p in adapter_parameters(actor, POLICY))
    torch.testing.assert_close(logprobs(actor), logprobs(load_model(before)), atol=1e-5, rtol=0)


def test_the_reference_stays_the_sft_policy(run, learner):
    sft, before = (load_model(run.path / name) for name in ("sft", "round-1/policy"))
    torch.testing.assert_close(logprobs(learner.reference), logprobs(sft), atol=1e-5, rtol=0)
    assert (logprobs(before) - logprobs(sft)).abs().max() > 1e-3
    assert run.series["ppo"].columns["kl"][0] == pytest.approx(0, abs=1e-5)
    assert run.series["ppo.2"].columns["kl"][0] > 1e-4


def test_the_base_under_the_adapter_is_the_sft_policy_to_the_end(run):
    """What the last policy has learnt in both rounds is one adapter of rank 2 on the SFT policy."""
    name = "model.layers.0.mlp.down_proj.weight"
    last, sft = (load_file(run.path / p / "model.safetensors")[name] for p in ("policy", "sft"))
    singular = torch.linalg.svdvals((last - sft).double())
    assert singular[1] > 1e-4 and singular[2] < 1e-6


@pytest.mark.parametrize("member", [1, 2])
def test_each_reward_model_of_an_ensemble_goes_on_from_its_own(run, member):
    name = f"reward_model-{member}"
    scorer, policy = stage(assembler_of(run), f"{name}.2").load_models(run.path, 0)
    before = {n: ScalarModel.load(run.path / "round-1" / f"reward_model-{n}") for n in (1, 2)}
    torch.testing.assert_close(scores(scorer), scores(before[member]), atol=1e-5, rtol=0)
    assert (scores(scorer) - scores(before[3 - member])).abs().max() > 1e-3
    trained = {p.shape for p in scorer.parameters() if p.requires_grad}
    assert trained and all(2 in shape or shape[0] == 1 for shape in trained), "matrices of rank 2"
    assert not any(p.requires_grad for p in adapter_parameters(policy, POLICY))
    asked = load_model(run.path / "round-1" / "policy")
    torch.testing.assert_close(logprobs(policy), logprobs(asked), atol=1e-5, rtol=0)
    configs = [
        json.loads((place / name / "config.json").read_text())
        for place in (run.path / "round-1", run.path)
    ]
    assert configs[0]["pad_token_id"] == configs[1]["pad_token_id"] is not None
    assert configs[0]["quartet_reward_centre"] != configs[1]["quartet_reward_centre"]


def test_the_critic_starts_from_the_first_reward_model_of_its_round(run, learner):
    reward_model = ScalarModel.load(run.path / "reward_model-1")
    torch.testing.assert_close(
        scores(learner.models.critic), scores(reward_model), atol=1e-5, rtol=0
    )


def test_every_member_is_a_stage_of_every_round(run):
    names = [name for name in run.series if name.startswith("reward_model")]
    assert names == ["reward_model-1", "reward_model-2", "reward_model-1.2", "reward_model-2.2"]
    held_out = [run.summary(name)["held_out_accuracy"] for name in names]
    assert len(held_out) == 4


def test_a_base_that_the_run_creates_is_the_same_in_every_round(tmp_path):
    run = run_of(tmp_path, LORA, f"recipe={ROUND * 2}")
    assembler = assembler_of(run)
    first, second = (assembler.in_round(n).models.initial_policy(run.path) for n in (1, 2))
    for name, weight in first.named_parameters():
        other = dict(second.named_parameters())
        mine = other.get(name, other.get(f"{name.removesuffix('.weight')}.base_layer.weight"))
        assert torch.equal(mine, weight), name


def test_the_models_of_a_checkpoint_of_each_round_are_those_that_it_wrote(run, tmp_path):
    for name, place in (("ppo-000002", run.path / "round-1"), ("ppo.2-000004", run.path)):
        scratch = tmp_path / name
        scratch.mkdir()
        write_models(run.path, run.path / "checkpoints" / name, scratch)
        for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
            mine, theirs = (load_file(p / "policy" / file) for p in (scratch, place))
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], value) for key, value in theirs.items())


def test_on_a_base_in_4_bits_adapters_go_on_and_that_of_sft_is_the_reference(tmp_path):
    pytest.importorskip("bitsandbytes")
    made = run_of(tmp_path, LORA, "policy.quantize=nf4")
    learner = stage(assembler_of(made), "ppo.2").load_components(made.path).learner
    for name, place in ((POLICY, "round-1/policy"), (REFERENCE, "sft")):
        saved = load_file(made.path / place / "adapter" / "adapter_model.safetensors")
        mine = adapter_parameters(learner.models.actor, name)
        assert len(mine) == len(saved)
        assert all(any(torch.equal(p, q) for q in saved.values()) for p in mine)
    assert made.series["ppo"].columns["kl"][0] == pytest.approx(0, abs=1e-5)
    assert made.series["ppo.2"].columns["kl"][0] > 1e-4


def test_frozen_layers_stay_those_of_the_sft_policy(tmp_path):
    run = run_of(tmp_path, "policy.frozen_layers=1", "policy.create.num_layers=2")
    sft, last = (load_file(run.path / p / "model.safetensors") for p in ("sft", "policy"))
    same = {name for name, weight in sft.items() if torch.equal(weight, last[name])}
    assert {name for name in sft if "layers.0." in name} <= same
    assert not any("layers.1." in name and name.endswith("proj.weight") for name in same)
    reference = stage(assembler_of(run), "ppo.2").load_components(run.path).learner.reference
    of_sft = logprobs(load_model(run.path / "sft"))
    torch.testing.assert_close(logprobs(reference), of_sft, atol=1e-5, rtol=0)


def test_a_reward_model_on_an_encoder_goes_on_in_the_next_round(tmp_path):
    bert(tmp_path / "bert", AutoModelForMaskedLM)
    words = (f"reward_model.model={tmp_path / 'bert'}", "data.unusable=drop")  # it knows few words
    run = run_of(tmp_path, *words)
    scorer, _ = stage(assembler_of(run), "reward_model.2").load_models(run.path, 0)
    before = load_scorer(run.path / "round-1" / "reward_model", None)
    torch.testing.assert_close(scores(scorer), scores(before))
    assert any(p.requires_grad for p in scorer.parameters())
    assert type(scorer) is type(before)


@pytest.mark.parametrize("words", [(), (LORA, "generator.adapter=true")])
def test_servers_sample_with_the_weights_of_their_round(tmp_path, run, words):
    with served(run.path / "sft") as (url, engine):
        where = f'generator={{type="vllm", urls=["{url}"]}}'
        made = run_of(tmp_path, where, "rollout.staleness=0", *words)
        assert len(engine.asked) > 4 * 8
    assert made.steps() == [1, 2, 3, 4]
    for name in ("ppo", "ppo.2"):
        assert max(made.series[name].columns["sampler_mismatch"]) < 1e-3
