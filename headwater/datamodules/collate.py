"""The one way samples become a batch: rows padded, or several documents packed into a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headwater.tokens import Tokens

Sample = dict[str, Tokens]  # modality -> tokens of one sample, without the row dimension
Rows = Sequence[Sequence[int]]  # the samples of each row


def collate(samples: Sequence[Sample], names: Sequence[str], rows: Rows | None = None) -> dict[str, Tokens]:
    """Rows of equal length for every modality in `names`.

    A sample that lacks a modality has no valid token there. rows: which samples share a row, the same one in every modality;
    None = one sample per row.
    """
    return {name: _alone(samples, name) if rows is None else _packed(samples, rows, name) for name in names}


def _alone(samples: Sequence[Sample], name: str) -> Tokens:
    """One sample per row."""
    found = [sample.get(name) for sample in samples]
    model = _model([t for t in found if t is not None], name)
    lengths = [0 if t is None else len(t.position) for t in found]
    length = max(lengths)

    def column(field: str) -> Tensor:
        parts = [None if t is None else getattr(t, field) for t in found]
        if min(lengths) == length:  # nothing to fill
            return torch.stack(parts)  # type: ignore[arg-type]
        like = getattr(model, field)
        out = torch.zeros(len(parts), length, *like.shape[1:], dtype=like.dtype)
        for row, part in zip(out, parts, strict=True):
            if part is not None:
                row[: len(part)] = part
        return out

    valid = torch.arange(length) < torch.tensor(lengths)[:, None]
    return Tokens(column("x"), column("position"), valid, None, None if model.order is None else column("order"))


def _packed(samples: Sequence[Sample], rows: Rows, name: str) -> Tokens:
    """Several samples per row; document = the number of the sample in the batch."""
    pieces = [[(s, samples[s][name]) for s in row if name in samples[s]] for row in rows]
    model = _model([t for row in pieces for _, t in row], name)
    length = max(sum(len(t.position) for _, t in row) for row in pieces)

    def joined(field: str) -> Tensor:
        return _pad([[getattr(t, field) for _, t in row] for row in pieces], length, getattr(model, field))

    real = [[torch.ones(len(t.position), dtype=torch.bool) for _, t in row] for row in pieces]
    owner = [[torch.full((len(t.position),), s) for s, t in row] for row in pieces]
    valid = _pad(real, length, torch.ones(0, dtype=torch.bool))
    last = torch.tensor([row[-1][0] if row else 0 for row in pieces])  # padding belongs to the last document: unbroken runs
    document = torch.where(valid, _pad(owner, length, torch.zeros(0, dtype=torch.int64)), last[:, None])
    return Tokens(joined("x"), joined("position"), valid, document, None if model.order is None else joined("order"))


def _model(found: Sequence[Tokens], name: str) -> Tokens:
    if not found:
        raise ValueError(f"no sample of this batch has {name}; it should not have been asked for")
    if len({t.order is None for t in found}) > 1:
        raise ValueError(
            f"some samples of {name} have an order and some have none; give such sources steps of their own (unit: batch)"
        )
    return found[0]


def _pad(rows: list[list[Tensor]], length: int, like: Tensor) -> Tensor:
    """Pieces joined along N and filled with zeros: (rows, length, ...)."""
    out = torch.zeros(len(rows), length, *like.shape[1:], dtype=like.dtype)
    for target, pieces in zip(out, rows, strict=True):
        start = 0
        for piece in pieces:
            target[start : start + len(piece)] = piece
            start += len(piece)
    return out
