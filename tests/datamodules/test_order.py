import numpy as np
import pytest

from headwater.datamodules.order import Order, quality

SIZES = [5, 1, 0, 7, 3, 4]
TOTAL = sum(SIZES)


def epoch(order, number):
    return [order[number * TOTAL + i] for i in range(TOTAL)]


@pytest.mark.parametrize("window", [0, 1, 2, 16])
def test_each_sample_comes_once_per_epoch(window):
    order = Order(SIZES, 3, window)
    every = {(shard, row) for shard, size in enumerate(SIZES) for row in range(size)}
    for number in (0, 1, 5):
        seen = epoch(order, number)
        assert {e for e, _, _ in seen} == {number}
        assert {(s, r) for _, s, r in seen} == every
        assert len(seen) == len(every)


def test_epochs_and_seeds_differ_and_files_stay_in_order_without_a_window():
    places = [[p[1:] for p in epoch(order, e)] for order in (Order(SIZES, 3), Order(SIZES, 4)) for e in (0, 1)]
    assert len({tuple(p) for p in places}) == 4
    one = Order([20], 3)  # a single shard too
    assert [one[i][1:] for i in range(20)] != [one[i][1:] for i in range(20, 40)]
    assert [p[1:] for p in epoch(Order(SIZES, 3, 0), 2)] == [(s, r) for s, n in enumerate(SIZES) for r in range(n)]


def test_it_is_a_pure_function_of_the_index():
    a, b = Order(SIZES, 3, 2), Order(SIZES, 3, 2)
    forward = [a[i] for i in range(3 * TOTAL)]
    assert [b[i] for i in reversed(range(3 * TOTAL))] == forward[::-1]  # whatever was asked before
    assert b[10**12] == Order(SIZES, 3, 2)[10**12]


@pytest.mark.parametrize("window", [1, 2])
def test_few_shards_are_open_at_a_time(window):
    shards = [s for _, s, _ in epoch(Order(SIZES, 3, window), 0)]
    places = [[i for i, s in enumerate(shards) if s == shard] for shard in set(shards)]
    assert all(sum(p[0] <= i <= p[-1] for p in places) <= window for i in range(TOTAL))


def test_an_empty_source_is_refused():
    with pytest.raises(ValueError, match="no sample"):
        Order([0, 0], 0)


def test_places_of_many_are_those_of_each():
    order = Order(SIZES, 3, 2)
    index = np.array([0, 3 * TOTAL + 7, 5, TOTAL - 1, TOTAL, 10**9])
    assert list(zip(*(column.tolist() for column in order.places(index)))) == [order[int(i)] for i in index]


def test_upcoming_names_the_shards_that_are_needed_next():
    order = Order(SIZES, 3, 2)
    for index in range(2 * TOTAL):
        ahead = order.upcoming(index)
        assert {order[i][1] for i in range(index, index + 2)} - {2} <= set(ahead)
        assert ahead[0] in ahead[:2]


def test_quality_tells_a_shuffle_from_files_in_order():
    sizes = [100] * 50
    assert quality(Order(sizes, 0, 0), 64).displacement == 0
    mixed, whole = quality(Order(sizes, 0, 4), 64), quality(Order(sizes, 0, 50), 64)
    assert quality(Order(sizes, 0, 0), 64).shards < 0.1 < mixed.shards < 0.2 < 0.9 < whole.shards
    assert abs(whole.displacement - 1 / 3) < 0.05
