"""Turns of sources: shares, and a ledger of changes that makes the order a function of it."""

from itertools import product

import numpy as np
import pytest

from headwater.datamodules.mixture import Ledger, Mixture, shares, taken, turns

WEIGHTS = [[1], [1, 1], [3, 1, 2], [0.7, 0.2, 0.1], [1, 0, 1], [1e-3, 1], [1 / 3] * 3, [8, 4, 2, 1, 1]]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_prefix_of_a_mixture_holds_the_shares_within_one(weights):
    share, seen = np.array(weights) / sum(weights), np.zeros(len(weights), int)
    found = turns(0, 400, tuple(weights))
    for index, (source, before) in enumerate(zip(*found)):
        assert before == seen[source]  # each source counts its own turns without a gap
        seen[source] += 1
        assert (np.abs(seen - (index + 1) * share) <= 1).all()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_any_stretch_is_a_part_of_the_whole(weights):
    whole = turns(0, 300, tuple(weights))
    for first, count in ((0, 1), (17, 40), (123, 177), (299, 1)):
        part = turns(first, count, tuple(weights))
        assert part.source.tolist() == whole.source[first : first + count].tolist()
        assert part.before.tolist() == whole.before[first : first + count].tolist()


@pytest.mark.parametrize(("weights", "index"), product([(3, 1, 2), (0.7, 0.2, 0.1)], [10**6, 10**9 + 7]))
def test_far_turns_continue_the_count(weights, index):
    counts = taken(index, weights)
    assert counts.sum() == index
    for source, before in zip(*turns(index, 60, weights)):
        assert before == counts[source]
        counts = counts + (np.arange(len(weights)) == source)


def test_one_epoch_each_takes_every_sample_once():
    sizes = [7, 1, 100, 33]
    found = turns(0, sum(sizes), tuple(shares("epoch", [1] * 4, sizes, 0)))
    for source, size in enumerate(sizes):
        assert found.before[found.source == source].tolist() == list(range(size))


def test_modes():
    assert shares("weights", [3, 1], [10, 1000], 0.5) == [3, 1]
    assert shares("size", [1, 1], [100, 10000], 0.5) == [10, 100]
    assert shares("size", [2, 1], [100, 10000], 0.0) == [2, 1]
    with pytest.raises(ValueError, match="takes every sample once"):
        shares("epoch", [2, 1], [3, 4], 0.5)


@pytest.mark.parametrize("per_step", [1, 5])
def test_changes_continue_every_source_without_a_gap_or_repeat(per_step):
    ledger = Ledger([1, 1, 2])
    mixture = Mixture(ledger, per_step)
    before = [mixture.step(s) for s in range(20)]
    ledger.add(20, [0, 5, 1])
    ledger.add(33, [1, 1, 1])
    after = [mixture.step(s) for s in range(60)]
    for a, b in zip(before, after):
        assert [c.tolist() for c in a] == [c.tolist() for c in b]  # what is past does not change
    seen = np.zeros(3, int)
    for step, (source, count) in enumerate(after):
        assert mixture.counts(step).tolist() == seen.tolist()
        for s, c in zip(source, count):
            assert c == seen[s]
            seen[s] += 1
        assert not (20 <= step < 33 and 0 in source)


def test_a_ledger_is_restored_and_refuses_nonsense():
    ledger = Ledger([1, 2])
    ledger.add(5, [2, 1])
    ledger.add(5, [3, 1])  # decided anew before it began
    again = Ledger([9, 9])
    again.restore(ledger.entries)
    assert again.entries == ledger.entries == [(0, (1.0, 2.0)), (5, (3.0, 1.0))]
    for wrong in ([1], [0, 0], [-1, 2], [float("nan"), 1]):
        with pytest.raises(ValueError, match="expected 2 numbers"):
            ledger.add(9, wrong)
    with pytest.raises(ValueError, match="already planned"):
        ledger.add(3, [1, 1])
