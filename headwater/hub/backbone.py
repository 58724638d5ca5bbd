"""Load and export backbones: a pretrained model in somebody else's code, in three lines, with nothing taken on trust.

A backbone is a folder: `weights.safetensors`, `card.yaml` (how the model is built, how signals are read, where it comes
from), `golden.safetensors` (an input and the output that it must give), README.md, and the files that readers need.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from headwater.datamodules.collate import collate
from headwater.hub.audit import Report, finite, load_weights, read_weights
from headwater.hub.card import LIBRARIES, make_card, model_of, read_card, sha256, write_card
from headwater.hub.golden import check, golden
from headwater.hub.remote import SCHEME, fetch, send
from headwater.hub.resize import resized
from headwater.model import Encoder, Model, Reader
from headwater.tokens import Tokens


class Backbone(nn.Module):
    """A pretrained model together with how its inputs are read; a plain module in your own loop.

    model: the Model. reader: modality -> Reader. card: provenance. report: what became of every parameter when it was loaded,
    None where nothing was.
    """

    def __init__(self, model: Model, card: dict[str, Any], report: Report | None = None) -> None:
        super().__init__()
        self.model, self.card, self.report = model, card, report
        if report is not None:  # what was loaded is not drawn anew when training starts
            for part in (model, *model.encoders.values()):
                part.settled = True

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
            made[name] = self.model.encoder(name).prepare(raw.map(lambda field: field.to(device)))
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

    note: what to add to the card: data, config, step, source, licence (see `provenance`).
    """
    folder = Path(folder)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        weights = {name: p.detach().cpu().contiguous() for name, p in model.state_dict().items()}
        finite(weights)
        save_file(weights, str(partial / "weights.safetensors"))
        write_card(make_card(model, partial, note or {}), partial)
        save_file(golden(model), str(partial / "golden.safetensors"))
        load_backbone(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def load_backbone(
    name: str | Path, pretrained: bool = True, coverage: float = 1.0, native: bool = False, size: int | None = None
) -> Backbone:
    """A backbone folder, "hf://owner/name[@revision]", a run's checkpoint, or a tower of another library ("timm/NAME").

    pretrained: for other libraries, fetch their weights. native: convert their tower into a Trunk of our own, instead of
    wrapping their code. coverage: share of the parameters that must fit, see `Report`; less raises. When all is asked for, the
    hash of the weights and the golden output are checked too. size: of pictures, when it shall be another one (see `resized`).
    """
    if size is not None:
        loaded = load_backbone(name, pretrained, coverage, native)
        model, report = resized(loaded.model, size)
        return Backbone(model, {**loaded.card, "resized": size, "model": model.spec}, report).eval()
    if str(name).startswith(SCHEME):
        folder = fetch(str(name))
        loaded = load_backbone(folder, coverage=coverage)
        loaded.card |= {"source": str(name), "revision": folder.name}
        return loaded
    if not Path(name).exists() and str(name).split("/")[0] in LIBRARIES:
        return foreign(str(name), pretrained, native)
    if native:
        raise ValueError(f"found native for {name}, which is no tower of another library; leave it out")
    if Path(name).suffix == ".ckpt":
        return from_checkpoint(Path(name), coverage)
    folder = Path(name)
    if not (folder / "card.yaml").is_file():
        raise FileNotFoundError(
            f"found no backbone at {name}; expected a folder with card.yaml and weights.safetensors (a run's backbone/ folder), "
            f"a checkpoint, or a name that starts with {', '.join(f'{library}/' for library in LIBRARIES)} or {SCHEME}"
        )
    card = read_card(folder)
    model = model_of(card["model"], folder)
    report = load_weights(model, folder / "weights.safetensors", coverage)
    if coverage == 1.0:
        verify(model, card, folder)
    return Backbone(model, card, report).eval()


def pretrained(name: str, modality: str | None = None) -> Encoder:
    """The encoder of a backbone, to go on from: a class_path for `encoders` in a recipe.

    name: what `load_backbone` takes. modality: which encoder, where there are several.
    """
    found = load_backbone(name).model.encoders
    if modality not in found and (modality or len(found) > 1):
        raise ValueError(f"found modality {modality!r} for {name}; expected one of {', '.join(found)}")
    return found[modality or next(iter(found))]


def verify(model: Model, card: dict[str, Any], folder: Path) -> None:
    """ValueError when the weights are not those of the card, or the model does not give the recorded output."""
    found, expected = sha256(folder / "weights.safetensors"), card.get("sha256", "")
    if expected and found != expected:
        raise ValueError(
            f"{folder / 'weights.safetensors'} has the SHA-256 {found[:12]}, but its card was written for {expected[:12]}; the "
            "file was changed or damaged. Fetch it again, or pass coverage=0.99 to use it unchecked"
        )
    check(model, read_weights(folder / "golden.safetensors"))


def foreign(name: str, pretrained: bool, native: bool) -> Backbone:
    """A tower of another library, wrapped or converted."""
    library, _, tower = name.partition("/")
    if native:
        return importlib.import_module(f"headwater.hub.{library}_models").load(tower, pretrained)
    towers = importlib.import_module(LIBRARIES[library]).towers(tower, pretrained)
    return Backbone(Model(towers), {"source": name, "pretrained": pretrained}).eval()


def from_checkpoint(path: Path, coverage: float) -> Backbone:
    """The backbone inside a run's checkpoint; the objective is left out. There is no golden output to check."""
    found = torch.load(path, map_location="cpu", weights_only=True)
    if "model" not in found:
        raise ValueError(
            f"{path} does not say how its model is made; build the model and call headwater.hub.load_weights(model, {str(path)!r})"
        )
    model = model_of(found["model"], path.parent)
    report = load_weights(model, found["state_dict"], coverage)
    return Backbone(model, {"source": str(path), "step": found.get("global_step"), "model": found["model"]}, report).eval()


def list_backbones(folder: str | Path = "runs") -> list[str]:
    """Paths of the exported backbones below a folder, newest first."""
    cards = sorted(Path(folder).rglob("card.yaml"), key=lambda p: p.stat().st_mtime, reverse=True)
    return [str(card.parent) for card in cards if not card.parent.name.endswith(".partial")]


def push(folder: str | Path, repository: str, private: bool = False, revision: str | None = None, api: Any = None) -> str:
    """Check a backbone folder and upload it to the Hugging Face hub; returns the address of the commit.

    repository: "owner/name". revision: a branch. api: an own HfApi, with another token or address.
    """
    load_backbone(folder)
    return send(Path(folder), repository, private, revision, api)
