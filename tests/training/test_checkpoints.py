"""Checkpoints are whole or not there, a damaged one is known, and a full disk ends nothing."""

import os
import resource
import threading

import pytest
import torch
from torch import nn

from headwater.training.checkpoints import Checkpoints, check_tensors, copied, found, newest, step_of


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path / "checkpoints")
    made.begin(0)
    return made


def state(number=0.0):
    return {"state_dict": {"w": torch.full((100, 100), number)}, "step": number, "list": [(1, "a")]}


def test_the_newest_two_remain_and_last_leads_to_the_newest(checkpoints):
    for step in (5, 10, 15):
        checkpoints.write(step, state(step))
    checkpoints.wait()
    folder = checkpoints.folder
    assert [step_of(path) for path in found(folder)] == [15, 10]
    assert not list(folder.glob("*.partial"))
    assert os.readlink(folder / "last.ckpt") == found(folder)[0].name == newest(folder)[0].name
    assert torch.load(folder / "last.ckpt", weights_only=True)["step"] == 15
    checkpoints.write(15, state(16))  # the same step again takes the place of the first
    checkpoints.wait()
    assert [step_of(path) for path in found(folder)] == [15, 10]
    assert torch.load(folder / "last.ckpt", weights_only=True)["step"] == 16


def test_training_goes_on_while_one_is_written_and_changes_nothing_in_it(checkpoints, monkeypatch):
    go, save = threading.Event(), torch.save

    def slow(*given):
        assert go.wait(10)
        save(*given)

    monkeypatch.setattr(torch, "save", slow)
    moving = state(1.0)
    checkpoints.write(1, moving)
    moving["state_dict"]["w"].fill_(2.0)  # the next step
    moving["list"].append(3)
    checkpoints.look()
    assert not found(checkpoints.folder)
    go.set()
    checkpoints.wait()
    saved = torch.load(checkpoints.folder / "last.ckpt", weights_only=True)
    assert (saved["state_dict"]["w"] == 1).all()
    assert saved["list"] == [(1, "a")]


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_a_damaged_one_is_known_and_the_one_before_it_is_taken(checkpoints, harm):
    for step in (1, 2):
        checkpoints.write(step, state(step))
    checkpoints.wait()
    last, before = found(checkpoints.folder)
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes({"flip": content, "cut": content[: len(content) // 2], "empty": b""}[harm])
    assert newest(checkpoints.folder) == (before, [last.name])
    checkpoints.begin(1)
    assert newest(checkpoints.folder) == (before, [])
    assert os.readlink(checkpoints.folder / "last.ckpt") == before.name
    assert (checkpoints.folder / f"{last.name}.damaged").exists()
    before.write_bytes(b"")
    with pytest.raises(ValueError, match=r"all damaged.*start anew"):
        newest(checkpoints.folder)


def test_a_full_disk_is_told_and_the_next_one_is_tried(checkpoints):
    checkpoints.write(1, state(1))
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limits[1]))
    try:
        checkpoints.write(2, state(2))
        with pytest.warns(UserWarning, match="could not be written.*training goes on"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(checkpoints.failed, OSError)
    assert not list(checkpoints.folder.glob("*.partial"))
    assert step_of(newest(checkpoints.folder)[0]) == 1
    checkpoints.write(3, state(3))
    checkpoints.wait()
    assert checkpoints.failed is None
    assert step_of(newest(checkpoints.folder)[0]) == 3


def test_what_is_no_disk_error_is_raised(checkpoints):
    checkpoints.write(1, {"state_dict": {}, "bad": lambda: None})
    with pytest.raises(Exception, match="lambda"):
        checkpoints.wait()
    checkpoints.look()  # once


def test_half_a_checkpoint_of_a_killed_run_is_cleared_away(checkpoints):
    (checkpoints.folder / "step-000007.partial").write_bytes(b"half")
    checkpoints.begin(0)
    assert not os.listdir(checkpoints.folder)
    assert newest(checkpoints.folder) == (None, [])


def test_copies_share_what_the_originals_share():
    base = torch.arange(12.0).reshape(3, 4)
    model = nn.Linear(2, 2).state_dict()
    given = {"a": base, "tied": base, "view": base[0], "other": base.clone(), "state_dict": model, "empty": torch.zeros(0)}
    out = copied(given)
    assert out["a"] is out["tied"]
    assert out["a"] is not out["other"]
    assert out["view"].untyped_storage().nbytes() == 16  # of its own row alone
    assert out["state_dict"]._metadata == model._metadata
    assert all(torch.equal(out[k], given[k]) for k in ("a", "tied", "view", "other", "empty"))
    base.zero_()
    assert out["a"].any()
    assert out["view"].any()


def test_changed_tensors_are_named():
    saved = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).state_dict()
    check_tensors(saved, nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)))
    with pytest.raises(ValueError, match=r"1\.weight was \(1, 3\), is \(2, 3\); 1\.bias was \(1,\), is \(2,\)"):
        check_tensors(saved, nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)))
    with pytest.raises(ValueError, match=r"2 tensors.*1\.weight is no more; 1\.bias is no more.*config\.yaml"):
        check_tensors(saved, nn.Sequential(nn.Linear(2, 3)))
    with pytest.raises(ValueError, match=r"1\.bias is new"):
        check_tensors({k: v for k, v in saved.items() if k != "1.bias"}, nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)))
