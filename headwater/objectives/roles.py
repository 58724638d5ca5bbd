"""Which turns of a record or a dialogue are learned: those of some roles; all others are only seen.

Instruction tuning is next-token prediction that asks for answers alone (Wei et al. 2021, arXiv:2109.01652); which turns count
makes the difference between learning to answer and learning to ask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headwater.model import Model
from headwater.objectives.causal import Causal
from headwater.objectives.objective import Batch
from headwater.objectives.wrapped import Wrapped
from headwater.tokens import Tokens


def speaker(t: Tokens, marks: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N) the number of the mark that opened the turn of each token, -1 before the first of a document; and where marks are.

    t.x: (B, N) ids; marks: (R,) ids.
    """
    here = torch.arange(t.x.shape[1], device=t.x.device).expand(t.x.shape)
    found = t.x[..., None] == marks
    opens = found.any(-1)
    last = torch.where(opens, here, -1).cummax(1).values
    number = found.long().argmax(-1).gather(1, last.clamp(min=0))
    return torch.where(last >= here - t.place(), number, -1), opens


class Roles(Wrapped):
    """Asks only for what some roles say, the end of their turns included, never for the mark that opens a turn.

    Args:
        model: the encoder's reader has `roles`, as that of Records.
        inner: Causal, or what grew from it.
        learned: the roles.
    """

    inner: Causal

    def __init__(self, model: Model, inner: Callable[[Model], Causal] = Causal, learned: list[str] | None = None) -> None:
        super().__init__(model, inner)
        if not isinstance(self.inner, Causal):
            raise ValueError(f"found {type(self.inner).__name__} inside; expected Causal, or what grew from it")
        roles: dict[str, int] = getattr(model.encoder(self.inner.modality).reader, "roles", {})
        learned = learned or ["answer"]
        if stray := set(learned) - set(roles):
            raise ValueError(f"found roles {sorted(stray)}; the reader of {self.inner.modality} knows {', '.join(roles) or 'none'}")
        self.marks, self.learned = [*roles.values()], [role in learned for role in roles]

    def task(self, batch: Batch, hints: Any = None) -> Batch:
        raw = batch[self.inner.modality]
        task = self.inner.task(batch, hints)
        who, opens = speaker(raw, torch.tensor(self.marks, device=raw.x.device))
        learned = torch.tensor(self.learned, device=raw.x.device)[who.clamp(min=0)] & (who >= 0)
        return {**task, "asked": task["asked"] & learned & ~opens}
