"""An evaluation has one policy in memory at a time."""

import weakref

import pytest

from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.models.forward import policy_logprobs
from quartet.rewards.functions import TextReward
from quartet.rewards.protocol import Weighted
from quartet.stages.evaluation import EvaluationStage
from quartet.training.batch import collate
from tests.support.world import model, prompts, tokenizer


def test_one_policy_at_a_time_is_in_memory_and_the_kl_is_that_of_both(tmp_path):
    alive, most, words = weakref.WeakSet(), [], tokenizer()

    def loads(seed):
        def load(_):
            made = model(seed=seed)
            alive.add(made)
            most.append(len(alive))
            return made

        return load

    stage = EvaluationStage(
        prompts=prompts(4),
        tokenizer=words,
        load_before=loads(0),
        load_after=loads(1),
        rewards=lambda _: [Weighted(TextReward("length", lambda _, text: float(len(text))), 1.0)],
        gold=None,
        sampling=Sampling(max_new_tokens=6),
        micro_batch_tokens=64,
        generator=lambda made, _: NativeGenerator(made, words, frozenset({1}), seed=0),
    )
    run = stage.begin(tmp_path)
    assert [step.number for step in run.steps(0)] == [1, 2]
    summary = run.finish()
    assert most == [1] * 3, "the policy of before is loaded again, for the KL"
    answers = NativeGenerator(model(seed=1), words, frozenset({1}), seed=0).generate(
        prompts(4), Sampling(max_new_tokens=6)
    )
    batch = collate(answers)
    shapes = batch.tokens, batch.lengths, batch.response_mask
    new, old = (policy_logprobs(model(seed=seed), *shapes, 1.0, 64) for seed in (1, 0))
    kl = (new - old).sum(dim=1).mean().item()
    assert kl > 0 and summary["kl"]["mean"] == pytest.approx(kl, rel=1e-5)
