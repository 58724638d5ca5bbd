"""A run that stands still, or has lost a rank, says so and ends."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import make, pairs, trainer, write_pairs

from headwater import distributed
from headwater.training import watchdog
from headwater.training.watchdog import Watchdog


def forked(function, said):
    """(status, what it wrote to stderr) of a copy of this process that calls a function which ends it."""
    pid = os.fork()
    if not pid:
        try:
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
            function()
        finally:
            os._exit(99)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, said.read_text()


def ends(pid):
    """A process is no more, or dead and nobody has asked about it."""
    deadline = time.monotonic() + 20
    stat = Path(f"/proc/{pid}/stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def launched(*codes):
    """What Lightning's launcher keeps of the ranks that it has launched."""

    class Launcher:
        procs = [subprocess.Popen([sys.executable, "-c", code]) for code in codes]

    return Launcher


SLEEP = "import time; time.sleep(100)"


@pytest.fixture
def shards(tmp_path):
    return write_pairs(tmp_path)


@pytest.fixture
def ended(monkeypatch):
    """Where the process would end: [(message, status)]; it goes on instead."""
    found = []

    def finish(message, status):
        found.append((message, status))

    monkeypatch.setattr(watchdog, "finish", finish)
    monkeypatch.setattr(watchdog, "PERIOD", 0.02)
    return found


class Slow(Watchdog):
    """A step that lasts, or a batch that is long in coming."""

    def __init__(self, seconds, late=False, **options):
        super().__init__(**options)
        self.seconds, self.late = seconds, late

    def on_train_batch_start(self, trainer, *rest):
        slow = trainer.global_step == 1
        stand_still(self.seconds if slow and self.late else 0)
        super().on_train_batch_start(trainer, *rest)
        stand_still(self.seconds if slow and not self.late else 0)


def stand_still(seconds):
    time.sleep(seconds)


def test_a_step_that_takes_too_long_is_told_with_its_stack(shards, ended, capfd):
    trainer(3, callbacks=[Slow(2.0, patience=1, end=60)]).fit(make(), pairs(shards))
    said = capfd.readouterr().err
    assert "s, in step 1; 0 of 1 ranks are ahead of it. The run ends at 60 s" in said
    assert "in stand_still" in said
    assert "in watch" in said  # all threads
    assert not ended


def test_a_step_that_never_ends_is_ended(shards, ended, capfd):
    trainer(3, callbacks=[Slow(2.0, patience=0.6, end=1)]).fit(make(), pairs(shards))
    message, status = next(told for told in ended if "in step 1" in told[0])
    assert "has made no progress" in message
    assert "--resume" in message
    assert status == 75


def test_nothing_is_said_of_a_run_that_goes_on_and_the_watch_ends_with_it(shards, ended, capfd):
    watch = Watchdog(patience=30, end=60)
    trainer(3, callbacks=[watch]).fit(make(), pairs(shards))
    watch._thread.join(5)
    assert not watch._thread.is_alive()
    assert "progress" not in capfd.readouterr().err
    assert watch.count > 6


def test_the_watch_ends_with_an_error(shards, ended):
    class Fails(Watchdog):
        def on_train_batch_start(self, *rest):
            raise ValueError("no more")

    watch = Fails()
    with pytest.raises(ValueError, match="no more"):
        trainer(3, callbacks=[watch]).fit(make(), pairs(shards))
    watch._thread.join(5)
    assert not watch._thread.is_alive()


def lag(shards):
    """Rank 1 waits for its batch while rank 0 goes on to a collective: what each says, and whose stacks it writes."""
    said, stacks = [], []
    watchdog.say, watchdog.PERIOD = said.append, 0.02
    watchdog.faulthandler.dump_traceback = lambda *given, **more: stacks.append(distributed.rank())
    watch = Slow(4.0 * distributed.rank(), late=True, patience=2, end=60)
    trainer(3, callbacks=[watch]).fit(make(), pairs(shards))
    return said, stacks


def test_the_rank_that_others_wait_for_is_named(ranks, shards):
    (first, _), (second, its) = ranks(lag, shards)
    assert any(line.endswith("s: rank 0 waits for rank 1 (waiting for the batch of step 1)") for line in first)
    assert "waiting for the batch of step 1; 1 of 2 ranks are ahead of it" in " ".join(second)
    assert 1 in its


def test_a_launched_rank_that_is_killed_ends_the_others(tmp_path):
    def first():
        launcher = launched(SLEEP, SLEEP)
        one, other = launcher.procs
        (tmp_path / "pid").write_text(str(other.pid))
        watchdog.take_over(launcher)
        assert not launcher.procs
        assert watchdog.gone(4) is None
        one.kill()
        one.wait()
        watchdog.finish(*watchdog.gone(4))

    status, said = forked(first, tmp_path / "said")
    assert status == 75
    assert "rank 5 was killed by SIGKILL; the other ranks end. The same command with --resume" in said
    ends(int((tmp_path / "pid").read_text()))


def test_a_launched_rank_that_fails_lends_its_status(tmp_path):
    def first():
        launcher = launched("raise SystemExit(3)")
        launcher.procs[0].wait()
        watchdog.take_over(launcher)
        watchdog.finish(*watchdog.gone(0))

    status, said = forked(first, tmp_path / "said")
    assert status == 3
    assert "rank 1 ended with status 3; the other ranks end. Its message stands above" in said


def test_a_rank_ends_when_its_parent_does(tmp_path):
    def first():
        read, write = os.pipe()
        rank = os.fork()
        if not rank:
            watchdog.end_with_parent()
            os.write(write, b".")
            time.sleep(100)
        os.read(read, 1)
        (tmp_path / "pid").write_text(str(rank))
        os.kill(os.getpid(), signal.SIGKILL)

    status, _ = forked(first, tmp_path / "said")
    assert status == -9
    ends(int((tmp_path / "pid").read_text()))
    assert "the process that launched rank ? is gone, so it ends" in (tmp_path / "said").read_text()


def test_a_process_of_a_run_tells_its_stacks_when_asked(shards, capfd):
    class Asked(Watchdog):
        def on_train_batch_start(self, *rest):
            os.kill(os.getpid(), watchdog.STACKS)

    trainer(1, callbacks=[Asked()]).fit(make(), pairs(shards))
    assert "in on_train_batch_start" in capfd.readouterr().err


def test_a_child_that_does_not_know_the_signal_is_let_alone():
    context = multiprocessing.get_context("fork")
    deaf = context.Process(target=deafen)
    deaf.start()
    try:
        deadline = time.monotonic() + 20
        while watchdog.listens(deaf):
            assert time.monotonic() < deadline
    finally:
        deaf.kill()
        deaf.join()
    assert not watchdog.listens(deaf)


def deafen():
    signal.signal(watchdog.STACKS, signal.SIG_DFL)
    time.sleep(100)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"patience=5 and end=5.*0 < patience < end"):
        Watchdog(5, 5)
