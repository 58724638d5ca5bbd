"""AdamW with moments of eight bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.optimizer import ParamsT

from headwater.training.optimizers.state import keep_types, mine, share

MOMENTS = ("exp_avg", "exp_avg_sq")  # the first has a sign


@lru_cache(maxsize=8)
def dynamic_codes(signed: bool, device: torch.device | None = None) -> Tensor:
    """(256,) the numbers from -1 or 0 to 1 that a byte stands for, in order: "dynamic" data type, seven powers of ten, the
    larger the finer (Dettmers et al. 2021, arXiv:2110.02861, section 1.3; https://github.com/bitsandbytes-foundation).
    """
    values = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (power + (not signed)) + 1, dtype=torch.float64)
        middles = (10.0 ** (power - 6) * (edges[1:] + edges[:-1]) / 2).tolist()
        values += middles + [-x for x in middles if signed]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def quantise(x: Tensor, codes: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(R, C) -> bytes (R, C) and the largest magnitude of every block of a row, (R, ceil(C / block))."""
    rows = F.pad(x, (0, -x.shape[1] % block)).unflatten(1, (-1, block))
    largest = rows.abs().amax(-1)
    rows = rows / largest.where(largest > 0, 1)[..., None]
    middles = (codes[1:] + codes[:-1]) / 2
    return torch.bucketize(rows.to(codes.dtype), middles).flatten(1)[:, : x.shape[1]].to(torch.uint8), largest


def dequantise(x: Tensor, largest: Tensor, codes: Tensor, block: int) -> Tensor:
    """The inverse, up to half the distance of two codes: bytes (R, C), (R, ceil(C / block)) -> (R, C)."""
    return codes[x.long()] * largest.repeat_interleave(block, 1)[:, : x.shape[1]]


class AdamW8bit(torch.optim.Optimizer):
    """AdamW that keeps both moments block by block in eight bits (same paper), and computes in float32.

    Blocks are pieces of rows, so that a rank's share of a matrix (FSDP2) has the same blocks as the whole one. What does not
    tolerate it keeps full moments, as in AdamW: vectors, small tensors, embeddings (section 2.3), and with them all that is not
    hidden.

    Args:
        params: groups of `headwater.training.groups`, of which "hidden" ones have eight bits; where none is, all large matrices.
        lr, betas, eps, weight_decay: of AdamW.
        block: numbers of a row with one scale.
        smallest: matrices with fewer numbers keep full moments.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        block: int = 256,
        smallest: int = 4096,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"found lr {lr}, betas {betas}, eps {eps}, weight_decay {weight_decay}; expected 0 or more, betas < 1")
        if block < 1 or smallest < 0:
            raise ValueError(f"found block {block} and smallest {smallest}; expected 1 or more, and 0 or more")
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "block": block, "smallest": smallest})
        self.marked = any("hidden" in group for group in self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of AdamW."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["step"] = torch.tensor(0.0)
                        state |= {} if self._packs(p, group) else {name: torch.zeros_like(p) for name in MOMENTS}
                    first, second = (unpacked(state, name, p, group["block"]) for name in MOMENTS)
                    advance(mine(p), mine(p.grad).to(first.dtype), first, second, state["step"], group)
                    if MOMENTS[0] not in state:
                        state |= packed(MOMENTS[0], first, p, group["block"]) | packed(MOMENTS[1], second, p, group["block"])
        return loss

    def _packs(self, p: Tensor, group: dict[str, Any]) -> bool:
        return p.ndim > 1 and p.numel() >= group["smallest"] and (group.get("hidden", False) or not self.marked)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Bytes stay bytes."""
        super().load_state_dict(state_dict)
        keep_types(self, state_dict)


def advance(x: Tensor, grad: Tensor, first: Tensor, second: Tensor, step: Tensor, group: dict[str, Any]) -> None:
    """One step of AdamW, in place, in the order of operations of torch.optim.AdamW."""
    beta1, beta2 = group["betas"]
    step += 1
    first.lerp_(grad, 1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    x.mul_(1 - group["lr"] * group["weight_decay"])
    root = (second.sqrt() / math.sqrt(1 - beta2 ** step.item())).add_(group["eps"])
    x.addcdiv_(first, root, value=-group["lr"] / (1 - beta1 ** step.item()))


def unpacked(state: dict[str, Any], name: str, p: Tensor, block: int) -> Tensor:
    """This rank's part of a moment: the one that is kept where it is kept in full, else a float32 copy, zeros at first."""
    if name in state:
        return mine(state[name])
    if f"{name}_codes" not in state:
        return torch.zeros_like(mine(p), dtype=torch.float32)
    codes, scale = mine(state[f"{name}_codes"]), mine(state[f"{name}_scale"])
    return dequantise(codes.flatten(1), scale, dynamic_codes(name == MOMENTS[0], codes.device), block).view_as(codes)


def packed(name: str, moment: Tensor, p: Tensor, block: int) -> dict[str, Tensor]:
    """A moment as bytes and scales."""
    codes, scale = quantise(moment.flatten(1), dynamic_codes(name == MOMENTS[0], moment.device), block)
    size = torch.Size([p.shape[0], scale.shape[1]])
    return {f"{name}_codes": share(codes.view_as(moment), p, p.shape), f"{name}_scale": share(scale, p, size)}
