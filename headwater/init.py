"""How parameters start: each is drawn from a generator of its own, seeded by (seed, qualified name), by an explicit rule.

So a start does not depend on the order of construction, on what else is in the model, on the device, or on the rank. A rule says
what a parameter is for; a scheme makes of it a standard deviation, and a factor on the learning rate.

Rules are found by the type of module (`TYPES`). A class with parameters of its own, or one that knows better, has
`init_rules() -> {name: Rule}`; names may lead into its children, and the outer class wins. A module whose weights come from
elsewhere, such as a tower of another library, says `settled = True` and is left alone with all that is inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from headwater import random

Role = Literal["branch", "path", "input", "table", "output", "tied", "fixed"]
CUT = 2.0  # normal draws end at so many deviations
_INSIDE = math.erf(CUT / math.sqrt(2))
_NARROWER = math.sqrt(1 - 2 * CUT * math.exp(-CUT * CUT / 2) / math.sqrt(2 * math.pi) / _INSIDE)  # deviation after the cut


class Rule(NamedTuple):
    """What a parameter is for.

    role: "branch" = a matrix inside of a residual branch; "path" = one that everything goes through; "input" = from the numbers
    of a signal, or an id, to the width; "table" = vectors that are added; "output" = from the width to an answer; "tied" = from an
    id to the width and back; "fixed" = a constant.
    value: it starts as this constant, or as what is computed. std: its deviation, whatever the scheme. fan_in: None = all
    dimensions but the first.
    """

    role: Role
    value: float | Callable[[], Tensor] | None = None
    std: float | None = None
    fan_in: int | None = None


BRANCH, PATH, INPUT = Rule("branch"), Rule("path"), Rule("input")
TABLE, OUTPUT, TIED = Rule("table"), Rule("output"), Rule("tied")
LOOKUP = Rule("input", fan_in=1)  # an embedding is a matrix whose input has a single one in it
ZERO, ONE = Rule("fixed", 0.0), Rule("fixed", 1.0)


def constant(value: float) -> Rule:
    """Starts as this value."""
    return Rule("fixed", value)


TYPES: dict[type | tuple[type, ...], dict[str, Rule]] = {
    (nn.Linear, nn.Bilinear): {"weight": PATH, "bias": ZERO},
    nn.Embedding: {"weight": LOOKUP},
    (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm): {"weight": ONE, "bias": ZERO},
    nn.modules.batchnorm._NormBase: {
        "weight": ONE,
        "bias": ZERO,
        "running_mean": ZERO,
        "running_var": ONE,
        "num_batches_tracked": ZERO,
    },
    (nn.Conv1d, nn.Conv2d, nn.Conv3d): {"weight": PATH, "bias": ZERO},
    nn.MultiheadAttention: {"in_proj_weight": BRANCH, "in_proj_bias": ZERO, "out_proj.weight": BRANCH},
}


class Normal:
    """Branches, tables and outputs start with one small deviation (BERT, ViT); what everything goes through keeps its size.

    So ids enter with deviation 1: they have to be seen beside the sines of their positions.

    Args:
        std: the deviation.
    """

    def __init__(self, std: float = 0.02) -> None:
        self.small = std

    def std(self, rule: Rule, fan_in: int, width: int | None) -> float:
        """Deviation of the draws. width: of the trunk or encoder around the parameter, where there is one."""
        if rule.std is not None:
            return rule.std
        return self.small if rule.role in ("branch", "table", "output") else fan_in**-0.5

    def factor(self, rule: Rule, fan_in: int, width: int | None) -> float:
        """On the learning rate."""
        return 1.0


class FanIn(Normal):
    """Every matrix starts with deviation 1 / sqrt(fan-in); tables as in Normal.

    Args:
        std: the deviation of tables.
    """

    def std(self, rule: Rule, fan_in: int, width: int | None) -> float:
        return fan_in**-0.5 if rule.std is None and rule.role in ("branch", "output") else super().std(rule, fan_in, width)


class MuP(FanIn):
    """Maximal update parametrisation for Adam (Yang et al. 2022, arXiv:2203.03466, table 3): a learning rate found at one width
    holds at others.

    A layer that grows with the width, by g = width / base, learns 1 / g as fast; outputs start 1 / sqrt(g) smaller than FanIn has
    them. At the base width nothing differs from FanIn. Attention stays divided by sqrt(d), which is right while the size d of a
    head is the same at all widths: leave `heads` of the trunk out, or set `head_size`.

    Args:
        base: the width at which learning rates are searched.
        zero: outputs start as zero, which is as good in the limit and makes small widths more like large ones.
        std: the deviation of tables.
    """

    def __init__(self, base: int = 128, zero: bool = False, std: float = 0.02) -> None:
        super().__init__(std)
        if base < 1:
            raise ValueError(f"found base {base}; expected the width at which learning rates are searched, such as 128")
        self.base, self.zero = base, zero

    def std(self, rule: Rule, fan_in: int, width: int | None) -> float:
        if rule.role == "tied":
            raise ValueError(
                "found a tied head under MuP, which wants tables and outputs to differ; set `tied: false` on the encoder"
            )
        if rule.role == "output" and rule.std is None:
            return 0.0 if self.zero else (fan_in * (width or fan_in) / self.base) ** -0.5
        return super().std(rule, fan_in, width)

    def factor(self, rule: Rule, fan_in: int, width: int | None) -> float:
        return self.base / (width or fan_in) if rule.role in ("branch", "path", "output") else 1.0


class Place(NamedTuple):
    """A parameter or buffer: its rule, None where it has none, and the width around it. settled: to be left alone."""

    rule: Rule | None
    width: int | None
    settled: bool = False


def places(module: nn.Module) -> dict[str, Place]:
    """Qualified name of every parameter and buffer, shared ones once -> its place."""
    found: dict[str, Place] = {}
    _walk(module, "", None, False, found)
    return {name: found[name] for name in _tensors(module)}


def _walk(module: nn.Module, prefix: str, width: int | None, settled: bool, found: dict[str, Place]) -> None:
    settled = settled or getattr(module, "settled", False) is True
    around = getattr(module, "width", None)
    width = around if isinstance(around, int) else width
    for name in (*module._parameters, *module._buffers):
        found[prefix + name] = Place(None, width, settled)
    for name, child in module.named_children():
        _walk(child, f"{prefix}{name}.", width, settled, found)
    if settled:
        return
    for name, rule in _rules(module).items():
        for part, its in _parts(module, name, rule).items():
            if prefix + part not in found:
                raise ValueError(
                    f"{type(module).__name__}.init_rules names {part!r}; expected a parameter or buffer of it or its children"
                )
            found[prefix + part] = found[prefix + part]._replace(rule=its)


def _parts(module: nn.Module, name: str, rule: Rule) -> dict[str, Rule]:
    """Where a form stands in place of a linear layer (`headwater.forms`), what the rule of its weight means for what is there."""
    owner, _, last = name.rpartition(".")
    layer = dict(module.named_modules()).get(owner) if last == "weight" and owner else None
    if layer is None or not hasattr(layer, "weight_rules"):
        return {name: rule}
    return {f"{owner}.{part}": its for part, its in layer.weight_rules(rule).items()}


def _rules(module: nn.Module) -> dict[str, Rule]:
    """Of its type where it has parameters of that type, then of its own method."""
    kind = next((rules for types, rules in TYPES.items() if isinstance(module, types)), {})
    found = {name: rule for name, rule in kind.items() if "." in name or getattr(module, name, None) is not None}
    return found | getattr(module, "init_rules", dict)()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, shared ones under their first name."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def fan_in(rule: Rule, shape: torch.Size) -> int:
    """How many numbers each output of a matrix sums up."""
    return rule.fan_in or math.prod(shape[1:])


def draw(rule: Rule, std: float, shape: torch.Size, seed: int, name: str) -> Tensor:
    """float32 on the CPU: a constant, or normal numbers cut at two deviations whose own deviation is `std`."""
    if callable(rule.value):
        return rule.value()
    if rule.value is not None or not std:
        return torch.full(shape, rule.value or 0.0, device="cpu")
    generator = torch.Generator("cpu").manual_seed(int(random.fold(torch.tensor(seed, device="cpu"), name)))
    x = torch.empty(shape, device="cpu").uniform_(-_INSIDE, _INSIDE, generator=generator)
    return x.erfinv_().mul_(math.sqrt(2) * std / _NARROWER)  # the inverse of the distribution, over the part inside of the cut


@torch.no_grad()
def initialise(module: nn.Module, seed: int | None = None, scheme: Normal | None = None) -> None:
    """Draw every parameter that has a rule, in place; the others, and what is on the meta device, stay as they are.

    seed: of everything that is drawn; None = the next number of torch's global generator. scheme: None = Normal().
    """
    scheme, tensors = scheme or Normal(), _tensors(module)
    seed = int(torch.randint(1 << 62, (), device="cpu")) if seed is None else seed
    for name, place in places(module).items():
        target = tensors[name]
        if place.rule is not None and not target.is_meta:
            std = scheme.std(place.rule, fan_in(place.rule, target.shape), place.width)
            target.copy_(draw(place.rule, std, target.shape, seed, name))


def materialise(module: nn.Module, device: torch.device | str, seed: int, scheme: Normal | None = None) -> None:
    """Give a module that was built under `torch.device("meta")` its memory and its start, in place.

    The weights are bitwise those of ordinary construction and `initialise` with the same seed. What was not on the meta device is
    moved. ValueError where something there has no rule: build that part outside of `torch.device("meta")`.
    """
    where = places(module)
    lost = [n for n, t in _tensors(module).items() if t.is_meta and where[n].rule is None]
    if lost:
        raise ValueError(
            f"found {len(lost)} tensors on the meta device that no rule can fill: {', '.join(lost[:5])}"
            f"{' ...' if len(lost) > 5 else ''}. Give their class init_rules, or build it outside of torch.device('meta'), "
            "as towers of other libraries must be"
        )
    replace(module, lambda old: torch.empty_like(old, device=device) if old.is_meta else old.to(device))
    initialise(module, seed, scheme)


def replace(module: nn.Module, by: Callable[[Tensor], Tensor]) -> None:
    """Other tensors in place of all parameters and buffers; what was shared stays shared, as `Module._apply` does not keep it."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # with the old ones, so that no address comes twice
    for inner in module.modules():
        for held in (inner._parameters, inner._buffers):
            for name, old in held.items():
                if old is not None and id(old) not in made:
                    new = by(old.detach())
                    made[id(old)] = old, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                if old is not None:
                    held[name] = made[id(old)][1]  # type: ignore[assignment]


