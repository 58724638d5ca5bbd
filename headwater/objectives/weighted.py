"""Several objectives on one model: all of them in every step, one drawn per batch or per sample, or each in turn.

Weights and shares are numbers or schedules over the run. Alternating causal and masked prediction is AntLM (Yu et al. 2024,
arXiv:2412.03275); dividing a loss by the logarithm of its number of classes is Muppet (Aghajanyan et al. 2021,
arXiv:2101.11038, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from headwater import distributed, random
from headwater.model import Model
from headwater.objectives.objective import Batch, Objective, Schedule, Term, at
from headwater.tokens import Tokens, split_rows

RUN = ("progress", "step")  # entries of a batch that say where the run is


class Turns:
    """Which parts learn from which samples; here all from all."""

    names: tuple[str, ...] = ()

    def choose(self, parts: Sequence[str], batch: Batch) -> dict[str, Tensor | None]:
        """parts: those that this batch serves -> those that run, each with its samples, (S,) bool; None = all of them."""
        return dict.fromkeys(parts)

    def meet(self, parts: Sequence[str]) -> None:
        """Told once what there is to choose from."""

    def see(self, terms: dict[str, Term]) -> dict[str, Term]:
        """What the parts that ran say of a piece, by "part/term", in training; what comes back is what they say."""
        return terms

    def after_step(self) -> None:
        """Once per optimizer step."""


class Draw(Turns):
    """One part is drawn for each batch, or for each sample, part k with a probability proportional to shares[k].

    A batch's draw is a function of the step, so that all ranks draw the same; a sample's is a function of its seed. Only parts
    that the batch serves are drawn from. Drawing per sample runs every part on the whole batch, where the others' samples
    count as absent: that mixes tasks within a step but saves no time.

    Args:
        shares: part -> share, a number or a schedule over the run; 1 where a name is missing.
        per: what is drawn for.
        seed: of the draws per batch.
    """

    def __init__(
        self, shares: dict[str, float | Schedule] | None = None, per: Literal["batch", "sample"] = "batch", seed: int = 0
    ) -> None:
        self.shares: dict[str, float | Schedule] = shares or {}
        self.per, self.seed, self.names = per, seed, tuple(self.shares)

    def choose(self, parts: Sequence[str], batch: Batch) -> dict[str, Tensor | None]:
        progress = batch.get("progress", 0.0)
        upper = list(accumulate(at(self.shares.get(name, 1.0), progress) for name in parts))
        if not upper or not math.isfinite(upper[-1]) or upper[-1] <= 0:
            raise ValueError(
                f"found shares that sum to {upper[-1] if upper else 0} over {', '.join(parts) or 'no part'} at progress "
                f"{progress:.2f}; expected a sum above 0 for the parts of every batch. Raise one, or take the data out"
            )
        if self.per == "batch":
            draw = random.seed_of(self.seed, batch.get("step", 0)) / (1 << 63) * upper[-1]
            return {next(name for name, bound in zip(parts, upper, strict=True) if draw < bound): None}
        bounds = torch.tensor(upper, device=batch["seed"].device) / upper[-1]
        drawn = torch.searchsorted(bounds[:-1], random.uniform(batch["seed"], (), "turn"), right=True)
        return {name: drawn == number for number, name in enumerate(parts)}


class Alternate(Turns):
    """The parts take turns, `steps` steps each; those that a batch does not serve are left out.

    Args:
        order: names of the parts, which may come several times; None = all, as they are listed.
        steps: length of a turn in optimizer steps; an epoch has samples / batch size of them.
    """

    def __init__(self, order: list[str] | None = None, steps: int = 1) -> None:
        if steps < 1:
            raise ValueError(f"found turns of {steps} steps; expected 1 or more")
        self.order, self.steps, self.names = order, steps, tuple(order or ())

    def choose(self, parts: Sequence[str], batch: Batch) -> dict[str, Tensor | None]:
        order = [name for name in self.order or parts if name in parts] or list(parts)
        return {order[batch.get("step", 0) // self.steps % len(order)]: None}


class Weighted(Objective):
    """Runs parts whose `needs` the batch can serve and multiplies their weights; a part without data has number 0.

    Args:
        model: handed to every part.
        parts: name -> objective.
        weights: name -> factor, a number or a schedule over the run; 1 where a name is missing.
        turns: Draw or Alternate; None = all parts in every step.
        per_class: divide the loss of a part that knows its number C of classes (`Objective.classes`) by log C, which makes all
            of them start near 1.
        log_gradients_every: steps between logs of the norm of each weighted term's gradient on the backbone, over all ranks and,
            with micro-batches, of one of them; every such step costs one more backward pass per term. 0 = never.
    """

    def __init__(
        self,
        model: Model,
        parts: dict[str, Callable[[Model], Objective]],
        weights: dict[str, float | Schedule] | None = None,
        turns: Turns | None = None,
        per_class: bool = False,
        log_gradients_every: int = 0,
    ) -> None:
        super().__init__()
        self.turns = turns or Turns()
        for what, named in (("weights", set(weights or {})), ("turns", set(self.turns.names))):
            if stray := named - set(parts):
                raise ValueError(f"{what} name {sorted(stray)}, which are no parts; the parts are {sorted(parts)}")
        if clash := set(parts) & {*RUN, "parts"}:
            raise ValueError(f"found parts called {sorted(clash)}, which a batch uses for itself; give them other names")
        made = {name: make(model) for name, make in parts.items()}
        if fed := [name for name, part in made.items() if part.feedback_needs]:
            raise ValueError(f"found feedback in the part {fed[0]}; put it outside, as VPretraining(inner=Weighted)")
        if outer := [name for name, part in made.items() if part.outermost]:
            raise ValueError(
                f"found {type(made[outer[0]]).__name__} as a part; it makes the gradient of a whole step, so put it outside"
            )
        self.parts: Any = nn.ModuleDict(made)
        self.turns.meet(tuple(made))
        self.weights = {name: (weights or {}).get(name, 1.0) for name in parts}
        self.scale = {name: 1 / math.log(part.classes) if per_class and part.classes else 1.0 for name, part in made.items()}
        self.log_gradients_every = log_gradients_every
        self.needs = tuple(dict.fromkeys(need for part in made.values() for need in part.needs))
        self.coupled = any(part.coupled for part in made.values())
        self.views = merged({name: part.views for name, part in made.items()})
        self.readers = merged({name: part.readers for name, part in made.items()})

    def _served(self, batch: Batch) -> dict[str, Batch]:
        """The parts that run, each with what it gets to see."""
        served = [name for name, part in self.parts.items() if all(need in batch for need in part.needs)]
        asked = batch.get("parts", served)
        given = {k: v for k, v in batch.items() if k != "parts"}
        return {name: narrowed(given, chosen) for name, chosen in self.turns.choose(served, batch).items() if name in asked}

    def pieces(self, batch: Batch, micro: int) -> list[Batch]:
        """The parts that compare samples on the whole batch, the others piece by piece."""
        served = self._served(batch)
        coupled = [name for name in served if self.parts[name].coupled]
        others = [name for name in served if name not in coupled]
        if micro == 1 or not coupled:
            return split_rows(batch, micro)
        return [{**batch, "parts": coupled}, *({**piece, "parts": others} for piece in split_rows(batch, micro) if others)]

    def start(self, model: Model) -> None:
        for part in self.parts.values():
            part.start(model)

    def look(self, model: Model, batch: Batch) -> dict[str, Any]:
        return {name: self.parts[name].look(model, given) for name, given in self._served(batch).items()}

    def task(self, batch: Batch, hints: dict[str, Any] | None = None) -> Batch:
        """Each part's own batch under its name: two parts may hide the same modality differently."""
        tasks = {name: self.parts[name].task(given, (hints or {}).get(name)) for name, given in self._served(batch).items()}
        return {k: batch[k] for k in RUN if k in batch} | tasks

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        running = [name for name in self.parts if name in batch]
        return {f"{name}/{k}": n for name in running for k, n in self.parts[name].numbers(batch[name]).items()}

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        terms = {}
        for name in self.parts:
            weight = at(self.weights[name], batch.get("progress", 0.0)) * self.scale[name]
            for k, term in self.parts[name](model, batch[name]).items() if name in batch else ():
                told = {"weight": torch.tensor(weight)} if callable(self.weights[name]) else {}
                terms[f"{name}/{k}"] = term._replace(weight=term.weight * weight, metrics=term.metrics | told)
        every = self.log_gradients_every
        if every and batch.get("step", 0) % every == 0 and torch.is_grad_enabled():
            norms = gradient_norms(terms, model)
            terms = {name: term._replace(metrics=term.metrics | {"gradient": norms[name]}) for name, term in terms.items()}
        return self.turns.see(terms) if self.training else terms

    def after_step(self, model: Model, progress: float) -> None:
        for part in self.parts.values():
            part.after_step(model, progress)
        self.turns.after_step()


