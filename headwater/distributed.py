"""Collectives with the right gradients. torch.distributed is asked at call time; nothing is stored."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def world() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This rank, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def local(x: Tensor) -> Tensor:
    """What lies on this rank, in the same memory and without graph: a share of what FSDP2 splits, all of any other tensor."""
    return x.to_local().detach() if isinstance(x, DTensor) else x.detach()


def total(x: Tensor) -> Tensor:
    """Sum of x over ranks, without gradient; x itself is left alone."""
    x = x.detach().clone()
    if world() > 1:
        dist.all_reduce(x)
    return x


def summed(x: Tensor) -> Tensor:
    """Sum of x over ranks, the same on all of them. Gradient: each rank's x gets the gradients of all ranks that used the sum."""
    return x if world() == 1 else _Summed.apply(x)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return total(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return total(grad.contiguous())


def lengths(n: int, device: torch.device) -> list[int]:
    """n of every rank."""
    if world() == 1:
        return [n]
    every = torch.zeros(world(), dtype=torch.int64, device=device)
    every[rank()] = n
    dist.all_reduce(every)
    return every.tolist()


def words(said: str) -> list[str]:
    """What every rank says."""
    every: list[Any] = [said] * world()
    if world() > 1:
        dist.all_gather_object(every, said)
    return every


def gather(x: Tensor) -> tuple[Tensor, int]:
    """Rows of every rank in rank order, and the number of rows before this rank's own.

    x: (S, ...) with any S per rank (padded to the largest for the exchange, then trimmed: an uneven all_gather aborts gloo).
    Gradient: each rank's share is summed over all ranks that used it, so a loss summed over ranks has the gradient of one
    process on the whole batch.
    """
    if world() == 1:
        return x, 0
    sizes = lengths(len(x), x.device)
    return _Gather.apply(x, sizes), sum(sizes[: rank()])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        every = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(every, padded)
        return torch.cat([rows[:n] for rows, n in zip(every, sizes, strict=True)])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad.split(ctx.sizes)[rank()], None
