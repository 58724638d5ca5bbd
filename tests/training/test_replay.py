import re
from functools import partial

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from training.continued import run, write

from headwater.training.replay import Forgetting, Shares, drop
from headwater.training.schedules import Linear, Step

FADING = {"old": Linear(1.0, 0.0)}
PLAIN = partial(torch.optim.SGD, lr=0.1)  # Adam makes much of the rounding where a gradient is nothing else
BOTH = {"new": 1.0, "old": 1.0}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write(tmp_path_factory.mktemp("texts"))


def mixed(folder, shares, **options):
    """The ledger of a run, and its parameters."""
    done = run(folder, [partial(Shares, shares, every=2)], train=BOTH, steps=12, optimizer=PLAIN, **options)
    return done.trainer.datamodule.ledger.entries, done.parameters


def test_shares_follow_the_schedule(texts):
    entries, _ = mixed(texts, FADING)
    assert entries[0] == (0, (1.0, 1.0))
    for step, (new, old) in entries[1:]:
        assert step % 2 == 0
        assert new == 1.0
        assert old == pytest.approx(max(0.0, 1 - step / 12))
    assert [step for step, _ in entries[1:]] == [2, 4, 6, 8, 10, 12]


def test_early_only_and_constant(texts):
    entries, _ = mixed(texts, {"old": Step(0.5, 0.0, 0.5)})
    assert entries == [(0, (1.0, 0.5)), (6, (1.0, 0.0))]
    entries, _ = mixed(texts, {"old": 0.25})
    assert entries == [(0, (1.0, 0.25))]


def test_a_resumed_run_draws_the_same(texts, tmp_path):
    entries, through = mixed(texts, FADING)
    mixed(texts, FADING, limit=5, save=tmp_path / "half.ckpt")
    again, resumed = mixed(texts, FADING, resume=tmp_path / "half.ckpt")
    assert again == entries
    assert all(torch.equal(p, resumed[n]) for n, p in through.items())


def test_two_ranks_share_one_ledger(ranks, texts):
    plain = mixed(texts, FADING)
    a, b = ranks(mixed, texts, FADING)
    assert a[0] == b[0] == plain[0]
    assert_close(a[1], plain[1], rtol=1e-4, atol=1e-5)


def test_a_drop_is_what_the_curve_says():
    curve = [(0, 1.0), (10, 3.0), (20, 2.0), (40, 0.0), (50, 0.5)]
    grid = np.linspace(0, 50, 500_001)
    above = np.interp(grid, *zip(*curve)) - 1.0
    found = drop(curve)
    assert found.depth == pytest.approx(above.max())
    assert found.width == pytest.approx((above > 0).mean() * 50, abs=1e-3)
    assert found.area == pytest.approx(np.clip(above, 0, None).mean() * 50, abs=1e-3)
    assert found.end == pytest.approx(-0.5)
    assert drop([(0, 1.0), (5, 1.0), (9, 0.5)]) == (0.0, 0.0, 0.0, -0.5)
    assert drop([(3, 2.0)]) == (0.0, 0.0, 0.0, 0.0)
    assert drop([(0, 1.0), (4, 1.0), (6, 2.0)])[:3] == (1.0, 2.0, 1.0)


def forgotten(folder, strategy=None, **options):
    done = run(folder, [partial(Forgetting, ["old"], every=2)], steps=6, strategy=strategy, optimizer=PLAIN, **options)
    return done.callbacks[0].curves["old"], done.parameters


def test_the_loss_of_old_data_is_watched_without_touching_the_run(texts):
    curve, watched = forgotten(texts)
    assert [step for step, _ in curve] == [0, 2, 4, 6]
    assert all(torch.equal(p, watched[n]) for n, p in run(texts, steps=6, optimizer=PLAIN).parameters.items())
    learned, _ = forgotten(texts, train={"old": 1.0})
    assert learned[0] == curve[0]
    assert learned[-1][1] < learned[0][1]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_watch_together(ranks, texts, strategy):
    curve, parameters = forgotten(texts)
    (a, x), (b, _) = ranks(forgotten, texts, strategy)
    assert a == b
    assert_close(a, curve, rtol=1e-4, atol=1e-5)
    assert_close(x, parameters, rtol=1e-4, atol=1e-5)


def test_curves_go_on_after_a_resume(texts, tmp_path):
    through, _ = forgotten(texts)
    forgotten(texts, limit=3, save=tmp_path / "half.ckpt")
    assert forgotten(texts, resume=tmp_path / "half.ckpt")[0] == through


@pytest.mark.parametrize(
    ("error", "make"),
    [
        ("at least one source", lambda: Shares({})),
        ("found shares of ['others']", lambda: Shares({"others": 1.0})),
        ("expected a source", lambda: Forgetting([])),
        ("the held-out ones are old", lambda: Forgetting(["others"])),
        ("no term of part 'other'", lambda: Forgetting(["old"], part="other")),
    ],
)
def test_mistakes_are_explained(texts, error, make):
    with pytest.raises(ValueError, match=re.escape(error)):
        run(texts, [make])
