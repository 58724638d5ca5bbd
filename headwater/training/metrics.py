"""Metrics of a run as one growing CSV file that survives a resume."""

from __future__ import annotations

import csv
import errno
import io
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class MetricsFile(Logger):
    """Appends (step, name, value) to `metrics.csv` in `folder`."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._rows: list[tuple] = []  # not written yet: the disk is full

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run folder's config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Rows that find a full disk wait for the next ones."""
        new = not self.path.exists()
        self._rows += [(step, name, f"{value:.6g}") for name, value in metrics.items() if name != "epoch"]
        text = io.StringIO(newline="")
        csv.writer(text).writerows([("step", "name", "value")] * new + self._rows)
        try:
            append(self.path, text.getvalue())
        except OSError as error:
            if error.errno not in FULL:
                raise
            rank_zero_warn(f"{self.path}: {error}; its rows are kept until there is room")
        else:
            self._rows = []

    @rank_zero_only
    def forget(self, step: int) -> None:
        """Drop rows from `step` on: a run that resumes there writes them again."""
        if not self.path.exists():
            return
        with self.path.open(newline="") as file:
            rows = list(csv.reader(file))
        kept = [rows[0], *(row for row in rows[1:] if int(row[0]) < step)]
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerows(kept)


def append(path: Path, text: str) -> None:
    """All of the text, or nothing of it."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", newline="") as file:
            file.write(text)
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise
