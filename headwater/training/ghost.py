"""What every sample of a batch adds to the gradient, without any sample's gradient being stored.

A linear layer's gradient is a sum over tokens of output gradient x input, so inner products with a reference and squared norms
follow from inputs and output gradients alone (Goodfellow 2015, arXiv:1510.01799, for vectors; Li et al. 2021, arXiv:2110.05679,
for sequences; the cheaper of two ways to a norm, Bu et al. 2022, arXiv:2205.10683). One forward and one backward pass serve the
whole batch. Products with a target's gradient tell what a step on a sample does for it (Wang et al. 2024, arXiv:2406.11011).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call, vjp, vmap

from headwater import random
from headwater.attention import higher_order
from headwater.layers import DynamicTanh, LayerScale
from headwater.model import Model
from headwater.objectives.objective import Batch, Objective, weighted_sum, wide
from headwater.tokens import Tokens, split_rows
from headwater.training.calls import Calls
from headwater.training.meters import evaluated

VECTORS = (nn.LayerNorm, nn.RMSNorm, LayerScale, DynamicTanh)  # a number per feature: their gradients per sample are small
Gradients = Mapping[str, Tensor]  # by the names of the model's parameters


def linear_products(a: Tensor, b: Tensor, reference: Tensor) -> Tensor:
    """<sum_t b_t a_t^T, reference> of every sample: inputs (S, L, I), output gradients (S, L, O), reference (O, I) -> (S,)."""
    return ((b @ reference) * a).sum((1, 2))


def linear_squares(a: Tensor, b: Tensor) -> Tensor:
    """|sum_t b_t a_t^T|^2 of every sample: (S, L, I), (S, L, O) -> (S,), by whichever is smaller, L x L or O x I."""
    if a.shape[1] ** 2 <= a.shape[2] * b.shape[2]:
        return ((a @ a.mT) * (b @ b.mT)).sum((1, 2))
    return torch.stack([(after.mT @ before).square().sum() for before, after in zip(a, b, strict=True)])


def table_products(ids: Tensor, b: Tensor, reference: Tensor) -> Tensor:
    """The same of a table of vectors: ids (S, L), output gradients (S, L, D), reference (V, D) -> (S,)."""
    return (reference[ids] * b).sum((1, 2))


def table_squares(ids: Tensor, b: Tensor) -> Tensor:
    """(S, L), (S, L, D) -> (S,)."""
    return ((ids[:, :, None] == ids[:, None]) * (b @ b.mT)).sum((1, 2))


def vector_gradients(module: nn.Module, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Gradients per sample of a module that treats every token alone: (S, L, D), (S, L, D) -> its own names -> (S, ...)."""
    own = {name: wide(p.detach()) for name, p in module.named_parameters(recurse=False)}

    def of_one(a: Tensor, b: Tensor) -> dict[str, Tensor]:
        back: Any = vjp(lambda given: functional_call(module, given, (a,)), own)[1]
        return back(b)[0]  # type: ignore[no-any-return]

    return vmap(of_one)(a, b)


class Layer(NamedTuple):
    """A module with parameters that are seen. names: its own names of them -> the model's."""

    module: nn.Module
    names: dict[str, str]

    @property
    def kind(self) -> Literal["linear", "turned", "table", "vector"] | None:
        """turned: linear, with a weight (I, O), as transformers' GPT-2 has them. None = no formula."""
        forward = type(self.module).forward
        if forward is nn.Linear.forward or type(self.module).__name__ == "Conv1D":
            return "linear" if forward is nn.Linear.forward else "turned"
        if isinstance(self.module, nn.Embedding) and forward is nn.Embedding.forward:
            return None if self.module.max_norm or self.module.scale_grad_by_freq or self.module.sparse else "table"
        return "vector" if isinstance(self.module, VECTORS) else None

    def products(self, a: Tensor, b: Tensor, reference: Gradients) -> Tensor:
        """<g_i, reference> over these parameters, (S,). a: (S, L, I) or ids (S, L); b: (S, L, O)."""
        wanted, out = {own: wide(reference[name]) for own, name in self.names.items()}, b.new_zeros(len(b))
        if self.kind == "vector":
            found = vector_gradients(self.module, a, b)
            return sum((found[own].flatten(1) @ x.flatten() for own, x in wanted.items()), out)
        if "bias" in wanted:
            out = out + b.sum(1) @ wanted["bias"]
        if "weight" not in wanted:
            return out
        if self.kind == "table":
            return out + table_products(a, b, wanted["weight"])
        return out + linear_products(a, b, wanted["weight"].mT if self.kind == "turned" else wanted["weight"])

    def squares(self, a: Tensor, b: Tensor) -> Tensor:
        """|g_i|^2 over these parameters, (S,)."""
        out = b.new_zeros(len(b))
        if self.kind == "vector":
            found = vector_gradients(self.module, a, b)
            return sum((found[own].flatten(1).square().sum(1) for own in self.names), out)
        if "bias" in self.names:
            out = out + b.sum(1).square().sum(1)
        if "weight" in self.names:
            out = out + (table_squares(a, b) if self.kind == "table" else linear_squares(a, b))
        return out


