"""Candidates of past steps: a queue of keys, equal on all ranks (MoCo, He et al. 2019, arXiv:1911.05722)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from headwater.init import ZERO, Rule


class Queue(nn.Module):
    """A ring of the last keys of the global batch. Every rank pushes the same keys, so nothing is exchanged or saved twice.

    Args:
        size: keys it holds.
        like: tensors (0, ...) that say what one key consists of.
    """

    seen: Tensor

    def __init__(self, size: int, like: Sequence[Tensor]) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"found a queue of {size} keys; expected 1 or more, or None for no queue")
        self.size, self.parts = size, len(like)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        for number, part in enumerate(like):
            self.register_buffer(f"part{number}", part.new_zeros(size, *part.shape[1:]))

    def init_rules(self) -> dict[str, Rule]:
        return dict.fromkeys(self._buffers, ZERO)

    def keys(self) -> tuple[Tensor, ...]:
        """Tensors (size, ...), empty places included."""
        return tuple(self.get_buffer(f"part{number}") for number in range(self.parts))

    def there(self) -> Tensor:
        """(size,) True = a key, False = a place that was never filled."""
        return torch.arange(self.size, device=self.seen.device) < self.seen

    @torch.no_grad()
    def push(self, keys: Sequence[Tensor]) -> None:
        """keys: tensors (S, ...), the same on every rank; the oldest make room. Of more than `size` the last ones stay."""
        count = len(keys[0])
        keys = [key[-self.size :] for key in keys]
        first = self.seen + count - len(keys[0])
        place = (first + torch.arange(len(keys[0]), device=first.device)) % self.size
        for number, key in enumerate(keys):
            held = self.get_buffer(f"part{number}")
            held.index_copy_(0, place, key.to(held.dtype))
        self.seen += count
