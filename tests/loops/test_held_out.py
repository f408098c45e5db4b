"""What is held out, judged by several ranks: each reads its share, and all know the whole."""

import pytest
import torch

from quartet.algorithms.preference import PREFERENCES
from quartet.data.records import Comparison, Demonstration
from quartet.distributed.process_group import SINGLE_PROCESS
from quartet.errors import NonFinite
from quartet.loops.preference import held_out_preference
from quartet.loops.reward_model import pair_scores
from quartet.loops.sft import held_out_loss
from quartet.models.actor_critic import freeze
from quartet.models.fused import has_fused_forward
from quartet.models.heads import ScalarModel
from tests.support.thread_ranks import on_ranks
from tests.support.world import model

LENGTHS = [9, 1, 2, 1, 5, 1, 7]
SICK = 19
"""A token that only the last row has."""


def demonstrations():
    last = len(LENGTHS) - 1
    return [
        Demonstration(f"d:{i}", (5, 6), (SICK if i == last else 4, *[4 + i] * n))
        for i, n in enumerate(LENGTHS)
    ]


def comparisons():
    return [
        Comparison(d.id, d.prompt_ids, d.response_ids, (4, 5, 6)[: i % 3 + 1])
        for i, d in enumerate(demonstrations())
    ]


def learnt(made):
    """Other numbers than those of a fresh model."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("micro_batch_tokens", [8, 4096])
def test_the_ranks_together_find_what_one_finds(world, micro_batch_tokens):
    actor = learnt(model())
    judge, before = learnt(ScalarModel.from_trunk(actor, 0, seed=0)), freeze(model())
    loss = PREFERENCES["dpo"]

    def look(process_group):
        preferred = held_out_preference(
            actor, before, comparisons(), loss, micro_batch_tokens, process_group
        )
        scores = pair_scores(judge, comparisons(), micro_batch_tokens, process_group)
        return [
            held_out_loss(actor, demonstrations(), micro_batch_tokens, process_group),
            *preferred.values(),
            *scores.flatten().tolist(),
        ]

    alone = look(SINGLE_PROCESS)
    assert len(set(alone)) > 8, "they tell rows apart"
    for found in on_ranks(world, look):
        assert found == pytest.approx(alone, abs=1e-5)


def test_each_reads_its_share():
    def look(process_group):
        actor, judge = model(), ScalarModel.from_trunk(model(), 0, seed=0)
        read = []
        for made in (actor, judge.model):
            has_fused_forward(made.base_model, 1)  # compares two forwards, once, on every rank
            made.base_model.embed_tokens.register_forward_hook(
                lambda _, args, __: read.append(args[0].numel())
            )
        held_out_loss(actor, demonstrations(), 1, process_group)
        held_out_preference(actor, None, comparisons(), PREFERENCES["simpo"], 1, process_group)
        pair_scores(judge, comparisons(), 1, process_group)
        return sum(read)

    alone = look(SINGLE_PROCESS)
    assert max(on_ranks(2, look)) < 0.7 * alone


def test_what_is_not_finite_on_one_rank_is_so_on_all():
    sick = model()
    judge = ScalarModel.from_trunk(sick, 0, seed=0)
    for made in (sick, judge.model):
        made.base_model.embed_tokens.register_forward_hook(
            lambda _, args, out: torch.where((args[0] == SICK)[..., None], torch.nan, out)
        )

    def look(process_group):
        for ask in (
            lambda: held_out_loss(sick, demonstrations(), 4096, process_group),
            lambda: pair_scores(judge, comparisons(), 4096, process_group),
            lambda: held_out_preference(
                sick, None, comparisons(), PREFERENCES["simpo"], 4096, process_group
            ),
        ):
            with pytest.raises(NonFinite, match="in sample d:6"):
                ask()
        return True

    assert on_ranks(2, look) == [True, True]
