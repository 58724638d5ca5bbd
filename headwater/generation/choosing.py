"""Which id comes next: pure functions of logits, with draws that depend on the sample and the place alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from headwater import random

Allowed = Callable[[Tensor], Tensor]  # ids so far, (B, n) -> (B, V) True = may come next; a row with none has ended


def top(logits: Tensor, k: int | None) -> Tensor:
    """(B, V) with all but the k largest of each row at -inf (Fan et al. 2018, arXiv:1805.04833); None = all stay."""
    if k is None or k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k, -1).values[..., -1:], -torch.inf)


def nucleus(logits: Tensor, p: float | None) -> Tensor:
    """(B, V) with only the likeliest of each row whose probabilities reach p (Holtzman et al. 2019, arXiv:1904.09751).

    None = all stay. The likeliest one always does.
    """
    if p is None:
        return logits
    falling, index = logits.sort(dim=-1, descending=True, stable=True)
    share = falling.softmax(-1)
    beyond = share.cumsum(-1) - share >= p
    beyond[..., 0] = False
    return logits.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), -torch.inf)


def choose(logits: Tensor, seed: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """(B,) ids drawn from the softmax of (B, V) / temperature; the likeliest at temperature 0. seed: (B,) of sample and place."""
    if temperature == 0:
        return logits.argmax(-1)
    kept = nucleus(top(logits / temperature, top_k), top_p)
    return (kept + random.gumbel(seed, (logits.shape[-1],), "choose")).argmax(-1)


def only(ids: Sequence[int], vocab: int) -> Allowed:
    """The same ids at every place."""
    if not len(ids) or min(ids) < 0 or max(ids) >= vocab:
        raise ValueError(f"found allowed ids {list(ids)[:8]}; expected some from 0 to {vocab - 1}")
    mask = torch.zeros(vocab, dtype=torch.bool)
    mask[list(ids)] = True
    return lambda x: mask.to(x.device).expand(len(x), -1)


class Choices:
    """Nothing but one of these sequences: the walk along a trie, by comparison with all of them at once.

    Args:
        sequences: (B, C, L) ids of the C choices of each row. lengths: (B, C). vocab: V.
    """

    def __init__(self, sequences: Tensor, lengths: Tensor, vocab: int) -> None:
        self.sequences, self.lengths, self.vocab = sequences, lengths, vocab

    @property
    def common(self) -> Tensor:
        """(B,) how many ids all choices of a row begin with."""
        place = torch.arange(self.sequences.shape[-1], device=self.lengths.device)
        same = (self.sequences == self.sequences[:, :1]).all(1) & (place < self.lengths.amin(1)[:, None])
        return same.long().cumprod(1).sum(1)

    def __call__(self, x: Tensor) -> Tensor:
        beams, place = len(x) // len(self.sequences), x.shape[1]
        sequences, lengths = (field.repeat_interleave(beams, 0) for field in (self.sequences, self.lengths))
        mask = torch.zeros(len(x), self.vocab, dtype=torch.bool, device=x.device)
        if place == sequences.shape[-1]:
            return mask
        open_ = (sequences[..., :place] == x[:, None]).all(-1) & (lengths > place)
        row, choice = open_.nonzero(as_tuple=True)
        return mask.index_put((row, sequences[row, choice, place]), mask.new_ones(()))
