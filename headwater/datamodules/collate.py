"""The one way samples become a batch: rows padded, or several documents packed into a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from headwater.tokens import Tokens

Sample = dict[str, Tokens]  # modality -> tokens of one sample, without the row dimension
Rows = Sequence[Sequence[int]]  # the samples of each row


def collate(
    samples: Sequence[Sample], names: Sequence[str], rows: Rows | None = None, buckets: Mapping[str, int] | None = None
) -> dict[str, Tokens]:
    """Rows of equal length for every modality in `names`.

    A sample that lacks a modality has no valid token there. rows: which samples share a row, the same one in every modality;
    None = one sample per row. buckets: modality -> n; its rows, and those of views of it, have a multiple of n places.
    """
    steps = {name: (buckets or {}).get(name.partition("@")[0], 1) for name in names}
    return {n: _alone(samples, n, steps[n]) if rows is None else _packed(samples, rows, n, steps[n]) for n in names}


def _alone(samples: Sequence[Sample], name: str, step: int) -> Tokens:
    """One sample per row."""
    found = [sample.get(name) for sample in samples]
    pieces = [t for t in found if t is not None]
    model = _model(pieces, name)
    lengths = [0 if t is None else t.position.shape[0] for t in found]
    size = step * -(-max(lengths) // step)
    valid = torch.arange(size) < torch.tensor(lengths)[:, None]
    even = min(lengths) == size

    def column(field: str) -> Tensor:
        parts = [getattr(t, field) for t in pieces]
        return torch.stack(parts) if even else _filled(torch.cat(parts), valid)

    return Tokens(column("x"), column("position"), valid, None, None if model.order is None else column("order"))


def _packed(samples: Sequence[Sample], rows: Rows, name: str, step: int) -> Tokens:
    """Several samples per row; document = the number of the sample in the batch."""
    found = [[(s, samples[s][name]) for s in row if name in samples[s]] for row in rows]
    pieces = [t for row in found for _, t in row]
    model = _model(pieces, name)
    lengths = torch.tensor([t.position.shape[0] for t in pieces])
    sizes = [sum(t.position.shape[0] for _, t in row) for row in found]
    valid = torch.arange(step * -(-max(sizes) // step)) < torch.tensor(sizes)[:, None]

    def joined(field: str) -> Tensor:
        return _filled(torch.cat([getattr(t, field) for t in pieces]), valid)

    owner = _filled(torch.tensor([s for row in found for s, _ in row]).repeat_interleave(lengths), valid)
    last = torch.tensor([row[-1][0] if row else 0 for row in found])  # padding belongs to the last document: unbroken runs
    document = torch.where(valid, owner, last[:, None])
    return Tokens(joined("x"), joined("position"), valid, document, None if model.order is None else joined("order"))


def _model(found: Sequence[Tokens], name: str) -> Tokens:
    if not found:
        raise ValueError(f"no sample of this batch has {name}; it should not have been asked for")
    if len({t.order is None for t in found}) > 1:
        raise ValueError(
            f"some samples of {name} have an order and some have none; give such sources steps of their own (unit: batch)"
        )
    return found[0]


def _filled(flat: Tensor, valid: Tensor) -> Tensor:
    """All tokens in order (T, ...) put into the valid places (B, N) of rows of zeros: (B, N, ...)."""
    out = flat.new_zeros(*valid.shape, *flat.shape[1:])
    out[valid] = flat
    return out
