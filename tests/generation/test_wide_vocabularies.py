"""What a large vocabulary costs the decoder: no second copy of the head, and logits that count as memory."""

import torch

from quartet.generation import fused
from quartet.generation.decoders import RowDecoder
from quartet.generation.fused import FusedLinear
from tests.support.world import model


def test_a_wide_matrix_is_not_copied_and_gives_the_same_product(monkeypatch):
    layer = torch.nn.Linear(64, FusedLinear.PACKED // 64, bias=False)
    x = torch.randn(5, 64)
    with torch.inference_mode():
        copied = FusedLinear([layer])
        monkeypatch.setattr(fused, "WIDE_WEIGHT", layer.weight.numel())
        kept = FusedLinear([layer])
        assert kept.packed and kept.weight.data_ptr() == layer.weight.data_ptr()
        assert copied.packed and copied.weight.is_mkldnn
        torch.testing.assert_close(kept(x), copied(x), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(kept(x), layer(x), atol=1e-6, rtol=1e-6)


def test_logits_count_with_the_cache_of_a_row(monkeypatch):
    """A row of 10 columns takes keys and values of 2 layers, 2 x heads x 8 numbers of 4 bytes each, and its logits three
    times; one hundred rows of that fit."""
    made = model()
    config = made.config
    numbers = 2 * 2 * config.num_key_value_heads * config.head_dim * 10
    row_bytes = 4 * numbers + 3 * 4 * config.vocab_size
    monkeypatch.setattr(fused, "cache_bytes", lambda _: 100 * row_bytes + 5)
    assert RowDecoder(made, 10).max_rows == 100
