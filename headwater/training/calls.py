"""Whose tokens a layer saw: every use of a layer in a forward pass, with its input and output gradient sorted by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headwater.model import Encoder, Fusion, Model
from headwater.objectives.objective import Batch, wide
from headwater.tokens import Tokens, earlier
from headwater.trunk import Trunk

Visit = Callable[[str, Tensor, Tensor], None]


class Call(NamedTuple):
    """One use of a layer. a: its input; whose: of the input's shape without features, the sample of each row; None = not known."""

    path: str
    a: Tensor
    ids: bool
    whose: Tensor | None


class Calls:
    """Of one forward and backward pass. Make it, ask inside `over`, then `backward`.

    Rows of a batch are samples. Where it is packed, tokens belong to the `document` of the Tokens of their shape that their encoder
    or fusion was given or made. Behind a slice, a view or x[mask], rows belong to whom they did before.

    Args:
        model: whose layers are watched.
        task: what the objective is asked.
        samples: S, how many there are in the batch.
    """

    def __init__(self, model: Model, task: Batch, samples: int) -> None:
        self.model, self.samples = model, samples
        self.raw: list[tuple[str, Tensor, bool, Any]] = []
        self.documents: dict[str, list[Tensor]] = {}
        for name, t in tokens(task):
            self._note(f"encoders.{name.partition('@')[0]}", t)
        self.packed = bool(self.documents)
        device = next(t.position.device for _, t in tokens(task))
        self.token = torch.zeros((), device=device, requires_grad=True)

    @contextmanager
    def over(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Watch these layers, by their paths in the model."""
        handles = [module.register_forward_hook(self._called(path)) for path, module in layers.items()]
        for path, module in self.model.named_modules() if self.packed else ():
            if isinstance(module, Encoder | Fusion | Trunk):
                handles.append(module.register_forward_hook(self._given(owner(path))))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def backward(self, loss: Tensor, visit: Visit) -> list[str]:
        """Differentiates the loss and calls `visit(path, a, b)` for every layer as soon as all of its uses are differentiated.

        a: inputs (S, L, I), or ids (S, L); b: gradients of the outputs (S, L, O), of all uses one behind the other; zeros where a
        sample has fewer tokens than L. No gradient of a parameter is made. Returns the layers of which some use cannot be
        told apart by sample; these are not visited.
        """
        self.calls = {number: self._told(*call) for number, call in enumerate(self.raw)}
        self.raw = []  # so that an input is let go when it has been visited
        lost = sorted({call.path for call in self.calls.values() if call.whose is None})
        self.calls = {n: call for n, call in self.calls.items() if call.path not in lost}
        self.visit, self.came = visit, dict[str, list[tuple[Tensor, Tensor]]]()
        torch.autograd.grad(loss, self.token, allow_unused=True)
        for path in list(self.came):  # of a layer with a use that the loss does not depend on
            self._done(path)
        return lost

    def _called(self, path: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            a, number = given[0], len(self.raw)
            self.raw.append((path, a.detach(), isinstance(module, nn.Embedding), a.grad_fn))
            return Through.apply(out, self.token, lambda b: self._came(number, b))  # type: ignore[no-any-return]

        return hook

    def _given(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
            for one in (*given, out):
                for t in one.values() if isinstance(one, dict) else (one,):
                    if isinstance(t, Tokens):
                        self._note(path, t)

        return hook

    def _note(self, path: str, t: Tokens) -> None:
        if t.document is not None:
            self.documents.setdefault(path, []).append(t.document)

    def _told(self, path: str, a: Tensor, ids: bool, node: Any) -> Call:
        if ids and a.ndim == 1:  # places, the same for every sample
            return Call(path, a, ids, None)
        shape = (*a.shape, 1) if ids else tuple(a.shape)
        whose = self._whose(path, shape, node)
        return Call(path, a, ids, whose if whose is not None and whose.shape == shape[:-1] else None)

    def _whose(self, path: str, shape: tuple[int, ...], node: Any) -> Tensor | None:
        """The sample of every row of a tensor (..., D), of its shape without D. node: how autograd says that it was made."""
        name, size = "" if node is None else node.name(), tuple(getattr(node, "_saved_self_sym_sizes", ()))
        if name == "AliasBackward0":  # of a slice that takes all
            return self._whose(path, shape, before(node))
        if (taken := selected(node, name, len(size))) is not None:
            whole = self._whose(path, size, before(node))
            return None if whole is None else whole[taken[: whole.ndim]]
        if name == "ViewBackward0" and size[-1] == shape[-1] and (whole := self._whose(path, size, before(node))) is not None:
            return whole.reshape(shape[:-1])
        return self._rows(path, shape[:-1])

    def _rows(self, path: str, lead: tuple[int, ...]) -> Tensor | None:
        """The same by the shape alone: (B, N), or (B, H, N) of several heads, or (S,)."""
        if self.packed and len(lead) > 1:
            known = [d for d in self.documents.get(owner(path), []) if d.shape == (lead[0], lead[-1])]
            if known:
                every = known[0].clamp(min=0).view(lead[0], *[1] * (len(lead) - 2), lead[-1])
                return every.expand(lead) if all(map(known[0].equal, known)) else None
        if lead[0] != self.samples:
            return None
        return torch.arange(self.samples, device=self.token.device).view(-1, *[1] * (len(lead) - 1)).expand(lead)

    def _came(self, number: int, b: Tensor) -> None:
        """The gradient of one use's output is there."""
        if (call := self.calls.pop(number, None)) is None:
            return
        whose, b = call.whose.flatten(), wide(b.detach()).flatten(0, -2)  # type: ignore[union-attr]
        a = call.a.flatten() if call.ids else wide(call.a).flatten(0, -2)
        self.came.setdefault(call.path, []).append((by_sample(a, whose, self.samples), by_sample(b, whose, self.samples)))
        if not any(other.path == call.path for other in self.calls.values()):
            self._done(call.path)

    def _done(self, path: str) -> None:
        uses = self.came.pop(path)
        a, b = uses[0] if len(uses) == 1 else (torch.cat(both, 1) for both in zip(*uses, strict=True))
        self.visit(path, a, b)


class Through(torch.autograd.Function):
    """A tensor as it is; in backward its gradient goes to `back` too. token: a leaf, for whose sake autograd comes by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, back: Callable[[Tensor], None]) -> Tensor:
        ctx.back = back
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.back(gradients[0])
        return gradients[0], None, None


def tokens(batch: Batch) -> Iterator[tuple[str, Tokens]]:
    """Every modality of a batch, and of those inside, which parts of an objective have."""
    for name, value in batch.items():
        if isinstance(value, Tokens):
            yield name, value
        elif isinstance(value, dict):
            yield from tokens(value)


def owner(path: str) -> str:
    """The encoder or fusion that a module of the model is part of: "encoders.text.trunk.norm" -> "encoders.text"."""
    return ".".join(path.split(".")[: 2 if path.startswith("encoders.") else 1])


def before(node: Any) -> Any:
    """How what a slice or selection was taken of was made."""
    return node.next_functions[0][0]


def selected(node: Any, name: str, dims: int) -> tuple[Any, ...] | None:
    """What a tensor of so many dimensions was indexed with; None where it was not, or where its features were taken apart."""
    if name == "IndexBackward0":
        sizes = [0 if i is None else i.ndim if i.dtype == torch.bool else 1 for i in node._saved_indices]
        return tuple(node._saved_indices) if sum(sizes) == dims - 1 and min(sizes) > 0 else None
    if name not in ("SliceBackward0", "SelectBackward0"):
        return None
    one = name == "SelectBackward0"
    taken = signed(node._saved_index) if one else slice(signed(node._saved_start), signed(node._saved_end), node._saved_step)
    return (*[slice(None)] * (signed(node._saved_dim) % dims), taken)


def signed(number: int) -> int:
    """Autograd shows negative numbers as those of 64 bits without a sign."""
    return number - (1 << 64) if number >= 1 << 63 else number


def by_sample(x: Tensor, whose: Tensor, samples: int) -> Tensor:
    """Tokens (T, ...) and the sample (T,) of each -> (S, L, ...), in their order; zeros behind those of shorter samples."""
    length = len(x) // samples
    if torch.equal(whose, torch.arange(samples, device=x.device).repeat_interleave(length)):
        return x.view(samples, length, *x.shape[1:])
    place = earlier(whose)
    return x.new_zeros(samples, int(place.max()) + 1 if len(place) else 0, *x.shape[1:]).index_put((whose, place), x)
