"""An objective around another one: everything is handed on, so that a wrapper says only what it changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from headwater.model import Model
from headwater.objectives.objective import Batch, Objective, Term


class Wrapped(Objective):
    """Does what `inner` does.

    Args:
        model: handed to the inner objective.
        inner: any objective, a weighted sum too.
    """

    def __init__(self, model: Model, inner: Callable[[Model], Objective]) -> None:
        super().__init__()
        self.inner = inner(model)
        self.needs, self.coupled = self.inner.needs, self.inner.coupled
        self.views, self.readers = self.inner.views, self.inner.readers
        self.feedback_needs, self.every = self.inner.feedback_needs, self.inner.every

    @property
    def parts(self) -> Any:
        """Those of a weighted sum inside, so that callbacks and checks of the data find them."""
        return getattr(self.inner, "parts", {"objective": self.inner})

    def before_step(self, probe: Any, batch: Batch) -> Batch:
        return self.inner.before_step(probe, batch)

    def pieces(self, batch: Batch, micro: int) -> list[Batch]:
        return self.inner.pieces(batch, micro)

    def start(self, model: Model) -> None:
        self.inner.start(model)

    def look(self, model: Model, batch: Batch) -> Any:
        return self.inner.look(model, batch)

    def task(self, batch: Batch, hints: Any = None) -> Batch:
        return self.inner.task(batch, hints)

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        return self.inner.numbers(batch)

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        return self.inner(model, batch)

    def after_step(self, model: Model, progress: float) -> None:
        self.inner.after_step(model, progress)
