"""Log-probabilities of ids without whole logits: tokens come in tiles, and only one tile's logits exist at a time.

The head of a language model makes V numbers of every token, which outweigh all its activations. Backward does without them:
where all answers weigh the same, gradients are made while a tile's logits are there (the idea of Liger's kernels, Hsu et al.
2024, arXiv:2410.10989); otherwise logits are made again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from headwater.attention import higher_order_is_on
from headwater.objectives.objective import cross_entropy, wide

TILE = 1 << 22  # logits at once
Choose = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def log_probabilities(unembed: Callable[[Tensor], Tensor], x: Tensor, answer: Tensor, alike: bool = False) -> Tensor:
    """log p of the right ids: vectors (T, D) and ids (T,) -> (T,), or K ids of each (T, K) -> (T, K); in float32 at least.

    unembed: (T, D) -> logits (T, V), each token alone. alike: every answer that comes out will weigh the same in the loss, which
    saves a pass through the head; the gradient is wrong if they do not.
    """
    if higher_order_is_on():
        return -cross_entropy(unembed(x), answer) if answer.ndim == 1 else wide(unembed(x)).log_softmax(-1).gather(-1, answer)
    probe = unembed(x.new_zeros(1, x.shape[-1]))
    each = answer[:, None] if answer.ndim == 1 else answer
    found: Tensor = Tiled.apply(unembed, alike, max(1, TILE // probe.shape[-1]), each, x, *leaves(probe))  # type: ignore[assignment]
    return found.view(answer.shape)


def leaves(made: Tensor) -> list[Tensor]:
    """The parameters of which a tensor was made."""
    found, seen, todo = [], set(), [made.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # where the gradient of a leaf ends
            found.append(node.variable)
        todo += [before for before, _ in node.next_functions]
    return found


class Tiled(torch.autograd.Function):
    """apply(unembed, alike, rows of a tile, answer (T, K), x (T, D), *parameters of unembed) -> log p (T, K)."""

    @staticmethod
    def forward(ctx: Any, unembed: Any, alike: bool, rows: int, answer: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.alike, ctx.rows, ctx.unembed, ctx.precision = alike, rows, unembed, precision(x)
        early = alike and any(ctx.needs_input_grad)
        log_p = wide(x).new_empty(answer.shape)
        gradients = Gradients(x, parameters)
        for start in range(0, len(x), rows):
            here = slice(start, start + rows)
            with torch.set_grad_enabled(early):
                piece = x[here].detach().requires_grad_(early)
                logits = unembed(piece)
            scores = wide(logits.detach())
            norm = scores.logsumexp(-1, keepdim=True)
            log_p[here] = scores.gather(-1, answer[here]) - norm
            if early:
                gradients.add(here, logits, piece, change(scores, norm, answer[here], torch.ones_like(log_p[here])))
        ctx.save_for_backward(*((gradients.x, *gradients.parameters) if early else (answer, x, *parameters)))
        return log_p

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:  # type: ignore[override]
        if ctx.alike:
            weight = outer[0][0, 0] if len(outer[0]) else outer[0].sum()
            return None, None, None, None, *(None if g is None else weight.to(g.dtype) * g for g in ctx.saved_tensors)
        answer, x, *parameters = ctx.saved_tensors
        gradients = Gradients(x, parameters)
        for start in range(0, len(x), ctx.rows):
            here = slice(start, start + ctx.rows)
            with torch.enable_grad(), ctx.precision():
                piece = x[here].detach().requires_grad_()
                logits = ctx.unembed(piece)
            scores = wide(logits.detach())
            slope = change(scores, scores.logsumexp(-1, keepdim=True), answer[here], outer[0][here])
            gradients.add(here, logits, piece, slope)
        return None, None, None, None, gradients.x, *gradients.parameters


def expected_log_probability(unembed: Callable[[Tensor], Tensor], x: Tensor, choose: Choose) -> Tensor:
    """sum_k w_k log p of K ids each, (T, D) -> (T,), where ids and weights are chosen by what is answered, as constants.

    Every answer that comes out must weigh the same in the loss: gradients are made while a tile's logits are there.
    choose: log p (R, V) of some rows, and which rows -> ids (R, K) and weights (R, K).
    """
    if higher_order_is_on():
        log_p = wide(unembed(x)).log_softmax(-1)
        with torch.no_grad():
            ids, weight = choose(log_p, slice(0, len(x)))
        return (weight * log_p.gather(-1, ids)).sum(-1)
    probe = unembed(x.new_zeros(1, x.shape[-1]))
    return Expected.apply(unembed, choose, max(1, TILE // probe.shape[-1]), x, *leaves(probe))  # type: ignore[no-any-return]


class Expected(torch.autograd.Function):
    """apply(unembed, choose, rows of a tile, x (T, D), *parameters of unembed) -> (T,)."""

    @staticmethod
    def forward(ctx: Any, unembed: Any, choose: Choose, rows: int, x: Tensor, *parameters: Tensor) -> Tensor:
        learns, out, gradients = any(ctx.needs_input_grad), wide(x).new_empty(len(x)), Gradients(x, parameters)
        for start in range(0, len(x), rows):
            here = slice(start, start + rows)
            with torch.set_grad_enabled(learns):
                piece = x[here].detach().requires_grad_(learns)
                logits = unembed(piece)
            log_p = wide(logits.detach()).log_softmax(-1)
            ids, weight = choose(log_p, here)
            out[here] = (weight * log_p.gather(-1, ids)).sum(-1)
            if learns:
                gradients.add(here, logits, piece, change(log_p, torch.zeros_like(log_p[:, :1]), ids, weight))
        ctx.save_for_backward(gradients.x, *gradients.parameters)
        return out

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:  # type: ignore[override]
        weight = outer[0][0] if len(outer[0]) else outer[0].sum()
        return None, None, None, *(None if g is None else weight.to(g.dtype) * g for g in ctx.saved_tensors)


class Gradients:
    """Sums over tiles. x: (T, D); parameters: one tensor each."""

    def __init__(self, x: Tensor, parameters: Any) -> None:
        self.x, self.of = torch.zeros_like(x), parameters
        self.parameters = [torch.zeros_like(p) for p in parameters]

    def add(self, here: slice, logits: Tensor, piece: Tensor, slope: Tensor) -> None:
        """slope: of what is summed by the logits, both (rows, V)."""
        found, *others = torch.autograd.grad(logits, (piece, *self.of), slope.to(logits.dtype))
        self.x[here] = found
        for total, part in zip(self.parameters, others, strict=True):
            total += part


def change(scores: Tensor, norm: Tensor, answer: Tensor, weight: Tensor) -> Tensor:
    """The derivative of sum_k w_k log p_k by the logits, sum_k w_k (one-hot_k - p).

    scores: (T, V); norm: (T, 1) their log-sum-exp; answer, weight: (T, K) -> (T, V).
    """
    slope = (scores - norm).exp_().mul_(-weight.sum(-1, keepdim=True))
    return slope.scatter_add_(-1, answer, weight.to(slope.dtype))


def precision(x: Tensor) -> Callable[[], AbstractContextManager[Any]]:
    """The autocast that is on now, for later."""
    kind = x.device.type
    now = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=now[1], enabled=now[0])
