"""An encoder made again with other arguments, and filled with the weights of the one that was given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from headwater.hub.audit import How, Report, Row
from headwater.hub.card import changed_reader
from headwater.model import Encoder, Model
from headwater.spec import build

Change = dict[str, tuple[How, Tensor]]  # tensors that are not copied under their own name, and what became of them


def trunk_of(encoder: Encoder) -> Any:
    """The trunk that an encoder was made with; ValueError where it has none of ours."""
    if "trunk" not in encoder.spec["init_args"]:
        raise ValueError(
            f"found {type(encoder).__name__}, which has no Trunk of its own; expected an encoder such as Text or Image. A tower of "
            "another library becomes one with headwater.load_backbone(NAME, native=True)"
        )
    return encoder.trunk


def remade(
    encoder: Encoder,
    trunk: Mapping[str, Any] | None = None,
    reader: Mapping[str, Any] | None = None,
    own: Mapping[str, Any] | None = None,
) -> Encoder:
    """An encoder with other arguments of its trunk, its reader and its own, whose weights are still to be filled in."""
    spec = changed_reader(encoder.spec, dict(reader or {}))
    given = {**spec["init_args"], **(own or {})}
    if trunk:
        old = trunk_of(encoder).spec
        given["trunk"] = {**old, "init_args": {**old["init_args"], **trunk}}
    made = build({**spec, "init_args": given})
    if encoder.settled:  # what was loaded is not drawn anew when training starts, and neither is what was made of it
        made.settled = True
    return made


@torch.no_grad()
def filled(made: Encoder, source: Encoder, changes: Change | None = None) -> Encoder:
    """`made` with the source's tensors, where `changes` has no others; `made.report` tells what became of each.

    ValueError where a tensor has another shape or is not there, so that nothing keeps a start by chance.
    """
    old, taken, rows = source.state_dict(), {}, []
    for name, own in made.state_dict().items():
        same: tuple[How, Tensor | None] = ("matched", old.get(name))
        how, value = (changes or {}).get(name, same)
        if value is not None and value.shape == own.shape:
            taken[name] = value
        else:
            how = "missing" if value is None else "other shape"
        found = None if value is None or name in taken else tuple(value.shape)
        rows.append(Row(how, name, name if name in old else "", tuple(own.shape), found))
    rows += [Row("left out", "", name, tuple(w.shape)) for name, w in old.items() if name not in taken]
    made.report = Report(tuple(rows)).accept(1.0, f"{type(source).__name__} in its new form")  # type: ignore[assignment]
    made.load_state_dict(taken)
    return made.train(source.training)


def within(model: Model, name: str, encoder: Encoder) -> Model:
    """A model with this encoder in place of the one called `name`; fusion, shared space and other encoders are the same objects.

    ValueError where others depend on a width that has changed, or where linear layers have other forms.
    """
    old = model.encoder(name)
    if model.forms:
        raise ValueError("found a model with forms of its weights; operate on headwater.forms.densified(model)")
    if (model.fusion is not None and old.width != encoder.width) or (model.space and old.dim != encoder.dim):
        raise ValueError(
            f"found an encoder of width {encoder.width} for {name} in place of one of {old.width}, but the model's fusion or "
            "shared space depends on it; keep the width, or operate before fusing"
        )
    parts = {n: encoder if n == name else e for n, e in model.encoders.items()}
    fusion = model.fusion
    made = Model(parts, None if fusion is None else lambda widths: fusion, model.space, model.frozen, model.processes)
    made.projections.load_state_dict(model.projections.state_dict())
    made.settled = getattr(model, "settled", False)  # type: ignore[assignment]
    return made.train(model.training)
