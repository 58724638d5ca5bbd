"""Models of one ancestor as one: soups, interpolation, and arithmetic with what each has learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headwater.hub.audit import finite
from headwater.hub.backbone import load_backbone
from headwater.model import Encoder, Model

State = Mapping[str, Tensor]
KIN = 0.5  # least cosine between the matrices of models that have an ancestor in common; of strangers it is near 0


def combined(states: Sequence[State], weights: Sequence[float]) -> dict[str, Tensor]:
    """sum of w_i * theta_i, tensor by tensor, with weights that add up to 1.

    One formula for all that is done with weights of one ancestor: their mean (model soups, Wortsman et al. 2022, arXiv:2203.05482),
    interpolation with weights (1 - a, a), and task arithmetic (see `added`). Numbers that are no floats, such as counts, must
    agree. Sums are taken in float64, so that the mean of equal models is that model.
    """
    if len(states) != len(weights) or not states or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"found weights {list(weights)} for {len(states)} models; expected one each, which add up to 1")
    check_shapes(states)
    made = {}
    for name, first in states[0].items():
        if first.is_floating_point():
            total = sum(w * state[name].double() for w, state in zip(weights, states, strict=True))
            made[name] = torch.as_tensor(total).to(first.dtype)
        elif all(torch.equal(first, state[name]) for state in states):
            made[name] = first
        else:
            raise ValueError(
                f"{name} holds {first.dtype} and differs between the models; only floating-point numbers can be merged"
            )
    finite(made)
    return made


def added(base: State, origin: State, tuned: Sequence[State], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """base + sum of c_i * (tuned_i - origin): what others have learned from an origin, given to a model of the same origin.

    Task arithmetic (Ilharco et al. 2022, arXiv:2212.04089); with one tuned model it is the chat vector (Huang et al. 2023,
    arXiv:2310.04799): a base that was trained on, plus instruct minus base. Negative coefficients take away.
    """
    return combined([base, *tuned, origin], [1.0, *coefficients, -float(sum(coefficients))])


def check_shapes(states: Sequence[State]) -> None:
    """ValueError that names what models do not share."""
    for number, state in enumerate(states[1:], 2):
        differ = sorted(set(states[0]) ^ set(state))
        differ += [n for n in states[0].keys() & state.keys() if states[0][n].shape != state[n].shape]
        if differ:
            raise ValueError(
                f"model {number} differs from the first in {len(differ)} tensors, such as {', '.join(differ[:4])}; expected the "
                "same names and shapes. Bring them to one form first, for example with headwater.surgery.reworded or deeper"
            )


def kinship(a: State, b: State) -> float:
    """Cosine between the matrices of two models, all as one vector: 1 for equal ones, near 0 for strangers."""
    pairs = [(a[n].double().flatten(), b[n].double().flatten()) for n in a if a[n].ndim > 1 and a[n].is_floating_point()]
    inner, left, right = (sum(float(f(x, y)) for x, y in pairs) for f in (torch.dot, lambda x, y: x @ x, lambda x, y: y @ y))
    return inner / max(left * right, 1e-300) ** 0.5


def check_kin(states: Sequence[State], least: float = KIN) -> None:
    """ValueError when models hardly resemble the first: the mean of strangers is no model."""
    for number, state in enumerate(states[1:], 2):
        if (cosine := kinship(states[0], state)) < least:
            raise ValueError(
                f"the matrices of model {number} have a cosine of {cosine:.2f} with those of the first, expected {least} or more: "
                "they do not come from one ancestor. Merge models that were trained from one start, or lower `kin`"
            )


def merged(
    names: list[str],
    weights: list[float] | None = None,
    origin: str | None = None,
    kin: float = KIN,
) -> Model:
    """Backbones as one model.

    names: what `load_backbone` takes: folders or checkpoints. weights: of each; None = equal ones that add up to 1. origin: the
    backbone that all come from; then the first stays whole, and weights, those of the others, multiply what each has learned since;
    None = 1 each. kin: least cosine to the first one.
    """
    if len(names) < 2:
        raise ValueError(f"found {len(names)} backbone to merge; expected two or more")
    models = [load_backbone(name).model for name in (*names, *([origin] if origin else []))]
    states = [model.state_dict() for model in models]
    check_shapes(states)
    check_kin(states, kin)
    if origin is None:
        values = combined(states, weights or [1 / len(names)] * len(names))
    else:
        values = added(states[0], states[-1], states[1:-1], weights or [1.0] * (len(names) - 1))
    models[0].load_state_dict(values)
    settle(models[0])
    return models[0]


def soup(
    names: list[str],
    weights: list[float] | None = None,
    origin: str | None = None,
    modality: str | None = None,
    kin: float = KIN,
) -> Encoder:
    """The encoder of merged backbones: a class_path for `encoders` in a recipe. modality: which; for the others see `merged`."""
    found: Any = merged(names, weights, origin, kin).encoders
    if modality not in found and (modality or len(found) > 1):
        raise ValueError(f"found modality {modality!r} for {', '.join(names)}; expected one of {', '.join(found)}")
    return found[modality or next(iter(found))]


def greedy(
    models: Sequence[nn.Module], score: Callable[[nn.Module], float], least: float = KIN
) -> tuple[dict[str, Tensor], list[int]]:
    """A soup into which a model comes only if it does no harm (Wortsman et al. 2022, recipe 1).

    models: best first, or in any order: they are sorted by their score. score: larger is better, on held-out data. Returns the
    mean of those that were taken, and their numbers. The first model is left as it was.
    """
    states = [{n: p.detach().clone() for n, p in model.state_dict().items()} for model in models]
    check_shapes(states)
    check_kin(states, least)
    alone = [score(model) for model in models]
    order = sorted(range(len(models)), key=lambda i: -alone[i])
    taken, best, trial = [order[0]], alone[order[0]], models[0]
    try:
        for number in order[1:]:
            mixed = [*taken, number]
            trial.load_state_dict(combined([states[i] for i in mixed], [1 / len(mixed)] * len(mixed)))
            if (found := score(trial)) >= best:
                taken, best = mixed, found
    finally:
        trial.load_state_dict(states[0])
    return combined([states[i] for i in taken], [1 / len(taken)] * len(taken)), taken


def settle(model: Model) -> None:
    """What was trained is not drawn anew when training starts."""
    for part in (model, *model.encoders.values()):
        part.settled = True
