"""What generation keeps between calls, so that each token is computed once.

Within `with Cache() as cache:` causal passes go on where the last one ended: they are given only the new tokens, with `position`
and `order` set, and attend to all that came before. Nothing else changes; no call hands the cache on.
"""

from __future__ import annotations

from contextvars import ContextVar, Token

import torch
from torch import Tensor, nn

from headwater.tokens import Tokens, cat

_current: ContextVar[Cache | None] = ContextVar("cache", default=None)


class Kept:
    """What one trunk keeps of a sequence: keys and values of every block.

    seen: the tokens so far, their x left empty. layers: per block (2, B, H, room, d), of which the first `seen` are filled.
    """

    def __init__(self) -> None:
        self.seen: Tokens | None = None
        self.layers: list[Tensor] = []
        self._start = 0

    def extend(self, t: Tokens) -> tuple[Tokens, Tokens]:
        """New tokens -> (these with their order, all tokens with theirs)."""
        if t.document is not None:
            raise ValueError("found packed rows with a cache; generation needs one document per row")
        self._start = 0 if self.seen is None else self.seen.position.shape[1]
        t = t._replace(order=t.place() + self._start if t.order is None else t.order)
        key = t._replace(x=t.x[..., :0])
        self.seen = key if self.seen is None else cat([self.seen, key])
        return t, self.seen

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the new tokens of a block, (B, H, N, d) each -> those of all. Without gradient."""
        end = self._start + k.shape[2]
        if layer == len(self.layers):
            self.layers.append(torch.stack([k, v]))
        elif end > self.layers[layer].shape[3]:  # twice the room, so that a sequence is copied a few times only
            held = self.layers[layer]
            self.layers[layer] = held.new_empty(*held.shape[:3], 2 * end, held.shape[4])
            self.layers[layer][:, :, :, : self._start] = held[:, :, :, : self._start]
        held = self.layers[layer]
        held[0, :, :, self._start : end], held[1, :, :, self._start : end] = k, v
        return held[0, :, :, :end], held[1, :, :, :end]

    def take(self, rows: Tensor) -> None:
        """Go on with these rows."""
        if self.seen is not None:
            self.seen = self.seen.map(lambda field: field[rows])
        self.layers = [held[:, rows] for held in self.layers]


class Cache:
    """Keys and values of every trunk that a causal pass went through, for one batch of sequences.

    kept: by trunk. before: by fusion, (B, 1) how many tokens it stood before each sequence.
    """

    def __init__(self) -> None:
        self.kept: dict[nn.Module, Kept] = {}
        self.before: dict[nn.Module, Tensor] = {}
        self._outer: list[Token] = []

    def __enter__(self) -> Cache:
        self._outer.append(_current.set(self))
        return self

    def __exit__(self, *error: object) -> None:
        _current.reset(self._outer.pop())

    def of(self, trunk: nn.Module) -> Kept:
        """What a trunk keeps, made when it is first asked for."""
        return self.kept.setdefault(trunk, Kept())

    def take(self, rows: Tensor) -> None:
        """Go on with these rows, (B',) of the B so far: a beam search orders them anew, doubles some and drops others."""
        for kept in self.kept.values():
            kept.take(rows)
        self.before = {fusion: count[rows] for fusion, count in self.before.items()}


def current() -> Cache | None:
    """The cache that this code runs within."""
    return _current.get()
