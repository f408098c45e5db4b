import torch

from quartet.algorithms.masked import all_equal_in_group, group_mean, group_std, masked_mean, whiten

MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_masked_mean_counts_only_the_mask():
    # (1 + 2 + 6) / 3
    assert masked_mean(torch.tensor([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0]]), MASK) == 3


def test_what_is_masked_may_be_anything():
    poisoned = torch.tensor([[1.0, 2.0, torch.nan], [6.0, torch.inf, -torch.inf]])
    assert masked_mean(poisoned, MASK) == 3
    assert whiten(poisoned, MASK).isfinite().all()


def test_nothing_masked_gives_zero():
    assert masked_mean(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)) == 0


def test_whitening_uses_the_population_variance():
    # 1, 2, 6: mean 3, squares 4 + 1 + 9 = 14, variance 14/3, σ = 2.1602; (1 − 3)/2.1602 = −0.92582
    x = torch.tensor([[1.0, 2.0, 0.0], [6.0, 0.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[-0.92582, -0.46291, 0.0], [1.38873, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(whiten(x, MASK), expected, atol=1e-5, rtol=0)


def test_group_statistics():
    # group 7: scores 1, 0, 0, 0: mean 1/4, sample std √(0.75 / 3) = 0.5; group 3: one score
    scores, groups = torch.tensor([1.0, 5.0, 0.0, 0.0, 0.0]), torch.tensor([7, 3, 7, 7, 7])
    assert group_mean(scores, groups).tolist() == [0.25, 5.0, 0.25, 0.25, 0.25]
    assert group_std(scores, groups).tolist() == [0.5, 0.0, 0.5, 0.5, 0.5]
    assert all_equal_in_group(scores, groups).tolist() == [False, True, False, False, False]
