"""The one LightningDataModule: named sources of shards in, batches of Tokens out."""

from __future__ import annotations

import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from headwater import distributed
from headwater.datamodules.shards import OpenSource, ShardDataset, Source, expand
from headwater.model import Reader
from headwater.tokens import Tokens


class ShardDataModule(pl.LightningDataModule):
    """Reads WebDataset tars in an order that is a pure function of (seed, step).

    Args:
        train: name -> source.
        held_out: name -> source for validation; each is one dataloader, read in file order.
        path: one folder of shards instead of `train` and `held_out`: train-*.tar (or all tars) and validation-*.tar.
        batch_size: samples per step over all ranks.
        unit: "batch" = each step comes from one source, in turn by weight; "sample" = each step mixes all by weight.
        workers: loader processes per rank.
        seed: of order, masks and views.
        window: shards that are shuffled together.
        pack: most tokens per row and modality, to pack several samples into a row; None = one sample per row.
        fault_budget: share of undecodable members at which the run stops.
    """

    def __init__(
        self,
        train: dict[str, Source] | None = None,
        held_out: dict[str, Source] | None = None,
        path: str | None = None,
        batch_size: int = 64,
        unit: Literal["batch", "sample"] = "batch",
        workers: int = 1,
        seed: int = 0,
        window: int = 16,
        pack: dict[str, int] | None = None,
        fault_budget: float = 0.1,
    ) -> None:
        super().__init__()
        if path is not None:
            train, held_out = folder(path, next(iter((train or {}).values()), Source("")))
        if not train:
            raise ValueError("no training data was named; give --data FOLDER of shards, or data.train in the recipe")
        self.train, self.held_out, self.batch_size, self.unit = train, held_out or {}, batch_size, unit
        self.workers, self.seed, self.window, self.pack, self.fault_budget = workers, seed, window, pack, fault_budget
        self.faults: Counter[str] = Counter()
        self.members_read = 0

    def setup(self, stage: str) -> None:
        """Open every index and choose readers by the encoders of the model."""
        self.sources = [OpenSource(n, s, self.readers, self.seed, self.window) for n, s in self.train.items()]
        self.validation = [OpenSource(n, s, self.readers, self.seed, 0) for n, s in self.held_out.items()]
        for source in [*self.sources, *self.validation]:
            self.faults |= Counter(source.faults)  # once, however often the sources are opened
        for source in self.sources:
            size = source.source.batch_size or self.batch_size
            if source.order.total < size:
                found = f"source {source.name} holds {source.order.total} samples"
                rank_zero_warn(f"{found}, fewer than a batch of {size}: a batch repeats some")

    def state_dict(self) -> dict[str, Any]:
        """What went wrong so far; where the order stands follows from the step."""
        return {"faults": dict(self.faults), "members_read": self.members_read}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.faults, self.members_read = Counter(state_dict["faults"]), state_dict["members_read"]

    @property
    def readers(self) -> dict[str, Reader]:
        """How each modality is read: by the encoders of the model."""
        model: Any = self.trainer.lightning_module
        return model.backbone.readers

    @property
    def provides(self) -> dict[str, tuple[str, ...]]:
        """Training source -> the modalities that it gives."""
        return {s.name: tuple(s.readers) for s in self.sources}

    def train_dataloader(self) -> DataLoader:
        data = self._dataset(self.sources, self.trainer.global_step, None)
        return self._loader(data)

    def val_dataloader(self) -> list[DataLoader]:
        return [self._loader(self._evaluation(source)) for source in self.validation]

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def _evaluation(self, source: OpenSource) -> ShardDataset:
        """Once through a source; the last batch wraps round to fill up, and whoever counts, counts each sample id once."""
        size = source.source.batch_size or self.batch_size
        return self._dataset([source], 0, -(-source.order.total // size))

    def _dataset(self, sources: list[OpenSource], first: int, steps: int | None) -> ShardDataset:
        rank, world = distributed.rank(), distributed.world()
        return ShardDataset(sources, self.unit, self.batch_size, self.seed, rank, world, first, steps, self.pack)

    def _loader(self, data: ShardDataset) -> DataLoader:
        workers = min(self.workers, data.steps or self.workers)
        return DataLoader(data, None, num_workers=workers, prefetch_factor=4 if workers else None, worker_init_fn=outlive_signals)

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Take the list of faults out of the batch and stop when there are too many."""
        batch = dict(batch)
        self.faults.update(batch.pop("faults", ()))
        self.members_read += sum(t.position.shape[0] for t in batch.values() if isinstance(t, Tokens))
        if len(self.faults) > 10 and sum(self.faults.values()) > self.fault_budget * self.members_read:
            worst = "\n  ".join(sorted(self.faults)[:10])
            raise RuntimeError(
                f"{sum(self.faults.values())} of {self.members_read} members could not be used, more than the budget of "
                f"{self.fault_budget:.0%}; mend the shards or raise data.fault_budget. Among them:\n  {worst}"
            )
        return batch

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Floats and normalisation, on the device."""
        readers = self.readers
        return {
            name: readers[name.partition("@")[0]].prepare(value) if isinstance(value, Tokens) else value
            for name, value in batch.items()
        }


def outlive_signals(worker: int) -> None:
    """A scheduler signals every process of a job; the main one finishes its step and then ends its workers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def folder(path: str, like: Source) -> tuple[dict[str, Source], dict[str, Source]]:
    """Training and held-out sources of one folder, glob or tar; views and the like as in the source `like`."""
    name = Path(path.rstrip("/")).name or "data"
    if not os.path.isdir(os.path.expanduser(path)):
        return {name: replace(like, shards=path)}, {}
    shards = [Path(p).name for p in expand(path)]
    train = any(p.startswith("train-") for p in shards)
    held = any(p.startswith("validation-") for p in shards)
    pattern = os.path.join(path, "train-*.tar") if train else path
    return {name: replace(like, shards=pattern)}, {name: Source(os.path.join(path, "validation-*.tar"))} if held else {}
