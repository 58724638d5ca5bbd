"""A sum of objectives, each whole in itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from headwater.model import Model
from headwater.objectives.objective import Batch, Objective, Term
from headwater.tokens import split_rows


class Weighted(Objective):
    """Runs the parts whose `needs` the batch can serve and multiplies their weights; a part without data has number 0.

    Args:
        model: handed to every part.
        parts: name -> objective.
        weights: name -> factor; 1 where a name is missing.
    """

    def __init__(
        self, model: Model, parts: dict[str, Callable[[Model], Objective]], weights: dict[str, float] | None = None
    ) -> None:
        super().__init__()
        weights = weights or {}
        if stray := set(weights) - set(parts):
            raise ValueError(f"weights name {sorted(stray)}, which are no parts; the parts are {sorted(parts)}")
        self.parts: Any = nn.ModuleDict({name: make(model) for name, make in parts.items()})
        self.weights = {name: weights.get(name, 1.0) for name in parts}
        self.needs = tuple(dict.fromkeys(need for part in self.parts.values() for need in part.needs))
        self.coupled = any(part.coupled for part in self.parts.values())

    def _served(self, batch: Batch) -> dict[str, Objective]:
        asked = batch.get("parts", self.parts)
        return {name: self.parts[name] for name in asked if all(need in batch for need in self.parts[name].needs)}

    def pieces(self, batch: Batch, micro: int) -> list[Batch]:
        """The parts that compare samples on the whole batch, the others piece by piece."""
        served = self._served(batch)
        coupled = [name for name, part in served.items() if part.coupled]
        others = [name for name in served if name not in coupled]
        if micro == 1 or not coupled:
            return split_rows(batch, micro)
        return [{**batch, "parts": coupled}, *({**piece, "parts": others} for piece in split_rows(batch, micro) if others)]

    def start(self, model: Model) -> None:
        for part in self.parts.values():
            part.start(model)

    def look(self, model: Model, batch: Batch) -> dict[str, Any]:
        return {name: part.look(model, batch) for name, part in self._served(batch).items()}

    def task(self, batch: Batch, hints: dict[str, Any] | None = None) -> Batch:
        """Each part's own batch under its name: two parts may hide the same modality differently."""
        return {name: part.task(batch, (hints or {}).get(name)) for name, part in self._served(batch).items()}

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        return {f"{name}/{k}": n for name in batch for k, n in self.parts[name].numbers(batch[name]).items()}

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        return {
            f"{name}/{k}": term._replace(weight=term.weight * self.weights[name])
            for name in batch
            for k, term in self.parts[name](model, batch[name]).items()
        }

    def after_step(self, model: Model, step: int) -> None:
        for part in self.parts.values():
            part.after_step(model, step)
