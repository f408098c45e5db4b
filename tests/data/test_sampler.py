import pytest

from quartet.data.sampler import Sampler


def test_an_epoch_has_every_record_once_in_an_order_of_its_own():
    sampler = Sampler(list(range(10)), 5, seed=0)
    first, second = sampler.next() + sampler.next(), sampler.next() + sampler.next()
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second != list(range(10))


def test_batches_run_over_the_end_of_an_epoch():
    sampler = Sampler(list(range(3)), 7, seed=0)
    assert sorted(sampler.next()[:6]) == [0, 0, 1, 1, 2, 2]


def test_it_goes_on_from_its_state():
    one, two = (Sampler(list(range(10)), 3, seed=4) for _ in range(2))
    for _ in range(5):
        one.next()
    two.load_state(one.state())
    assert [one.next() for _ in range(5)] == [two.next() for _ in range(5)]


def test_seeds_differ():
    assert Sampler(list(range(99)), 9, seed=1).next() != Sampler(list(range(99)), 9, seed=2).next()


def test_no_records_are_refused():
    with pytest.raises(ValueError, match="no records"):
        Sampler([], 1, seed=0)
