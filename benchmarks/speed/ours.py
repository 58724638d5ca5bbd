"""headwater's part: the data module that `headwater fit` uses, with the readers of the encoders, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from headwater.datamodules.datamodule import ShardDataModule
from headwater.datamodules.sources import Source
from headwater.model import Reader
from headwater.tokens import Tokens


def load(
    folder: str, readers: dict[str, Reader], workers: int, batch: int, pack: dict[str, int] | None = None
) -> Iterator[dict[str, Any]]:
    """Batches as a training run gets them on its device, before floats are made of them there."""
    data = ShardDataModule({"bench": Source(folder)}, batch_size=batch, workers=workers, pack=pack)
    module = SimpleNamespace(readers=readers, objective=SimpleNamespace(needs=tuple(readers), views={}, feedback_needs=()))
    trainer: Any = SimpleNamespace(lightning_module=module, global_step=0)
    data.trainer = trainer  # all that the data module asks of one
    data.setup("fit")
    for raw in data.train_dataloader():
        yield data.on_before_batch_transfer(raw, 0)


def size(batch: dict[str, Any]) -> int:
    """How many samples a batch holds."""
    return len(batch["sample"])


def texts(t: Tokens) -> list[str]:
    """Rows of byte ids as strings."""
    return [bytes(i for i in row[real].tolist() if i < 256).decode() for row, real in zip(t.x, t.real(), strict=True)]


def pixels(t: Tokens, side: int) -> torch.Tensor:
    """Whole pictures as one token each, (B, 1, side * side * 3) -> (B, side, side, 3)."""
    return t.x.reshape(len(t.x), side, side, 3)
