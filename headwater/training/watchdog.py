"""A watch over every rank: a run that cannot go on ends, says where it stood, and never hangs."""

from __future__ import annotations

import contextlib
import faulthandler
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException

GO_ON = "The same command with --resume goes on from the last checkpoint"
AGAIN = 75  # EX_TEMPFAIL of sysexits.h: the same command with --resume may well succeed
PERIOD = 0.5  # seconds between two looks
STACKS = signal.SIGUSR2  # a process of a run that gets it writes the stacks of its threads to stderr

_ranks: list[subprocess.Popen] = []  # that this process launched; it does so once, whatever trainers follow


class Watchdog(pl.Callback):
    """Ends a run that has lost a rank, or that stands still; every run of the command line has one.

    A rank that dies takes the others with it within seconds, with a message, where Lightning launched them; torchrun and srun
    see to that themselves. When there was neither a batch nor a finished step for `patience` seconds, the ranks that have come
    least far say so, with the stacks of all their threads and of their data workers, on stderr; after `end` seconds the run ends.
    Both end with status 75: --resume goes on from the last checkpoint.

    Args:
        patience: seconds until the stacks are written; the longest step, compilation and validation batch must fit in.
        end: seconds until the run ends; less than the timeout of the process group, 1800 s, tells more than that does.
    """

    LATER = 60.0  # seconds after `end`, when a timer ends the process that needs no interpreter, should even the watch stand still

    def __init__(self, patience: float = 600.0, end: float = 1500.0) -> None:
        if not 0 < patience < end:
            raise ValueError(f"found patience={patience} and end={end} seconds; expected 0 < patience < end")
        self.patience, self.end = patience, end
        self.rank, self.world = 0, 1  # until `setup` is told
        self.store: Any = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        take_over(trainer.strategy.launcher)
        faulthandler.unregister(STACKS)  # else it takes no notice that Lightning put the default back after an earlier fit
        faulthandler.register(STACKS, 2)  # forked workers inherit it
        self.rank, self.world = trainer.global_rank, trainer.world_size
        if self.world > 1:
            self.store = dist.distributed_c10d._get_default_store().clone()  # a connection of our own: collectives wait on theirs
            self.store.set_timeout(timedelta(seconds=10))
        self.count, self.told, self.armed = 0, False, -math.inf
        self.beat("setting up")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self.watch, args=(self._over,), name="watchdog", daemon=True)
        self._thread.start()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.stop()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.beat(f"waiting for the batch of step {trainer.global_step}")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.beat(f"in step {trainer.global_step}")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.beat(f"waiting for the batch of step {trainer.global_step}")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.beat(f"after validation batch {batch_idx}")

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """A collective fails as soon as another rank dies: rather than its words, say who is gone."""
        if self.world > 1 and isinstance(exception, RuntimeError):
            time.sleep(4 * PERIOD)  # the watch, here or on the rank that launched this one, ends it meanwhile
        if not isinstance(exception, SIGTERMException):
            self.stop()

    def beat(self, place: str) -> None:
        """This rank has come as far as `place`."""
        self.place, self.since = place, time.monotonic()
        self.count += 1
        self.told = False
        if self.since - self.armed > self.LATER / 4:  # seldom, because it starts a thread
            self.armed = self.since
            faulthandler.dump_traceback_later(self.end + self.LATER, exit=True, file=2)

    def stop(self) -> None:
        """Watch no more."""
        self._over.set()
        faulthandler.cancel_dump_traceback_later()

    def watch(self, over: threading.Event) -> None:
        """The thread."""
        shared = 0
        while not over.wait(PERIOD):
            if lost := gone(self.rank):
                finish(*lost)
            if self.store is not None and shared != self.count:
                shared = self.count
                with contextlib.suppress(RuntimeError):  # the first rank keeps it and may have ended
                    self.store.set(f"watchdog/{self.rank}", f"{shared} {self.place}")
            idle = time.monotonic() - self.since
            if idle > self.patience and not self.told:
                self.told = True
                self.report(idle)
            if idle > self.end:
                finish(f"rank {self.rank} has made no progress for {idle:.0f} s, {self.place}; the run ends. {GO_ON}", AGAIN)

    def report(self, idle: float) -> None:
        """A rank that no other is behind writes its stacks; the first one names those that it waits for."""
        places = self.places()
        least = min(count for count, _ in places.values())
        behind = {rank: place for rank, (count, place) in places.items() if count == least}
        if self.rank in behind:
            ahead = f"{self.world - len(behind)} of {self.world} ranks are ahead of it"
            say(f"rank {self.rank} has made no progress for {idle:.0f} s, {self.place}; {ahead}. The run ends at {self.end:.0f} s")
            say(f"stacks of rank {self.rank}, process {os.getpid()}:")
            faulthandler.dump_traceback(2, all_threads=True)
            for worker in filter(listens, multiprocessing.active_children()):
                say(f"stacks of {worker.name}, process {worker.pid}, of rank {self.rank}:")
                os.kill(worker.pid, STACKS)  # type: ignore[arg-type]
                time.sleep(PERIOD)  # one after the other
        elif self.rank == 0:
            names = "; ".join(f"rank {rank} ({place})" for rank, place in list(behind.items())[:8])
            say(f"no progress for {idle:.0f} s: rank 0 waits for {names}")

    def places(self) -> dict[int, tuple[int, str]]:
        """Rank -> how often it has come forward, and where it is; of this rank alone when the others cannot be asked."""
        every = {self.rank: (self.count, self.place)}
        with contextlib.suppress(RuntimeError):
            for rank in range(self.world if self.store is not None else 0):
                if self.store.check([f"watchdog/{rank}"]):
                    count, _, place = self.store.get(f"watchdog/{rank}").decode().partition(" ")
                    every[rank] = int(count), place
        return every


