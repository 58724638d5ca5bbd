"""The one LightningDataModule: named sources of shards in, batches of Tokens out."""

from __future__ import annotations

import atexit
import faulthandler
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, get_worker_info

from headwater import distributed
from headwater.datamodules.feedback import FedDataset, Feedback, open_feedback
from headwater.datamodules.files import expand, is_remote
from headwater.datamodules.mixture import Ledger, Mode, shares
from headwater.datamodules.plan import Arrange, Last, Plan, Unit
from headwater.datamodules.shards import ShardDataset
from headwater.datamodules.sources import Source
from headwater.datamodules.stream_source import open_source
from headwater.embedded import place
from headwater.model import Reader
from headwater.tokens import Tokens


class ShardDataModule(pl.LightningDataModule):
    """Reads WebDataset tars in an order that is a pure function of (seed, step) and of the ledger of weight changes.

    Args:
        train: name -> source.
        held_out: name -> source for validation; each is one dataloader, read in file order.
        path: one folder of shards instead of `train` and `held_out`: train-*.tar (or all tars) and validation-*.tar.
        batch_size: samples per step over all ranks.
        unit: "batch" = each step comes from one source, in turn by weight; "sample" = each step mixes all by weight.
        mixing: what a weight means. "weights": fixed proportions; "epoch": every sample of every source once before any comes
            again; "size": weight * size^alpha.
        alpha: see mixing.
        last: what happens to samples that do not fill an epoch's last batch: "wrap" fills it from the next epoch, "drop"
            leaves them out of this epoch, "short" makes a smaller batch.
        arrange: put samples of like length, or related ones, into the same batch; None = as they come.
        pack: most tokens per row and modality, to pack several samples into a row; None = one sample per row.
        buckets: modality -> n: its rows have a multiple of n places, so that compiled blocks meet few lengths; None = as many as
            the longest needs.
        workers: loader processes per rank.
        start: how they are started: "fork", "spawn" or "forkserver"; None = the platform's way.
        seed: of order, masks and views.
        window: shards that are shuffled together.
        notice: steps before a change of weights begins; more than the workers read ahead.
        fault_budget: share of undecodable members at which the run stops.
        feedback: a source of batches that come beside those of training, for objectives that ask for feedback.
    """

    def __init__(
        self,
        train: dict[str, Source] | None = None,
        held_out: dict[str, Source] | None = None,
        path: str | None = None,
        batch_size: int = 64,
        unit: Unit = "batch",
        mixing: Mode = "weights",
        alpha: float = 0.5,
        last: Last = "wrap",
        arrange: Arrange | None = None,
        pack: dict[str, int] | None = None,
        buckets: dict[str, int] | None = None,
        workers: int = 1,
        start: Literal["fork", "spawn", "forkserver"] | None = None,
        seed: int = 0,
        window: int = 16,
        notice: int = 64,
        fault_budget: float = 0.1,
        feedback: Feedback | None = None,
    ) -> None:
        super().__init__()
        if path is not None:
            train, held_out = folder(path, next(iter((train or {}).values()), Source("")))
        if not train:
            raise ValueError("no training data was named; give --data FOLDER of shards, or data.train in the recipe")
        if buckets and min(buckets.values()) < 1:
            raise ValueError(
                f"found buckets {buckets}; expected modalities with the number of places that theirs are a multiple of"
            )
        if workers >= notice:
            raise ValueError(f"found workers={workers} and notice={notice}; workers read ahead: expected more notice than workers")
        self.train, self.held_out, self.batch_size, self.unit = train, held_out or {}, batch_size, unit
        self.mixing, self.alpha, self.last, self.arrange, self.pack = mixing, alpha, last, arrange, pack
        self.buckets = buckets
        self.workers, self.start, self.seed, self.window = workers, start, seed, window
        self.notice, self.fault_budget = notice, fault_budget
        self.feedback = feedback
        self.faults: Counter[str] = Counter()
        self.members_read = 0
        self.first = 0  # steps of the order that earlier runs have taken

    def setup(self, stage: str) -> None:
        """Open every index and choose readers: training reads what the objective needs, held-out sources give all modalities."""
        module: Any = self.trainer.lightning_module
        views, needs = module.objective.views, module.objective.needs
        opened = [
            open_source(n, s, self.readers, self.seed, self.window, k, views, needs) for k, (n, s) in enumerate(self.train.items())
        ]
        self.sources = opened
        plain = {name: reader for name, reader in self.readers.items() if name not in views}
        self.validation = [open_source(n, s, plain, self.seed, 0) for n, s in self.held_out.items()]
        self.fed = open_feedback(self.feedback, module.objective, self.readers, self.seed, self.window, len(opened))
        for source in [*self.sources, *self.validation, *(self.fed.sources if self.fed else ())]:
            self.faults |= Counter(source.faults)  # once, however often the sources are opened
            for lost in source.lost:
                rank_zero_warn(f"source {source.name} has no index: {lost}. Run `headwater index` on it, or give it a cache")
        if endless := [source.name for source in self.validation if source.lost]:
            raise ValueError(f"held-out sources are read once, and {endless} are streams without an index; give them a cache")
        weights = shares(self.mixing, [s.source.weight for s in opened], [s.total for s in opened], self.alpha)
        self.ledger = Ledger(weights)
        self.plan = Plan(opened, self.ledger, self.batch_size, self.unit, self.last, self.seed, self.arrange, self.pack)
        for plan in (self.plan, *([self.fed] if self.fed else ())):
            for number, source in enumerate(plan.sources):
                if source.total < plan.size(number):
                    found = f"source {source.name} holds {source.total} samples"
                    rank_zero_warn(f"{found}, fewer than a batch of {plan.size(number)}: a batch repeats some")

    def reweigh(self, weights: dict[str, float]) -> int:
        """Change the weights of the mixture during the run; returns the step from which on they hold.

        Called on every rank; the weights of the first rank count. The change is kept in the checkpoint, so order remains a
        function of (seed, step, ledger).
        """
        if set(weights) != set(self.train):
            raise ValueError(f"found weights of {sorted(weights)}; expected one for each source: {sorted(self.train)}")
        given = torch.tensor(
            [weights[name] for name in self.train], dtype=torch.float64, device=self.trainer.lightning_module.device
        )
        step = self.first + self.trainer.global_step + self.notice
        if self.unit == "sample" and self.arrange:  # a window that is being read keeps its samples
            step = -(-step // self.arrange.steps) * self.arrange.steps
        self.ledger.add(step, distributed.gather(given[None])[0][0].tolist())
        return step - self.first

    @property
    def setting(self) -> dict[str, Any]:
        """All that the order depends on, beside the step and the ledger."""
        own = {k: getattr(self, k) for k in ("seed", "batch_size", "unit", "last", "window")}
        arranged = vars(self.arrange) if self.arrange else None
        fed = (
            {**vars(self.feedback), "source": self.fed.sources[0].total, "every": self.every}
            if self.feedback and self.fed
            else None
        )
        sources = {s.name: s.total for s in self.sources}
        return {**own, "arrange": arranged, "pack": self.pack, "sources": sources, "feedback": fed}

    def state_dict(self) -> dict[str, Any]:
        """What went wrong so far, and the ledger; where the order stands follows from the step."""
        ledger = [[step, list(weights)] for step, weights in self.ledger.entries]
        read = {"faults": dict(self.faults), "members_read": self.members_read}
        return {**read, "ledger": ledger, "setting": self.setting, "first": self.first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.faults, self.members_read = Counter(state_dict["faults"]), state_dict["members_read"]
        self.first, before = state_dict["first"], state_dict["setting"]
        if changed := self.changes(before):
            rank_zero_warn(f"the order of samples does not continue that of the checkpoint, because of: {'; '.join(changed)}")
        if list(before["sources"]) == list(self.setting["sources"]):
            self.ledger.restore([(int(step), weights) for step, weights in state_dict["ledger"]])

    def go_on(self, state: dict[str, Any], steps: int) -> None:
        """Take up the order of samples where another run left it. state: its `state_dict`; steps: that it has made."""
        if changed := self.changes(state["setting"] | {"feedback": self.setting["feedback"]}):  # which may change between stages
            raise ValueError(
                f"the order of samples cannot go on, because of: {'; '.join(changed)}. Take `data` out of `carry`, and give the "
                "stage another data.seed, so that it does not begin with the same samples"
            )
        self.ledger.restore([(int(step), weights) for step, weights in state["ledger"]])
        self.first = state["first"] + steps

    def changes(self, before: dict[str, Any]) -> list[str]:
        """In what the order of samples differs from that of a run with this `setting`."""
        now = self.setting
        return [f"{k} (was {before.get(k)}, is {now[k]})" for k in now if before.get(k) != now[k]]

    @property
    def readers(self) -> dict[str, Reader]:
        """How each modality, view of one and label is read."""
        module: Any = self.trainer.lightning_module
        return module.readers

    @property
    def every(self) -> int:
        """Steps between batches of feedback."""
        module: Any = self.trainer.lightning_module
        return module.objective.every

    @property
    def provides(self) -> dict[str, tuple[str, ...]]:
        """Training source -> the modalities that it gives."""
        return {s.name: tuple(s.readers) for s in self.sources}

    def shares(self) -> dict[str, float]:
        """Source -> its share of the samples that have been drawn; empty where there is only one."""
        return self.plan.shares(self.first + self.trainer.global_step) if len(self.sources) > 1 else {}

    def source(self) -> str:
        """The one that the present step comes from; empty where there is only one, or where steps mix them."""
        if self.unit == "sample" or len(self.sources) == 1:
            return ""
        return self.sources[int(self.plan.mixture.step(self.first + self.trainer.global_step).source[0])].name

    def train_dataloader(self) -> DataLoader:
        first = self.first + self.trainer.global_step
        data = ShardDataset(self.plan, distributed.rank(), distributed.world(), first, buckets=self.buckets)
        return self._loader(FedDataset(data, self.fed, self.every, self.first) if self.fed else data)

    def val_dataloader(self) -> list[DataLoader]:
        return [self._loader(self._evaluation(source)) for source in self.validation]

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def _evaluation(self, source: Any) -> ShardDataset:
        """Once through a source; the last batch wraps round to fill up, and whoever counts, counts each sample id once."""
        plan = Plan([source], Ledger([1.0]), self.batch_size, "batch", "wrap", self.seed, None, self.pack)
        return ShardDataset(plan, distributed.rank(), distributed.world(), 0, plan.steps(0))

    def _loader(self, data: ShardDataset) -> DataLoader:
        workers = min(self.workers, data.steps or self.workers)
        if not workers:
            return DataLoader(data, None, collate_fn=as_it_is)
        ahead = max(1, min(4, self.notice // workers - 1))  # a change of weights must not find its steps read already
        atexit.register(let_go, data.closing)
        return DataLoader(
            data,
            None,
            collate_fn=as_it_is,
            num_workers=workers,
            prefetch_factor=ahead,
            multiprocessing_context=self.start,
            worker_init_fn=outlive_signals,
        )

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Take the list of faults out of the batch and stop when there are too many."""
        batch = dict(batch)
        self.faults.update(batch.pop("faults", ()))
        within = [one.values() for one in (batch, *batch.values()) if isinstance(one, dict)]
        self.members_read += sum(t.position.shape[0] for values in within for t in values if isinstance(t, Tokens))
        if len(self.faults) > 10 and sum(self.faults.values()) > self.fault_budget * self.members_read:
            worst = "\n  ".join(sorted(self.faults)[:10])
            raise RuntimeError(
                f"{sum(self.faults.values())} of {self.members_read} members could not be used, more than the budget of "
                f"{self.fault_budget:.0%}; mend the shards or raise data.fault_budget. Among them:\n  {worst}"
            )
        return batch

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """On the device: the module makes of it what its objective asks about."""
        module: Any = self.trainer.lightning_module  # type: ignore[union-attr]
        return module.prepare(batch)


def as_it_is(batch: Any) -> Any:
    """The dataset gives whole batches; torch's own conversion would walk through every one of them."""
    return batch


def let_go(closing: torch.Tensor) -> None:
    """Tell the workers of a loader that the main process exits."""
    with torch.inference_mode():  # a loader of an evaluation was made in it, and its tensors cannot be changed outside
        closing.fill_(True)


def outlive_signals(worker: int) -> None:
    """A scheduler signals every process of a job: the main one finishes its step and then ends its workers.

    Only once the main process exits does SIGTERM, with which Python ends children that are left over, take effect.
    """
    info: Any = get_worker_info()
    closing = info.dataset.closing
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if closing else None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR2, 2)  # with which the watchdog asks a worker where it is
    threading.Thread(target=follow, args=(os.getppid(),), daemon=True).start()


def follow(parent: int) -> None:
    """End when the process that started this one is gone, even if a read never returns."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def folder(path: str, like: Source) -> tuple[dict[str, Source], dict[str, Source]]:
    """Training and held-out sources of one folder, glob or tar; views and the like as in the source `like`."""
    name = Path(path.rstrip("/")).name or "data"
    if is_remote(path) or not os.path.isdir(place(path)):
        return {name: replace(like, shards=path)}, {}
    shards = [Path(p).name for p in expand(path)]
    train = any(p.startswith("train-") for p in shards)
    held = any(p.startswith("validation-") for p in shards)
    pattern = os.path.join(path, "train-*.tar") if train else path
    return {name: replace(like, shards=pattern)}, {name: Source(os.path.join(path, "validation-*.tar"))} if held else {}
