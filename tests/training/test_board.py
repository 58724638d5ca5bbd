"""TensorBoard on a full disk loses points, never the run."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from headwater.training.board import Board


def test_an_error_of_the_disk_costs_some_points(tmp_path, monkeypatch):
    board = Board(tmp_path, name="", version="board")
    board.log_metrics({"loss": 1.0}, 0)
    broken = board.experiment
    with monkeypatch.context() as full:
        full.setattr(broken, "add_scalar", lambda *given: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.warns(UserWarning, match="No space left on device.*metrics.csv has all"):
            board.log_metrics({"loss": 2.0}, 1)
    broken.flush()
    board.log_metrics({"loss": 3.0}, 2)
    board.save()
    board.finalize("success")
    assert board.experiment is not broken
    read = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [(point.step, point.value) for point in read.Scalars("loss")] == [(0, 1.0), (2, 3.0)]


def test_other_errors_are_raised(tmp_path):
    with pytest.raises(ValueError, match="you tried to log"):
        Board(tmp_path, name="").log_metrics({"loss": "high"}, 0)
