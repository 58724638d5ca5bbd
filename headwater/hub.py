"""Load and export backbones, audited: what did not match is said, and too little is refused.

A backbone is a folder: `weights.safetensors`, `card.yaml` (how the model is built, how signals are read, where it comes
from), `golden.safetensors` (an input and the output that it must give) and the files that readers need.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import headwater.fusion  # these hold the classes that a card may name
import headwater.modalities.open_clip_tower
import headwater.modalities.timm_tower  # noqa: F401
from headwater import __version__
from headwater.datamodules.collate import collate
from headwater.model import Model, Reader
from headwater.spec import build
from headwater.tokens import Tokens

ASSET = "asset:"
FIELDS = Tokens._fields
TOLERANCE = 1e-3  # of the golden output; between CPU kernels and machines it moves by about 1e-5


class Backbone(nn.Module):
    """A pretrained model together with how its inputs are read; a plain module in your own loop.

    model: the Model. reader: modality -> Reader. card: provenance.
    """

    def __init__(self, model: Model, card: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.card = model, card

    @property
    def reader(self) -> dict[str, Reader]:
        """How each modality is read; its settings travelled with the weights."""
        return self.model.readers

    def batch(self, signals: Mapping[str, Sequence[Any]]) -> dict[str, Tokens]:
        """Raw signals per modality (pictures, strings, (wave, rate), frames, actions) -> prepared Tokens on the device."""
        if stray := set(signals) - set(self.reader):
            raise ValueError(f"found inputs for {sorted(stray)}; this backbone encodes {sorted(self.reader)}")
        device = next(self.model.parameters()).device
        made = {}
        for name, values in signals.items():
            if isinstance(values, str) or not isinstance(values, Sequence) or not len(values):
                raise ValueError(f"{name} must be a non-empty list of signals, one per sample; found {type(values).__name__}")
            raw = collate([{name: self.reader[name].tokens(value)} for value in values], [name])[name]
            if bool(raw.real().all()):
                raw = raw._replace(valid=None)  # nothing is padded: fused attention stays on
            made[name] = self.reader[name].prepare(raw.map(lambda field: field.to(device)))
        return made

    def forward(self, **signals: Sequence[Any]) -> dict[str, Tensor]:
        """Lists of raw signals -> {modality: (B, D)} pooled vectors, with gradient."""
        return {name: pooled.x for name, pooled in self.model.represent(self.batch(signals)).items()}

    @torch.no_grad()
    def embed(self, **signals: Sequence[Any]) -> dict[str, Tensor]:
        """Lists of raw signals -> {modality: (B, D)} unit vectors, comparable across modalities that were aligned."""
        training = self.training
        self.eval()
        vectors = {name: F.normalize(x.float(), dim=-1) for name, x in self(**signals).items()}
        self.train(training)
        return vectors

    @torch.no_grad()
    def tokens(self, **signals: Sequence[Any]) -> dict[str, Tokens]:
        """Lists of raw signals -> {modality: contextual Tokens after fusion}."""
        return self.model(self.model.embed(self.batch(signals)))


def save_backbone(model: Model, folder: str | Path, note: dict[str, Any] | None = None) -> Path:
    """Write a backbone folder, whole or not at all, and prove it by loading it again.

    note: what to add to the card (data, step, run).
    """
    folder = Path(folder)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = {name: p.detach().cpu().contiguous() for name, p in model.state_dict().items()}
    save_file(weights, str(partial / "weights.safetensors"))
    card = {
        "headwater": __version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "modalities": {name: type(reader).__name__ for name, reader in model.readers.items()},
        "left_out": "heads, decoders and teachers of the objective",
        **(note or {}),
        "model": _with_assets(model, partial),
    }
    (partial / "card.yaml").write_text(yaml.safe_dump(card, sort_keys=False, allow_unicode=True))
    save_file(_golden(model), str(partial / "golden.safetensors"))
    load_backbone(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return folder


def load_backbone(name: str | Path, pretrained: bool = True, coverage: float = 1.0) -> Backbone:
    """A backbone folder, or a tower of another library ("timm/vit_base_patch16_224", "open_clip/ViT-B-32").

    pretrained: for other libraries, fetch their weights. coverage: share of the parameters that must be found in the file;
    less raises. The golden output is checked when everything matched.
    """
    if not Path(name).is_dir() and str(name).split("/")[0] in LIBRARIES:
        library, _, tower = str(name).partition("/")
        towers = importlib.import_module(LIBRARIES[library]).towers(tower, pretrained)
        return Backbone(Model(towers), {"source": str(name), "pretrained": pretrained}).eval()
    folder = Path(name)
    if not (folder / "card.yaml").is_file():
        raise FileNotFoundError(
            f"found no backbone at {name}; expected a folder with card.yaml and weights.safetensors (a run's backbone/ folder), "
            f"or a name that starts with {', '.join(f'{library}/' for library in LIBRARIES)}"
        )
    card = yaml.safe_load((folder / "card.yaml").read_text())
    model = model_of(card["model"], folder)
    matched = load_weights(model, load_file(str(folder / "weights.safetensors")), coverage)
    if matched == 1.0:
        _check_golden(model, load_file(str(folder / "golden.safetensors")))
    return Backbone(model, card).eval()


LIBRARIES = {"timm": "headwater.modalities.timm_tower", "open_clip": "headwater.modalities.open_clip_tower"}


def list_backbones(folder: str | Path = "runs") -> list[str]:
    """Paths of the exported backbones below a folder, newest first."""
    cards = sorted(Path(folder).rglob("card.yaml"), key=lambda p: p.stat().st_mtime, reverse=True)
    return [str(card.parent) for card in cards if not card.parent.name.endswith(".partial")]


def load_weights(model: nn.Module, weights: dict[str, Tensor], coverage: float = 1.0) -> float:
    """Copy tensors by name and shape; returns the share of the parameters that matched and raises when it is below `coverage`."""
    own = model.state_dict()
    matched = {name: w for name, w in weights.items() if name in own and own[name].shape == w.shape}
    share = sum(w.numel() for w in matched.values()) / max(1, sum(w.numel() for w in own.values()))
    if share < coverage:
        raise ValueError(
            f"only {share:.1%} of the parameters were found ({len(matched)} of {len(own)} tensors); "
            f"expected at least {coverage:.0%}.\n"
            f"  missing: {_some(set(own) - set(weights))}\n"
            f"  unexpected: {_some(set(weights) - set(own))}\n"
            f"  other shape: {_some({n for n in weights if n in own and own[n].shape != weights[n].shape})}\n"
            "Check that the file belongs to this model, or pass a lower coverage"
        )
    model.load_state_dict(matched, strict=False)
    return share


def _some(names: set[str], most: int = 8) -> str:
    shown = ", ".join(sorted(names)[:most]) or "none"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def model_of(spec: dict[str, Any], folder: Path) -> Model:
    """Build a Model from the card's plain data; files that readers need are taken from `folder`."""
    spec = _resolve(spec, folder)
    fusion = spec["fusion"]
    return Model(
        {name: build(e) for name, e in spec["encoders"].items()},
        None if fusion is None else lambda widths: build(fusion),
        spec["space"],
    )


