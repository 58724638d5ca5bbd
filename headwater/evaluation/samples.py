"""What a model generates while it learns: panels of samples in the folder of the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from headwater.generation import Settings
from headwater.generation.files import save, sheet, suffix
from headwater.generation.signals import alone, fill
from headwater.model import Encoder, Model, Reader
from headwater.tokens import Tokens, in_all, unpack
from headwater.training.sharding import Sharded


class Samples(pl.Callback):
    """Generates one modality, every few steps and at the end, from the same given samples and with the same draws.

    In the folder of the run, `samples/` gets pictures as one sheet per step, texts as one file of lines, and others as a file
    each; and once, as `given-...`, what they were made from.

    Args:
        to: what is generated.
        given: modalities that are given, of the first samples of the first held-out source that has them.
        count: how many samples.
        every: steps between panels; 0 = only at the end.
        settings: how they are generated; see headwater.generate. None = as they come by its defaults.
    """

    def __init__(
        self, to: str = "text", given: Sequence[str] = (), count: int = 16, every: int = 0, settings: Settings | None = None
    ) -> None:
        settings = settings or Settings()
        if count < 1 or every < 0 or settings.samples != 1:
            raise ValueError(
                f"found count {count}, every {every} and samples {settings.samples}; expected 1 or more, 0 or more, and 1: the "
                "count says how many are made"
            )
        self.to, self.wanted, self.count, self.every, self.settings = to, tuple(given), count, every, settings

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if isinstance(trainer.strategy, Sharded):
            raise ValueError("Samples runs on one rank, which needs the whole model; found weights that are split over ranks")
        if not trainer.is_global_zero:
            return
        model: Model = pl_module.backbone
        model.encoder(self.to).blank()  # so that a modality without a canvas stops the run at its start
        self.folder = Path(trainer.default_root_dir) / "samples"
        self.given = self._found(trainer, pl_module) if self.wanted else {}
        self.rows = next((len(t.position) for t in self.given.values()), self.count)
        for name, t in self.given.items():
            self._write(f"given-{name}", signals(model.encoder(name), t), model.encoder(name).reader)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.every and trainer.global_step % self.every == 0 and trainer.global_step < trainer.max_steps:
            self._panel(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._panel(trainer, pl_module)

    def _found(self, trainer: Any, module: Any) -> dict[str, Tokens]:
        """The samples from which everything is made, prepared, one per row."""
        data = trainer.datamodule
        for source, loader in zip(data.validation, data.val_dataloader()):
            if not set(self.wanted) <= set(source.readers):
                continue
            batch = next(iter(loader.dataset))
            batch = module.prepare({name: batch[name].map(lambda field: field.to(module.device)) for name in self.wanted})
            both = in_all([batch[name].samples() for name in self.wanted])[: self.count]
            if len(both):
                return {name: rows(batch[name], both) for name in self.wanted}
        raise ValueError(
            f"no held-out source gives {' and '.join(self.wanted)} together, of which samples of {self.to} are made; found "
            + ("; ".join(f"{source.name}: {', '.join(source.readers)}" for source in data.validation) or "none")
            + ". Name one under data.held_out"
        )

    def _panel(self, trainer: pl.Trainer, module: Any) -> None:
        if not trainer.is_global_zero:
            return
        model: Model = module.backbone
        *_, made = fill(model, self.to, self.settings, self.rows, self.given)
        self._write(f"{self.to}-{trainer.global_step:06d}", signals(model.encoder(self.to), made), model.encoder(self.to).reader)

    def _write(self, name: str, found: list[Any], reader: Reader) -> None:
        """One file where pictures or texts fit into one, else one each."""
        kind = suffix(found[0], reader)
        if kind == ".txt":
            save("\n".join(repr(text)[1:-1] for text in found), reader, self.folder / name)  # one line each, whatever they hold
        elif kind == ".png":
            save(sheet([np.asarray(picture) for picture in found]), reader, self.folder / name)
        else:
            for number, signal in enumerate(found):
                save(signal, reader, self.folder / f"{name}-{number:02d}")


def signals(encoder: Encoder, t: Tokens) -> list[Any]:
    """What the tokens of each row mean."""
    return [encoder.restore(alone(t, row)) for row in range(len(t.position))]


def rows(t: Tokens, sample: torch.Tensor) -> Tokens:
    """These samples (S,), one per row."""
    if t.document is None:
        return t.map(lambda field: field[sample])
    every = unpack(t)
    return every._replace(order=None if t.order is None else every.order).map(
        lambda field: field[torch.searchsorted(t.samples(), sample)]
    )
