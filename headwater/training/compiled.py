"""Blocks compiled one by one: blocks of one class share their code, so a model compiles as fast as one block of it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from headwater.training.groups import stacked


class Compiled(pl.Callback):
    """Each block is compiled, once for every signature and every shape that it meets; what is around blocks stays eager.

    `compile/recompiles` is logged: how often a block was compiled after the first step. It should stand still after a few steps.
    Lengths that vary freely compile again and again: `data.buckets` pads them to a few.

    Args:
        backend: of torch.compile.
        dynamic: one code for all shapes, slower than one for each.
        limit: shapes that a class of blocks may meet; further ones run eagerly, and a warning says so.
    """

    def __init__(self, backend: str = "inductor", dynamic: bool = False, limit: int = 64) -> None:
        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            raise ValueError(f"found the backend {backend!r}; expected one of {', '.join(sorted(known))}")
        if limit < 1:
            raise ValueError(f"found limit={limit}; expected the number of shapes that may be compiled, 1 or more")
        self.backend, self.dynamic, self.limit = backend, dynamic, limit
        self.compiles = 0
        self.first: int | None = None  # compiles of the first step

    def setup(self, trainer: Any, pl_module: pl.LightningModule, stage: str) -> None:
        """Before FSDP2 and DDP, whose hooks stay outside of what is compiled."""
        torch._dynamo.config.recompile_limit = self.limit
        if stage == "fit" and not self.compile_blocks(pl_module):
            rank_zero_warn("Compiled found no blocks; everything runs eagerly")

    def compile_blocks(self, module: nn.Module) -> int:
        """In place; returns how many. Names and parameters stay as they are."""
        blocks = [b for b in map(module.get_submodule, stacked(module, "")) if not hasattr(type(b), "compiled")]
        made = {kind: self.compiled_class(kind) for kind in dict.fromkeys(map(type, blocks))}
        for block in blocks:
            block.__class__ = made[type(block)]
        return len(blocks)

    def compiled_class(self, kind: type[nn.Module]) -> type[nn.Module]:
        """The same class of modules with its forward pass compiled."""
        run = torch.compile(kind.forward, backend=self.count, dynamic=self.dynamic)

        def forward(self: nn.Module, *args: Any, **named: Any) -> Any:
            return run(self, *args, **named)

        return type(kind.__name__, (kind,), {"forward": forward, "compiled": True})

    def count(self, graph: Any, inputs: Any) -> Any:
        """What torch.compile calls with every graph."""
        self.compiles += 1
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.first is None:
            self.first = self.compiles
        pl_module.log("compile/recompiles", float(self.compiles - self.first))
        if self.compiles >= self.limit and trainer.is_global_zero:
            rank_zero_warn(
                f"blocks were compiled {self.compiles} times; a class of them that has met limit={self.limit} shapes runs others "
                "eagerly. Set data.buckets, so that lengths are few, or Compiled(dynamic=True), or raise the limit"
            )
