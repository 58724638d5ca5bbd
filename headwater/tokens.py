"""The one currency of the suite: a signal as tokens with coordinates.

Letters used in every shape: B rows, N tokens, D features or width, P coordinates, S samples in the batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LAST = 1 << 62  # the order of appended tokens: in causal attention they see their whole document, and only they see them


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

    def given(self) -> Tensor:
        """(B, N) True = came with the signal; False = class, register and other tokens that `append` put behind it."""
        if self.order is None:
            return self.position.new_ones(self.position.shape[:2], dtype=torch.bool)
        return self.order != LAST

    def samples(self) -> Tensor:
        """(S,) sorted numbers of the samples that have at least one real token here."""
        if self.document is None:
            every = torch.arange(self.position.shape[0], device=self.position.device)
            return every if self.valid is None else every[self.valid.any(1)]
        return self.document[self.real()].unique()


Kind = Literal["full", "causal", "padded", "packed", "ordered"]


class Mask(NamedTuple):
    """What attention may see, told by the fields that decide it; nothing of size Q x K exists until `dense` is asked for.

    kind: "full" = everything; "causal" = the kernel's own triangle; "padded" = the real keys; "packed" = the real keys of the
    same document; "ordered" = those with an order up to the query's, of all or of the same document.
    valid: (B, K) of the keys. document, order: (B, Q) of the queries and (B, K) of the keys.
    """

    kind: Kind
    valid: Tensor | None = None
    document: tuple[Tensor, Tensor] | None = None
    order: tuple[Tensor, Tensor] | None = None

    @property
    def causal(self) -> bool:
        """True = nothing but the triangle, which kernels have built in."""
        return self.kind == "causal"

    @property
    def dense(self) -> Tensor | None:
        """(B or 1, 1, Q or 1, K) True = attend; None where nothing is hidden or the kernel's own triangle serves."""
        see = None if self.valid is None else self.valid[:, None, :]
        for pair, relation in ((self.document, torch.eq), (self.order, torch.ge)):
            if pair is not None:
                allowed = relation(pair[0][:, :, None], pair[1][:, None, :])
                see = allowed if see is None else see & allowed
        return None if see is None else see[:, None]


class Pooled(NamedTuple):
    """One vector per sample: x (S, D), sample (S,) its number in the batch, sorted. Absent samples have no row."""

    x: Tensor
    sample: Tensor


def in_all(samples: Sequence[Tensor]) -> Tensor:
    """Sorted numbers of samples, several times -> those that are in all of them."""
    first, *others = samples
    for other in others:
        first = first[torch.isin(first, other)]
    return first


def of(pooled: Pooled, sample: Tensor) -> Tensor:
    """The vectors of these samples, which it has, in order."""
    return pooled.x[torch.isin(pooled.sample, sample)]


def join(a: Pooled, b: Pooled) -> tuple[Tensor, Tensor]:
    """Vectors of the samples that both have, in the same order."""
    return of(a, b.sample), of(b, a.sample)


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


def concat(parts: Sequence[Tokens]) -> Tokens:
    """Join per document: its real tokens of the first part, then those of the second, and so on, (B, N').

    A sample lies in one row, whatever it has of each part; in a row documents follow one another by their numbers, padding
    behind them. Coordinates are zero-padded to the largest P. `order` is None where no part has one, and then counts anew.
    """
    dims = max(t.position.shape[-1] for t in parts)
    packed, ordered = any(t.document is not None for t in parts), any(t.order is not None for t in parts)
    real = torch.cat([t.real() for t in parts], 1)
    sample = torch.cat([t.sample() for t in parts], 1)
    row = torch.arange(len(real), device=real.device)[:, None].expand_as(real)[real]
    first = ((row * (int(sample.max()) + 1 if sample.numel() else 1)) + sample[real]).argsort(stable=True)
    row, own = row[first], sample[real][first]
    seat = row, earlier(row)
    length = int(seat[1].max()) + 1 if len(row) else 1  # one column at least, so that a rank without any token can run

    def laid(fields: Sequence[Tensor]) -> Tensor:
        values = torch.cat(list(fields), 1)
        return values.new_zeros(len(real), length, *values.shape[2:]).index_put(seat, values[real][first])

    x = laid([t.x for t in parts])
    position = laid([F.pad(t.position, (0, dims - t.position.shape[-1])) for t in parts])
    order = laid([t.place() if t.order is None else t.order for t in parts]) if ordered else None
    there = real.new_zeros(len(real), length).index_put(seat, real.new_ones(()))
    valid = None if len(row) and all(t.valid is None for t in parts) else there
    if not packed:
        return Tokens(x, position, valid, None, order)
    document = own.new_zeros(len(real), length).index_put(seat, own)
    return Tokens(x, position, valid, torch.where(there, document, document.amax(1, keepdim=True)), order)


