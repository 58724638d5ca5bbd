"""What a step consists of: last batches, arranged and packed batches, whatever the ranks."""

from types import SimpleNamespace

import numpy as np
import pytest

from headwater.datamodules.mixture import Ledger
from headwater.datamodules.plan import Arrange, Plan, Step, pack

rng = np.random.default_rng(0)


class Lengths:
    """A source of which only lengths and one hint are known."""

    def __init__(self, name, total, batch_size=None):
        self.name, self.total = name, total
        self.source = SimpleNamespace(batch_size=batch_size, weight=1.0)
        self.readers, self.hints = {"text": None, "image": None}, ("txt.cluster",)
        self.text, self.image = rng.integers(1, 60, total), rng.integers(0, 30, total)

    def lengths(self, index):
        return {"text": self.text[index % self.total], "image": self.image[index % self.total]}

    def hint(self, name, index):
        assert name == "txt.cluster"
        return np.where(index % 5 == 4, np.nan, index % self.total // 10)


def plan(*sources, size=16, **options):
    return Plan(sources, Ledger([1.0] * len(sources)), size, **options)


def taken(p, steps):
    return [tuple(pair) for s in range(steps) for pair in zip(*(c.tolist() for c in p.step(s)[:2]))]


@pytest.mark.parametrize(
    ("last", "sizes"),
    [("wrap", [16] * 8), ("drop", [16] * 8), ("short", [16, 16, 16, 2, 16, 16, 16, 2])],
    ids=["wrap", "drop", "short"],
)
def test_the_last_batch_of_an_epoch(last, sizes):
    p = plan(Lengths("a", 50), last=last)
    steps = [p.step(s).place for s in range(8)]
    assert [len(i) for i in steps] == sizes
    first = np.concatenate(steps[: p.steps(0)])
    if last == "wrap":
        assert np.concatenate(steps).tolist() == list(range(128))
    else:
        assert first.tolist() == list(range(48 if last == "drop" else 50))
        assert steps[p.steps(0)][0] == 50  # the second epoch begins with its own first sample


def test_policies_that_need_whole_batches_of_one_source_say_so():
    with pytest.raises(ValueError, match="unit='batch'"):
        plan(Lengths("a", 50), Lengths("b", 50), unit="sample", last="drop")


def test_what_nobody_knows_cannot_be_arranged_by():
    with pytest.raises(ValueError, match=r"expected one of image, length, text, txt\.cluster"):
        plan(Lengths("a", 50), arrange=Arrange("txt.clusters"))


@pytest.mark.parametrize("unit", ["batch", "sample"])
@pytest.mark.parametrize("by", ["length", "text", "txt.cluster"])
def test_arranging_keeps_every_sample_once(unit, by):
    sources = [Lengths("a", 300), Lengths("b", 170)]
    plain = plan(*sources, unit=unit)
    arranged = plan(*sources, unit=unit, arrange=Arrange(by, 4))
    assert sorted(taken(plain, 16)) == sorted(taken(arranged, 16))  # both sources had 8 turns: whole windows
    assert taken(plain, 16) != taken(arranged, 16)
    assert taken(arranged, 16) == taken(plan(*sources, unit=unit, arrange=Arrange(by, 4)), 16)


def test_arranging_by_length_saves_padding():
    source = Lengths("a", 4096)

    def padded(p):
        used = [source.lengths(p.step(s).place)["text"] for s in range(64)]
        return sum(len(u) * u.max() for u in used) / sum(u.sum() for u in used)

    assert padded(plan(source)) > 1.8
    assert padded(plan(source, arrange=Arrange("text", 16))) < 1.1


def test_batches_of_a_window_come_shuffled():
    source = Lengths("a", 4096)
    p = plan(source, arrange=Arrange("text", 16))
    means = [source.lengths(p.step(s).place)["text"].mean() for s in range(16)]
    assert means != sorted(means)
    assert means != sorted(means, reverse=True)


@pytest.mark.parametrize("world", [1, 2, 3, 20])
def test_packed_rows_fit_hold_every_sample_once_and_do_not_depend_on_ranks(world):
    source = Lengths("a", 1000)
    limits = {"text": 100, "image": 60}
    p = plan(source, size=40, pack=limits)
    for step in range(5):
        whole = p.step(step)
        rows = [[whole.place[s] for d in row for s in d] for row in whole.rows]
        assert sorted(i for row in rows for i in row) == sorted(whole.place)
        for name, limit in limits.items():
            assert all(source.lengths(np.array(row))[name].sum() <= limit for row in rows)
        parts = [whole.of_rank(rank, world) for rank in range(world)]
        dealt = [[[part.place[s] for d in row for s in d] for row in part.rows] for part in parts]
        assert [rows[k::world] for k in range(world)] == dealt
        assert max(len(d) for d in dealt) - min(len(d) for d in dealt) <= 1


def test_packing_fills_rows():
    lengths = rng.integers(10, 700, 1000)[:, None]
    rows = pack([[k] for k in range(1000)], lengths, np.array([2048]))
    assert lengths.sum() / (2048 * len(rows)) > 0.98


def test_what_is_longer_than_a_row_has_one_of_its_own():
    rows = pack([[0], [1], [2]], np.array([[5], [50], [5]]), np.array([20]))
    assert rows == [[[1]], [[0], [2]]]


def test_related_samples_are_joined_within_a_row():
    source = Lengths("a", 1000)
    p = plan(source, size=40, pack={"text": 120}, arrange=Arrange("txt.cluster", 4, join=True))
    for step in range(4):
        planned = p.step(step)
        documents = [d for row in planned.rows for d in row]
        assert sorted(s for d in documents for s in d) == list(range(40))
        hints = [set(source.hint("txt.cluster", planned.place[d]).tolist()) for d in documents]
        assert all(len(h) == 1 for h in hints)
        assert any(len(d) > 2 for d in documents)
        assert all(len(d) == 1 for d, h in zip(documents, hints) if h != h)  # of unknown relation
        for row in planned.rows:
            assert source.lengths(planned.place[[s for d in row for s in d]])["text"].sum() <= 120


def test_a_rank_may_have_no_row():
    part = Step(np.zeros(2, int), np.arange(2), None).of_rank(2, 3)
    assert len(part.place) == 0


def test_shares_are_those_of_the_samples():
    p = plan(Lengths("a", 300, 8), Lengths("b", 170, 24))
    assert p.shares(10) == {"a": 0.25, "b": 0.75}
    assert plan(Lengths("a", 300, 8), Lengths("b", 170, 24), unit="sample").shares(10) == {"a": 0.5, "b": 0.5}
