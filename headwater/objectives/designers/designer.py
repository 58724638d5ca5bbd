"""What a task designer is: it shapes the task that an objective sets, with parameters that feedback trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headwater.model import Model, Reader
from headwater.objectives.objective import Batch, Objective, Term
from headwater.objectives.weighted import narrowed
from headwater.tokens import Tokens, split_rows


class Designer(nn.Module):
    """Sets the task of an objective as it is. Subclasses change it, before or after something is hidden, or how it is scored.

    The learner's step and the look ahead use the same methods: the first without gradient to the designer, the second with it.
    So whatever depends on the designer is made in `design` and stands in the task; `ask` only reads it.

    Args of every subclass, first: the model and the objective, read for widths and names and not kept.
    """

    needs: tuple[str, ...] = ()
    readers: Mapping[str, Reader] = {}

    def look(self, inner: Objective, model: Model, batch: Batch, ahead: bool) -> Any:
        """Without gradient, what `design` wants to know from the model; what the objective itself looks at is part of it."""
        return inner.look(model, batch)

    def design(self, inner: Objective, batch: Batch, hints: Any, ahead: bool) -> Batch:
        """The task. hints: what `look` found; ahead: the value is wanted, of all tasks that could be set where one is drawn."""
        return inner.task(batch, hints)

    def numbers(self, inner: Objective, task: Batch) -> dict[str, Tensor]:
        """How many targets each term has; see Objective.numbers."""
        return inner.numbers(task)

    def ask(self, inner: Objective, model: Model, task: Batch) -> dict[str, Term]:
        """The terms of what `design` returned."""
        return inner(model, task)

    def tell(self) -> dict[str, Tensor]:
        """Numbers to log: what the designer wants now."""
        return {}


def rows_of(batch: Batch, chosen: Tensor) -> Batch:
    """The rows of some samples, (S,) bool. Where none is chosen, or rows are packed, the other samples' tokens are not valid."""
    packed = any(isinstance(t, Tokens) and t.document is not None for t in batch.values())
    if packed or not chosen.any():
        return narrowed(batch if packed else split_rows(batch, len(chosen))[0], chosen if packed else chosen[:1])
    rows = chosen.nonzero()[:, 0]

    def take(value: Any) -> Any:
        if isinstance(value, Tokens):
            return value.map(lambda field: field[rows])
        return value[rows] if isinstance(value, Tensor) and value.ndim else value

    return {name: take(value) for name, value in batch.items()}


def scaled(terms: dict[str, Term], factor: Tensor) -> dict[str, Term]:
    """Terms whose totals are multiplied by a number ()."""
    return {name: term._replace(total=term.total * factor.to(term.total.dtype)) for name, term in terms.items()}


def shares(logits: Tensor) -> Tensor:
    """(K,) -> weights (K,) above 0 with mean 1."""
    return torch.softmax(logits, -1) * len(logits)
