"""TensorBoard beside metrics.csv: a convenience, so a full disk costs some of its points and not the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn


class Board(TensorBoardLogger):
    """Lightning's logger, whose writer is replaced by another one after each error of the disk; what it held is lost."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._try(super().log_metrics, metrics, step)

    def save(self) -> None:
        self._try(super().save)

    def finalize(self, status: str) -> None:
        self._try(super().finalize, status)

    def _try(self, call: Callable, *given: Any) -> None:
        try:
            call(*given)
        except (OSError, ValueError) as error:
            fault = error if isinstance(error, OSError) else error.__cause__  # Lightning puts a ValueError around it
            if not isinstance(fault, OSError):
                raise
            self._experiment = None  # its thread has ended; the next call begins another file
            rank_zero_warn(f"TensorBoard could not write to {self.log_dir}: {fault}. It lacks some points; metrics.csv has all")
