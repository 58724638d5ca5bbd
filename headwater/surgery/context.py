"""Longer contexts: what a trained encoder needs so that places beyond those of its training mean something."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from headwater.model import Encoder
from headwater.position import Learned, Rotary
from headwater.surgery.remake import Change, filled, remade, trunk_of


def longer(encoder: Encoder, length: int, base: float | None = None, stretch: float | None = None) -> Encoder:
    """An encoder for longer texts: a class_path for `encoders` in a recipe. Training on longer ones then makes it use them.

    encoder: of texts. length: the most tokens of a text from now on, marks included. base: of rotary positions, by which the slow
    pairs turn less per token, so that far places are no angles that were never seen (10,000 to 500,000 for lengths of 4,000 to
    32,000; Xiong et al. 2023, arXiv:2309.16039). stretch: places are divided by it instead, which are then those of the old length
    (position interpolation, Chen et al. 2023, arXiv:2306.15595). With neither nothing but the length changes. A table of learned
    positions is interpolated to the new length.
    """
    trunk, position = trunk_of(encoder), trunk_of(encoder).position
    most = getattr(encoder.reader, "most", None)
    if most is None or length < most:
        raise ValueError(
            f"found length {length} for {type(encoder).__name__} of {most} tokens; expected texts and at least as many"
        )
    if not isinstance(position, Rotary) and (base is not None or stretch is not None):
        raise ValueError(
            f"found base {base} and stretch {stretch}, but the positions are {type(position).__name__}; leave both out"
        )
    changed: dict[str, Any] = {}
    changes: Change = {}
    if isinstance(position, Rotary):
        changed = {k: float(v) for k, v in (("base", base), ("stretch", stretch)) if v is not None}
    elif isinstance(position, Learned) and len(position.sizes) == 1:
        changed = {"sizes": [length]}
        changes["trunk.position.table"] = ("resampled", stretched(trunk.position.table.detach(), length))
    where = {**position.spec, "init_args": {**position.spec["init_args"], **changed}}
    return filled(remade(encoder, {"position": where}, {"length": length}), encoder, changes)


def stretched(table: Tensor, length: int) -> Tensor:
    """A table of positions at more places, by linear interpolation that keeps both ends: (N, D) -> (length, D)."""
    if length == len(table):
        return table
    return F.interpolate(table.T[None].float(), length, mode="linear", align_corners=True)[0].T.to(table.dtype)
