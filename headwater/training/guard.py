"""A look at every step before the optimizer takes it: steps that would do harm are not taken, on any rank."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor, nn

from headwater import distributed
from headwater.distributed import local
from headwater.training.culprit import culprit

Action = Literal["warn", "skip", "slow", "back"]
LEAST = 20  # good steps before which nothing is called a spike
FILE = "guard.jsonl"


class Event(NamedTuple):
    """What happened at a step. action: what was done; samples: ids of the step's batch, of all ranks."""

    step: int
    why: str
    action: str
    samples: list[int]


class Guard:
    """Steps that are not finite are left out on all ranks; spikes are told, or answered as `action` says.

    A step that is left out counts: the optimizer is called without gradients, so the order of samples and the schedules go on,
    and a run that resumes does the same. Every event is written to `guard.jsonl` in the run folder, with the ids of its samples.

    folder: of the run, None = events are told and kept in checkpoints alone.

    Args:
        spike: a loss or gradient norm is a spike from so many robust deviations above the median of the last `window` good
            steps on, each source by itself where steps come from one of several; 20 finds gross ones. 0 = nothing is.
        action: what a spike leads to. "warn": nothing else; "skip": the step is left out; "slow": it is left out, and the rate is
            `slow` times as high for `rest` steps; "back": the weights and optimizer state of the last checkpoint return, and the
            data goes on, as in PaLM (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1). So do they then after a step that is
            not finite.
        window: good steps that are remembered.
        slow: see action.
        rest: see action.
        patience: so many steps left out in a row end the run.
    """

    folder: Path | None = None

    def __init__(
        self,
        spike: float = 0.0,
        action: Action = "warn",
        window: int = 100,
        slow: float = 0.1,
        rest: int = 100,
        patience: int = 10,
    ) -> None:
        if spike < 0 or window < LEAST or patience < 1 or rest < 0 or not 0 <= slow <= 1:
            raise ValueError(
                f"found spike={spike}, window={window}, slow={slow}, rest={rest}, patience={patience}; expected a spike of 0 or "
                f"more, a window of {LEAST} or more, slow from 0 to 1, rest of 0 or more, and patience of 1 or more"
            )
        self.spike, self.action, self.window, self.slow, self.rest, self.patience = spike, action, window, slow, rest, patience
        self.seen: dict[str, deque[float]] = {}
        self.events: list[Event] = []
        self.row, self.until = 0, 0  # steps left out since the last good one; the step that ends the low rate
        self.kept: tuple[int, dict[str, Tensor], list[dict[str, Any]]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and words."""
        seen = {name: list(values) for name, values in self.seen.items()}
        return {"seen": seen, "events": [list(e) for e in self.events], "row": self.row, "until": self.until}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = {name: deque(values, self.window) for name, values in state["seen"].items()}
        self.events, self.row, self.until = [Event(*e) for e in state["events"]], state["row"], state["until"]

    def factor(self, step: int) -> float:
        """On the learning rate of this step."""
        return self.slow if step < self.until else 1.0

    def allows(self, pretrainer: Any, optimizer: torch.optim.Optimizer) -> bool:
        """Whether to take the step that `pretrainer.step` tells of. If not, its gradients are gone when this returns."""
        done = pretrainer.step
        asked = [name for name, number in done.numbers.items() if number > 0]
        told = torch.stack([done.norm, *(done.values[name].to(done.norm) for name in asked)]).tolist()  # one wait for the device
        source = pretrainer.trainer.datamodule.source()
        values = {f"{n} of {source}" if source else n: x for n, x in zip(["gradient norm", *asked], told, strict=True)}
        why = self.fault(values)
        broken = not all(map(math.isfinite, told))
        taken = not why or (self.action == "warn" and not broken)
        if taken:
            self.row = 0
            for name, value in values.items():
                self.seen.setdefault(name, deque(maxlen=self.window)).append(value)
        if why:
            samples = distributed.gather(done.batch["sample"])[0].tolist()
            said = why + (culprit(pretrainer) if broken else "")
            did = "taken" if taken else self.leave_out(pretrainer, optimizer, broken)
            self.tell(pretrainer, Event(pretrainer.global_step, said, did, samples))
        return taken

    def fault(self, values: dict[str, float]) -> str:
        """What is wrong with losses and norm, which are the same on all ranks; "" = nothing."""
        if bad := [name for name, value in values.items() if not math.isfinite(value)]:
            return f"{', '.join(bad)} not finite"
        bounds = {name: limit(self.seen.get(name, ()), self.spike) for name in values} if self.spike else {}
        spikes = (
            f"{name} {values[name]:.4g}, expected below {bound:.4g}" for name, bound in bounds.items() if values[name] > bound
        )
        return "; ".join(spikes)

    def leave_out(self, pretrainer: Any, optimizer: torch.optim.Optimizer, broken: bool) -> str:
        """Take the gradients away, and do what `action` says; returns it in words."""
        optimizer.zero_grad()
        self.row += 1
        if self.action == "back" and self.kept is not None:
            step, weights, state = self.kept
            restore(pretrainer, weights)
            recall(optimizer, state)
            return f"left out; back to the weights of step {step}"
        if self.action == "slow" and not broken:
            self.until = pretrainer.global_step + 1 + self.rest
            return f"left out; {self.slow} times the rate until step {self.until}"
        return "left out"

    def remember(self, pretrainer: Any) -> None:
        """Called whenever a checkpoint is written or loaded: keep what "back" returns to, on the CPU."""
        if self.action == "back":
            kept = {name: local(x).to("cpu", copy=True) for name, x in pretrainer.state_dict().items()}
            self.kept = pretrainer.global_step, kept, memory(pretrainer.optimizers(use_pl_optimizer=False))

    def tell(self, pretrainer: Any, event: Event) -> None:
        """Write the event down, and warn or end the run."""
        self.events.append(event)
        if self.folder is not None:
            write(self.folder, self.events)
        rank_zero_warn(f"step {event.step}: {event.why}. The step is {event.action}; its samples: {shown(event.samples)}")
        if self.row >= self.patience:
            raise RuntimeError(
                f"{self.row} steps in a row were left out, the last one, {event.step}, because: {event.why}. Look at the samples "
                f"({shown(event.samples)}), lower the learning rate, or go on from an earlier checkpoint with another data.seed"
            )


def shown(samples: list[int]) -> str:
    """The first ids, and where the others are."""
    return ", ".join(map(str, samples[:8])) + (f" and {len(samples) - 8} others, listed in {FILE}" if len(samples) > 8 else "")


def limit(values: Iterable[float], spike: float) -> float:
    """median + spike * deviation, where the deviation is 1.4826 * the median distance from the median, and 1 % of it at least."""
    values = list(values)
    if len(values) < LEAST:
        return math.inf
    middle = median(values)
    return middle + spike * max(1.4826 * median(abs(v - middle) for v in values), 0.01 * abs(middle))


def memory(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """A copy of the state of each parameter, on the CPU."""
    every = [p for group in optimizer.param_groups for p in group["params"]]
    return [
        {k: local(v).to("cpu", copy=True) if isinstance(v, Tensor) else v for k, v in optimizer.state[p].items()} for p in every
    ]


@torch.no_grad()
def recall(optimizer: torch.optim.Optimizer, kept: list[dict[str, Any]]) -> None:
    """Put a memory back; parameters that had no state then have none now."""
    every = [p for group in optimizer.param_groups for p in group["params"]]
    for p, state in zip(every, kept, strict=True):
        for name, value in list(optimizer.state[p].items()):
            if name not in state:
                del optimizer.state[p][name]
            elif isinstance(value, Tensor):
                local(value).copy_(state[name])
            else:
                optimizer.state[p][name] = state[name]


@torch.no_grad()
def restore(module: nn.Module, kept: dict[str, Tensor]) -> None:
    """Put a module's tensors back in place."""
    for name, x in module.state_dict().items():
        local(x).copy_(kept[name])


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Whatever happens inside, parameters and buffers are afterwards what they were."""
    kept = {name: local(x).clone() for name, x in module.state_dict().items()}
    yield
    restore(module, kept)


@rank_zero_only
def write(folder: Path, events: list[Event]) -> None:
    """All events of the run so far; those that a resumed run has not come to yet are gone."""
    partial = folder / f"{FILE}.partial"
    try:
        partial.write_text("".join(json.dumps(e._asdict()) + "\n" for e in events))
        os.replace(partial, folder / FILE)
    except OSError as error:
        rank_zero_warn(f"{folder / FILE}: {error}; its events are in the checkpoint, and are written with the next one")
