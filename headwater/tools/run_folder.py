"""The folder of a run: where it is, what it holds, how a run ends and how it goes on."""

from __future__ import annotations

import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from headwater import distributed, hub
from headwater.evaluation.figures import contact_sheet, loss_plot
from headwater.evaluation.results import Result
from headwater.hub.card import model_of
from headwater.model import Model
from headwater.training.averaging import kept
from headwater.training.checkpoints import Checkpoints
from headwater.training.metrics import MetricsFile
from headwater.training.sharding import Sharded

SUMMARY = "summary.json"
CHECKPOINTS = "checkpoints"
LAST = f"{CHECKPOINTS}/last.ckpt"
BEGAN = time.monotonic()  # about when the process did


def new_folder(root: Path, recipe: str) -> Path:
    """Make runs/<recipe>/<NNN> with the next free number."""
    numbers = [int(p.name) for p in (root / recipe).glob("*") if p.name.isdigit()]
    number = max(numbers, default=-1) + 1
    while True:
        folder = root / recipe / f"{number:03d}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # another run took it meanwhile
            number += 1
        else:
            return folder


def is_unused(folder: Path) -> bool:
    """True for a run folder without a metric, checkpoint or summary."""
    return folder.is_dir() and not any((folder / name).exists() for name in ("metrics.csv", LAST, SUMMARY))


def unfinished(root: Path, recipe: str) -> Path:
    """The newest run of a recipe that has no summary."""
    runs = sorted((p for p in (root / recipe).glob("*") if p.name.isdigit()), key=lambda p: int(p.name))
    open_runs = [p for p in runs if not (p / SUMMARY).exists()]
    if not open_runs:
        found = f"{len(runs)} runs, all finished" if runs else "no run"
        raise ValueError(f"--resume found {found} in {root / recipe}; expected one without {SUMMARY}. Start without --resume")
    return open_runs[-1]


