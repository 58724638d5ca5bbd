"""What became of every parameter when weights were loaded, and the refusal when too little fits.

A load that says nothing about its coverage is how a file of 211 tensors fills 2 of them and training starts from noise
(NVIDIA-TAO/tao-pytorch#87). So every way in goes through `Report`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from difflib import SequenceMatcher
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

How = Literal[
    "matched", "renamed", "reshaped", "fused", "split", "folded", "resampled", "inflated",
    "new", "left out", "missing", "unexpected", "other shape",
]  # fmt: skip
LOADED: tuple[How, ...] = ("matched", "renamed", "reshaped", "fused", "split", "folded", "resampled", "inflated")
WRONG: tuple[How, ...] = ("missing", "unexpected", "other shape")
WRAPPERS = ("", "module.", "backbone.", "model.", "module.backbone.")  # what trainers put before every name
LEFT = ("objective.", "average.")  # of our own checkpoints: they are thrown away after training
log = logging.getLogger(__name__)


class Row(NamedTuple):
    """One tensor. ours, theirs: its names in the model and in the file, empty where it is in one of them only."""

    how: How
    ours: str
    theirs: str
    shape: tuple[int, ...]
    found: tuple[int, ...] | None = None  # the shape in the file, where it is another one

    @property
    def number(self) -> int:
        """Its parameters."""
        return torch.Size(self.shape).numel()


class Report(NamedTuple):
    """Every tensor of the model and of the file.

    "new": of the model, and known not to be in files of this kind, such as the head of a tower that has none. "left out": of
    the file, and known not to belong to the model, such as a classifier.
    """

    rows: tuple[Row, ...]

    def number(self, *hows: How) -> int:
        """Parameters of these kinds."""
        return sum(row.number for row in self.rows if row.how in hows)

    @property
    def coverage(self) -> float:
        """The smaller one of two shares: of the model's parameters that were found, and of the file's that were used.

        A file of twelve blocks fills a model of six completely, and is another model all the same.
        """
        loaded = self.number(*LOADED)
        return min(1.0, loaded / max(1, loaded + max(self.number("missing", "other shape"), self.number("unexpected"))))

    def summary(self) -> str:
        """One line: every kind with its number of tensors and its share of the parameters, of the model or else of the file."""
        inside = self.number("new", "missing", "other shape", *LOADED)
        of_file = self.number("unexpected", "left out", "other shape", *LOADED)
        parts = []
        for how in get_args(How):
            if count := sum(row.how == how for row in self.rows):
                total = of_file if how in ("unexpected", "left out") else inside
                parts.append(f"{how} {self.number(how) / max(1, total):.1%} ({count})")
        return ", ".join(parts)

    def __str__(self) -> str:
        """The summary, then a line for every tensor that did not fit, with the name that may have been meant."""
        wrong = sorted((row for row in self.rows if row.how in WRONG), key=lambda row: WRONG.index(row.how))
        lines = [f"  {row.how:<11}  {row.ours or row.theirs}  {list(row.shape)}{self._meant(row)}" for row in wrong[:40]]
        more = [f"  and {len(wrong) - 40} more"] if len(wrong) > 40 else []
        return "\n".join([self.summary(), *lines, *more])

    def _meant(self, row: Row) -> str:
        """The shape in the file, or what a missing tensor may be called there."""
        if row.found is not None:
            return f", found {list(row.found)}"
        name = near(row, [other for other in self.rows if other.how == "unexpected"]) if row.how == "missing" else ""
        return f", perhaps {name}" if name else ""

    def accept(self, coverage: float = 1.0, what: str = "the file") -> Report:
        """The report itself. Raises ValueError, with the table of what did not fit, when the coverage is too small."""
        if self.coverage < coverage or not self.number(*LOADED):
            raise ValueError(
                f"{what} fits only {shown(self.coverage)} of the parameters; expected at least {coverage:.0%}.\n{self}\n"
                "Check that the weights belong to this model, rename them, or pass a lower coverage"
            )
        log.info("%s: %s", what, self.summary())
        return self


def shown(share: float) -> str:
    """A share that is not rounded up to 100 %."""
    return f"{int(share * 1000) / 10:.1f}%"


def near(row: Row, others: list[Row]) -> str:
    """The unexpected name of the same shape that is most like the missing one, or ""."""
    like = {o.theirs: SequenceMatcher(None, row.ours[::-1], o.theirs[::-1]).ratio() for o in others if o.shape == row.shape}
    best = max(like, key=like.__getitem__, default="")
    return best if best and like[best] > 0.4 else ""


def finite(weights: Mapping[str, Tensor]) -> None:
    """ValueError that names the tensors which hold NaN or infinity."""
    if broken := [name for name, w in weights.items() if w.is_floating_point() and not bool(torch.isfinite(w).all())]:
        raise ValueError(
            f"found NaN or infinity in {len(broken)} tensors, such as {', '.join(broken[:4])}; these weights are broken"
        )


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a checkpoint of Lightning or torch. Nothing in it is executed."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"found no weights at {path}; expected a .safetensors or .ckpt file")
    if path.suffix == ".safetensors":
        try:
            return load_file(str(path))
        except SafetensorError as error:
            raise ValueError(f"{path} is no whole safetensors file ({error}); fetch or export it again") from error
    found = torch.load(path, map_location="cpu", weights_only=True)
    found = found.get("state_dict", found)
    return {name: w for name, w in found.items() if isinstance(w, Tensor)}


def load_weights(model: nn.Module, weights: Mapping[str, Tensor] | str | Path, coverage: float = 1.0) -> Report:
    """Copy tensors by name and shape, or raise and leave the model as it was.

    weights: tensors by name, or a file. Prefixes of wrappers (DDP, compile, Lightning) are taken off, and a checkpoint's
    objective is left out. coverage: see Report.
    """
    what = "the weights" if isinstance(weights, Mapping) else str(weights)
    found = dict(weights) if isinstance(weights, Mapping) else read_weights(weights)
    own, names = model.state_dict(), unwrapped(found, model)
    rows = [compare(name, own.get(name), theirs, found[theirs]) for name, theirs in names.items()]
    known = set(names.values())
    for theirs in (name for name in found if name not in known):
        how: How = "left out" if theirs.startswith(LEFT) else "unexpected"
        rows.append(Row(how, "", theirs, tuple(found[theirs].shape)))
    rows += [Row("missing", name, "", tuple(w.shape)) for name, w in own.items() if name not in names]
    report = Report(tuple(rows)).accept(coverage, what)
    taken = {row.ours: found[row.theirs] for row in rows if row.how in LOADED}
    finite(taken)
    model.load_state_dict(taken, strict=False)
    return report


def compare(name: str, own: Tensor | None, theirs: str, found: Tensor) -> Row:
    """The row of a tensor of the file. name: what it would be called in the model."""
    if own is None:
        return Row("unexpected", "", theirs, tuple(found.shape))
    if own.shape != found.shape:
        return Row("other shape", name, theirs, tuple(own.shape), tuple(found.shape))
    return Row("matched" if name == theirs else "renamed", name, theirs, tuple(own.shape))


def unwrapped(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, str]:
    """Name without the prefix of a wrapper -> name in the file, for those that have it; the prefix with which most names fit."""
    own = set(model.state_dict())

    def without(prefix: str) -> dict[str, str]:
        plain = {name.replace("_orig_mod.", ""): name for name in weights}
        return {name.removeprefix(prefix): theirs for name, theirs in plain.items() if name.startswith(prefix)}

    return max(map(without, WRAPPERS), key=lambda names: len(own & set(names)))
