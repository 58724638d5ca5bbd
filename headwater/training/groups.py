"""Parameter groups: which parameters an optimizer treats alike, with their own rate, weight decay and options."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from headwater.init import Place, places
from headwater.model import Encoder, Fusion
from headwater.training.optimizers.state import check_shares

LATE = {"proj", "projection"}  # open_clip keeps its last projection as a bare parameter, which torch lists before all blocks
OWN = {"params", "lr", "initial_lr", "factor", "weight_decay", "initial_weight_decay"}  # what no option of a rule may name


@dataclass(frozen=True)
class Rule:
    """What holds for the parameters whose names match.

    Args:
        pattern: regular expression, looked for anywhere in the qualified name ("^objective\\.", "encoders\\.text", "bias$").
        factor: on the learning rate; factors of several rules that match, of layers and of MuP multiply.
        weight_decay: None = what the kind of parameter has. The last rule that matches wins, here and in options.
        options: what else the optimizer takes by group, such as {betas: [0.9, 0.95]}, and "hidden", see `Groups`.
    """

    pattern: str
    factor: float = 1.0
    weight_decay: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"found the pattern {self.pattern!r}, which is no regular expression: {error}") from error
        if self.factor <= 0:
            raise ValueError(f"found factor {self.factor} for {self.pattern!r}; expected one above 0. To stop learning, freeze it")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise ValueError(f"found weight_decay {self.weight_decay} for {self.pattern!r}; expected 0 or more")
        if taken := OWN & self.options.keys():
            raise ValueError(f"found options {', '.join(sorted(taken))} for {self.pattern!r}; use its factor or weight_decay")


class Groups:
    """Every trainable parameter in exactly one group, with all that holds for it.

    Matrices decay; vectors, scalars, embeddings and what a timm model names in `no_weight_decay` do not. Matrices inside of the
    network, two-dimensional and neither embeddings nor tables nor heads, are marked "hidden": Muon and GaLore work on these.
    Groups carry "factor", "weight_decay", "hidden" and options only where they differ from an optimizer's own.

    Layer-wise decay (ULMFiT, Howard and Ruder 2018, arXiv:1801.06146; BEiT, Bao et al. 2021, arXiv:2106.08254) slows what lies
    deep: c^(L-l) for block l = 0 ... L - 1 of an encoder or fusion, c^(L+1) for what stands before the blocks, 1 for what stands
    behind them and for the objective.

    Args:
        layer_decay: c, from 0 to 1; 0.65 to 0.9 is usual when a trained backbone is trained further.
        rules: by name.
    """

    def __init__(self, layer_decay: float = 1.0, rules: Sequence[Rule] = ()) -> None:
        if not 0 < layer_decay <= 1:
            raise ValueError(f"found layer_decay {layer_decay}; expected a factor per layer above 0 and up to 1, such as 0.75")
        self.layer_decay, self.rules = layer_decay, tuple(rules)

    def of(self, module: nn.Module, factors: dict[str, float] | None = None) -> list[dict[str, Any]]:
        """Groups for an optimizer.

        factors: parameter -> factor on its learning rate, as `headwater.init.factors` gives it; 1 where a name is missing.
        """
        where, deep, still = places(module), depths(module) if self.layer_decay < 1 else {}, stills(module)
        if self.layer_decay < 1 and not any(deep.values()):
            raise ValueError(f"found layer_decay {self.layer_decay}, but no encoder or fusion made of blocks; leave it out")
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError("found no parameter that trains; everything is frozen")
        self._check(trainable, [name for name, p in module.named_parameters() if not p.requires_grad])
        made: dict[Any, dict[str, Any]] = {}
        for name, p in trainable.items():
            factor = (factors or {}).get(name, 1.0) * self.layer_decay ** deep.get(name, 0)
            about: dict[str, Any] = {} if p.ndim > 1 and id(p) not in still else {"weight_decay": 0.0}
            about |= {"hidden": True} if p.ndim == 2 and id(p) not in still and inner(where[name], name) else {}
            for rule in (rule for rule in self.rules if re.search(rule.pattern, name)):
                factor *= rule.factor
                about |= {} if rule.weight_decay is None else {"weight_decay": rule.weight_decay}
                about |= {key: tuple(value) if isinstance(value, list) else value for key, value in rule.options.items()}
            if about.get("hidden") and p.ndim != 2:
                raise ValueError(f"a rule marks {name} of shape {tuple(p.shape)} as hidden; expected a matrix")
            about |= {} if factor == 1 else {"factor": factor}
            key = repr(sorted(about.items()))
            made.setdefault(key, {"params": [], **about})["params"].append(p)
        groups = sorted(made.values(), key=lambda group: "weight_decay" in group)  # what decays comes first
        assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, trainable.values()))
        return groups

    def _check(self, trainable: dict[str, nn.Parameter], frozen: list[str]) -> None:
        """Every rule means something."""
        for rule in self.rules:
            if any(re.search(rule.pattern, name) for name in trainable):
                continue
            if still := [name for name in frozen if re.search(rule.pattern, name)]:
                raise ValueError(f"the rule for {rule.pattern!r} matches {len(still)} parameters, all frozen, such as {still[0]}")
            near = get_close_matches(re.sub(r"[\\^$]", "", rule.pattern), parts(trainable), 5, 0.3)
            raise ValueError(
                f"the rule for {rule.pattern!r} matches no parameter; expected a regular expression found in one of "
                f"{len(trainable)} names. Near it: {', '.join(near or list(trainable)[:5])}"
            )


def parts(names: Sequence[str] | dict[str, Any]) -> list[str]:
    """Names and all their beginnings, which are the modules around them."""
    return list(dict.fromkeys(".".join(name.split(".")[: i + 1]) for name in names for i in range(name.count(".") + 1)))


def check_options(optimizer: torch.optim.Optimizer, groups: Sequence[dict[str, Any]]) -> None:
    """ValueError for what an optimizer cannot do: options of groups that it does not know, which torch keeps without a word, and
    shares of parameters."""
    check_shares(optimizer)
    known = {*OWN, "hidden", *optimizer.defaults}
    for name in (name for group in groups for name in group if name not in known):
        accepted = ", ".join(sorted(set(optimizer.defaults) - OWN))
        raise ValueError(f"found the option {name!r} for {type(optimizer).__name__}; expected one of: {accepted}")


def stills(module: nn.Module) -> set[int]:
    """Ids of the parameters with several dimensions that do not decay: embeddings, and what timm's models say."""
    found = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for part in module.modules():
        says: Any = getattr(part, "no_weight_decay", None)
        names = says() if callable(says) else ()
        found |= {id(p) for n, p in part.named_parameters() if n in names}
    return found


