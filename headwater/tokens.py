"""The one currency of the suite: a signal as tokens with coordinates.

Letters used in every shape: B rows, N tokens, D features or width, P coordinates, S samples in the batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Tokens(NamedTuple):
    """One modality of a batch, raw or embedded. A reader makes the same without the row dimension B.

    x: (B, N) ids | (B, N, D) vectors. A NaN inside a raw vector marks an absent slot.
    position: (B, N, P) coordinates in token units; coordinate 0 is time or reading order, so signals can be aligned by it.
    valid: (B, N) True = a real token. None = all are real; no mask is built and fused attention stays on.
    document: (B, N) the sample each token belongs to, numbered over the whole batch and the same in every modality; a
        sample lies in the same row everywhere. Attention never crosses documents. None = the row number.
    order: (B, N) for causal attention: a key is seen when its order <= the query's. Equal order = a bidirectional span,
        0 = a prefix. None = the index within the document.
    """

    x: Tensor
    position: Tensor
    valid: Tensor | None = None
    document: Tensor | None = None
    order: Tensor | None = None

    def map(self, f: Callable[[Tensor], Tensor]) -> Tokens:
        """Apply `f` to every field that is set."""
        return Tokens(f(self.x), f(self.position), *(None if field is None else f(field) for field in self[2:]))

    def take(self, index: Tensor, valid: Tensor | None = None) -> Tokens:
        """The tokens at index (B, K); with valid (B, K), places where it is False become padding."""

        def pick(field: Tensor) -> Tensor:
            wide = index.reshape(*index.shape, *([1] * (field.ndim - 2)))
            return field.gather(1, wide.expand(*index.shape, *field.shape[2:]))

        order = self.place() if self.order is None else self.order  # the index changes meaning, so it is written down
        taken = self._replace(order=order).map(pick)
        return taken if valid is None else taken._replace(valid=valid if taken.valid is None else taken.valid & valid)

    def real(self) -> Tensor:
        """`valid` as a tensor (B, N), all True where it is None."""
        return self.position.new_ones(self.position.shape[:2], dtype=torch.bool) if self.valid is None else self.valid

    def sample(self) -> Tensor:
        """`document` as a tensor (B, N), the row number where it is None."""
        rows, length = self.position.shape[:2]
        if self.document is not None:
            return self.document
        return torch.arange(rows, device=self.position.device)[:, None].expand(rows, length)

    def place(self) -> Tensor:
        """(B, N) the number of each token within its document, from 0. A document is one unbroken run of a row."""
        rows, length = self.position.shape[:2]
        index = torch.arange(length, device=self.position.device).expand(rows, length)
        if self.document is None:
            return index
        first = F.pad(self.document[:, 1:] != self.document[:, :-1], (1, 0), value=True)
        return index - torch.where(first, index, 0).cummax(1).values

    def samples(self) -> Tensor:
        """(S,) sorted numbers of the samples that have at least one real token here."""
        if self.document is None:
            every = torch.arange(self.position.shape[0], device=self.position.device)
            return every if self.valid is None else every[self.valid.any(1)]
        return self.document[self.real()].unique()


class Mask(NamedTuple):
    """What attention may see. dense: (B or 1, 1, Q, K) True = attend, or None; causal: the kernel's own triangle."""

    dense: Tensor | None
    causal: bool


class Pooled(NamedTuple):
    """One vector per sample: x (S, D), sample (S,) its number in the batch, sorted. Absent samples have no row."""

    x: Tensor
    sample: Tensor


def cat(parts: Sequence[Tokens]) -> Tokens:
    """Join along N. Coordinates are zero-padded to the largest P; None fields are filled in where another part has them."""
    dims = max(t.position.shape[-1] for t in parts)
    fill = {"valid": Tokens.real, "document": Tokens.sample, "order": lambda t: t.place() if t.order is None else t.order}
    x = torch.cat([t.x for t in parts], 1)
    position = torch.cat([F.pad(t.position, (0, dims - t.position.shape[-1])) for t in parts], 1)
    fields: dict[str, Tensor | None] = {}
    for name, value in fill.items():
        needed = any(getattr(t, name) is not None for t in parts) or (name == "order" and len(parts) > 1)
        fields[name] = torch.cat([value(t) for t in parts], 1) if needed else None
    return Tokens(x, position, **fields)


def split(t: Tokens, lengths: Sequence[int]) -> list[Tokens]:
    """Undo `cat`: cut N into pieces of these lengths."""

    def piece(n: int, end: int) -> Tokens:
        return t.map(lambda field: field[:, end - n : end])

    return list(map(piece, lengths, accumulate(lengths)))


def split_rows(batch: dict[str, Any], pieces: int) -> list[dict[str, Any]]:
    """Cut a batch into pieces of whole rows. Packed rows keep their batch-wide sample numbers and the seeds of all samples.

    What is neither Tokens nor a tensor of one entry per row goes into every piece.
    """
    if pieces == 1:
        return [batch]
    tokens = [t for t in batch.values() if isinstance(t, Tokens)]
    packed = any(t.document is not None for t in tokens)
    rows = tokens[0].position.shape[0]
    if pieces > rows:
        raise ValueError(f"found {rows} rows in a rank's batch and micro={pieces}; expected at most one piece per row")

    def cut(value: Any, start: int, end: int) -> Any:
        if isinstance(value, Tokens):
            return value.map(lambda field: field[start:end])
        return value[start:end] if isinstance(value, Tensor) and not packed else value

    ends = [rows * (i + 1) // pieces for i in range(pieces)]
    return [{name: cut(value, start, end) for name, value in batch.items()} for start, end in zip([0, *ends], ends, strict=False)]


def attention_mask(q: Tokens, k: Tokens, causal: bool = False) -> Mask:
    """The only place where a mask is made. With nothing to hide it returns no mask, and fused kernels run."""
    see = None if k.valid is None else k.valid[:, None, :]
    if q.document is not None or k.document is not None:
        same = q.sample()[:, :, None] == k.sample()[:, None, :]
        see = same if see is None else same & see
    if causal:
        if see is None and q.order is None and k.order is None and q.position.shape[1] == k.position.shape[1]:
            return Mask(None, True)
        before = [t.place() if t.order is None else t.order for t in (q, k)]
        earlier = before[1][:, None, :] <= before[0][:, :, None]
        see = earlier if see is None else see & earlier
    return Mask(None if see is None else see[:, None], False)


def mean_pool(t: Tokens) -> Pooled:
    """Average of the real tokens of each sample. t.x: (B, N, D)."""
    if t.document is not None:
        real = t.real()
        sample, inverse, count = t.document[real].unique(return_inverse=True, return_counts=True)
        total = t.x.new_zeros(len(sample), t.x.shape[-1]).index_add(0, inverse, t.x[real])
        return Pooled(total / count[:, None].to(total.dtype), sample)
    if t.valid is None:
        return Pooled(t.x.mean(1), t.samples())
    weight = t.valid[..., None].to(t.x.dtype)
    sample = t.samples()
    return Pooled(((t.x * weight).sum(1) / weight.sum(1).clamp(min=1))[sample], sample)
