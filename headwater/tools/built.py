"""What a recipe builds, without memory for it; and what would have been accepted where it builds nothing."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from typing import Any

import torch
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser

from headwater import evaluation, fusion, modalities, objectives, training  # importing them lets recipes name their classes barely
from headwater.pretrainer import Pretrainer

INIT = {"model.init": {"class_path": "headwater.init.Normal"}}  # a recipe starts as a function of model.seed alone


def built(recipe: dict[str, Any], device: str = "meta") -> Pretrainer:
    """A recipe's model and objective; on the meta device where all of its parts can be built there."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(Pretrainer, "model")
    parser.set_defaults(INIT)
    try:
        parsed = parser.parse_object({"model": recipe.get("model") or {}})
    except ArgumentError as error:
        raise ValueError(explain(str(error))) from error
    try:
        with torch.device(device):
            return parser.instantiate_classes(parsed)["model"]
    except NotImplementedError:  # a library that moves its weights while it builds them
        return parser.instantiate_classes(parsed)["model"]


def explain(message: str) -> str:
    """What would have been accepted, for a class or option that is not."""
    after = re.search(r"Option '([^']+)' is not accepted.*?class_path='([^']+)'", message, re.DOTALL)
    before = re.search(r"class_path '([^']+)':\s+Option '([^']+)' is not accepted", message)
    if after or before:
        option, path = (after[1], after[2]) if after else (before[2], before[1])  # type: ignore[index]
        module, _, name = path.rpartition(".")
        accepted = ", ".join(list(inspect.signature(getattr(import_module(module), name).__init__).parameters)[1:])
        return f"found the option {option!r} for {name}; expected one of: {accepted}"
    if key := re.search(r"Key '([^']+)' is not expected|Unrecognized arguments: (\S+)", message):
        return f"found {key[1] or key[2]}, which is no setting; `headwater fit --help` lists all. ({message.strip()})"
    if unknown := re.search(r"Expected a dot import path string: (\S+)", message):
        every = [n for m in (modalities, fusion, objectives, evaluation, training) for n in m.__all__]
        accepted = f"a dotted path of your own class or one of: {', '.join(every)}"
        return f"found the class {unknown[1]!r}; expected {accepted}. ({message.strip()})"
    return message
