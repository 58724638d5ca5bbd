from itertools import product

import numpy as np
import pytest

from headwater.datamodules.order import Order, turn

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


@pytest.mark.parametrize("weights", [[1], [1, 1], [3, 1, 2], [0.7, 0.2, 0.1], [1, 0, 1], [1e-3, 1], [1 / 3] * 3, [8, 4, 2, 1, 1]])
def test_every_prefix_of_a_mixture_holds_the_shares_within_one(weights):
    share, taken = np.array(weights) / sum(weights), np.zeros(len(weights), int)
    for index in range(400):
        source, before = turn(index, weights)
        assert before == taken[source]  # each source counts its own turns without a gap
        taken[source] += 1
        assert (np.abs(taken - (index + 1) * share) <= 1).all()


@pytest.mark.parametrize(("weights", "index"), product([[3, 1, 2], [0.7, 0.2, 0.1]], [10**6, 10**9 + 7]))
def test_far_turns_continue_the_count(weights, index):
    counts = {}
    for i in range(index, index + 60):
        source, before = turn(i, weights)
        assert before == counts.get(source, before)
        counts[source] = before + 1
    assert sum(counts.values()) == index + 60
