"""Meters equal their formulas typed anew, are logged by default, agree on all ranks, and say when a tower collapses."""

import csv
import math
import warnings
from functools import partial

import numpy as np
import pytest
import runs
import torch
from torch.nn import functional as F

from headwater.datamodules.datamodule import ShardDataModule, Source
from headwater.datamodules.writer import ShardWriter
from headwater.modalities import Text
from headwater.model import Model
from headwater.objectives import Causal
from headwater.pretrainer import Pretrainer
from headwater.tokens import Tokens
from headwater.training import meters
from headwater.training.meters import Meters
from headwater.training.metrics import MetricsFile
from headwater.training.schedules import constant
from headwater.trunk import Trunk


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def distance(a, b):
    return sum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True))


def test_formulas():
    torch.manual_seed(0)
    a, b = unit(7, 5), unit(7, 5)
    values = np.linalg.svd(a.numpy(), compute_uv=False)
    share = values / values.sum()
    assert math.isclose(meters.effective_rank(a), math.exp(-sum(s * math.log(s) for s in share)), rel_tol=1e-9)
    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    cosine = sum(float(a[i] @ a[j]) for i, j in pairs) / len(pairs)
    assert math.isclose(meters.mean_cosine(a), cosine, rel_tol=1e-9)
    even = math.log(sum(math.exp(-2 * distance(a[i], a[j])) for i, j in pairs) / len(pairs))
    assert math.isclose(meters.uniformity(a), even, rel_tol=1e-9)
    assert math.isclose(meters.alignment(a, b), sum(distance(x, y) for x, y in zip(a, b, strict=True)) / 7, rel_tol=1e-9)
    centres = [[sum(float(x[i][d]) for i in range(7)) / 7 for d in range(5)] for x in (a, b)]
    assert math.isclose(meters.gap(a, b), math.dist(*centres), rel_tol=1e-9)
    deviations = [np.std(a[:, d].numpy()) for d in range(5)]
    assert math.isclose(meters.spread(a), sum(deviations) / 5 * math.sqrt(5), rel_tol=1e-9)


def test_what_meters_say_of_spread_and_collapsed_vectors():
    torch.manual_seed(0)
    even = unit(2000, 16)
    assert meters.effective_rank(even) > 15.5
    assert meters.spread(even) > 0.98
    assert abs(meters.mean_cosine(even)) < 0.01
    line = torch.randn(100, 1, dtype=torch.float64) * unit(1, 16)
    assert math.isclose(meters.effective_rank(line), 1.0, abs_tol=1e-6)
    point = F.normalize(unit(1, 16) + 1e-3 * unit(100, 16), dim=-1)
    assert meters.spread(point) < 0.01
    assert meters.mean_cosine(point) > 0.999
    assert meters.alignment(even, even) == meters.gap(even, even) == 0


def test_samples_that_lack_a_modality_do_not_count():
    torch.manual_seed(0)
    a, b, c = torch.randn(6, 4), torch.randn(6, 4), torch.randn(6, 3)
    here = {"a": torch.tensor([1, 1, 1, 1, 0, 0]).bool(), "b": torch.tensor([0, 1, 1, 1, 1, 1]).bool(), "c": torch.ones(6).bool()}
    here["d"] = torch.tensor([1, 0, 0, 0, 0, 0]).bool()
    found = meters.measure({"a": a, "b": b, "c": c, "d": c}, here)
    names = {f"{m}/{n}" for m in "abc" for n in ("rank", "std", "cosine", "uniformity")}
    assert set(found) == names | {"a-b/alignment", "a-b/gap"}  # others have no common size, or one sample
    ua, ub = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    assert math.isclose(found["a-b/alignment"], meters.alignment(ua[1:4], ub[1:4]), rel_tol=1e-5)
    assert math.isclose(found["a/rank"], meters.effective_rank(a[:4]), rel_tol=1e-5)
    assert meters.measure({"a": a}, {"a": torch.zeros(6).bool()}) == {}


def test_equal_signals_are_counted_once():
    t = Tokens(torch.tensor([[1, 2, 9], [2, 1, 9], [1, 2, 7], [5, 5, 5]]), torch.zeros(4, 3, 1))
    t = t._replace(valid=torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 0], [0, 0, 0]]).bool())
    assert meters.distinct(t) == 2
    vectors = t._replace(x=torch.stack([t.x.float(), torch.nan * t.x], -1))
    assert meters.distinct(vectors) == 2


