"""What goes wrong in the drill, as recipes name it."""

import os
import time
from pathlib import Path

import lightning.pytorch as pl

from headwater.modalities.text import Text, TextReader
from headwater.trunk import Trunk


class Poison(pl.Callback):
    """The pictures of one rank become a number that they should not be. steps: step -> the number."""

    def __init__(self, steps: dict[int, float], rank: int = 1) -> None:
        self.steps, self.rank = steps, rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step in self.steps and trainer.global_rank == self.rank:
            batch["image"].x.fill_(self.steps[trainer.global_step])


class Pids(pl.Callback):
    """Writes pid-<rank>, so that the drill knows whom to kill, and lets every step last a while."""

    def __init__(self, pause: float = 0.0) -> None:
        self.pause = pause

    def on_train_start(self, trainer, pl_module) -> None:
        Path(f"pid-{trainer.global_rank}").write_text(str(os.getpid()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        time.sleep(self.pause)


class Stuck(TextReader):
    """Reads nothing as long as there is a file stuck-<rank>."""

    def tokens(self, signal, view=None):
        while os.path.exists(f"stuck-{os.environ.get('LOCAL_RANK', 0)}"):
            time.sleep(0.05)
        return super().tokens(signal, view)


class StuckText(Text):
    """Text that is read by it."""

    def __init__(self, trunk: Trunk, length: int = 32) -> None:
        super().__init__(trunk, length=length)
        self.reader = Stuck(length=length)
