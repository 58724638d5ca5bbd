"""Many samples, many shards: what opening and reading cost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MILLION = """
import json, resource, sys, time
from headwater.datamodules.index import Row, assemble, load_index, save_index
tar, small = sys.argv[1:]
load_index(small)  # so that imports and first calls are not counted
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
times = []
for _ in range(5):
    start = time.perf_counter()
    index = load_index(tar)
    times.append(time.perf_counter() - start)
last = index.key(len(index) - 1), index.extent(len(index) - 1).size
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"seconds": max(times), "megabytes": memory / 1000, "last": last, "samples": len(index)}))
"""

EPOCH = """
import json, os, sys
import numpy as np
from headwater.datamodules.sources import OpenSource, Source
from headwater.modalities.text import TextReader
def memory():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
source = OpenSource("s", Source(sys.argv[1]), {"text": TextReader(length=32)}, 0, 16)
used = []
for first in range(0, source.total, 500):
    assert all(not one.faults for one in source.read(np.arange(first, min(first + 500, source.total))))
    used.append(memory())
print(json.dumps({"used": used, "total": source.total, "open": len(os.listdir("/proc/self/fd"))}))
"""


def measured(script, *arguments):
    run = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


@pytest.mark.slow
def test_an_index_of_a_million_samples_opens_at_once(tmp_path):
    from headwater.datamodules.index import Row, assemble, index_path, save_index
    from headwater.datamodules.writer import ShardWriter

    with ShardWriter(tmp_path / "{}.tar", samples=10) as writer:
        for k in range(20):
            writer.write(str(k), {"jpg": b"x" * 2000, "txt": b"a caption", "json": b"{}"})
    big, small = writer.shards

    def place(k, part):
        return 512 * (9 * k + part)

    rows = (
        Row(f"{k:09d}", [("jpg", place(k, 1), 2000, k + 1), ("txt", place(k, 6), 9, k + 1), ("json", place(k, 8), 2, k + 1)])
        for k in range(1_000_000)
    )
    os.truncate(big, place(1_000_000, 1))
    save_index(assemble(str(big), rows))
    assert index_path(big).stat().st_size / 1e6 < 75  # bytes per sample, with keys of 9 letters and 3 members
    found = measured(MILLION, big, small)
    assert found["samples"] == 1_000_000
    assert found["last"] == ["000999999", place(999_999, 8) + 2 - place(999_999, 1)]
    assert found["seconds"] < 0.05
    assert found["megabytes"] < 100


@pytest.mark.parametrize("shards", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_stays_flat_over_many_shards(tmp_path, shards):
    from headwater.datamodules.writer import ShardWriter

    with ShardWriter(Path(tmp_path) / "{:05d}.tar", samples=10) as writer:
        for k in range(10 * shards):
            writer.write(f"{k:06d}", {"txt": b"sample %d" % k})
    found = measured(EPOCH, tmp_path)
    used = found["used"]
    assert found["total"] == 10 * shards
    assert found["open"] < 600
    settled = used[len(used) // 2]  # by then as many shards are open as ever will be
    assert used[-1] - settled < 8
    assert max(used) - used[0] < 60
