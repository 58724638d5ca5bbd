"""A live line with the loss of each part and the samples per second."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar


class Progress(LightningProgressBar):
    """On a terminal one table that is redrawn; elsewhere a line every `seconds`.

    Args:
        seconds: between lines where the output is no terminal.
    """

    def __init__(self, seconds: float = 15.0) -> None:
        super().__init__()
        self.seconds, self._on = seconds, True
        self._live: Any = None

    def disable(self) -> None:
        self._on = False

    def enable(self) -> None:
        self._on = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = self._told = time.monotonic()
        self._first, self._samples = trainer.global_step, 0
        if self._on and sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(refresh_per_second=4)
            self._live.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: dict, batch_idx: int) -> None:
        self._samples += len(batch["sample"]) * trainer.world_size
        if not self._on:
            return
        if self._live is not None:
            self._live.update(self._table(trainer))
        elif time.monotonic() - self._told > self.seconds:
            self._told = time.monotonic()
            losses = "  ".join(f"{name} {value:.3f}" for name, value in self._losses(trainer).items())
            print(f"{self._where(trainer)}  {losses}", flush=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _where(self, trainer: pl.Trainer) -> str:
        spent = max(1e-9, time.monotonic() - self._began)
        left = (trainer.max_steps - trainer.global_step) * spent / max(1, trainer.global_step - self._first)
        return f"step {trainer.global_step}/{trainer.max_steps}  {self._samples / spent:.0f} samples/s  {left:.0f} s left"

    def _losses(self, trainer: pl.Trainer) -> dict[str, float]:
        return {name.removeprefix("train/"): float(value) for name, value in sorted(trainer.progress_bar_metrics.items())}

    def _table(self, trainer: pl.Trainer):
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table("loss of", "now", box=None)
        for name, value in self._losses(trainer).items():
            table.add_row(name, f"{value:.4f}")
        bar = ProgressBar(total=trainer.max_steps, completed=trainer.global_step, width=60)
        return Group(bar, Text(self._where(trainer), no_wrap=True), table)
