"""Losses over all pairs of samples without the matrix of all pairs.

Rows come in tiles beside all candidates; a tile's scores are made, used and dropped, and backward makes them again. What is kept
between the two passes is O(rows + candidates) per tile, so memory is that of one tile however large the batch
(the same exchange of time for memory as in "Inf-CL", Cheng et al. 2024, arXiv:2410.17243, without its ring of devices).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from headwater import distributed


def tiled(block: Callable[..., Any], rows: Sequence[Tensor], width: int, tile: int) -> list[Any]:
    """`block` of some rows after the other, at most `tile` numbers (rows * width) at once.

    rows: tensors (A, ...) that are cut alike. width: numbers that exist per row: candidates, times what a score takes. A matrix
    that fits in one tile is kept: there is nothing to save.
    """
    step = max(1, tile // max(1, width))
    if len(rows[0]) <= step:
        return [block(*rows)]
    pieces = zip(*(x.split(step) for x in rows), strict=True)
    if not torch.is_grad_enabled():
        return [block(*piece) for piece in pieces]
    return [checkpoint(block, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]


def softmax_both_ways(logits: Callable[..., Tensor], rows: Sequence[Tensor], own: Tensor, width: int, tile: int) -> Tensor:
    """CLIP's loss: the mean of both directions' cross entropies, summed over this rank's pairs, from one matrix of scores.

    The second direction needs log-sum-exps over columns, of which this rank's rows have a part; parts are joined over tiles and
    ranks, so each score is made by one rank alone. Formula: arXiv:2103.00020, figure 3.

    logits: some of the rows -> (A, C) their scores beside the partners of all ranks. rows: tensors (A, ...). own: (A,) the column
    of each row's partner.
    """

    def block(own: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = logits(*rows)
        return scores.logsumexp(1), scores.logsumexp(0), scores.gather(1, own[:, None])[:, 0]

    along, parts, pair = zip(*tiled(block, (own, *rows), width, tile), strict=True)
    every, _ = distributed.gather(torch.stack(parts).logsumexp(0)[None])
    down = every.logsumexp(0)[own]
    return (torch.cat(along) + down).sum() / 2 - torch.cat(pair).sum()