class RunFolder(pl.Callback):
    """Writes checkpoints, the exported backbone, pictures and the summary.

    On SIGTERM or Ctrl-C of any rank, and after `stop_after`, the step in progress is finished on all ranks, and a validation
    that is due, a checkpoint is written, and the run ends with status 143; --resume goes on from there.

    Args:
        folder: of the run.
        every: steps between checkpoints.
        stop_after: how long the process may live, as a scheduler grants it; None = as long as it takes.
        keep: newest checkpoints that are kept.
    """

    def __init__(self, folder: str | Path, every: int = 200, stop_after: timedelta | None = None, keep: int = 2) -> None:
        if every < 1:
            raise ValueError(f"found {every} steps between checkpoints; expected 1 or more")
        self.folder, self.every, self.stop_after = Path(folder), every, stop_after
        self.checkpoints = Checkpoints(self.folder / CHECKPOINTS, keep)
        self.asked = self.agreed = False  # to stop: this rank was, and all ranks know

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.guard.folder = self.folder
        trainer._signal_connector._sigterm_notifier_fn = self.stop  # Lightning's own begins a collective, wherever this rank is

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.forget(trainer.global_step)
        if trainer.is_global_zero:
            self.checkpoints.begin(trainer.global_step)
        self.listen()

    def listen(self) -> None:
        """Signals ask for an orderly end."""
        signal.signal(signal.SIGINT, self.stop)
        signal.signal(signal.SIGTERM, self.stop)

    def stop(self, number: int, frame: Any) -> None:
        """The first Ctrl-C asks for an orderly end, as SIGTERM does; the second stops at once, without a checkpoint."""
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if distributed.rank() == 0:
                print("finishing this step to write a checkpoint; once more stops at once", flush=True)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.checkpoints.look()
        if trainer.global_step % self.every == 0:
            self.save(trainer)
        late = self.stop_after is not None and time.monotonic() - BEGAN > self.stop_after.total_seconds()
        self.agreed = somewhere(trainer, self.asked or late)
        self.end_after_this_step(trainer, self.agreed)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.end_after_this_step(trainer, False)  # half a validation could not go on
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # all is written

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.end_after_this_step(trainer, self.agreed)

    def end_after_this_step(self, trainer: Any, yes: bool) -> None:
        """Whether Lightning raises SIGTERMException once the step is logged."""
        trainer._signal_connector.received_sigterm = yes

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.hear_no_more()
        if isinstance(exception, SIGTERMException) and self.agreed:
            self.save(trainer, wait=True)
            if trainer.is_global_zero:
                print(f"stopped at step {trainer.global_step}; go on with the same command and --resume {self.folder}", flush=True)

    def hear_no_more(self) -> None:
        """From here on signals end the process."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def save(self, trainer: Any, wait: bool = False) -> None:
        """Collect the state of the run from all ranks; the first writes it while training goes on.

        wait: until it is written. OSError on all ranks when it cannot be.
        """
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)  # with the optimizer
        if trainer.is_global_zero:
            self.checkpoints.write(trainer.global_step, state)
        if not wait:
            return
        self.checkpoints.wait()
        if somewhere(trainer, self.checkpoints.failed is not None):
            raise OSError(
                f"the checkpoint of step {trainer.global_step} could not be written to {self.checkpoints.folder}: "
                f"{self.checkpoints.failed or 'see what the first rank says'}. Make room; --resume {self.folder} then goes on from "
                "the one before it"
            )

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.interrupted:
            return
        self.listen()  # until all is written: Lightning listens no more
        self.save(trainer, wait=True)
        model = whole(trainer, kept(pl_module))
        if trainer.is_global_zero:
            config = self.folder / "config.yaml"  # what the command line writes
            note = hub.provenance(pl_module, trainer.datamodule, config if config.exists() else None)
            note |= {"step": trainer.global_step, "run": self.folder.name, "average": kept(pl_module) is not pl_module.backbone}
            hub.save_backbone(model, self.folder / "backbone", note)
        self.hear_no_more()
        if somewhere(trainer, self.asked):
            raise SIGTERMException

    def finish(self, trainer: Any) -> dict[str, Any]:
        """After evaluation: pictures, what was skipped, and the summary that marks the run as finished."""
        results = results_of(trainer)
        faults = trainer.datamodule.faults
        summary: dict[str, Any] = {
            "step": trainer.global_step,
            "results": [r._asdict() for r in results],
            "skipped": dict(sorted(faults.items())),
        }
        if not trainer.is_global_zero:
            return summary
        metrics = self.folder / "metrics.csv"
        for logger in trainer.loggers:
            if results:
                logger.log_metrics({f"held_out/{r.source}/{r.metric}": r.value for r in results}, trainer.global_step)
        if metrics.exists():
            loss_plot(metrics, self.folder / "losses.png")
        for callback in trainer.callbacks:
            if getattr(callback, "sheet", None):
                contact_sheet(callback.sheet, self.folder / "retrieval.png")
        partial = self.folder / f"{SUMMARY}.partial"
        partial.write_text(json.dumps(summary, indent=2))
        os.replace(partial, self.folder / SUMMARY)
        show(results, summary["skipped"])
        print(f"run folder: {self.folder}")
        return summary


def whole(trainer: pl.Trainer, model: Model) -> Model:
    """The model itself; under FSDP2 a copy on the CPU, which only the first rank fills. Called on all ranks."""
    if not isinstance(trainer.strategy, Sharded):
        return model
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    copy = model_of(model.spec, Path())
    if trainer.is_global_zero:
        copy.load_state_dict(weights)
    return copy


def somewhere(trainer: Any, here: bool) -> bool:
    """Is it so on any rank? Called on all of them."""
    return bool(distributed.total(torch.tensor(float(here), device=trainer.strategy.root_device)))


def results_of(trainer: Any) -> list[Result]:
    """The figures of every evaluation callback."""
    return [r for callback in trainer.callbacks for r in getattr(callback, "results", ())]


def show(results: list[Result], skipped: dict[str, int]) -> None:
    """Print the table of held-out figures against what needs no learning, and what was skipped."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if os.isatty(1) else 110)
    table = Table(
        "held-out part", "metric", "value", "95 % interval", "against", "n", title="Held-out evaluation", title_justify="left"
    )
    for r in results:
        against = ", ".join(f"{name} {value:.3f}" for name, value in r.against.items())
        table.add_row(r.source, r.metric, f"{r.value:.3f}", f"{r.low:.3f} - {r.high:.3f}", against, str(r.n))
    if results:
        console.print(table)
    if skipped:
        console.print(f"{sum(skipped.values())} members could not be used and were skipped:", style="yellow")
        for fault, times in list(skipped.items())[:20]:
            console.print(f"  {fault}" + (f" ({times} times)" if times > 1 else ""), markup=False)
