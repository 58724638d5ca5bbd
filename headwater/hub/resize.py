"""A model at another picture size, with other patches, or for video instead of pictures; every change of weights is reported."""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from headwater.hub.audit import How, Report, Row
from headwater.hub.card import changed_reader
from headwater.hub.tables import inflate_kernel, renormalise, resample_positions, resize_kernel
from headwater.modalities.image import ImageReader
from headwater.modalities.video import VideoReader
from headwater.model import Encoder, Model
from headwater.position import Learned, Rotary
from headwater.spec import build

Change = dict[str, tuple[How, Tensor]]


def resized(model: Model, size: int, patch: int | None = None, name: str = "image") -> tuple[Model, Report]:
    """The same model for pictures of another size, or with patches of another size.

    Learned positions are resampled, the span of rotary ones becomes the new grid, the stem is resized (see
    headwater.hub.tables). With other patches a head that generates pixels starts at zero.
    """
    encoder, reader = _with_stem(model, name)
    old, patch = (reader.size // reader.patch,) * 2, patch or reader.patch
    if size % patch:
        raise ValueError(f"found size {size} with patches of {patch}; expected a multiple, such as {size // patch * patch}")
    grid = (size // patch,) * 2
    trunk, changes = _at_grid(encoder, old, grid, grid)
    spec = changed_reader(encoder.spec, {"size": size, "patch": patch})
    spec["init_args"]["trunk"] = trunk
    if patch != reader.patch:
        kernel = resize_kernel(_kernel(encoder, reader), (patch, patch))
        changes["stem.weight"] = ("resampled", rearrange(kernel, "d c p q -> d (p q c)"))
    return _rebuilt(model, name, name, spec, changes)


def inflated(
    model: Model, frames: int, tubelet: int = 2, how: Literal["mean", "central"] = "mean", name: str = "image"
) -> tuple[Model, Report]:
    """The same model with an encoder "video" in place of the one of pictures.

    frames: of a clip. tubelet: frames per token. A clip that stands still and fills one tubelet gives the vector of its picture,
    if that is square and was read without zoom. Learned positions begin the same at all moments; rotary ones do not know time.
    """
    encoder, reader = _with_stem(model, name)
    made = VideoReader(reader.size, reader.patch, frames, tubelet=tubelet)
    grid = (reader.size // reader.patch,) * 2
    trunk, changes = _at_grid(encoder, grid, grid, (frames, *grid))
    if "trunk.position.table" in changes:
        changes["trunk.position.table"] = ("inflated", changes["trunk.position.table"][1].repeat(frames, 1))
    normal = ((0.5,) * 3, (0.5,) * 3)  # what VideoReader takes away and divides by
    stem: Any = encoder.stem
    kernel, bias = renormalise(_kernel(encoder, reader), stem.bias.detach(), (reader.mean, reader.std), normal)
    kernel = inflate_kernel(kernel, tubelet, how)
    changes |= {"stem.weight": ("inflated", rearrange(kernel, "d c s p q -> d (s p q c)")), "stem.bias": ("inflated", bias)}
    given: dict[str, Any] = {"reader": made.spec, "trunk": trunk, "pooling": encoder.pooling}
    given |= {"pooled_norm": not isinstance(encoder.pooled_norm, nn.Identity), "causal": encoder.causal}
    return _rebuilt(model, name, "video", {"class_path": "headwater.model.Encoder", "init_args": given}, changes)


def _with_stem(model: Model, name: str) -> tuple[Encoder, ImageReader]:
    """The encoder and its reader. ValueError when it has no linear stem over square patches of its own."""
    encoder = model.encoder(name)
    if not isinstance(encoder.reader, ImageReader) or not isinstance(getattr(encoder, "stem", None), nn.Linear):
        raise ValueError(
            f"{name} is a {type(encoder).__name__}; expected an encoder of pictures on a Trunk of our own. Load a tower of another "
            "library with native=True"
        )
    return encoder, encoder.reader


def _kernel(encoder: Encoder, reader: ImageReader) -> Tensor:
    """(D, p q c) -> (D, c, p, q)."""
    stem: Any = encoder.stem
    return rearrange(stem.weight.detach(), "d (p q c) -> d c p q", p=reader.patch, q=reader.patch)


def _at_grid(encoder: Encoder, old: tuple[int, int], new: tuple[int, int], sizes: tuple[int, ...]) -> tuple[dict[str, Any], Change]:
    """The spec of the trunk for another grid, and its table of positions there. sizes: of the table that the spec will ask for."""
    spec, position = encoder.trunk.spec, encoder.trunk.position
    changed: dict[str, Any] = {}
    changes: Change = {}
    if isinstance(position, Learned):
        if position.factorised or tuple(position.sizes) != old or position.axes not in (None, (1, 2), [1, 2]):
            raise ValueError(f"found a table of positions for {position.sizes}; expected one over rows and columns, {old}")
        changed = {"sizes": list(sizes), "axes": None}
        changes["trunk.position.table"] = ("resampled", resample_positions(position.table.detach(), old, new))
    elif isinstance(position, Rotary) and position.span is not None:
        changed = {"span": list(new)}
    where = position.spec
    where = {**where, "init_args": {**where["init_args"], **changed}}
    return {**spec, "init_args": {**spec["init_args"], "position": where}}, changes


def _rebuilt(model: Model, old: str, new: str, spec: dict[str, Any], changes: Change) -> tuple[Model, Report]:
    """The model with another encoder in the place of `old`, called `new`. changes: its tensors that are not copied."""
    parts = {new if name == old else name: spec if name == old else e.spec for name, e in model.encoders.items()}
    fusion = model.fusion
    if fusion is not None and old != new:
        raise ValueError("found a fusion, which knows its modalities by name; inflate the encoder before fusing")
    made = Model(
        {n: build(s) for n, s in parts.items()},
        (lambda widths: build(fusion.spec)) if fusion else None,
        model.space,
        processes={new if name == old else name: process for name, process in model.processes.items()},
    )
    place = re.compile(rf"^(encoders|projections)\.{old}\.")
    mine = {place.sub(rf"\1.{new}.", name): w for name, w in model.state_dict().items()}
    taken, rows = {}, []
    copied: How = "matched" if old == new else "renamed"
    for name, own in made.state_dict().items():
        how, value = changes.get(name.removeprefix(f"encoders.{new}."), (copied, mine.get(name)))
        if value is None or value.shape != own.shape:
            how, value = "new" if name.startswith(f"encoders.{new}.head.") else "missing", torch.zeros_like(own)
        taken[name] = value
        rows.append(Row(how, name, name, tuple(own.shape)))
    report = Report(tuple(rows)).accept(what=f"{old} in its new shape")
    made.load_state_dict(taken)
    return made.train(model.training), report
