"""A run in this process ends in order, goes on, and says why where it cannot."""

import os
import resource
import signal
from datetime import timedelta

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from runs import COUPLED, make, pairs, trainer, write_pairs

from headwater.tools import run_folder
from headwater.tools.run_folder import LAST, RunFolder
from headwater.training.checkpoints import found, newest, step_of

STEPS = 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


class Then(pl.Callback):
    """Calls something in the middle of a step."""

    def __init__(self, step, call):
        self.step, self.call = step, call

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.call()


def run(shards, folder, steps=STEPS, callbacks=(), resume=False, **options):
    """State of the last checkpoint after a run, or another piece of it."""
    one = trainer(steps, callbacks=[*callbacks, RunFolder(folder, **{"every": 3, **options})])
    data = pairs(shards)
    one.fit(make(COUPLED), data, ckpt_path=newest(folder / "checkpoints")[0] if resume else None, weights_only=True)
    state = torch.load(folder / LAST, weights_only=True)
    return state["state_dict"], state["optimizer_states"][0]["state"], state["global_step"]


def steps_in(folder):
    return [step_of(path) for path in found(folder / "checkpoints")]


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    made = run(shards, folder)
    assert steps_in(folder) == [8, 6]
    assert made[2] == STEPS
    return made


def equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_middle_of_a_step_loses_nothing(shards, tmp_path, whole, capsys, number):
    with pytest.raises(SIGTERMException):
        run(shards, tmp_path, callbacks=[Then(4, lambda: os.kill(os.getpid(), number))])
    assert f"stopped at step 5; go on with the same command and --resume {tmp_path}" in capsys.readouterr().out
    assert steps_in(tmp_path) == [5, 3]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    equal(run(shards, tmp_path, resume=True), whole)


def test_a_signal_after_the_last_step_waits_until_all_is_written(shards, tmp_path, whole, monkeypatch):
    save = run_folder.hub.save_backbone

    def slow(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        save(*given)

    monkeypatch.setattr(run_folder.hub, "save_backbone", slow)
    with pytest.raises(SIGTERMException):
        run(shards, tmp_path)
    monkeypatch.undo()
    assert steps_in(tmp_path) == [8, 6]
    assert (tmp_path / "backbone/weights.safetensors").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    equal(run(shards, tmp_path, resume=True), whole)


def test_a_second_interrupt_ends_at_once(shards, tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises((KeyboardInterrupt, SystemExit)) as stop:
        run(shards, tmp_path, callbacks=[Then(4, twice)])
    assert not isinstance(stop.value, SIGTERMException)
    assert steps_in(tmp_path) == [3]


def test_time_is_up(shards, tmp_path, monkeypatch, whole):
    now = run_folder.time.monotonic
    later = Then(2, lambda: monkeypatch.setattr(run_folder.time, "monotonic", lambda: now() + 1e6))
    with pytest.raises(SIGTERMException):
        run(shards, tmp_path, callbacks=[later], stop_after=timedelta(hours=1e2))
    assert steps_in(tmp_path) == [3]
    monkeypatch.undo()
    equal(run(shards, tmp_path, resume=True), whole)


def test_an_error_leaves_the_last_checkpoint_which_goes_on_to_the_same_end(shards, tmp_path, whole):
    def fail():
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        run(shards, tmp_path, callbacks=[Then(7, fail)])
    assert steps_in(tmp_path) == [6, 3]
    newest_one = found(tmp_path / "checkpoints")[0]
    newest_one.write_bytes(newest_one.read_bytes()[:-1])
    equal(run(shards, tmp_path, resume=True), whole)  # from step 3


def test_a_disk_that_is_full_for_a_while_costs_one_checkpoint(shards, tmp_path, whole):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = Then(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limits[1])))
    free = Then(7, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    with pytest.warns(UserWarning, match="could not be written"):
        made = run(shards, tmp_path, callbacks=[full, free])
    equal(made, whole)
    assert steps_in(tmp_path) == [8, 3]


def test_a_disk_that_stays_full_is_an_error_at_the_end(shards, tmp_path, whole):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = Then(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limits[1])))
    try:
        said = r"checkpoint of step 8 could not be written.*Make room"
        with pytest.warns(UserWarning, match="make room"), pytest.raises(OSError, match=said):
            run(shards, tmp_path, callbacks=[full])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert steps_in(tmp_path) == [3]
    equal(run(shards, tmp_path, resume=True), whole)


def test_a_validation_that_is_due_is_made_before_the_end(shards, tmp_path):
    seen = []

    class Validated(pl.Callback):
        def on_validation_batch_end(self, trainer, *rest):
            seen.append(trainer.global_step)

    ask = Then(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    often = {"val_check_interval": 4, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    one = trainer(STEPS, callbacks=[ask, Validated(), RunFolder(tmp_path)], **often)
    data = pairs(shards)
    data.held_out = dict(data.train)
    with pytest.raises(SIGTERMException):
        one.fit(make(), data)
    assert seen == [4] * 4  # 20 samples in batches of 5
    assert steps_in(tmp_path) == [4]


def end(shards, folder, sharded, who):
    """One rank is told to end in the middle of a step; where it ended, and where the run that goes on ends."""
    from headwater import distributed

    ask = Then(3, lambda: os.kill(os.getpid(), signal.SIGTERM) if distributed.rank() == who else None)
    ended = None
    for callbacks in ([ask], []):
        pretrainer = make(COUPLED)
        one = trainer(STEPS, sharded, callbacks=[*callbacks, RunFolder(folder, 100)])
        try:
            one.fit(pretrainer, pairs(shards), ckpt_path=newest(folder / "checkpoints")[0], weights_only=True)
        except SIGTERMException:
            ended = one.global_step
    return ended, one.global_step, torch.load(folder / LAST, weights_only=True)["state_dict"] if who else None


def straight(shards, folder, sharded):
    trainer(STEPS, sharded, callbacks=[RunFolder(folder, 100)]).fit(make(COUPLED), pairs(shards))


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_one_rank_is_told_and_all_end_at_the_same_step(ranks, shards, tmp_path, sharded):
    (ended, last, _), (ended_too, _, state) = ranks(end, shards, tmp_path / "told", sharded, 1)
    assert ended == ended_too == 4
    assert last == STEPS
    ranks(straight, shards, tmp_path / "straight", sharded)
    equal(state, torch.load(tmp_path / "straight" / LAST, weights_only=True)["state_dict"])


def test_bad_arguments():
    with pytest.raises(ValueError, match="steps between checkpoints"):
        RunFolder("x", 0)
    with pytest.raises(ValueError, match="keep=0"):
        RunFolder("x", keep=0)