def factors(module: nn.Module, scheme: Normal | None) -> dict[str, float]:
    """Parameter -> factor on its learning rate, without those that are 1."""
    if scheme is None:
        return {}
    where, found = places(module), {}
    for name, p in module.named_parameters():
        if (rule := where[name].rule) is not None:
            found[name] = scheme.factor(rule, fan_in(rule, p.shape), where[name].width)
    return {name: factor for name, factor in found.items() if factor != 1.0}


class Row(NamedTuple):
    """One parameter of an audit. expected, measured: deviations, None where there is no rule. fault: "" = as it should be."""

    name: str
    shape: tuple[int, ...]
    rule: str
    expected: float | None
    measured: float | None
    factor: float
    fault: str


@torch.no_grad()
def audit(module: nn.Module, seed: int = 0, scheme: Normal | None = None) -> list[Row]:
    """Every parameter, how it should start, and how it does. What is on the meta device is drawn for the look, one by one.

    A deviation, or a mean, is a fault from five of its own standard errors on.
    """
    scheme, where, rows = scheme or Normal(), places(module), []
    for name, p in module.named_parameters():
        rule, width, settled = where[name]
        if rule is None:
            rows.append(Row(name, tuple(p.shape), "settled" if settled else "none", None, None, 1.0, "" if settled else "no rule"))
            continue
        fan = fan_in(rule, p.shape)
        std = scheme.std(rule, fan, width) if rule.value is None else 0.0
        x = draw(rule, std, p.shape, seed, name) if p.is_meta else p.float()
        words = f"constant {rule.value:g}" if isinstance(rule.value, float) else rule.role
        measured = (
            float(x.std(correction=0)) if std else float((x - draw(rule, 0.0, p.shape, seed, name).to(x)).square().mean().sqrt())
        )
        rows.append(Row(name, tuple(p.shape), words, std, measured, scheme.factor(rule, fan, width), _fault(x, std, measured)))
    return rows


def _fault(x: Tensor, std: float, measured: float) -> str:
    if not std:
        return "" if measured == 0 else "not the constant"
    error = 5 * std / math.sqrt(x.numel())
    if abs(measured - std) > error:
        return "too wide" if measured > std else "too narrow"
    return "" if abs(float(x.mean())) <= error else "mean not zero"


def lines(rows: list[Row]) -> str:
    """An audit as text."""
    cells = [["parameter", "shape", "rule", "expected", "measured", "rate", ""]]
    for row in rows:
        numbers = ["" if x is None else f"{x:.4g}" for x in (row.expected, row.measured)]
        cells.append([row.name, " x ".join(map(str, row.shape)), row.rule, *numbers, f"{row.factor:.3g}", row.fault])
    wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(f"{cell:<{n}}" for cell, n in zip(line, wide, strict=True)).rstrip() for line in cells)
