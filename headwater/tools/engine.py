"""Spread work on many shards over the processes of this machine, or over a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, Literal, NamedTuple

from headwater.datamodules.faults import said

Engine = Literal["local", "ray"]
AHEAD = 2  # items under way per job: a slow one does not leave the others idle, and results do not pile up


class Result(NamedTuple):
    """What came of one item. error: "" or the class and words of what it raised; value is None then."""

    item: Any
    value: Any
    error: str = ""


def spread(
    function: Callable[[Any], Any], items: Iterable[Any], jobs: int | None = None, engine: Engine = "local"
) -> Iterator[Result]:
    """Apply a function to every item and give the results in the order of the items, as they are asked for.

    An item whose function raises, or whose process dies, costs that item only; its result tells the error.

    Args:
        function: at the top of a module, or a functools.partial of such; what it takes and returns must be picklable.
        items: taken a few ahead, so they may be endless.
        jobs: at once; None = as many as there are cores. With 1, or for a single item, everything runs in this process.
        engine: "local" = processes of this machine; "ray" = tasks of the Ray cluster that is there, or of one made here.
    """
    if engine == "ray":
        return _ray(function, items, jobs)
    count = jobs or os.cpu_count() or 1
    if count == 1 or (isinstance(items, Sized) and len(items) == 1):
        return (attempt(function, item) for item in items)
    return _local(function, items, count)


def attempt(function: Callable[[Any], Any], item: Any) -> Result:
    """One call; an exception becomes words, since not every exception can be pickled."""
    try:
        return Result(item, function(item))
    except Exception as error:
        return Result(item, None, said(error))


def _in_order(
    items: Iterable[Any], most: int, submit: Callable[[Any], Any], take: Callable[[Any, Any], Result]
) -> Iterator[Result]:
    """Keep at most `most` items under way. submit: item -> handle; take: item and handle -> its result, waiting for it."""
    left, waiting = iter(items), deque[tuple[Any, Any]]()
    while True:
        waiting.extend((item, submit(item)) for item in islice(left, most - len(waiting)))
        if not waiting:
            return
        yield take(*waiting.popleft())


def _local(function: Callable[[Any], Any], items: Iterable[Any], jobs: int) -> Iterator[Result]:
    pool = _processes(jobs)

    def submit(item: Any) -> Future[Result]:
        nonlocal pool
        try:
            return pool.submit(attempt, function, item)
        except BrokenProcessPool:
            pool = _processes(jobs)
            return pool.submit(attempt, function, item)

    def take(item: Any, future: Future[Result]) -> Result:
        try:
            return future.result()
        except BrokenProcessPool:  # this item or another one killed a process; the pool does not tell which
            return _alone(function, item)
        except Exception as error:  # what it returned cannot be pickled
            return Result(item, None, said(error))

    try:
        yield from _in_order(items, AHEAD * jobs, submit, take)
    finally:
        pool.shutdown(cancel_futures=True)


def _alone(function: Callable[[Any], Any], item: Any) -> Result:
    """In a process that only this item can kill."""
    with _processes(1) as pool:
        try:
            return pool.submit(attempt, function, item).result()
        except BrokenProcessPool:
            return Result(item, None, "the process that worked on it died: killed, out of memory, or a crash in a decoder")


def _processes(jobs: int) -> ProcessPoolExecutor:
    """Fresh processes: forked ones would inherit locks that threads of this process hold."""
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """Without this, the workers of a process that was killed would wait for work for ever."""
    threading.Thread(target=_watch_parent, daemon=True).start()


def _watch_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _ray(function: Callable[[Any], Any], items: Iterable[Any], jobs: int | None) -> Iterator[Result]:
    try:
        import ray
    except ImportError as error:
        raise RuntimeError("--engine ray needs Ray; install it with: pip install 'headwater[ray]'") from error
    mine = not ray.is_initialized()
    if mine:
        try:
            ray.init(address="auto")
        except ConnectionError:  # no cluster is running
            ray.init(num_cpus=jobs, include_dashboard=False)
    task = ray.remote(attempt).options(max_retries=1)  # once more after the loss of a node; exceptions are not tried again
    shared = ray.put(function)

    def take(item: Any, reference: Any) -> Result:
        try:
            return ray.get(reference)
        except ray.exceptions.RayError as error:  # the worker or its node is gone
            return Result(item, None, said(error))

    most = jobs or AHEAD * int(ray.cluster_resources().get("CPU", 1))
    try:
        yield from _in_order(items, most, lambda item: task.remote(shared, item), take)
    finally:
        if mine:
            ray.shutdown()