def cat_rows(parts: Sequence[Tokens]) -> Tokens:
    """Join along B tokens of equal N without documents; row r of part k becomes row r + the rows of the parts before it."""
    valid = None if all(t.valid is None for t in parts) else torch.cat([t.real() for t in parts])
    order = None if parts[0].order is None else torch.cat([t.order for t in parts])  # type: ignore[misc]
    return Tokens(torch.cat([t.x for t in parts]), torch.cat([t.position for t in parts]), valid, None, order)


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
    """The only place where a mask is made. With nothing to hide there is none, and fused kernels run."""
    packed = q.document is not None or k.document is not None
    if causal and not packed and q.order is k.order is k.valid is None and q.position.shape[1] == k.position.shape[1]:
        return Mask("causal")
    document = (q.sample(), k.sample()) if packed else None
    if causal:
        before = [t.place() if t.order is None else t.order for t in (q, k)]
        return Mask("ordered", k.valid, document, (before[0], before[1]))
    return Mask("packed" if packed else "full" if k.valid is None else "padded", k.valid, document)


def append(t: Tokens, x: Tensor) -> Tokens:
    """R more tokens for every document of every row, behind the N that were given, so that places stay what they were.

    x: (R, D) the same for all, or (S, R, D) one set per sample, in the order of `t.samples()`. They have order LAST and
    position zero. Rows with fewer documents than others are padded.
    """
    sample = t.samples()
    count = x.shape[-2]
    row, place = seats(t, sample)
    rows, most = t.position.shape[0], 1 if t.document is None else int(place.max()) + 1 if len(place) else 0
    behind = Tokens(
        t.x.new_zeros(rows, most, count, x.shape[-1]),
        t.position.new_zeros(rows, most, count, t.position.shape[-1]),
        t.position.new_zeros(rows, most, count, dtype=torch.bool),
        sample.new_full((rows, most, count), -1),
        sample.new_full((rows, most, count), LAST),
    )
    seat = (row, place)
    values = x.to(t.x.dtype).expand(len(sample), *x.shape[-2:])
    behind = behind._replace(
        x=behind.x.index_put(seat, values),
        valid=behind.real().index_put(seat, seat[0].new_ones((), dtype=torch.bool)),
        document=None if t.document is None else behind.sample().index_put(seat, sample[:, None].expand(-1, count)),
    )
    behind = behind.map(lambda field: field.flatten(1, 2))
    return cat([t, behind._replace(valid=None) if t.valid is None and t.document is None else behind])


def seats(t: Tokens, sample: Tensor) -> tuple[Tensor, Tensor]:
    """Row and number within the row of every document. sample: (S,) `t.samples()` -> two (S,)."""
    if t.document is None:
        return sample, torch.zeros_like(sample)
    real = t.real()
    index = torch.arange(len(real), device=real.device)[:, None].expand_as(real)[real]
    row = torch.zeros_like(sample).index_put((torch.searchsorted(sample, t.document[real]),), index)
    return row, earlier(row)


def unpack(t: Tokens) -> Tokens:
    """Packed rows -> one row per sample, (S, L), in the order of `t.samples()`; L is the longest document. `document` becomes None.

    Order is written down first: a subset of a document keeps what may see what.
    """
    inside, row, place = _alone(t)
    shape = len(t.samples()), int(place.max()) + 1 if len(place) else 0
    order = t.place() if t.order is None else t.order

    def spread(field: Tensor) -> Tensor:
        return field.new_zeros(*shape, *field.shape[2:]).index_put((row, place), field[inside])

    return t._replace(valid=t.real(), document=None, order=order).map(spread)


def repack(alone: Tokens, t: Tokens) -> Tokens:
    """The inverse of `unpack` for contextual tokens. alone: (S, L + R) of the packed `t`; the R come back as appended tokens."""
    inside, row, place = _alone(t)
    length = int(place.max()) + 1 if len(place) else 0
    x = alone.x.new_zeros(*t.position.shape[:2], alone.x.shape[-1])
    back = t._replace(x=x.index_put(tuple(inside.nonzero().T), alone.x[row, place]))
    return append(back, alone.x[:, length:]) if alone.x.shape[1] > length else back


def _alone(t: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Where tokens go when every sample has a row of its own: which go (B, N), and of these T the row and place, two (T,)."""
    samples = t.samples()
    inside = torch.isin(t.sample(), samples)
    row = torch.searchsorted(samples, t.sample()[inside])
    return inside, row, earlier(row)


def earlier(group: Tensor) -> Tensor:
    """(T,) numbers of groups -> (T,) how many earlier entries are of the same group."""
    by_group, count = group.argsort(stable=True), group.bincount()
    place = torch.empty_like(group)
    place[by_group] = torch.arange(len(group), device=group.device) - (count.cumsum(0) - count)[group[by_group]]
    return place


def mean_pool(t: Tokens) -> Pooled:
    """Average of the real tokens of each sample, without appended ones. t.x: (B, N, D)."""
    if t.order is not None:
        t = t._replace(valid=t.given() if t.valid is None else t.valid & t.given())
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
