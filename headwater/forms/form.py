"""Forms of weights: other layers in place of a model's linear ones, chosen by name; part of its spec, its card and its exports."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from difflib import get_close_matches
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from headwater.attention import higher_order_is_on
from headwater.init import PATH, ZERO, Normal, Rule, draw, fan_in
from headwater.spec import Described

BLOCKS = r"blocks\..*(qkv|proj|fc1|fc2)$"  # the linear layers of blocks, as our trunks, timm and open_clip name them
Schedule = Callable[[float], float]  # of progress, the share of the run that is done
M = TypeVar("M", bound=nn.Module)


class Formed(nn.Module):
    """A layer that stands where an nn.Linear was: a function of parameters gives its weight, (out, in).

    `weight` is what a plain layer would have, so code that reads it instead of calling the layer is right too. It is made anew
    in the backward pass, not kept for it.

    in_features, out_features, bias: of the linear layer. added: own parameters that are trained beside weights that stay.
    """

    added: tuple[str, ...] = ()

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """(out, in), with gradient to the parameters."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its weight is")

    def weight_rules(self, rule: Rule) -> dict[str, Rule]:
        """How the parameters and buffers start, given the rule of the weight that was here."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its parameters start")

    def init_rules(self) -> dict[str, Rule]:
        """Those of a weight without any other rule; whoever owns the layer may know better."""
        return self.weight_rules(PATH) | ({} if self._parameters.get("bias") is None else {"bias": ZERO})

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if not torch.is_grad_enabled() or higher_order_is_on():
            return self.apply_weight(x)
        return checkpoint(self.apply_weight, x, use_reentrant=False, preserve_rng_state=False)

    def apply_weight(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.weight, self.bias)

    def exact_weight(self) -> Tensor:
        """`weight`; ValueError where the layer does more than any matrix does."""
        return self.weight

    def new_rules(self) -> dict[str, Rule]:
        """How those parameters and buffers start that do not come from the layer which was there."""
        return {}


class Full(Formed):
    """A form whose one parameter `full` has the size of the weight, (out, in), and starts as the weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.full = linear.weight

    def weight_rules(self, rule: Rule) -> dict[str, Rule]:
        return {"full": rule}


class Around(Formed):
    """A form around a layer that stays what it is, `base`: an nn.Linear or another form. What it adds has no effect at first."""

    def __init__(self, base: nn.Linear | Formed) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.base = base.in_features, base.out_features, base

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """Of the layer inside."""
        return self.base.bias

    @property
    def weight(self) -> Tensor:
        return self.changed(self.base.weight)

    def exact_weight(self) -> Tensor:
        return self.changed(self.base.exact_weight() if isinstance(self.base, Formed) else self.base.weight)

    def changed(self, weight: Tensor) -> Tensor:
        """The weight of the layer inside, (out, in), with what is added; ValueError where that is no matter of weights."""
        raise ValueError(f"found {type(self).__name__}, which no plain layer equals; keep the form")

    def weight_rules(self, rule: Rule) -> dict[str, Rule]:
        """Of the layer inside, and of what is added."""
        inner = self.base.weight_rules(rule) if isinstance(self.base, Formed) else {"weight": rule}
        return {f"base.{name}": found for name, found in inner.items()} | self.new_rules()


class Form(Described):
    """What a recipe names in `backbone.forms`: puts layers of another form in place of every linear layer of that name.

    Args:
        match: regular expression that is searched in the names of layers ("encoders.text.trunk.blocks.0.attn.qkv").
        seed: of what is added to weights that stay; a run draws everything else from its own seed.
    """

    kinds: tuple[type[nn.Module], ...] = (nn.Linear,)  # what it replaces
    layer: type[nn.Module] = Formed  # what it puts there
    weight_only: bool = True  # the layer does no more than its weight says
    frozen: bool = False  # what it adds trains, and nothing else in the encoders or fusion around it

    def __init__(self, match: str = BLOCKS, seed: int = 0) -> None:
        self.match, self.seed = match, seed

    def make(self, old: Any, name: str) -> nn.Module:
        """The layer that takes the place of one of that name."""
        raise NotImplementedError(f"{type(self).__name__} makes no layer")

    def __call__(self, model: nn.Module) -> None:
        """Replace, in place. ValueError when no layer has such a name."""
        found = self.found(model)
        for name, old in found:
            layer = self.make(old, name).train(old.training)
            start(layer, name, self.seed)
            setattr(_owner(model, name), name.rpartition(".")[2], layer)
        if self.frozen:
            freeze(model, [name for name, _ in found])

    def at(self, model: nn.Module, progress: float) -> None:
        """Before each step: what changes over the run. progress: share of the run that is done, 0 to 1."""

    def found(self, model: nn.Module) -> list[tuple[str, Any]]:
        """Name and layer of everything that shall be replaced."""
        inside = (n for n, m in model.named_modules() if n and not isinstance(_owner(model, n), Around))
        every = {n: model.get_submodule(n) for n in inside if isinstance(model.get_submodule(n), self.kinds)}
        chosen = [(n, m) for n, m in every.items() if re.search(self.match, n)]
        if not chosen:
            raise missing(self, every)
        for name, _ in chosen:
            if not self.weight_only and isinstance(_owner(model, name), nn.MultiheadAttention):
                raise ValueError(
                    f"found {name} inside of torch's MultiheadAttention, which reads its weight and never calls it; "
                    f"{type(self).__name__} does more than that. Leave it out of `match`"
                )
        return chosen

    def settle(self, name: str, value: float | Schedule) -> None:
        """What a card says of an argument that changes over the run: its last value; how far it has come is in the weights."""
        self.spec["init_args"][name] = at(value, 1.0)

    def layers(self, model: nn.Module) -> list[tuple[str, Any]]:
        """Name and layer of what this form has made of a model, by their names without forms around them."""
        named = ((n.replace(".base", ""), m) for n, m in model.named_modules() if isinstance(m, self.layer))
        return [(name, m) for name, m in named if re.search(self.match, name)]