def inner(place: Place, name: str) -> bool:
    """Whether a matrix leads from features to features. Towers of other libraries have no rules: there those in blocks do."""
    if place.rule is None:
        return re.search(r"\.\d+\.", name) is not None and not re.search(r"\b(head|embed\w*)\b", name)
    return place.rule.role in ("branch", "path")


def depths(module: nn.Module) -> dict[str, int]:
    """Parameter -> number of blocks from it to the end of its encoder or fusion, its own included, and 1 more before the first."""
    found: dict[str, int] = {}
    for prefix, part in outermost(module, ""):
        timm = next(((n, m) for n, m in part.named_modules() if hasattr(m, "group_matcher")), None)
        deep = by_blocks(part) if timm is None else by_timm(*timm)
        found |= {prefix + name: depth for name, depth in deep.items()}
    return found


def outermost(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Encoders and fusions that are in no other one, and how the names inside of them begin."""
    if isinstance(module, Encoder | Fusion):
        yield prefix, module
    else:
        for name, child in module.named_children():
            yield from outermost(child, f"{prefix}{name}.")


def by_timm(prefix: str, model: Any) -> dict[str, int]:
    """As timm numbers the layers of its model, with a head behind the last. The adapter's other parameters are behind it."""
    from timm.models import group_parameters

    every: Any = SimpleNamespace(named_parameters=lambda: [*model.named_parameters(), ("~head", None)])
    layer = group_parameters(every, model.group_matcher(coarse=False), reverse=True)
    return {f"{prefix}.{name}".lstrip("."): layer["~head"] - number for name, number in layer.items() if name != "~head"}


def by_blocks(part: nn.Module) -> dict[str, int]:
    """By the stacks of equal modules, in the order in which they are registered; what is listed before the first is deepest."""
    blocks = list(stacked(part, ""))
    passed, found = 0, {}
    for name, _ in part.named_parameters() if blocks else ():
        number = next((i for i, block in enumerate(blocks) if name.startswith(f"{block}.")), None)
        if number is not None:
            passed, found[name] = number + 1, len(blocks) - number
        elif name.rpartition(".")[2] not in LATE:
            found[name] = len(blocks) - passed + (passed == 0)
    return found


def stacked(module: nn.Module, prefix: str) -> Iterator[str]:
    """Names of the members of every outermost list of modules of one class that have modules inside: blocks, in order."""
    for name, child in module.named_children():
        members = [m for m in child.children() if next(m.parameters(), None) is not None]
        alike = len({type(m) for m in members}) == 1 and next(members[0].children(), None) is not None
        if isinstance(child, nn.ModuleList | nn.Sequential) and alike:
            yield from (f"{prefix}{name}.{n}" for n, m in child.named_children() if m in members)
        else:
            yield from stacked(child, f"{prefix}{name}.")
