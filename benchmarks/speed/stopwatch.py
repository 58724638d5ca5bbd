"""Interleaved timing of streams of batches, each in a process of its own."""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch


class Row(NamedTuple):
    """One line of a benchmark.

    open: a fresh stream of batches; the first time it may also make what it reads, such as a peer's own format.
    samples: how many samples a batch holds. check: looks at the first batches; says what it found, or raises.
    """

    name: str
    open: Callable[[], Iterator[Any]]
    samples: Callable[[Any], int]
    check: Callable[[Iterator[Any]], str]


class Timing(NamedTuple):
    """Of one row: samples per second, seconds to the first batch and seconds of processor time per sample, per repeat."""

    speed: list[float]
    first: list[float]
    processor: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.speed)


def measure(rows: Sequence[Row], warm: int, timed: int, repeats: int, say: Callable[[str], None]) -> dict[str, Timing | str]:
    """Time `timed` batches after `warm` others, `repeats` times in turn. Row name -> timing, or why there is none.

    Rows take turns, forwards and backwards, so that a machine that becomes slower does so for all. Each row lives in a forked
    process, so that threads, garbage and imports of one do not slow down another.
    """
    context = multiprocessing.get_context("fork")
    processes = []
    pipes: dict[str, Connection] = {}
    measured: dict[str, list[tuple[float, float, float]]] = {}
    left_out: dict[str, str] = {}
    for row in rows:
        pipe, theirs = context.Pipe()
        processes.append(context.Process(target=_serve, args=(row, theirs, warm, timed)))
        processes[-1].start()
        theirs.close()  # so that a process that dies is noticed
        works, said = pipe.recv()  # one row after the other: what is not timed yet may write files
        say(f"  {row.name}: {said}")
        if works:
            pipes[row.name], measured[row.name] = pipe, []
        else:
            left_out[row.name] = said
    for repeat in range(repeats):
        for name in list(pipes) if repeat % 2 == 0 else list(pipes)[::-1]:
            try:
                pipes[name].send(True)
                measured[name].append(pipes[name].recv())
            except (EOFError, OSError):
                left_out[name] = f"left out, its process ended in repeat {repeat}"
                del pipes[name], measured[name]
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:
        process.join()
    timings = {name: Timing(*map(list, zip(*repeated, strict=True))) for name, repeated in measured.items()}
    return {row.name: timings.get(row.name) or left_out[row.name] for row in rows}


def ratio(ours: Timing, theirs: Timing) -> float:
    """How many times as fast: the median over repeats of the two speeds of one repeat, which had the same machine."""
    return statistics.median(a / b for a, b in zip(ours.speed, theirs.speed, strict=True))


def _serve(row: Row, pipe: Connection, warm: int, timed: int) -> None:
    """The process of a row: says what it found, or why it does not work, then times one stream per request."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*pin_memory.*")  # two peers pin memory, which does nothing without an accelerator
    try:
        found = row.check(row.open())
    except Exception as error:  # a peer may fail in its own way; the row says so and the others go on
        said = str(error).strip().splitlines() or [""]
        pipe.send((False, f"left out, {type(error).__name__}: {said[0]}"))
        return
    pipe.send((True, found))
    while pipe.recv():
        pipe.send(_once(row, warm, timed))


def _once(row: Row, warm: int, timed: int) -> tuple[float, float, float]:
    """Samples per second, seconds to the first batch, seconds of processor time per sample."""
    gc.collect()
    start = time.perf_counter()
    stream = row.open()
    next(stream)
    first = time.perf_counter() - start
    for _ in range(warm - 1):
        next(stream)
    samples, start, used = 0, time.perf_counter(), time.process_time()
    for _ in range(timed):
        samples += row.samples(next(stream))
    seconds, used = time.perf_counter() - start, time.process_time() - used
    del stream  # closes the generator, and with it the loader and its workers
    return samples / seconds, first, used / samples
