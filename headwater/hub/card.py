"""What is written beside weights: how the model is made, where it comes from, and the same for people to read."""

from __future__ import annotations

import hashlib
import importlib
import platform
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml

import headwater.forms
import headwater.fusion
import headwater.modalities  # noqa: F401  these hold the classes that a card may name
from headwater import __version__
from headwater.model import Model
from headwater.spec import build

ASSET = "asset:"
LIBRARIES = {
    "timm": "headwater.modalities.timm_tower",
    "open_clip": "headwater.modalities.open_clip_tower",
    "transformers": "headwater.modalities.transformers_tower",
}
UNSTATED = "not stated"
PAGE = """---
{head}---

# A backbone of headwater

```python
import headwater
backbone = headwater.load_backbone("hf://OWNER/NAME")  # or this folder
vectors = backbone.embed({first}=[...])["{first}"]
```

| | |
|--|--|
{rows}

How it is built, how signals are read and how it was trained is in `card.yaml`. `golden.safetensors` holds an input of every
modality and the output that it must give; loading checks it, and the SHA-256 of the weights.
"""
WRITTEN = ("headwater", "torch", "python", "parameters", "modalities", "sha256", "model")  # always by `make_card` itself


def make_card(model: Model, folder: Path, note: dict[str, Any]) -> dict[str, Any]:
    """The card of a model whose weights lie in `folder`; files that readers need are copied there.

    note: what only the caller knows; "data", "config", "step", "source", "revision" and "licence" have a meaning to readers.
    """
    return {
        "headwater": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "modalities": {name: type(reader).__name__ for name, reader in model.readers.items()},
        "licence": UNSTATED,
        "left_out": "heads, decoders and teachers of the objective",
        **{name: value for name, value in note.items() if name not in WRITTEN},
        "sha256": sha256(folder / "weights.safetensors"),
        "model": with_assets(model, folder),
    }


def provenance(pretrainer: Any, data: Any, config: str | Path | None = None) -> dict[str, Any]:
    """What a run knows of its backbone, for `save_backbone`.

    pretrainer: the Pretrainer, whose objective is left out. data: the ShardDataModule. config: the recipe as it was run.
    """
    left: Counter[str] = Counter()
    for name, p in pretrainer.objective.named_parameters():
        left[name.partition(".")[0]] += p.numel()
    parts = ", ".join(f"{name} ({number})" for name, number in left.items())
    return {
        "objective": type(pretrainer.objective).__name__,
        "left_out": f"of the objective, with numbers of parameters: {parts}" if parts else "nothing",
        "data": {source.name: {"shards": source.source.shards, "index": manifest(source)} for source in data.sources},
        **({"config": yaml.safe_load(Path(config).read_text())} if config else {}),
    }


def manifest(source: Any) -> str:
    """SHA-256 over what the indices of a source say: every shard's name, its keys, and place, size and hash of every member.

    A source that is only streamed has no index.
    """
    from headwater.datamodules.index import load_index

    if not hasattr(source, "cards"):
        return "none, it was streamed"
    total = hashlib.sha256()
    for card in source.cards:
        index = load_index(card.path)
        total.update("\n".join([Path(card.path).name, *index.keys.to_pylist()]).encode())
        for column in (index.block, index.bytes, index.hash):
            total.update(column.tobytes())
    return total.hexdigest()


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a backbone folder."""
    card = yaml.safe_load((folder / "card.yaml").read_text())
    if not isinstance(card, dict) or "model" not in card:
        raise ValueError(f"{folder / 'card.yaml'} does not say how the model is made; expected a mapping with the key `model`")
    return card


def write_card(card: dict[str, Any], folder: Path) -> None:
    """card.yaml, and README.md for people and hubs."""
    (folder / "card.yaml").write_text(yaml.safe_dump(card, sort_keys=False, allow_unicode=True))
    (folder / "README.md").write_text(readme(card))


def readme(card: dict[str, Any]) -> str:
    """The card as a page, with the three lines that use it. Hubs read the YAML at its top."""
    head: dict[str, Any] = {"library_name": "headwater", "tags": sorted(card["modalities"])}
    if card["licence"] != UNSTATED:
        head["license"] = card["licence"]
    first = next(iter(card["modalities"]))
    facts = {name.replace("_", " "): value for name, value in card.items() if not isinstance(value, dict)}
    data = {f"data: {name}": value for name, value in card["data"].items()} if isinstance(card.get("data"), dict) else {}
    readers = {f"reads {name} by": reader for name, reader in card["modalities"].items()}
    rows = "\n".join(f"| {name} | {value} |" for name, value in (readers | facts | data).items())
    return PAGE.format(head=yaml.safe_dump(head, sort_keys=False), first=first, rows=rows)


def model_of(spec: dict[str, Any], folder: Path) -> Model:
    """Build a Model from the card's plain data; files that readers need are taken from `folder`."""
    spec = _resolve(spec, folder)
    for library, module in LIBRARIES.items():
        if f"headwater.modalities.{library}_" in str(spec["encoders"]):  # only these, whatever a card says
            importlib.import_module(module)
    if "headwater.surgery." in str(spec["encoders"]):
        importlib.import_module("headwater.surgery")
    fusion = spec["fusion"]
    return Model(
        {name: build(e) for name, e in spec["encoders"].items()},
        None if fusion is None else lambda widths: build(fusion),
        spec["space"],
        processes={name: build(process) for name, process in spec.get("processes", {}).items()},
        forms=[build(form) for form in spec.get("forms", [])],
    )


def _resolve(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {k: _resolve(v, folder) for k, v in value.items()}
    if isinstance(value, list):
        return [_resolve(v, folder) for v in value]
    if isinstance(value, str) and value.startswith(ASSET):
        return str(folder / Path(value.removeprefix(ASSET)).name)
    return value


def with_assets(model: Model, folder: Path) -> dict[str, Any]:
    """The model's spec; files named by it are copied into `folder` and named as assets."""
    encoders = {}
    for name, encoder in model.encoders.items():
        changed = {}
        for argument, path in encoder.reader.files().items():
            changed[argument] = f"{ASSET}{name}.{argument}{path.suffix}"
            shutil.copyfile(path, folder / f"{name}.{argument}{path.suffix}")
        encoders[name] = changed_reader(encoder.spec, changed)
    return {**model.spec, "encoders": encoders}


def changed_reader(spec: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """An encoder's spec with other arguments of its reader.

    The reader is an argument of its own or takes the encoder's; one that goes around another encoder has its reader.
    """
    arguments = dict(spec["init_args"])
    if inner := next((name for name in ("encoder", "tokeniser") if isinstance(arguments.get(name), dict)), None):
        arguments[inner] = changed_reader(arguments[inner], changed)
    elif isinstance(arguments.get("reader"), dict):
        arguments["reader"] = {**arguments["reader"], "init_args": {**arguments["reader"]["init_args"], **changed}}
    else:
        arguments |= changed
    return {**spec, "init_args": arguments}
