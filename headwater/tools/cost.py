"""What a training step costs, found by running it on tensors that have a shape and no memory.

Parameters, and all that is computed from them, are torch's fake tensors; batches, masks and places are real, so that code which
looks at them runs as it is. FLOPs are those of torch's flop counter, a multiplication and an addition being two. Activations are
the tensors that autograd has saved when the forward pass ends, each storage once, parameters left out.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from headwater.init import replace
from headwater.model import Reader
from headwater.objectives import Weighted
from headwater.objectives.objective import weighted_sum
from headwater.pretrainer import Pretrainer
from headwater.tokens import Tokens
from headwater.view import View

ROWS = (2, 4, 6)  # samples of the three runs that a parabola goes through
MOST = 1e6  # of every fact, to ask a reader for its longest sample
FACTS = ("size", "width", "height", "seconds", "frames", "fps", "steps", "words")
INDEXED = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


class Cost(NamedTuple):
    """Of one part: FLOPs of the forward and of the backward pass, bytes that are kept between them."""

    forward: float = 0
    backward: float = 0
    activations: float = 0


class Saved:
    """A tensor that autograd keeps, and the part of the model that it was saved in."""

    def __init__(self, tensor: Tensor, part: str) -> None:
        self.tensor, self.part = tensor, part


class Hollow(FakeTensorMode):
    """Runs what touches no fake tensor for real, and counts FLOPs by part.

    The backward pass knows its part by what it unpacks: a matrix product always needs something that was saved.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.part, self.flops, self.busy = "", Counter[str](), False
        self.kept: list[weakref.ref[Saved]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.busy:  # what torch calls to find out the shape of a result
            return super().__torch_dispatch__(func, types, args, kwargs)
        if not any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            return self.count(func, args, kwargs, func(*args, **kwargs))
        if func._overloadpacket in INDEXED:  # the number of True is known, and a fake tensor would forget it
            args = (args[0], [at for index in args[1] for at in places(index)], *args[2:])
        self.busy = True
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.busy = False
        return self.count(func, args, kwargs, out)

    def count(self, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        """The result, after its FLOPs are noted."""
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops[self.part] += formula(*args, **kwargs, out_val=out)
        return out

    @contextmanager
    def inside(self, part: str) -> Iterator[None]:
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def watch(self, part: str, module: nn.Module, methods: tuple[str, ...]) -> None:
        """Calls of these methods count for `part`."""

        def within(method: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                with self.inside(part):
                    return method(*args, **kwargs)

            return call

        for name in methods:
            setattr(module, name, within(getattr(module, name)))

    def keep(self, tensor: Tensor) -> Saved:
        saved = Saved(tensor, self.part)
        self.kept.append(weakref.ref(saved))
        return saved

    def give(self, saved: Saved) -> Tensor:
        self.part = saved.part
        return saved.tensor


def places(index: Tensor | None) -> tuple[Tensor | None, ...]:
    """A real mask as the places of what is True; any other index as it is."""
    real = isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor)
    return index.nonzero(as_tuple=True) if real else (index,)  # type: ignore[union-attr]


def parts_of(pretrainer: Pretrainer) -> dict[str, tuple[str, nn.Module]]:
    """Part -> prefix of its parameters' names, and its module."""
    model, objective = pretrainer.backbone, pretrainer.objective
    found: dict[str, tuple[str, nn.Module]] = {
        f"encoder {name}": (f"backbone.encoders.{name}.", encoder) for name, encoder in model.encoders.items()
    }
    if model.fusion is not None:
        found["fusion"] = ("backbone.fusion.", model.fusion)
    if model.space:
        found["projections"] = ("backbone.projections.", model.projections)
    if isinstance(objective, Weighted):
        return found | {f"objective {name}": (f"objective.parts.{name}.", part) for name, part in objective.parts.items()}
    return found | {"objective": ("objective.", objective)}


def measure(pretrainer: Pretrainer, precision: str, batch: int, real: bool = False) -> tuple[dict[str, Cost], int]:
    """Part -> its cost in a step of `batch` samples, each as long as can be and with all that the objective needs; and the bytes
    of optimizer state.

    Three small batches are run, and a parabola through them is exact: pairs of samples are the most that a loss compares. The
    pretrainer's tensors are fake afterwards; with `real` it must have memory, keeps it, and the batches run for real.
    """
    mode, dtype = Hollow(), {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}.get(precision)
    replace(pretrainer, lambda old: old.to(dtype) if dtype and old.is_floating_point() else old)
    if not real:
        replace(pretrainer, lambda old: FakeTensor(mode, old.to("meta"), torch.device("cpu")))
    with mode:
        pretrainer.objective.start(pretrainer.backbone)
    parts = parts_of(pretrainer)
    for name, (_, module) in parts.items():
        if isinstance(module, nn.ModuleDict):
            for layer in module.values():
                mode.watch(name, layer, ("forward",))
        else:
            mode.watch(name, module, ("embed", "forward", "pool", "unembed") if name.startswith("encoder") else ("forward",))
    pretrainer.backbone.chunks = 1
    runs = [step(pretrainer, mode, rows, precision, dtype) for rows in ROWS]
    found = {name: Cost(*(parabola(f, batch) for f in zip(*(run[name] for run in runs), strict=True))) for name in parts}
    with mode:
        optimizer = pretrainer.configure_optimizers()
        for p in pretrainer.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None
        optimizer.step()
    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    return found, sum(x.numel() * x.element_size() for x in states)


def step(pretrainer: Pretrainer, mode: Hollow, rows: int, precision: str, dtype: torch.dtype | None) -> dict[str, Cost]:
    """One forward and backward pass on `rows` samples."""
    objective, model = pretrainer.objective, pretrainer.backbone
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    batch = example(pretrainer, rows, dtype)
    mode.flops, mode.kept = Counter(), []
    own = {p.untyped_storage()._cdata for p in pretrainer.parameters()}
    names = parts_of(pretrainer)
    rest = "objective" if "objective" in names else next(n for n in names if n.startswith("objective"))
    with mode, mode.inside(rest), torch.autocast("cpu", mixed) if mixed else nullcontext():
        with torch.no_grad():
            task = objective.task(batch, objective.look(model, batch))
        numbers = objective.numbers(task)
        with torch.autograd.graph.saved_tensors_hooks(mode.keep, mode.give):
            loss = weighted_sum(objective(model, task), numbers, 1)
        forward, mode.flops = mode.flops, Counter()
        bytes_of = Counter[str]()
        for saved in filter(None, (ref() for ref in mode.kept)):
            storage = saved.tensor.untyped_storage()
            if storage._cdata not in own:
                own.add(storage._cdata)
                bytes_of[saved.part] += storage.nbytes()
        loss.backward()
    for p in pretrainer.parameters():
        p.grad = None
    return {name: Cost(forward[name], mode.flops[name], bytes_of[name]) for name in names}


def example(pretrainer: Pretrainer, rows: int, dtype: torch.dtype | None) -> dict[str, Any]:
    """A prepared batch of what an objective needs: the longest samples, nothing padded."""
    batch: dict[str, Any] = {"seed": torch.arange(rows), "sample": torch.arange(rows)}
    for name in pretrainer.objective.needs:
        reader = pretrainer.readers[name]
        one = reader.example(1, 0)[0]
        one = stretch(one, longest(reader, pretrainer.objective.views.get(name)) or one.position.shape[0])
        batch[name] = one.map(lambda field: field[None].repeat(rows, *[1] * field.ndim))
    return {name: narrowed(value, dtype) for name, value in pretrainer.prepare(batch).items()}


def narrowed(value: Any, dtype: torch.dtype | None) -> Any:
    """Vectors of tokens in this precision."""
    floats = isinstance(value, Tokens) and value.x.is_floating_point()
    return value._replace(x=value.x.to(dtype)) if dtype and floats else value


def longest(reader: Reader, view: View | None = None) -> int | None:
    """Tokens of the longest sample, or of a view of it; None = the reader cannot tell."""
    names = (*FACTS, f"tokens-{reader.digest}") if hasattr(reader, "digest") else FACTS
    count = reader.length(dict.fromkeys(names, MOST))
    return count if count is None or view is None else max(1, round(count * view.scale**2))


def stretch(t: Tokens, length: int) -> Tokens:
    """One sample (N, ...) as `length` tokens: cut, or repeated later and later."""
    count = t.position.shape[0]
    index, turn = torch.arange(length) % count, torch.arange(length) // count
    t = t.map(lambda field: field[index])
    position = t.position.clone()
    position[:, 0] += (turn * (int(position[:, 0].max()) + 1)).to(position.dtype)
    return t._replace(position=position, order=None if t.order is None else t.order + turn * (int(t.order.max()) + 1))


def parabola(values: tuple[float, float, float], at: float) -> float:
    """Through the values at ROWS."""
    a, b, c = ROWS
    weights = (
        (at - b) * (at - c) / ((a - b) * (a - c)),
        (at - a) * (at - c) / ((b - a) * (b - c)),
        (at - a) * (at - b) / ((c - a) * (c - b)),
    )
    return math.sumprod(weights, values) if hasattr(math, "sumprod") else sum(w * v for w, v in zip(weights, values, strict=True))
