"""Old data beside new: shares of the mixture that follow schedules, and how much is lost of what was known before.

Replay of a small share of earlier data (Ibrahim et al. 2024, arXiv:2403.08763), in the beginning only, or fading; the drop right
after data changes is the stability gap (De Lange et al. 2022, arXiv:2205.13452; Guo et al. 2024, arXiv:2406.14833).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

from headwater import distributed
from headwater.objectives.objective import Batch, Schedule, at
from headwater.training.meters import evaluated
from headwater.training.sharding import Sharded


class Shares(pl.Callback):
    """Weights of the mixture as schedules over the run: the share of replayed data, constant, early only or decaying.

    Changes hold from `data.notice` steps on, because loaders read ahead; schedules are asked for the progress of that step, so
    what is drawn follows them to within `every` steps. Sources that are not named keep the weight of the recipe. A change is kept
    with the data's ledger, so a run that is resumed draws what it would have drawn.

    Args:
        shares: source -> weight, a number or a schedule; in the recipe {class_path: Linear, init_args: {...}} for one.
        every: steps between looks at the schedules.
    """

    def __init__(self, shares: dict[str, float | Schedule], every: int = 16) -> None:
        if not shares or every < 1:
            raise ValueError(f"found shares {shares} and every={every}; expected at least one source and 1 or more steps")
        self.shares, self.every = shares, every

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """The first weights, before any worker plans a step."""
        if stage == "fit":
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            if stray := set(self.shares) - set(data.train):
                raise ValueError(f"found shares of {sorted(stray)}; the sources of the training data are {sorted(data.train)}")
            data.ledger.add(0, list(self.weights(data, 0.0).values()))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        wanted = self.weights(data, pl_module.share(trainer.global_step + data.notice))
        if tuple(wanted.values()) != data.ledger.entries[-1][1]:
            data.reweigh(wanted)

    def weights(self, data: Any, progress: float) -> dict[str, float]:
        """Of every source at this progress."""
        last = dict(zip(data.train, data.ledger.entries[0][1], strict=True))
        return {name: at(self.shares[name], progress) if name in self.shares else last[name] for name in data.train}


class Drop(NamedTuple):
    """What a curve of losses says about forgetting. depth: the most by which it exceeded its first value; width: steps for which it
    exceeded it; area: the integral of the excess over steps; end: how much the last value exceeds the first."""

    depth: float
    width: float
    area: float
    end: float


def drop(curve: Sequence[tuple[int, float]]) -> Drop:
    """Of (step, loss) in order of steps, with straight lines between them; the first is that before the data changed."""
    start = curve[0][1]
    width = area = 0.0
    for (a, x), (b, y) in pairwise((step, loss - start) for step, loss in curve):
        above = [max(x, 0.0), max(y, 0.0)]
        share = 1.0 if min(x, y) >= 0 else max(above) / (abs(x) + abs(y)) if max(above) else 0.0
        share = 0.0 if x == y == 0 else share
        width += share * (b - a)
        area += share * (b - a) * sum(above) / 2
    return Drop(max(loss - start for _, loss in curve), width, area, curve[-1][1] - start)


class Forgetting(pl.Callback):
    """The loss on held-out sources while training runs, from before the first step on, and the drop that it shows.

    Logs forgetting/SOURCE (the loss, that of a step under `step - 1` as all metrics are), forgetting/SOURCE/depth, .../width,
    .../area and .../end of `Drop`. The objective is asked as in training, without gradient and in evaluation mode, always about
    the same batches. Curves are kept in checkpoints.

    Args:
        sources: names among data.held_out; each must serve the objective, or the part.
        part: of a `Weighted` objective; None = all of the objective.
        every: steps between looks.
        batches: of `data.batch_size` samples that are asked about.
    """

    def __init__(self, sources: list[str], part: str | None = None, every: int = 20, batches: int = 4) -> None:
        if not sources or every < 1 or batches < 1:
            raise ValueError(f"found sources={sources}, every={every}, batches={batches}; expected a source, 1 or more of both")
        self.sources, self.part, self.every, self.batches = sources, part, every, batches
        self.curves: dict[str, list[tuple[int, float]]] = {name: [] for name in sources}
        self._kept: dict[str, list[Batch]] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._kept = {name: list(held_out(trainer, name, self.batches)) for name in self.sources}
        if not any(self.curves.values()):
            self.look(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every == 0 and self.curves[self.sources[0]][-1][0] < trainer.global_step:
            self.look(trainer, pl_module)

    def look(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Ask about every source and log."""
        found: dict[str, float] = {}
        for name, batches in self._kept.items():
            self.curves[name].append((trainer.global_step, loss_of(trainer, pl_module, batches, self.part)))
            seen = drop(self.curves[name])._asdict()
            found |= {f"forgetting/{name}": self.curves[name][-1][1]}
            found |= {f"forgetting/{name}/{key}": value for key, value in seen.items()}
        for logger in trainer.loggers:
            logger.log_metrics(found, max(0, trainer.global_step - 1))

    def state_dict(self) -> dict[str, Any]:
        return {"curves": {name: [list(point) for point in curve] for name, curve in self.curves.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curves |= {name: [(int(s), float(x)) for s, x in points] for name, points in state_dict["curves"].items()}


@torch.no_grad()
def loss_of(trainer: pl.Trainer, pl_module: Any, batches: Sequence[Batch], part: str | None = None) -> float:
    """The weighted loss over all targets of all ranks of some prepared batches; of one part if it is named."""
    totals: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}
    weights: dict[str, float] = {}
    with evaluated(pl_module), trainer.precision_plugin.forward_context():
        for batch in batches:
            task = pl_module.hide({**batch, "progress": pl_module.progress, "step": trainer.global_step})
            for name, term in pl_module.ask(task).items():
                if part is None or name.startswith(f"{part}/"):
                    totals[name] = totals.get(name, 0) + term.total.detach().double()
                    counts[name] = counts.get(name, 0) + term.number.double()
                    weights[name] = term.weight
    if isinstance(trainer.strategy, Sharded):
        pl_module.reshard()
    if not totals:
        raise ValueError(f"found no term of part {part!r} on the held-out batches; name a part of the Weighted objective")
    summed = [distributed.total(torch.stack(list(x.values()))) for x in (totals, counts)]
    return float(sum(w * t / n.clamp(min=1) for w, t, n in zip(weights.values(), *summed, strict=True)))


def held_out(trainer: pl.Trainer, source: str, batches: int) -> Iterator[Batch]:
    """The first batches of a held-out source, prepared and on the device; each rank has its share of each."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    names = list(data.held_out)
    if source not in names:
        raise ValueError(f"found source {source!r}; the held-out ones are {', '.join(names) or 'none'}: name it in data.held_out")
    for batch in islice(iter(data.val_dataloader()[names.index(source)]), batches):
        yield trainer.strategy.batch_to_device(batch)