def at(value: float | Schedule, progress: float) -> float:
    """A number that may change over the run, at this progress."""
    return value(progress) if callable(value) else value


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def missing(form: Form, names: dict[str, nn.Module]) -> ValueError:
    """The error of a form that matches nothing, with the names that come nearest to what was asked for."""
    words = {re.sub(r"\d+", "0", name) for name in names}
    near = get_close_matches(form.match, words, 5, 0.0)
    return ValueError(
        f"{type(form).__name__} found no layer that {form.match!r} matches, among {len(names)}; expected the end of names such as "
        f"{', '.join(near) or 'none, there is no such layer'}. Set `match` of the form"
    )


@torch.no_grad()
def start(layer: nn.Module, name: str, seed: int) -> None:
    """Draw what was not in the layer that was there, as a function of (seed, name) alone; not on the meta device."""
    for part, rule in layer.new_rules().items():  # type: ignore[operator]
        target = getattr(layer, part)
        if not target.is_meta:
            std = Normal().std(rule, fan_in(rule, target.shape), None)
            target.copy_(draw(rule, std, target.shape, seed, f"{name}.{part}"))


def wide(x: Tensor) -> Tensor:
    """Half precision as float32, in which scales are taken and products summed up."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def gathered(p: Tensor) -> Tensor:
    """The whole of a parameter; under FSDP2 every rank asks for it."""
    return p.full_tensor() if isinstance(p, DTensor) else p


def shared(x: Tensor, like: Tensor) -> Tensor:
    """What every rank knows, split as `like` is; nothing is sent."""
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None) if isinstance(like, DTensor) else x


def additions(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of all that forms have added to weights that stay."""
    for prefix, module in model.named_modules():
        for name in getattr(module, "added", ()):
            yield f"{prefix}.{name}", module.get_parameter(name)


def freeze(model: nn.Module, names: list[str]) -> None:
    """Nothing but additions trains any more in the encoders, or the fusion, around these layers."""
    roots = {".".join(name.split(".")[: 2 if name.startswith("encoders.") else 1]) for name in names}
    kept = {id(p) for _, p in additions(model)}
    for root in roots:
        for p in model.get_submodule(root).parameters():
            p.requires_grad_(id(p) in kept and p.requires_grad)


@torch.no_grad()
def densified(model: M, exact: bool = True) -> M:
    """A copy with plain linear layers, which gives the same answers and trains all of them.

    exact: ValueError where a form rounds the inputs too. False = it is left out, and answers change by that. Adapters and
    prefixes, which are no matter of weights, raise all the same.
    """
    made = deepcopy(model)
    while formed := [(n, m) for n, m in made.named_modules() if getattr(m, "added", ()) or isinstance(m, Formed)]:
        name, layer = formed[0]  # the outermost
        if not isinstance(layer, Formed):
            raise ValueError(f"found {type(layer).__name__} at {name}, which no plain layer equals; keep the form")
        weight = layer.exact_weight() if exact else layer.weight
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, weight.device, weight.dtype)
        plain.weight.copy_(weight)
        if layer.bias is not None:
            plain.bias.copy_(layer.bias)
        setattr(_owner(made, name), name.rpartition(".")[2], plain.train(layer.training))
    made.forms = ()  # type: ignore[assignment]
    return made
