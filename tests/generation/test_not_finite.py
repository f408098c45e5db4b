"""A model whose logits are not finite is found where it samples, and the sample is named."""

import math

import pytest
import torch

from quartet.errors import NonFinite
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling, draw
from tests.generation.test_episodes import SAMPLING, TOKENIZER, episodes, game_prompts, policy
from tests.support.world import model, prompts, tokenizer

END = 1
SAMPLINGS = [
    {},
    {"top_k": 1},
    {"top_k": 3},
    {"top_p": 0.9},
    {"top_k": 3, "top_p": 0.9},
    {"temperature": 0.5},
]


def overflowing(made):
    """All weights are finite, and no logits are."""
    with torch.no_grad():
        final = made.base_model.ln_f if hasattr(made.base_model, "ln_f") else made.base_model.norm
        final.weight.fill_(3e38)
    assert all(weight.isfinite().all() for weight in made.parameters())
    return made


@pytest.mark.parametrize("changed", SAMPLINGS, ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_finite_weights_with_other_logits_are_named_by_the_first_answer(kind, changed):
    generator = NativeGenerator(overflowing(model(kind)), tokenizer(), frozenset({END}), 0)
    asked = prompts(3)
    with pytest.raises(
        NonFinite, match=f"the log-probability is not finite in sample {asked[0].id}/0"
    ) as caught:
        generator.generate(asked, Sampling(**({"max_new_tokens": 4} | changed)), 2)
    assert caught.value.tokens[: len(asked[0].ids)] == list(asked[0].ids)
    assert all(0 <= token < len(tokenizer()) for token in caught.value.tokens)


def test_of_several_answers_the_one_is_named_whose_logits_are_not_finite():
    class Broken(NativeGenerator):
        def _sample(self, *arguments):
            answers = super()._sample(*arguments)
            answers[5][1][-1] = math.nan
            return answers

    asked = prompts(4)
    with pytest.raises(NonFinite, match=f"in sample {asked[2].id}/1"):
        Broken(model(), tokenizer(), frozenset({END}), 0).generate(
            asked, Sampling(max_new_tokens=3), 2
        )


def test_episodes_end_there_before_the_environment_hears_anything():
    spoken = []

    class Listening:
        def reset(self, prompt):
            return []

        def step(self, response):
            spoken.append(response)
            return [], 0.0, True

    turns = NativeGenerator(overflowing(policy()), TOKENIZER, frozenset({END}), 0)
    with pytest.raises(NonFinite, match="the log-probability is not finite in sample"):
        episodes(turns, make=Listening).generate(game_prompts(2), SAMPLING, 2)
    assert spoken == []


@pytest.mark.parametrize("changed", SAMPLINGS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_beside_one_that_is_not_finite_are_drawn_as_ever(bad, changed):
    logits, noise = (
        torch.randn(3, 7, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0.1, 0.5, 0.9]),
    )
    broken = logits.clone()
    broken[1, 3] = bad
    whole, drawn = (draw(rows, Sampling(**changed), noise) for rows in (logits, broken))
    assert drawn.logprobs[1].isnan() and 0 <= drawn.tokens[1] < 7
    for row in (0, 2):
        assert drawn.tokens[row] == whole.tokens[row] and drawn.logprobs[row] == whole.logprobs[row]