class Aligned(NamedTuple):
    """Of every sample, (S,): product <g_i, reference>, and square |g_i|^2. reference: |reference|^2 over the same parameters."""

    product: Tensor
    square: Tensor
    reference: Tensor

    @property
    def cosine(self) -> Tensor:
        """(S,) from -1 to 1; 0 for a sample that has no target."""
        return self.product / (self.square * self.reference).sqrt().clamp(min=torch.finfo(self.square.dtype).tiny)


class Ghost:
    """Asks an objective about batches, and tells of every sample i what its share g_i of the loss' gradient is like.

    The loss is the mean over targets of every term, times its weight; the mean of all g_i is its gradient, and where samples have
    equally many targets, g_i is what sample i has alone. Models are in evaluation mode.

    Seen are trained parameters of linear layers, of tables of vectors, of layer and RMS norms, layer scales and bounded tanhs. A
    warning names all others (class tokens, convolutions, a table that the head shares) with their share of the numbers; their
    part of every product is missing. Rows may be packed. A layer of which no sample can be told for every row, such as a table of
    places, or an encoder of several views in one pass, is found out when it is met, and left out likewise.

    Args:
        model, objective: as they train, on one device or under DDP, unwrapped.
        layers: paths in the model ("encoders.text.trunk.blocks.3") of what is seen; None = all of it.
    """

    def __init__(self, model: Model, objective: Objective, layers: Sequence[str] | None = None) -> None:
        if any(isinstance(p, DTensor) for p in model.parameters()):
            raise ValueError("found parameters that fsdp2 has split: no rank has a layer's own. Use one device, or ddp")
        if objective.coupled:
            raise ValueError(
                f"found {type(objective).__name__}, whose loss compares the samples of a batch; expected one that is a sum over "
                "samples, such as Masked or Causal: no other has a gradient per sample"
            )
        self.model, self.objective = model, objective
        self.layers = seen(model, layers)
        if not self.layers:
            raise ValueError(f"found layers={layers}, in which no linear layer, table or norm trains; give other paths")
        self._told: set[str] = set()
        inside = {name for name, p in model.named_parameters() if p.requires_grad and within(name, layers)}
        self._tell(inside - set(self.names), "of kinds that it does not know, or shared")

    @property
    def names(self) -> list[str]:
        """Of the model's parameters that are seen."""
        return [name for layer in self.layers.values() for name in layer.names.values()]

    def align(self, batch: Batch, reference: Gradients) -> Aligned:
        """Inner products with a reference gradient, and norms, in float64. batch: as `Pretrainer.prepare` returns it."""
        count, device = len(batch["seed"]), batch["seed"].device
        product, square = torch.zeros(2, count, dtype=torch.float64, device=device)

        def visit(path: str, a: Tensor, b: Tensor) -> None:
            product.add_(self.layers[path].products(a, b, reference))
            square.add_(self.layers[path].squares(a, b))

        self.visit(batch, visit)
        return Aligned(product, square, dot(reference, reference, self.names))

    def project(self, batch: Batch, layer: str, size: int = 16, seed: int = 0) -> Tensor:
        """(S, size^2): random projections of every sample's gradient of one linear layer; on average inner products stay.

        Output gradients and inputs are projected each by a Gaussian matrix, sum_t (P b_t) (Q a_t)^T, so that no gradient is ever
        made (Choe et al. 2024, arXiv:2405.13954, https://github.com/logix-project/logix). Beside an embedding they are the
        features of Simoncini et al. 2024, arXiv:2407.10964. layer: its path in the model.
        """
        linear = [path for path, one in self.layers.items() if one.kind in ("linear", "turned")]
        if layer not in linear or size < 1:
            raise ValueError(f"found layer {layer!r}, size {size}; expected 1 or more, and one of {', '.join(linear)}")
        start = torch.tensor(seed, device=batch["seed"].device)
        out = torch.zeros(len(batch["seed"]), size * size, device=start.device)

        def visit(path: str, a: Tensor, b: Tensor) -> None:
            drawn = [random.normal(start, (x.shape[-1], size), f"{layer}/{n}").to(x) for n, x in (("out", b), ("in", a))]
            out.add_(((b @ drawn[0]).mT @ (a @ drawn[1])).flatten(1) / size)

        self.visit(batch, visit, [layer])
        return out

    def visit(self, batch: Batch, visit: Callable[[str, Tensor, Tensor], None], layers: Sequence[str] | None = None) -> None:
        """Asks once, and calls `visit(path, a, b)` of every layer as backward comes by; see `Calls.backward`. b is of S * loss."""
        samples, watched = len(batch["seed"]), self.layers if layers is None else {path: self.layers[path] for path in layers}
        with asking(self.model, self.objective), torch.enable_grad():
            task = hidden(self.model, self.objective, batch)
            calls = Calls(self.model, task, samples)
            with calls.over({path: layer.module for path, layer in watched.items()}):
                terms = self.objective(self.model, task)
            loss = weighted_sum(terms, self.objective.numbers(task), samples)
            lost = calls.backward(loss, visit)
        if lost:
            self._tell({name for path in lost for name in self.layers.pop(path).names.values()}, "whose rows are no samples")

    def check(self, batch: Batch, tolerance: float = 1e-3) -> None:
        """Compares the shares of the samples in the first row with the gradient of that row alone, which autograd finds.

        ValueError names layers where they differ: a weight is used as no layer shows, or rows do not belong to samples. It costs
        two passes, one of them of a single row.
        """
        rows = next(t.position.shape[0] for t in batch.values() if isinstance(t, Tokens))
        first, samples = split_rows(batch, rows)[0], len(batch["seed"])
        inside = torch.cat([t.samples() for t in first.values() if isinstance(t, Tokens)]).unique()
        with asking(self.model, self.objective):
            numbers = self.objective.numbers(hidden(self.model, self.objective, batch))
            task = hidden(self.model, self.objective, first)
            alone = gradient_of(self.model, self.objective, task, numbers, self.names, samples)
        shares: dict[str, float] = {}

        def visit(path: str, a: Tensor, b: Tensor) -> None:
            shares[path] = float(self.layers[path].products(a, b, alone)[inside].sum())

        self.visit(batch, visit)
        lengths = {path: float(dot(alone, alone, layer.names.values())) for path, layer in self.layers.items()}
        wrong = [p for p, x in lengths.items() if abs(shares.get(p, 0.0) - x) > tolerance * max(lengths.values())]
        if wrong:
            raise ValueError(
                f"found samples' gradients that do not add up to that of their row in {', '.join(wrong[:8])}; a weight is used in "
                "ways that no layer shows, or its layer mixes samples. Name only other paths in `layers`"
            )

    def _tell(self, missing: set[str], why: str) -> None:
        """Warn once of parameters that are not seen."""
        if missing := missing - self._told:
            self._told |= missing
            size = {name: p.numel() for name, p in self.model.named_parameters() if p.requires_grad}
            names = ", ".join(sorted(missing)[:8]) + (", ..." if len(missing) > 8 else "")
            share = sum(size[name] for name in missing) / sum(size.values())
            warnings.warn(
                f"gradients of samples leave out {share:.1%} of the trained numbers, in layers {why}: {names}", stacklevel=3
            )


