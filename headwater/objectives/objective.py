"""What an objective is: it hides something, asks the model for it back, and scores the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headwater import distributed, fused
from headwater.model import Model, Reader
from headwater.tokens import Tokens, split_rows
from headwater.view import View

Batch = dict[str, Any]  # modality -> Tokens; "seed", "sample", "origin" (S,) int64; "progress", "step"; and what `task` adds


class Curve:
    """A function of progress that recipes name without a path; plain functions serve as well."""

    def __call__(self, progress: float) -> float:
        """progress: share of the run that is done."""
        raise NotImplementedError(f"{type(self).__name__} must return its value at this progress")


Schedule = Curve | Callable[[float], float]  # of progress, the share of the run that is done


def at(value: float | Schedule, progress: float) -> float:
    """A number that may change over the run, at this progress from 0 to 1."""
    return value(progress) if callable(value) else value


class Term(NamedTuple):
    """One part of a loss. total: sum over this rank's targets; number: how many; metrics: detached scalars to log.

    The Pretrainer adds weight * total * world / max(sum of numbers over ranks and micro-batches, 1), so that after the
    gradient average over ranks every target of the step counts the same, however rows were padded, packed or dealt out.
    """

    total: Tensor
    number: Tensor
    weight: float = 1.0
    metrics: dict[str, Tensor] = {}


class Objective(nn.Module):
    """Subclasses read widths from the model in __init__, build heads, and keep no reference to it.

    needs: batch keys that are read. coupled: the loss compares the samples of a batch, so it is not cut into micro-batches;
    such objectives ask `model.represent` or `model.in_pieces`, which save the memory instead.
    views: random views that the loader shall make, by their key in the batch: a modality, "@" and a name ("image@global0").
    readers: of labels that only this objective uses; their Tokens come under these keys and have no encoder.
    classes: how many answers each target chooses from, where that is one fixed number.
    outermost: it makes the gradient of the whole step, so nothing may stand around it.
    feedback_needs: batch keys of a small labelled batch that comes under "feedback" every `every` steps; () = none comes.
    """

    needs: tuple[str, ...] = ()
    coupled: bool = False
    views: Mapping[str, View] = {}
    readers: Mapping[str, Reader] = {}
    classes: int | None = None
    feedback_needs: tuple[str, ...] = ()
    every: int = 1
    outermost: bool = False

    def before_step(self, probe: Any, batch: Batch) -> Batch:
        """Once per optimizer step, before anything is hidden: a look at gradients, by a headwater.objectives.probe.Probe.

        What it finds goes to the optimizer by `probe.hand`, or on to `task` in the batch.
        """
        return batch

    def pieces(self, batch: Batch, micro: int) -> list[Batch]:
        """What is hidden and scored one after the other to save memory; together the terms are those of the whole batch."""
        return [batch] if self.coupled else split_rows(batch, micro)

    def start(self, model: Model) -> None:
        """After weights are loaded: copy teachers here."""

    def look(self, model: Model, batch: Batch) -> Any:
        """Optional, without gradient: what `task` wants to know from the model (attention, scores)."""
        return None

    def task(self, batch: Batch, hints: Any = None) -> Batch:
        """Hide: return the batch with masks, noise or targets added. Draws come from the seeds in the batch alone."""
        return batch

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        """How many targets each term of this batch will have, without the model; called on what `task` returned."""
        raise NotImplementedError(f"{type(self).__name__}.numbers must count the targets of every term")

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        """Ask and score."""
        raise NotImplementedError(f"{type(self).__name__}.forward must return {{name: Term}}")

    def after_step(self, model: Model, progress: float) -> None:
        """Once per optimizer step: moving averages, queues, clamps. progress: share of the run that is done."""


def count(numbers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Targets per term, over pieces and ranks."""
    local: dict[str, Tensor] = {}
    for piece in numbers:
        for name, number in piece.items():
            local[name] = local.get(name, 0) + number.long()
    return dict(zip(local, distributed.total(torch.stack(list(local.values()))), strict=True))


def weighted_sum(terms: dict[str, Term], numbers: dict[str, Tensor], world: int) -> Tensor:
    """The rank's loss, given how many targets each term has over all ranks and micro-batches of the step."""
    return torch.stack([t.weight * t.total * world / numbers[name].clamp(min=1) for name, t in terms.items()]).sum()


def wide(x: Tensor) -> Tensor:
    """Half precision as float32, in which losses and statistics are taken."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def viewed(names: Sequence[str], views: Mapping[str, View] | None) -> dict[str, View]:
    """How the loader makes those of these names that are views ("image@0"); one that is not in `views` is the reader's own."""
    found = {name: (views or {}).get(name, View()) for name in names if "@" in name}
    if stray := set(views or {}) - set(found):
        raise ValueError(f"found views {sorted(stray)}; expected some of those that are asked for: {sorted(found) or 'none'}")
    return found


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over the present slots of each target: (..., D), (..., D) -> (...). Absent slots (NaN) do not count."""
    present = ~target.isnan()
    error = (prediction - torch.where(present, target, prediction.detach())).square() * present
    return error.sum(-1) / present.sum(-1).clamp(min=1)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Per-token cross entropy in nats: (..., V), (...) ids -> (...)."""
    flat = fused.cross_entropy(logits.flatten(0, -2), target.flatten())
    return flat.view(target.shape)


def score(prediction: Tensor, target: Tensor, ids: bool) -> Tensor:
    """Per-token error: cross entropy for ids, squared error for vectors."""
    return cross_entropy(prediction, target) if ids else squared_error(prediction.float(), target)


def check_context(model: Model, modality: str, others: Sequence[str]) -> None:
    """Other modalities can only help where a fusion brings them in."""
    if others and model.fusion is None:
        raise ValueError(
            f"{modality} is to be predicted with the help of {', '.join(others)}, but the model has no fusion; "
            "add one, for example --model.backbone.fusion JointTokens, or leave the others out"
        )


def part(batch: Batch, names: tuple[str, ...]) -> dict[str, Tokens]:
    """The Tokens of these modalities."""
    return {name: batch[name] for name in names}
