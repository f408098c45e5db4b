"""Whatever changes the sampler's distribution is computed by the learner, or refused: a test for each row of the table in
docs/algorithms.md. Ids that the tokenizer lacks are in tests/models/test_support.py, filters in
tests/training/test_keep_mask.py."""

import dataclasses

import pytest
import torch

from quartet.config.rules import untrained_filter
from quartet.config.toml import ConfigError, read_settings
from quartet.generation.dialects import DIALECTS
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.models.forward import masked_logprobs
from quartet.recipes import recipe_path
from quartet.runtime.job import Job
from quartet.runtime.lifecycle import CannotRun, begin
from quartet.training.batch import collate
from tests.support.world import model, prompts, tokenizer

SERVER = "generator={type='vllm', urls=['http://x']}"


def sampled(policy, sampling):
    ends = frozenset({tokenizer().eos_token_id})
    return NativeGenerator(policy, tokenizer(), ends, 0).generate(prompts(4), sampling)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_learner_divides_by_the_temperature(temperature):
    policy = model()
    batch = collate(sampled(policy, Sampling(max_new_tokens=6, temperature=temperature)))
    ours = masked_logprobs(policy, batch.tokens, batch.response_mask, temperature)
    assert (ours - batch.rollout_logprobs).abs().max() < 1e-5


def test_the_native_generator_reads_no_sampling_settings_of_the_model():
    plain, other = model(), model()
    settings = {"top_k": 1, "top_p": 0.1, "temperature": 9.0, "repetition_penalty": 5.0}
    other.generation_config.update(
        **settings, do_sample=True, min_new_tokens=6, suppress_tokens=[5]
    )
    sampling = Sampling(max_new_tokens=6)
    assert sampled(plain, sampling) == sampled(other, sampling)


@pytest.mark.parametrize("name", DIALECTS)
def test_requests_to_servers_leave_no_sampling_setting_to_the_server(name):
    order = DIALECTS[name].write([1], 4, Sampling(temperature=0.7), [2], 3, None)
    said = order.body["sampling_params"]
    neutral = {
        "temperature": 0.7,
        "top_k": -1,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        {"vllm": "min_tokens", "sglang": "min_new_tokens"}[name]: 0,
    }
    assert said | neutral == said


@pytest.mark.parametrize(
    "key",
    ["min_p", "typical_p", "repetition_penalty", "bad_words"],
)
def test_what_the_learner_does_not_compute_is_no_setting(key):
    with pytest.raises(ConfigError, match=f"rollout.{key}: no such key"):
        read_settings(recipe_path("sums"), [f"rollout.{key}=1"], "recipe sums")


@pytest.mark.parametrize(
    ("recipe", "words", "sentence"),
    [
        ("sums", ["rollout.top_p=0.9"], "rollout.top_p = 0.9: .* Set rollout.keep_mask = true"),
        ("sums", ["rollout.top_k=5"], "rollout.top_k = 5: the distribution without this filter"),
        ("sums", ["rollout.min_new_tokens=2"], "rollout.min_new_tokens = 2: the distribution"),
        ("reviews", [SERVER, "rollout.top_p=0.9"], "Servers do not tell which tokens they kept"),
    ],
)
def test_a_new_run_with_a_filter_that_is_not_trained_is_refused(recipe, words, sentence, tmp_path):
    words = [*words, f"run.folder={tmp_path / 'runs'}"]
    settings = read_settings(recipe_path(recipe), words, f"recipe {recipe}")
    with pytest.raises(CannotRun, match=sentence):
        begin(settings, Job([], None, [], settings.config, {}, torch.device("cpu")))
    assert not (tmp_path / "runs").exists()


def test_a_filter_that_is_trained_or_that_nothing_samples_with_is_not():
    config = read_settings(recipe_path("sums"), ["rollout.top_k=5"], "recipe sums").config
    kept = dataclasses.replace(config.rollout, keep_mask=True)
    assert untrained_filter(config) is not None
    assert untrained_filter(dataclasses.replace(config, rollout=kept)) is None
    assert untrained_filter(dataclasses.replace(config, recipe=("sft",), algorithm=None)) is None
