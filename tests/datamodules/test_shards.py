"""Sources and batches: what a pattern means, broken members, and batches that do not depend on workers or ranks."""

import os
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from headwater.datamodules.files import expand
from headwater.datamodules.mixture import Ledger
from headwater.datamodules.plan import Plan
from headwater.datamodules.shards import ShardDataset
from headwater.datamodules.sources import OpenSource, Source
from headwater.datamodules.writer import ShardWriter
from headwater.embedded import place
from headwater.tokens import Tokens


def open_source(readers, pattern, **options):
    return OpenSource("s", Source(pattern, **options), readers, 0, 4)


def one(source, index):
    return source.read(np.array([index]))[0]


def dataset(sources, batch_size, unit="batch", rank=0, world=1, first=0, steps=None, **options):
    plan = Plan(sources, Ledger([s.source.weight for s in sources]), batch_size, unit, **options)
    return ShardDataset(plan, rank, world, first, steps)


def equal(a, b):
    if isinstance(a, Tokens):
        return all(equal(x, y) for x, y in zip(a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same(a, b):
    return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)


def test_patterns(tmp_path):
    for name in ("a-000", "a-001", "b [x]"):
        (tmp_path / f"{name}.tar").touch()
    names = [os.path.basename(p) for p in expand(str(tmp_path))]
    assert names == ["a-000.tar", "a-001.tar", "b [x].tar"]
    assert [p[-9:] for p in expand(str(tmp_path / "a-{000..001}.tar"))] == ["a-000.tar", "a-001.tar"]
    assert len(expand(str(tmp_path / "a-*.tar"))) == 2
    assert expand("embedded:sounds-test-*.tar") == [place("embedded:sounds-test-000.tar")]
    for wrong in ("nothing-*.tar", "a-{000..002}.tar"):
        with pytest.raises(FileNotFoundError, match="expected a tar"):
            expand(str(tmp_path / wrong))


@pytest.mark.parametrize("member", ["png", "ogg", "mp4", "npy", "txt"])
def test_a_broken_member_costs_itself_and_is_named(readers, tmp_path, member):
    things, episodes = (open_source(readers, f"embedded:{name}") for name in ("things-seen-*.tar", "episodes-test-*.tar"))
    whole = {}
    for source in (things, episodes):
        index, file = source._shard(0)
        whole |= index.read(file, 0)
    broken = {**whole, member: b" " if member == "txt" else whole[member][: len(whole[member]) // 5]}
    with ShardWriter(tmp_path / "{}.tar") as writer:
        writer.write("0", whole)
        writer.write("1", broken)
        writer.write("2", {**whole, member: b""})
    source = OpenSource("s", Source(str(tmp_path)), readers, 0, 0)
    assert set(one(source, 0).sample) == set(readers)
    assert one(source, 0).faults == []
    for row in (1, 2):
        sample, _, _, faults = one(source, row)
        assert len(faults) == 1
        assert f"{row}.{member}: " in faults[0]
        assert len(sample) == 4
    data = dataset([source], 3)
    batch = data.batch(0)
    lost = next(k for k, r in readers.items() if member in r.extensions)
    assert batch[lost].valid.any(1).tolist() == [True, False, False]
    assert all(batch[k].valid.any(1).all() for k in readers if k != lost)
    assert len(batch["faults"]) == 2


def test_a_batch_without_one_good_member_keeps_its_keys(readers, tmp_path):
    with ShardWriter(tmp_path / "{}.tar") as writer:
        for i in range(4):
            writer.write(str(i), {"png": b"no", "txt": b"words"})
    batch = dataset([open_source(readers, str(tmp_path))], 4).batch(0)
    assert not batch["image"].valid.any()
    assert batch["text"].valid.any(1).all()


def test_silence_is_a_fault_of_its_own(readers, tmp_path):
    import io

    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.zeros(1600), 16000, format="WAV")
    with pytest.raises(ValueError, match="all zero"):
        readers["audio"].decode({"wav": file.getvalue()})


@pytest.mark.parametrize("unit", ["batch", "sample"])
def test_batches_do_not_depend_on_workers(readers, unit):
    sources = [
        OpenSource("things", Source("embedded:things-seen-*.tar", 2, views=["image", "audio"]), readers, 0, 4),
        OpenSource("sounds", Source("embedded:sounds-test-*.tar", 1, batch_size=3), readers, 0, 4, 1),
    ]
    data = dataset(sources, 6, unit, first=5, steps=12)
    plain = list(data)
    assert len(plain) == 7
    for workers in (1, 2):
        loaded = DataLoader(data, None, num_workers=workers, multiprocessing_context="forkserver" if workers == 2 else None)
        assert all(same(a, b) for a, b in zip(plain, loaded, strict=True))


def test_ranks_share_the_same_global_batch(readers):
    source = open_source(readers, "embedded:things-seen-*.tar", views=["image"])
    whole = dataset([source], 7).batch(3)
    parts = [dataset([source], 7, rank=rank, world=3).batch(3) for rank in range(3)]
    for rank, part in enumerate(parts):
        assert torch.equal(part["sample"], whole["sample"][rank::3])
        assert torch.equal(part["seed"], whole["seed"][rank::3])
        assert torch.equal(part["image"].x, whole["image"].x[rank::3])


def test_an_epoch_holds_every_sample_once_and_views_differ_between_epochs(readers):
    source = open_source(readers, "embedded:sounds-test-*.tar", views=["audio"], modalities=["audio"])
    data = dataset([source], 11)
    epochs = [torch.cat([data.batch(step)["sample"] for step in range(e * 3, e * 3 + 3)]) for e in (0, 1)]
    assert sorted(epochs[0].tolist()) == sorted(epochs[1].tolist()) == list(range(33))
    assert not torch.equal(*epochs)
    seeds = [
        {i: s for step in range(e * 3, e * 3 + 3) for i, s in zip(*(data.batch(step)[k].tolist() for k in ("sample", "seed")))}
        for e in (0, 1)
    ]
    assert all(seeds[0][i] != seeds[1][i] for i in range(33))


def test_sources_cross_processes(readers):
    source = open_source(readers, "embedded:sounds-test-*.tar")
    one(source, 0)
    again = pickle.loads(pickle.dumps(source))
    assert same(one(again, 5).sample, one(source, 5).sample)


def test_a_reader_that_breaks_its_promise_is_named(readers):
    reader = pickle.loads(pickle.dumps(readers["image"]))
    source = OpenSource("s", Source("embedded:things-seen-*.tar"), {"image": reader}, 0, 4)
    reader.features = 5
    assert "ImageReader.tokens gave x (16, 768)" in one(source, 0).faults[0]
    assert "expected x (16, 5)" in one(source, 0).faults[0]
    with pytest.raises(ValueError, match=r"gave x \(16, 768\)"):
        OpenSource("s", Source("embedded:things-seen-*.tar"), {"image": reader}, 0, 4)
