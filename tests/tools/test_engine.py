"""`spread`: results in order, one failure costs one item, and nothing is left running."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import count, islice
from pathlib import Path

import pytest

from headwater.datamodules.files import expand
from headwater.datamodules.index import load_index
from headwater.tools.checks import check
from headwater.tools.engine import spread
from headwater.tools.shard import shard


def inverse(item, scale=1):
    return scale / item


def doomed(item):
    if item == 2:
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory is short
    return item, os.getpid()


def locked(item):
    return item if item else (lambda: None)  # a function inside a function cannot be pickled


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_come_in_order_and_a_failure_costs_one_item(jobs):
    results = list(spread(partial(inverse, scale=6), [1, 0, 2, 3], jobs))
    assert [(result.item, result.value) for result in results] == [(1, 6), (0, None), (2, 3), (3, 2)]
    assert [result.error for result in results] == ["", "ZeroDivisionError: division by zero", "", ""]


def test_a_process_that_dies_takes_its_own_item_only():
    results = list(spread(doomed, range(7), jobs=2))
    assert [result.item for result in results] == list(range(7))
    assert [result.item for result in results if result.error] == [2]
    assert "died" in results[2].error
    assert all(result.value[0] == result.item for result in results if not result.error)
    assert os.getpid() not in {result.value[1] for result in results if not result.error}


def test_a_result_that_cannot_be_pickled_is_an_error_of_its_item():
    results = list(spread(locked, [1, 0, 2], jobs=2))
    assert [bool(result.error) for result in results] == [False, True, False]


def test_items_are_taken_only_a_few_ahead():
    taken = []
    items = (taken.append(n) or n + 1 for n in count())
    results = spread(inverse, items, jobs=2)
    assert [result.value for result in islice(results, 3)] == [1, 1 / 2, 1 / 3]
    results.close()
    assert len(taken) <= 8


def test_a_single_item_needs_no_process():
    assert next(spread(doomed, [1], jobs=8)).value == (1, os.getpid())


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\n"
        "from headwater.tools.engine import spread\n"
        "def work(item):\n"
        "    open(os.path.join(sys.argv[1], str(os.getpid())), 'w').close()\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    list(spread(work, range(4), 2))\n"
    )
    seen = tmp_path / "seen"
    seen.mkdir()
    parent = subprocess.Popen([sys.executable, program, seen])
    try:
        assert wait(lambda: len(list(seen.iterdir())) == 2, 30)
    finally:
        parent.kill()
        parent.wait()
    workers = [int(one.name) for one in seen.iterdir()]
    assert wait(lambda: not any(alive(worker) for worker in workers), 10)


def wait(met, seconds):
    end = time.monotonic() + seconds
    while not met() and time.monotonic() < end:
        time.sleep(0.05)
    return met()


def alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_without_ray_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RuntimeError, match=r"pip install 'headwater\[ray\]'"):
        next(spread(inverse, [1], engine="ray"))


@pytest.mark.slow
def test_ray_gives_what_processes_give(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))  # tasks run in another folder and must find `doomed`
    monkeypatch.chdir(tmp_path)
    paths = [*expand("embedded:things-*.tar"), str(tmp_path / "none.tar")]
    Path("raw").mkdir()
    for name in ("one", "two", "three"):
        Path(f"raw/{name}.txt").write_text(f"the text {name}")
    Path("raw/broken.png").write_bytes(b"not a picture")
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        shard("raw", "by_ray", engine="ray")
        spread_out = list(spread(partial(check, decode=False), paths, engine="ray"))
        died = list(spread(doomed, [1, 2, 3], jobs=2, engine="ray"))
    finally:
        ray.shutdown()
    shard("raw", "here")
    for name in ("train-00000.tar", "skipped.jsonl"):
        assert Path("by_ray", name).read_bytes() == Path("here", name).read_bytes()
    assert len(load_index("by_ray/train-00000.tar")) == 3
    here = list(spread(partial(check, decode=False), paths, jobs=1))
    assert len(spread_out) == len(paths)
    for ours, theirs in zip(here, spread_out):
        assert (ours.item, ours.error) == (theirs.item, theirs.error)
        assert ours.error or ours.value[:5] == theirs.value[:5]
    assert "FileNotFoundError" in here[-1].error
    assert [bool(result.error) for result in died] == [False, True, False]
