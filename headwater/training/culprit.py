"""Where the first number of a step that is not finite comes from: a parameter, a signal, a module, or a gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headwater import distributed
from headwater.distributed import local
from headwater.tokens import Tokens


def culprit(pretrainer: Any) -> str:
    """In words, for the step that `pretrainer.step` tells of. Called on all ranks at once: it runs the model once more."""
    module = first_module(pretrainer)
    here = parameter(pretrainer) or signal(pretrainer.step.batch) or module or gradient(pretrainer)
    every = [said for said in distributed.words(here) if said]
    return f", because {'; '.join(dict.fromkeys(every))}" if every else ""


def parameter(pretrainer: nn.Module) -> str:
    """The first parameter with numbers that are not finite."""
    bad = [name for name, p in pretrainer.named_parameters() if not finite(p)]
    return f"the parameter {bad[0]} is not finite, nor are {len(bad) - 1} others" if bad else ""


def signal(batch: dict[str, Any]) -> str:
    """The first modality with infinite values, and its samples. NaN may mark a slot that is absent, so it is left to modules."""
    for name, t in batch.items():
        if isinstance(t, Tokens) and t.x.is_floating_point():
            bad = t.x.isinf().flatten(2).any(2) & t.real()
            if bool(bad.any()):
                return f"{name} of the samples {batch['sample'][t.sample()[bad].unique()].tolist()} is infinite"
    return ""


def first_module(pretrainer: Any) -> str:
    """The first module in the order of the forward pass whose output is not finite."""
    found: list[str] = []
    with watched(pretrainer, found), torch.no_grad(), pretrainer.trainer.precision_plugin.forward_context():
        for piece in pretrainer.step.pieces:
            pretrainer.ask(piece)
    return f"the output of {found[0]} is not finite" if found else ""


@contextmanager
def watched(module: nn.Module, found: list[str]) -> Iterator[None]:
    """For as long as this lasts, modules with outputs that are not finite are written down in `found`."""

    def look(name: str, part: nn.Module, out: Any) -> None:
        out = out.x if isinstance(out, Tokens) else out
        if isinstance(out, Tensor) and not finite(out):
            found.append(f"{name} ({type(part).__name__})")

    handles = [
        part.register_forward_hook(lambda part, given, out, name=name: look(name, part, out))
        for name, part in module.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gradient(pretrainer: nn.Module) -> str:
    """The last parameter whose gradient is not finite, which is where the backward pass met it first."""
    bad = [name for name, p in pretrainer.named_parameters() if p.grad is not None and not finite(p.grad)]
    return f"the forward pass is finite, but the gradient of {bad[-1]} is not" if bad else ""


def finite(x: Tensor) -> bool:
    """Whether all its numbers are; of a shared tensor those that lie on this rank."""
    return not x.is_floating_point() or bool(local(x).isfinite().all())