# runs


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    with ShardWriter(folder / "{:03d}.tar") as writer:
        for k in range(24):
            writer.write(f"{k:03d}", {"txt": f"{k * 7 % 24} words of number {k} ".encode()})
    return str(folder)


def fit(shards, callbacks=(), steps=4, sharded=False, folder=None, pack=None, break_it=False, **options):
    """The callbacks and the trained parameters of a short run on texts."""
    torch.manual_seed(0)
    model = Model({"text": Text(Trunk(16, depth=1, heads=2, drop_path=0.5), length=24)}, space=8)
    if break_it:
        torch.nn.init.zeros_(model.projections["text"].weight)
    pretrainer = Pretrainer(model, Causal, schedule=constant, optimizer=partial(torch.optim.SGD, lr=0.1))
    logger = MetricsFile(folder) if folder else False
    trainer = runs.trainer(steps, sharded, callbacks=list(callbacks), logger=logger, **options)
    trainer.fit(pretrainer, ShardDataModule(train={"texts": Source(shards)}, batch_size=9, workers=0, pack=pack))
    found = [c for c in trainer.callbacks if isinstance(c, Meters)]
    return found, {n: p.detach() for n, p in pretrainer.named_parameters()}


def last(*args, **kwargs):
    """What a run with meters at every second step measured last."""
    ((found,), _) = fit(*args[:1], [Meters(every=2, samples=args[1] if len(args) > 1 else 256)], *args[2:], **kwargs)
    return found.last


def last_of_shares(shards):
    return last(shards, 256, 4, True)


def test_every_run_has_meters_and_a_recipe_can_set_or_stop_them(shards):
    (by_default,), _ = fit(shards, steps=1)
    assert by_default.every == 100
    own = Meters(every=0)
    assert fit(shards, [own], steps=1)[0] == [own]
    assert own.last == {}


def test_meters_are_written_beside_the_losses(shards, tmp_path):
    (found,), _ = fit(shards, [Meters(every=2)], folder=tmp_path, log_every_n_steps=100)
    with (tmp_path / "metrics.csv").open() as file:
        rows = [(int(r["step"]), r["name"], float(r["value"])) for r in csv.DictReader(file)]
    written = {(step, name): value for step, name, value in rows if name.startswith("meters/")}
    assert {step for step, _ in written} == {1, 3}  # the second and the fourth, counted from 0
    assert {name for _, name in written} == {f"meters/text/{n}" for n in ("rank", "std", "cosine", "uniformity")}
    assert math.isclose(written[3, "meters/text/rank"], found.last["text/rank"], rel_tol=1e-5)


def test_measuring_changes_nothing(shards):
    (_, plain), (_, measured) = (fit(shards, [Meters(every=every)]) for every in (0, 1))
    assert all(torch.equal(plain[n], measured[n]) for n in plain)


def test_packing_and_ranks_measure_the_same(ranks, shards):
    one = last(shards)
    assert one["text/rank"] > 1
    packed = last(shards, pack={"text": 60})
    two, shares = ranks(last, shards), ranks(last_of_shares, shards)
    for other in (packed, *two, *shares):
        assert other.keys() == one.keys()
        assert all(math.isclose(other[n], one[n], rel_tol=1e-3, abs_tol=1e-4) for n in one), (one, other)


def test_few_samples_are_enough(shards):
    assert last(shards, 4) != last(shards)
    assert last(shards, 4)["text/rank"] <= 4


def test_a_collapsed_tower_is_named_once_with_what_to_do(shards):
    with pytest.warns(UserWarning, match=r"meters/text/std is 0.*expected above.*text may be collapsing.*learning rate") as told:
        fit(shards, [Meters(every=1)], break_it=True)
    assert sum("meters/text/std" in str(w.message) for w in told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(workers|LeafSpec|Total length|Checkpoint|tensorboard|samples, fewer).*")
        fit(shards, [Meters(every=1, alarms=False)], break_it=True)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="every=-1"):
        Meters(every=-1)
    with pytest.raises(ValueError, match="samples=1"):
        Meters(samples=1)
