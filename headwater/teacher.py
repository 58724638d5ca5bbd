"""Teachers: copies of a module that never train and follow it slowly."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn


class Teacher(nn.Module):
    """A frozen copy in evaluation mode; objectives hold it, so it is saved with them and sharded as they are.

    It is moved from `Objective.after_step`, once per optimizer step and however many pieces the step had (mean teacher,
    Tarvainen and Valpola 2017, arXiv:1703.01780).

    Args:
        module: what is copied.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = deepcopy(module).requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode."""
        return super().train(False)

    def __getattr__(self, name: str) -> Any:
        """What the module can do, the copy can."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def init_rules(self) -> dict[str, Any]:
        """None of its own: those of the copy are found inside of it."""
        return {}

    @torch.no_grad()
    def forward(self, *given: Any) -> Any:
        """What the module would answer."""
        return self.module(*given)

    def copy(self, module: nn.Module) -> None:
        """Take all weights over."""
        self.follow(module, 0.0)

    @torch.no_grad()
    def follow(self, module: nn.Module, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * module; buffers are copied.

        Both must have been made alike; under FSDP2 each rank moves its own shares.
        """
        pairs = [(mine.detach(), theirs.detach()) for mine, theirs in _pairs(self.module.parameters(), module.parameters())]
        if pairs:
            torch._foreach_lerp_([own for own, _ in pairs], [other.to(own.dtype) for own, other in pairs], 1 - momentum)
        for mine, theirs in _pairs(self.module.buffers(), module.buffers()):
            mine.copy_(theirs)


def _pairs(mine: Any, theirs: Any) -> list[tuple[Tensor, Tensor]]:
    return list(zip(mine, theirs, strict=True))
