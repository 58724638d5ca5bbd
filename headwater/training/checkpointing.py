"""Activation checkpointing: blocks forget what they computed, and compute it again in the backward pass."""

from __future__ import annotations

from functools import cache
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.utils.checkpoint import checkpoint

from headwater.training.groups import stacked


class Checkpointed(pl.Callback):
    """Every n-th block keeps only what it is given (Chen et al. 2016, arXiv:1604.06174): memory, for a third more time.

    Gradients are bitwise those without it, dropout and stochastic depth included: blocks draw again from the same state. Blocks
    are what is in the lists of equal modules of trunks, decoders and towers of other libraries.

    Args:
        every: 1 = each block, 2 = every other block of each list, and so on.
    """

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"found every={every}; expected 1 for each block, or more to leave out blocks between")
        self.every = every

    def setup(self, trainer: Any, pl_module: pl.LightningModule, stage: str) -> None:
        """Before FSDP2 and DDP: they gather a block before it runs, either time."""
        if stage == "fit" and not forgetful(pl_module, self.every):
            rank_zero_warn("Checkpointed found no blocks that it can compute again; memory stays as it is")


class Forgetful:
    """Mixed in front of the class of a block. forgets: whether this one does."""

    training: bool
    forgets: bool = False

    def forward(self, *args: Any, **named: Any) -> Any:
        run = super().forward  # type: ignore[misc]
        if self.forgets and self.training and torch.is_grad_enabled():
            return checkpoint(run, *args, use_reentrant=False, **named)
        return run(*args, **named)


def forgetful(module: nn.Module, every: int = 1) -> int:
    """Make every n-th block of each list forgetful, in place; returns how many are. Names and parameters stay as they are.

    Left out are blocks with batch statistics: computed again, they would count a batch twice.
    """
    named = [(int(name.rpartition(".")[2]), module.get_submodule(name)) for name in stacked(module, "")]
    blocks: list[tuple[int, Any]] = [(number, block) for number, block in named if not counts(block)]
    for number, block in blocks:
        if not isinstance(block, Forgetful):
            block.__class__ = mixed(type(block))  # type: ignore[arg-type]
        block.forgets = number % every == 0
    return sum(block.forgets for _, block in blocks)


@cache
def mixed(kind: type) -> type:
    """One class for all blocks of a class: who looks for lists of equal modules still finds them."""
    return type(kind.__name__, (Forgetful, kind), {})


def counts(block: nn.Module) -> bool:
    """Whether it keeps statistics of the batches that it sees."""
    return any(isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats for m in block.modules())
