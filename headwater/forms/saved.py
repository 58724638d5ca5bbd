"""What forms have added to a model, in a file of its own: one backbone, many adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from headwater.forms.form import Form, additions
from headwater.spec import build, plain


def save_additions(model: Any, path: str | Path) -> Path:
    """Write what the forms of a Model have added to weights that stay, and the forms themselves, as one safetensors file."""
    found = {name: p.detach().cpu().contiguous() for name, p in additions(model)}
    if not found:
        raise ValueError("found no addition in the model; expected forms such as LoRA, which leave its weights as they are")
    adding = [form for form in model.forms if getattr(form.layer, "added", ())]
    save_file(found, str(path), {"forms": json.dumps(plain(adding))})
    return Path(path)


@torch.no_grad()
def add(model: Any, path: str | Path) -> Any:
    """Put the additions of such a file into a model that has none of them, in place; returns it.

    ValueError when it was written for other layers; the model then has additions without effect.
    """
    with safe_open(str(path), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        forms: list[Form] = build(json.loads(file.metadata()["forms"]))
    before = {name for name, _ in additions(model)}
    for form in forms:
        form(model)
    ours = {name: p for name, p in additions(model) if name not in before}
    expected, found = ({(name, tuple(t.shape)) for name, t in held.items()} for held in (ours, tensors))
    if other := sorted({name for name, _ in expected ^ found}):
        raise ValueError(f"{path} was written for another model: {len(other)} tensors differ, such as {', '.join(other[:3])}")
    for name, p in ours.items():
        p.copy_(tensors[name])
    model.forms = (*model.forms, *forms)
    return model
