"""What a decoder and a learner must agree on."""

from typing import Any

import torch

from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.models.forward import masked_logprobs
from tests.support.world import prompts, tokenizer


def check_rows(made: Any, decoder: Any, near: dict[str, float]) -> None:
    """Prompts of three lengths, two samples each, of which some end: each has the logits that it has alone."""
    texts = [[5, 9, 21, 33, 4, 17, 8, 30, 12, 11, 3], [7, 12, 30], [6]]
    logits = decoder.prefill(texts, 2)
    texts = [list(text) for text in texts for _ in range(2)]
    for step in range(8):
        for text, ours in zip(texts, logits, strict=True):
            alone = made(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
            torch.testing.assert_close(ours, alone, **near)
        if step == 3:
            kept = decoder.keep(torch.tensor([True, False, False, True, True, False]))
            texts = [texts[row] for row in kept.tolist()]
        tokens = torch.randint(3, 40, (len(texts),))
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text.append(token)
        logits = decoder.step(tokens)


def check_logprobs(made: Any, max_new_tokens: int, near: dict[str, float]) -> None:
    """The log-probs that a generator records are those of the learner."""
    generator = NativeGenerator(made, tokenizer(), frozenset({3}), 0)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0.8)
    for r in generator.generate(prompts(6), sampling, 2):
        tokens = torch.tensor([[*r.prompt.ids, *r.response_ids]])
        mask = torch.arange(tokens.shape[1])[None] >= len(r.prompt.ids)
        learner = masked_logprobs(made, tokens, mask, 0.8)[mask]
        torch.testing.assert_close(learner, torch.tensor(r.logprobs), **near)