def narrowed(batch: Batch, chosen: Tensor | None) -> Batch:
    """The batch in which only the chosen samples have real tokens. chosen: (S,) bool; None = all."""
    if chosen is None:
        return batch
    return {k: v._replace(valid=v.real() & chosen[v.sample()]) if isinstance(v, Tokens) else v for k, v in batch.items()}


def gradient_norms(terms: dict[str, Term], model: nn.Module) -> dict[str, Tensor]:
    """Norm over the model's parameters of the gradient of weight * total / number, both summed over ranks, for each term.

    Raises ValueError under FSDP2: ranks that hold shares have no whole gradient to compare.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if any(isinstance(p, DTensor) for p in parameters):
        raise ValueError(
            "found log_gradients_every with parameters that are split over ranks; expected whole ones. Use the strategy ddp, or "
            "leave it out"
        )
    norms = {}
    for name, term in terms.items():
        found: Sequence[Tensor | None] = [None] * len(parameters)
        if term.total.requires_grad:
            found = torch.autograd.grad(term.total, parameters, retain_graph=True, allow_unused=True)
        flat = torch.cat(
            [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)]
        )
        norms[name] = abs(term.weight) * distributed.total(flat).norm() / distributed.total(term.number).clamp(min=1)
    return norms


def merged(declared: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """part -> what it declares, as one dict. Two parts may share a key only when they mean the same by it."""
    found: dict[str, tuple[str, Any]] = {}
    for part, things in declared.items():
        for key, thing in things.items():
            first, known = found.setdefault(key, (part, thing))
            if getattr(known, "spec", known) != getattr(thing, "spec", thing):
                raise ValueError(f"{first} and {part} both name {key} and mean different things: {known} and {thing}; rename one")
    return {key: thing for key, (_, thing) in found.items()}
