"""The one way samples become a batch: rows padded, or several samples packed into a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headwater.tokens import Tokens

Sample = dict[str, Tokens]  # modality -> tokens of one sample, without the row dimension


def collate(samples: Sequence[Sample], names: Sequence[str], pack: dict[str, int] | None = None) -> dict[str, Tokens]:
    """Rows of equal length for every modality in `names`.

    A sample that lacks a modality has no valid token there. pack: the most tokens per row and modality; samples then share
    rows, in their order, the same row in every modality. None = one sample per row.
    """
    rows = assign(samples, pack) if pack else [[s] for s in range(len(samples))]
    return {name: _rows(samples, rows, name, packed=pack is not None) for name in names}


def assign(samples: Sequence[Sample], limits: dict[str, int]) -> list[list[int]]:
    """First-fit: which samples share a row, such that no modality exceeds its limit. A sample over a limit is an error."""
    rows: list[list[int]] = []
    free: list[dict[str, int]] = []
    for number, sample in enumerate(samples):
        need = {name: t.position.shape[0] for name, t in sample.items() if name in limits}
        if over := {name: n for name, n in need.items() if n > limits[name]}:
            raise ValueError(
                f"a sample has {over} tokens, more than a packed row may hold ({limits}); raise the limit or cut the reader"
            )
        row = next((r for r, room in enumerate(free) if all(room[name] >= n for name, n in need.items())), None)
        if row is None:
            row = len(rows)
            rows.append([])
            free.append(dict(limits))
        rows[row].append(number)
        for name, n in need.items():
            free[row][name] -= n
    return rows


def _rows(samples: Sequence[Sample], rows: list[list[int]], name: str, packed: bool) -> Tokens:
    pieces = [[(s, samples[s][name]) for s in row if name in samples[s]] for row in rows]
    model = next((t for row in pieces for _, t in row), None)
    if model is None:
        raise ValueError(f"no sample of this batch has {name}; it should not have been asked for")
    length = max(sum(t.position.shape[0] for _, t in row) for row in pieces)

    def joined(field: str) -> Tensor:
        return _pad([[getattr(t, field) for _, t in row] for row in pieces], length, getattr(model, field))

    real = [[torch.ones(t.position.shape[0], dtype=torch.bool) for _, t in row] for row in pieces]
    valid = _pad(real, length, torch.ones(0, dtype=torch.bool))
    document = None
    if packed:
        owner = [[torch.full((t.position.shape[0],), s) for s, t in row] for row in pieces]
        document = _pad(owner, length, torch.zeros(0, dtype=torch.int64))
        last = torch.tensor([row[-1][0] if row else 0 for row in pieces])  # padding belongs to the last document: unbroken runs
        document = torch.where(valid, document, last[:, None])
    return Tokens(joined("x"), joined("position"), valid, document, None if model.order is None else joined("order"))


def _pad(rows: list[list[Tensor]], length: int, like: Tensor) -> Tensor:
    """Pieces joined along N and filled with zeros: (rows, length, ...)."""
    out = torch.zeros(len(rows), length, *like.shape[1:], dtype=like.dtype)
    for target, pieces in zip(out, rows, strict=True):
        start = 0
        for piece in pieces:
            target[start : start + len(piece)] = piece
            start += len(piece)
    return out
