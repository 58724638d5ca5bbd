"""Ranks that read mixed sources over shards of very different sizes: no one waits, and every sample is counted once."""

import io
from collections import Counter

import numpy as np
import pytest
import torch
from ranks import Ranks

from headwater import distributed
from headwater.datamodules.mixture import Ledger, shares
from headwater.datamodules.plan import Plan
from headwater.datamodules.shards import ShardDataset
from headwater.datamodules.sources import OpenSource, Source
from headwater.datamodules.writer import ShardWriter
from headwater.modalities.action import ActionReader
from headwater.modalities.text import TextReader
from headwater.tokens import Tokens

SIZES = {"texts": [1, 1000, 1, 2, 333], "moves": [7, 1, 500], "both": [1], "broken": [3, 40]}
READERS = {"text": TextReader(length=16), "action": ActionReader(choices=4)}
TOTAL = sum(sum(sizes) for sizes in SIZES.values())


def npy(values):
    file = io.BytesIO()
    np.save(file, np.array(values))
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    for name, sizes in SIZES.items():
        for number, size in enumerate(sizes):
            with ShardWriter(root / name / f"{number}-{{}}.tar") as writer:
                for k in range(size):
                    text = {"txt": f"{name} {k}".encode()} if name != "moves" else {}
                    action = {"npy": npy([k % 4, 1])} if name in ("moves", "both") else {}
                    members = {"txt": b""} if name == "broken" else {**text, **action}
                    writer.write(f"{k:04d}", members, {"npy.steps": 2})
    return root


@pytest.fixture(scope="module")
def four():
    pool = Ranks(4, timeout=100)
    yield pool
    pool.stop()


def run(folder, unit, last, batch_size, pack):
    """Every step of one joint epoch, with a collective per modality as training would have; what this rank read."""
    sources = [OpenSource(name, Source(str(folder / name)), READERS, 0, 2, k) for k, name in enumerate(SIZES)]
    ledger = Ledger(shares("epoch", [1] * len(sources), [s.total for s in sources], 0))
    plan = Plan(sources, ledger, batch_size, unit, last, pack=pack)
    if unit == "batch":  # one epoch of each source: as many turns as it has batches
        ledger.restore([(0, [plan.steps(k) for k in range(len(sources))])])
        steps = sum(plan.steps(k) for k in range(len(sources)))
    else:
        steps = -(-TOTAL // batch_size)
    data = ShardDataset(plan, distributed.rank(), distributed.world(), 0, steps)
    seen, signatures, counted = Counter(), [], 0
    for batch in data:
        signature = [name for name, value in batch.items() if isinstance(value, Tokens)]
        for name in signature:  # hangs, or fails, if a rank has no such key
            counted += int(distributed.total(batch[name].real().any(1).sum()[None].double()))
            assert batch["seed"][batch[name].sample()].shape == batch[name].real().shape
        signatures.append(signature)
        seen.update(i for i in batch["sample"].tolist() if i >= 0)
    return seen, signatures, counted


@pytest.mark.parametrize(
    ("unit", "last", "batch_size", "pack"),
    [
        ("batch", "short", 64, None),
        ("batch", "short", 3, None),  # fewer samples than ranks
        ("sample", "wrap", 64, None),
        ("batch", "short", 64, {"text": 48, "action": 48}),
        ("sample", "wrap", 5, {"text": 48, "action": 48}),
    ],
)
def test_four_ranks_never_wait_and_count_each_sample_once(four, folder, unit, last, batch_size, pack):
    answers = four(run, folder, unit, last, batch_size, pack)
    seen = sum((counter for counter, _, _ in answers), Counter())
    assert all(signatures == answers[0][1] for _, signatures, _ in answers)
    assert len({counted for _, _, counted in answers}) == 1
    assert len(seen) == TOTAL
    if unit == "batch":
        assert set(seen.values()) == {1}
    else:  # the last step wraps into the next epoch
        assert sum(seen.values()) - TOTAL == -TOTAL % batch_size


def test_numbers_name_samples_for_ever(folder):
    source = OpenSource("texts", Source(str(folder / "texts")), READERS, 0, 2, 3)
    epochs = [{r.number: r for r in source.read(np.arange(e * source.total, (e + 1) * source.total))} for e in (0, 1)]
    assert epochs[0].keys() == epochs[1].keys()
    for number, one in epochs[0].items():
        assert number >> 40 == 3
        assert torch.equal(one.sample["text"].x, epochs[1][number].sample["text"].x)
        assert one.seed != epochs[1][number].seed
