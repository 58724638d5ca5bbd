"""What all adapters to towers of other libraries share: rows of one sample each, and tokens of their own behind what was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from headwater.model import Encoder, Reader
from headwater.tokens import Pooled, Tokens, repack, split, unpack


class Alone(NamedTuple):
    """Contextual tokens by sample: given (S, L, D) at position (S, L, P), valid (S, L) or None; own (S, R, D); sample (S,)."""

    given: Tensor
    position: Tensor
    valid: Tensor | None
    own: Tensor
    sample: Tensor


class Tower(Encoder):
    """An encoder whose weights and code are another library's.

    A subclass writes `embed`, `contextual` and `pooled`, and `unembed` where its model has a head that generates. It meets
    rows of one sample each: packed rows are unpacked before and packed again afterwards.

    own: R, how many tokens (class, register) the tower puts behind those of every sample.
    """

    own: int = 0
    cacheable = False
    settled = True  # `headwater.init` leaves it alone: its own library has drawn or loaded its weights

    def __init__(self, reader: Reader, width: int, dim: int) -> None:
        nn.Module.__init__(self)
        self.reader, self.width, self.embedded, self.dim = reader, width, width, dim
        self.features, self.vocab = reader.features, reader.vocab

    def forward(self, t: Tokens, causal: bool = False, condition: Tensor | None = None) -> Tokens:
        if condition is not None:
            raise ValueError(f"{type(self).__name__} takes no condition; use an encoder with a conditional Trunk instead")
        return by_sample(t, lambda rows: self.contextual(rows, causal))

    def contextual(self, t: Tokens, causal: bool) -> Tokens:
        """One sample per row: embedded (B, N, D) -> contextual (B, N + R, D), the R by `tokens.append`."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its tower runs")

    def pool(self, t: Tokens) -> Pooled:
        alone = self.alone(t)
        return Pooled(self.pooled(alone), alone.sample)

    def pooled(self, alone: Alone) -> Tensor:
        """(S, dim): the mean of the given tokens, where a subclass does not know better."""
        if alone.valid is None:
            return alone.given.mean(1)
        weight = alone.valid[..., None].to(alone.given.dtype)
        return (alone.given * weight).sum(1) / weight.sum(1)

    def alone(self, t: Tokens) -> Alone:
        """What `forward` returned, as one row per sample that is present."""
        sample, total = t.samples(), t.x.shape[1]
        if t.document is None:
            count = total - self.own
            if t.valid is not None:
                t = t.map(lambda field: field[sample])
            valid = None if t.valid is None else t.valid[:, :count]
            return Alone(t.x[:, :count], t.position[:, :count], valid, t.x[:, count:], sample)
        count = int(t.given()[0].sum()) if self.own else total
        front, back = split(t, (count, total - count))
        rows, mine = unpack(front), back.real()
        order = back.sample()[mine].argsort(stable=True)
        own = back.x[mine][order].unflatten(0, (len(sample), self.own)) if self.own else t.x.new_empty(len(sample), 0, self.width)
        return Alone(rows.x, rows.position, rows.valid, own, sample)

    def unembed(self, x: Tensor) -> Tensor:
        raise ValueError(
            f"{type(self).__name__} has no head that generates; for causal prediction or flow use an encoder with a Trunk or a "
            "language model"
        )


def by_sample(t: Tokens, run: Callable[[Tokens], Tokens]) -> Tokens:
    """`run` on rows of one sample each, whether the tokens come packed or not."""
    if t.document is None:
        return run(t)
    rows = unpack(t)
    rows = rows if t.order is not None else rows._replace(order=None)  # so that a tower sees that nothing is out of order
    return repack(run(rows), t)


def require(tower: Tower, t: Tokens, what: str) -> None:
    """ValueError where a tower that counts places itself is given tokens of another order than they were read in."""
    if t.order is not None:
        raise ValueError(f"{type(tower).__name__} {what}; found tokens with an `order`, expected all tokens as they were read")


def tie(tower: Tower) -> None:
    """Weights that two modules share are written once, under the first name; loading that one loads both."""
    seen: set[int] = set()
    again = [n for n, p in tower.named_parameters(remove_duplicate=False) if id(p) in seen or seen.add(id(p))]  # type: ignore[func-returns-value]

    def forget(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name in again:
            state.pop(prefix + name, None)

    def forgive(module: nn.Module, found: Any) -> None:
        found.missing_keys[:] = [key for key in found.missing_keys if not key.endswith(tuple(again))]

    if again:
        tower.register_state_dict_post_hook(forget)
        tower.register_load_state_dict_post_hook(forgive)