def _resolve(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {k: _resolve(v, folder) for k, v in value.items()}
    if isinstance(value, list):
        return [_resolve(v, folder) for v in value]
    if isinstance(value, str) and value.startswith(ASSET):
        return str(folder / Path(value.removeprefix(ASSET)).name)
    return value


def _with_assets(model: Model, folder: Path) -> dict[str, Any]:
    """The model's spec; files named by it are copied into `folder` and named as assets."""
    spec = {**model.spec, "encoders": {n: {**e, "init_args": dict(e["init_args"])} for n, e in model.spec["encoders"].items()}}
    for name, reader in model.readers.items():
        for argument, path in reader.files().items():
            target = f"{name}.{argument}{path.suffix}"
            shutil.copyfile(path, folder / target)
            spec["encoders"][name]["init_args"][argument] = ASSET + target
    return spec


def _golden(model: Model) -> dict[str, Tensor]:
    """An example input of every modality and the pooled output."""
    pairs: dict[str, Tensor] = {}
    for name, reader in model.readers.items():
        raw = collate([{name: t} for t in reader.example(2, 0)], [name])[name]
        pairs |= {f"{name}.{field}": value for field, value in zip(FIELDS, raw, strict=True) if value is not None}
        pairs[f"{name}.output"] = _pooled(model, name, raw)
    return {k: v.contiguous() for k, v in pairs.items()}


@torch.no_grad()
def _pooled(model: Model, name: str, raw: Tokens) -> Tensor:
    training, device = model.training, next(model.parameters()).device
    model.eval()
    prepared = model.encoder(name).reader.prepare(raw.map(lambda field: field.to(device)))
    pooled = model.represent({name: prepared})[name].x
    model.train(training)
    return pooled.float().cpu()


def _check_golden(model: Model, golden: dict[str, Tensor]) -> None:
    for name in model.encoders:
        raw = Tokens(**{field: golden[key] for field in FIELDS if (key := f"{name}.{field}") in golden})
        expected, found = golden[f"{name}.output"], _pooled(model, name, raw)
        gap = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        if not gap < TOLERANCE:
            raise ValueError(
                f"the weights of {name} were loaded, but its output differs from the recorded one by {gap:.1e} of its size "
                f"(allowed {TOLERANCE:.0e}); the code of its encoder has changed since the export. "
                "Load it with the version in card.yaml"
            )