def listens(worker: BaseProcess) -> bool:
    """Would it write its stacks? The signal would end a process that does not know it."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{worker.pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (STACKS - 1) & 1)
    return False


def take_over(launcher: Any) -> None:
    """Watch over the ranks that Lightning launched in its place: it kills this one too, within 5 s and without a word."""
    launched = getattr(launcher, "procs", None)
    if launched:
        _ranks.extend(launched)
        launched.clear()


def gone(rank: int) -> tuple[str, int] | None:
    """What to say, and the status to end with, if a rank that this process launched has failed."""
    for number, process in enumerate(_ranks, 1):
        status = process.poll()
        if status and status < 0:
            name = signal.Signals(-status).name
            return f"rank {rank + number} was killed by {name}; the other ranks end. {GO_ON}", AGAIN
        if status:
            return f"rank {rank + number} ended with status {status}; the other ranks end. Its message stands above", status
    return None


def end_with_parent() -> None:
    """From now on this process ends when the one that launched it does: called by ranks that Lightning launched."""
    parent = os.getppid()

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(PERIOD)
        finish(f"the process that launched rank {os.environ.get('LOCAL_RANK', '?')} is gone, so it ends. {GO_ON}", AGAIN)

    threading.Thread(target=follow, name="end with parent", daemon=True).start()


def children(pid: int) -> list[int]:
    """Processes that a process has started and that are still there."""
    return [int(child) for thread in Path(f"/proc/{pid}/task").glob("*/children") for child in thread.read_text().split()]


def finish(message: str, status: int) -> NoReturn:
    """End this process, its data workers, the ranks that it launched and theirs, from any thread."""
    say(message)
    ours = children(os.getpid())
    theirs = [pid for child in ours for pid in children(child)]  # workers that stand still would outlive the ranks
    for pid in [*theirs, *ours]:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def say(message: str) -> None:
    """One line on stderr, whatever has been done to sys.stderr."""
    os.write(2, f"headwater: {message}\n".encode())
