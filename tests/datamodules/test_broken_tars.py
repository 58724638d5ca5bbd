"""Broken and hostile tars: what the damage does not touch comes back, what is lost is named, and no run stops."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from broken import Broken, cases, entry, sound

from headwater.datamodules import index as indexing
from headwater.datamodules.files import File
from headwater.datamodules.index import FAULTS, MEMBERS, VERSION, index_path, load_card, load_index, scan
from headwater.datamodules.mixture import Ledger
from headwater.datamodules.plan import Plan
from headwater.datamodules.shards import ShardDataset
from headwater.datamodules.sources import OpenSource, Source

CORPUS = cases()


def path(folder: Path, case: Broken) -> Path:
    return folder / f"{CORPUS.index(case):03d}.tar"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("broken")
    for case in CORPUS:
        path(made, case).write_bytes(case.raw)
    return made


def contents(index):
    with File(index.path) as file:
        return {index.key(row): index.read(file, row) for row in range(len(index))}


def test_the_corpus_is_large_and_always_the_same():
    assert len(CORPUS) > 300
    assert len({case.name for case in CORPUS}) == len(CORPUS)
    assert [case.raw for case in cases()] == [case.raw for case in CORPUS]
    assert sum(len(case.whole) for case in CORPUS) > 1400


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case.name)
def test_untouched_samples_come_back_and_losses_are_named(folder, case):
    tar = path(folder, case)
    index = load_index(tar)
    found = contents(index)
    assert {key: found.get(key) for key in case.whole} == case.whole
    assert found.keys() <= case.whole.keys() | case.touched
    sound(index, case.raw)
    if case.fault is not None:
        assert bool(index.faults) == bool(case.fault)
        assert not case.fault or any(re.search(case.fault, fault) for fault in index.faults), index.faults
    assert len(index.faults) <= FAULTS + 1
    assert all(fault.startswith(str(tar)) and fault.isprintable() and len(fault) < 1000 for fault in index.faults)
    again = load_index(tar)  # from the saved index
    assert again.card == index.card
    assert contents(again) == found
    hashed = scan(tar, hashed=True)
    assert contents(hashed) == found
    assert hashed.hash.all()


def test_a_shard_has_a_bounded_number_of_extensions(tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "KINDS", 2)
    tar = tmp_path / "a.tar"
    tar.write_bytes(b"".join(entry(f"{k}.{e}", b"x") for k in range(2) for e in ("txt", "png", "one", "two")) + bytes(1024))
    index = scan(tar)
    assert index.extensions == ("png", "txt")
    assert len(index.faults) == 4
    assert "0.one has the extension number 3" in index.faults[0]


def test_an_epoch_over_all_broken_tars_counts_every_sample_once(folder, readers):
    source = OpenSource("broken", Source(str(folder)), readers, 0, 16)
    assert source.total == sum(len(load_index(path(folder, case))) for case in CORPUS)
    assert len(source.faults) > 1000
    batches = list(ShardDataset(Plan([source], Ledger([1.0]), 64), steps=-(-source.total // 64)))
    seen = torch.cat([batch["sample"] for batch in batches])[: source.total]  # the last batch begins the next epoch
    assert sorted(seen.tolist()) == list(range(source.total))
    faults = {fault for batch in batches for fault in batch["faults"]}
    assert not os.path.exists("/tmp/headwater-trap")
    pickles = path(folder, next(case for case in CORPUS if case.name == "content: objects as npy"))
    assert {fault.split(": ")[1] for fault in faults if fault.startswith(str(pickles))} == {"000098.npy", "000099.npy"}
    whole = {
        f"{path(folder, case)}: {key}." for case in CORPUS if not case.name.startswith(("content", "zeros")) for key in case.whole
    }
    assert not [fault for fault in faults if fault.startswith(tuple(whole))]


def saved(index, columns, note, batches=1):
    """The bytes of an index with other columns or facts than the true ones."""
    parts = [pa.array(getattr(index, name)) for name in ("kind", "block", "bytes", "hash")]
    names = ["kind", "block", "size", "hash"]
    parts = [columns.get(name, part) for name, part in zip(names, parts)]
    listed = pa.ListArray.from_arrays(pa.array(index.first), pa.StructArray.from_arrays(parts, names=names))
    table = pa.RecordBatch.from_arrays([columns.get("key", index.keys), columns.get("members", listed)], ["key", "members"])
    facts = {"version": VERSION, "bytes": os.path.getsize(index.path), **index.card._asdict(), **note}
    schema = table.schema.with_metadata({"headwater": json.dumps(facts)})
    out = pa.BufferOutputStream()
    with pa.ipc.new_file(out, schema) as writer:
        for _ in range(batches):
            writer.write_batch(table.replace_schema_metadata(schema.metadata))
    true, told = index.first.tobytes(), columns.get("first", index.first).astype(np.int32).tobytes()
    return out.getvalue().to_pybytes().replace(true, told)  # Arrow itself would refuse to write these numbers


def numbers(values, kind="uint32"):
    return pa.array(np.asarray(values).astype(kind))


LIES = {
    "nothing": lambda i: ({}, {}),
    "kind beyond the extensions": lambda i: ({"kind": numbers(i.kind + 3, "uint16")}, {}),
    "block beyond the file": lambda i: ({"block": numbers(i.block + 10_000)}, {}),
    "block at the end of 32 bits": lambda i: ({"block": numbers(np.full(len(i.block), 2**32 - 1))}, {}),
    "block before the file": lambda i: ({"block": numbers(i.block * 0)}, {}),
    "size beyond the file": lambda i: ({"size": numbers(i.bytes + 10**9)}, {}),
    "one size beyond the file": lambda i: ({"size": numbers(np.where(np.arange(len(i.bytes)) == 7, 2**32 - 1, i.bytes))}, {}),
    "first goes back": lambda i: ({"first": i.first[[0, 3, 2, 3, 4, 5, 6]]}, {}),
    "first begins late": lambda i: ({"first": i.first + (i.first == 0)}, {}),
    "first below 0": lambda i: ({"first": i.first - 1}, {}),
    "first ends early": lambda i: ({"first": np.minimum(i.first, 5)}, {}),
    "first beyond the members": lambda i: ({"first": i.first * 1000}, {}),
    "kinds of another type": lambda i: ({"kind": numbers(i.kind, "float64")}, {}),
    "blocks of 64 bits": lambda i: ({"block": numbers(i.block, "int64")}, {}),
    "missing sizes": lambda i: ({"size": pa.array([None] * len(i.bytes), pa.uint32())}, {}),
    "missing keys": lambda i: ({"key": pa.array([None] * len(i), pa.string())}, {}),
    "missing members": lambda i: ({"members": pa.nulls(len(i), MEMBERS)}, {}),
    "keys as numbers": lambda i: ({"key": pa.array(range(len(i)))}, {}),
    "keys in a dictionary": lambda i: ({"key": i.keys.dictionary_encode()}, {}),
    "members as text": lambda i: ({"members": i.keys}, {}),
    "more samples": lambda i: ({}, {"samples": 7}),
    "samples below 0": lambda i: ({}, {"samples": -1}),
    "samples as text": lambda i: ({}, {"samples": "6"}),
    "fewer extensions": lambda i: ({}, {"extensions": ["png"]}),
    "extensions as a text": lambda i: ({}, {"extensions": "png"}),
    "extensions as numbers": lambda i: ({}, {"extensions": [1, 2, 3]}),
    "faults as a number": lambda i: ({}, {"faults": 3}),
    "header as a list": lambda i: ({}, {"header": []}),
    "hints that are not there": lambda i: ({}, {"hints": ["png.width"]}),
    "bytes as a text": lambda i: ({}, {"bytes": "many"}),
    "bytes of another tar": lambda i: ({}, {"bytes": 1 << 60}),
    "another version": lambda i: ({}, {"version": VERSION + 1}),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies_is_made_anew(tmp_path, lie):
    case = next(case for case in CORPUS if case.name == "form: GNU")
    tar = tmp_path / "a.tar"
    tar.write_bytes(case.raw)
    true = scan(tar)
    index_path(tar).write_bytes(bad := saved(true, *LIES[lie](true)))
    assert contents(load_index(tar)) == case.whole
    assert load_card(tar) == true.card
    sound(load_index(tar), case.raw)
    assert (index_path(tar).read_bytes() == bad) == (lie == "nothing")


@pytest.mark.parametrize("batches", [0, 2])
def test_an_index_has_one_batch(tmp_path, batches):
    case = next(case for case in CORPUS if case.name == "form: GNU")
    tar = tmp_path / "a.tar"
    tar.write_bytes(case.raw)
    index_path(tar).write_bytes(saved(scan(tar), {}, {}, batches))
    assert contents(load_index(tar)) == case.whole


def test_the_fuzzer_finds_nothing_in_five_seconds(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.fuzz.fuzz_tar", "--seconds", "5", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\d+ tars and \d+ indexes", run.stdout)
