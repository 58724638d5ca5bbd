"""What happens inside an encoder: what a layer is given and says, and where its attention looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from headwater.attention import Route, higher_order
from headwater.layers import Attention
from headwater.position import rotate

T = TypeVar("T")


@contextmanager
def heard(module: nn.Module) -> Iterator[list[tuple[tuple, Any]]]:
    """What a module is given and what it answers, call by call, while this is open."""
    found: list[tuple[tuple, Any]] = []
    handle = module.register_forward_hook(lambda _, given, said: found.append((given, said)))
    try:
        yield found
    finally:
        handle.remove()


def attention_scores(attn: Attention, run: Callable[[], T]) -> tuple[Tensor, T]:
    """What the softmax of self-attention gets, (B, H, N, N), when `run` first uses this layer, and what `run` returns.

    Very negative where nothing may be seen. The layer's own queries and keys are taken, since outside of its block's forward pass
    FSDP2 has its weights in shares.
    """
    with heard(attn.q_norm) as asks, heard(attn.k_norm) as offers, heard(attn) as calls, higher_order():
        result = run()
    (_, q), (_, k), (given, _) = asks[0], offers[0], calls[0]
    route: Route = given[1]  # dense, under higher_order
    if (turn := given[2]) is not None:
        q, k = rotate(q, turn), rotate(k, turn)
    scores = q @ k.repeat_interleave(attn.heads // attn.kv_heads, 1).mT * attn.size**-0.5
    if route.mask is not None and route.mask.dtype != torch.bool:
        scores = scores + route.mask
    hidden = torch.zeros((), dtype=torch.bool, device=q.device)
    if route.mask is not None:
        hidden = ~route.mask if route.mask.dtype == torch.bool else route.mask.isneginf()
    if route.causal:
        hidden = hidden | torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min / 2), result  # finite: rows that see nothing stay numbers
