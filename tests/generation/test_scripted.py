from quartet.generation.protocol import Weights
from quartet.generation.sampling import Sampling
from quartet.generation.scripted import ScriptedGenerator
from tests.support.world import prompts, tokenizer


def test_answers_come_in_order_and_over_again():
    scripted = ScriptedGenerator(["good", "not bad"], tokenizer())
    scripted.load_weights(Weights(2, {}))
    rollouts = scripted.generate(prompts(3), Sampling(max_new_tokens=8))
    assert [r.response for r in rollouts] == ["good", "not bad", "good"]
    assert rollouts[0].response_ids[-1] == tokenizer().eos_token_id
    assert rollouts[0].policy_version == 2


def test_a_long_answer_is_cut_at_the_limit():
    rollout = ScriptedGenerator(["good bad long short"], tokenizer()).generate(
        prompts(1), Sampling(max_new_tokens=3)
    )[0]
    assert len(rollout.response_ids) == len(rollout.logprobs) == 3
    assert rollout.finish_reason == "length"
