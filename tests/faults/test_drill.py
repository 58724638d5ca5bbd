"""Everything that is promised in docs/survival.md, done to real runs of `headwater fit` with several ranks."""

import contextlib
import json
import re
import resource
import subprocess
from pathlib import Path

import pytest
from conftest import KILL, POISON, STOP, TERM, Drill, equal, signal_all

UNLIMITED = resource.RLIM_INFINITY


@pytest.mark.slow
def test_poison_is_left_out_and_written_down(straight):
    events = [json.loads(line) for line in (straight.made / "guard.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == list(POISON)
    assert all(event["action"] == "left out" and len(event["samples"]) == 8 for event in events)
    assert "not finite" in events[0]["why"]
    assert "expected below" in events[-1]["why"]


@pytest.mark.slow
def test_a_run_through_every_fault_ends_like_one_that_nothing_happened_to(two, straight):
    run = a_rank_is_killed(two)
    run = the_newest_checkpoint_is_damaged(two, run)
    run = the_disk_is_full_for_a_while(run)
    all_are_told_to_end(run)
    a_worker_stands_still(two)
    the_first_rank_is_killed(two)
    run = two.start("chain", "--resume")
    run.ends(0)
    equal(run.result(), straight.result())


def a_rank_is_killed(drill):
    run = drill.start("chain")
    run.reach(lambda: len(run.checkpoints()) == 2)
    run.reach_step(11)
    run.kill(1, KILL)
    run.ends(75, seconds=15)
    assert "rank 1 was killed by SIGKILL; the other ranks end" in run.said
    assert "--resume goes on from the last checkpoint" in run.said
    return run


def the_newest_checkpoint_is_damaged(drill, run):
    before, newest = run.checkpoints()
    file = run.made / "checkpoints" / newest
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    run = drill.start("chain", "--resume")
    run.reach_step(12)
    assert f"checkpoint {newest} is damaged" in run.said
    assert f"resuming runs/drill/000 from runs/drill/000/checkpoints/{before}" in run.said
    return run


def the_disk_is_full_for_a_while(run):
    resource.prlimit(run.pid(0), resource.RLIMIT_FSIZE, (1 << 16, UNLIMITED))  # more than the metrics need, less than a checkpoint
    kept = run.checkpoints()
    run.reach(lambda: "could not be written" in run.said)
    assert set(kept[-1:]) <= set(run.checkpoints())
    assert "training goes on" in run.said
    resource.prlimit(run.pid(0), resource.RLIMIT_FSIZE, (UNLIMITED, UNLIMITED))
    run.reach(lambda: run.checkpoints()[-1] > kept[-1])
    return run


def all_are_told_to_end(run):
    signal_all(run, TERM)
    run.ends(143, seconds=120)
    assert "stopped at step" in run.said
    assert f"step {run.checkpoints()[-1].split('-')[1].lstrip('0')};" in run.said


def a_worker_stands_still(drill):
    run = drill.start("chain", "--resume", patience=8, end=16)
    run.reach_step(int(run.checkpoints()[-1].split("-")[1]) + 2)
    stuck = run.folder / "stuck-1"
    stuck.touch()
    run.ends(75, seconds=90)
    stuck.unlink()
    assert re.search(r"rank 1 has made no progress for \d+ s, waiting for the batch of step \d+; 1 of 2 ranks are ahead", run.said)
    assert "stacks of rank 1" in run.said
    assert "stacks of rank 0" not in run.said
    assert "in tokens" in run.said  # where the worker stands
    assert "the run ends. The same command with --resume" in run.said


def the_first_rank_is_killed(drill):
    run = drill.start("chain", "--resume")
    run.reach_step(30)
    run.kill(0, KILL)
    run.ends(-KILL, seconds=15)
    assert "is gone, so it ends" in run.said


@pytest.mark.slow
def test_three_ranks_that_share_all_state(tmp_path):
    drill = Drill(tmp_path, ranks=3, strategy="fsdp2", steps=32)
    straight = drill.start("straight")
    straight.ends(0)
    run = drill.start("chain", patience=10, end=20)
    run.reach(lambda: len(run.checkpoints()) == 2)
    run.kill(1, STOP)  # it cannot even watch over itself
    run.ends(75, seconds=120)
    assert "rank 0 waits for rank 1" in run.said
    run = drill.start("chain", "--resume")
    run.reach_step(20)
    run.kill(2, TERM)  # one is told, all end
    run.ends(143, seconds=120)
    run = drill.start("chain", "--resume")
    run.ends(0)
    equal(run.result(), straight.result())


@pytest.mark.slow
def test_after_the_time_that_it_has_a_run_ends_in_order(tmp_path):
    drill = Drill(tmp_path, ranks=1, steps=100_000)
    run = drill.start("limited", "--stop_after", "00:00:01")
    run.ends(143)
    assert "stopped at step 1; go on with the same command and --resume" in run.said
    assert run.checkpoints()[-1].startswith("step-000001-")


def fill(path):
    """Until the disk is full."""
    with contextlib.suppress(OSError), path.open("wb", 0) as file:
        while True:
            file.write(bytes(1 << 12))


@pytest.mark.slow
@pytest.mark.skipif(subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0, reason="may not mount a disk")
def test_a_disk_without_any_room_costs_no_metric_and_no_step(tmp_path):
    drill = Drill(tmp_path, ranks=1, steps=60, pause=0.2)
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=8m none runs && exec "$@"', "sh"]
    (tmp_path / "small/runs").mkdir(parents=True)
    run = drill.start("small", before=mount)
    run.reach((tmp_path / "small/pid-0").exists)
    run.made = Path(f"/proc/{run.pid(0)}/root", *run.made.parts[1:])  # the disk is theirs alone
    run.reach(run.checkpoints)
    filler = run.made / "filler"
    fill(filler)
    run.reach(lambda: "could not be written" in run.said)
    run.reach(lambda: "its rows are kept until there is room" in run.said)
    kept = run.checkpoints()
    assert kept
    filler.unlink()
    run.reach(lambda: run.checkpoints()[-1] > kept[-1])
    rows = [row.split(",") for row in (run.made / "metrics.csv").read_text().splitlines()[1:]]
    steps = [int(step) for step, name, _ in rows if name == "train/patches/masked"]
    assert steps == list(range(len(steps)))
    assert len(steps) > 10
    signal_all(run, TERM)
    run.ends(143)