def within(name: str, paths: Sequence[str] | None) -> bool:
    """Whether a module or parameter lies in one of these; None = everywhere."""
    return paths is None or any(f"{name}.".startswith(f"{path}.") for path in paths)


def seen(model: Model, paths: Sequence[str] | None = None) -> dict[str, Layer]:
    """Modules that have a formula, by their paths, with those of their parameters that train and that nobody shares."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    shared = {p for p, count in uses.items() if count > 1}
    shared |= {id(e.stem.weight) for e in model.encoders.values() if hasattr(e, "stem") and getattr(e, "head", e) is None}
    found = {}
    for path, module in model.named_modules():
        own = module.named_parameters(recurse=False)
        layer = Layer(module, {name: f"{path}.{name}" for name, p in own if p.requires_grad and id(p) not in shared})
        if layer.kind and layer.names and within(path, paths):
            found[path] = layer
    return found


@contextmanager
def asking(model: Model, objective: Objective) -> Iterator[None]:
    """Evaluation mode, and kernels that leave every layer in sight."""
    with evaluated(model), evaluated(objective), higher_order():
        yield


@torch.no_grad()
def hidden(model: Model, objective: Objective, batch: Batch) -> Batch:
    """What the objective is asked about a batch, the same whenever it comes."""
    batch = {"progress": 1.0, "step": 1, **batch}
    return objective.task(batch, objective.look(model, batch))


@torch.enable_grad()
def gradient_of(
    model: Model, objective: Objective, task: Batch, numbers: dict[str, Tensor], names: Sequence[str], factor: float = 1.0
) -> dict[str, Tensor]:
    """The gradient of factor * loss by these parameters. numbers: targets of each term, by which the loss is normalised."""
    parameters = [model.get_parameter(name) for name in names]
    loss = factor * weighted_sum(objective(model, task), numbers, 1)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, found, strict=True)}


def dot(a: Gradients, b: Gradients, names: Iterable[str]) -> Tensor:
    """<a, b> over these parameters, in float64."""
    return torch.stack([(a[name].double() * b[name].double()).sum() for name in names]).sum()
