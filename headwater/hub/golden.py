"""An input of every modality and the output that it must give: what proves that weights, code and reader belong together."""

from __future__ import annotations

import torch
from torch import Tensor

from headwater.datamodules.collate import collate
from headwater.model import Model
from headwater.tokens import Tokens

TOLERANCE = 1e-3  # of the largest value; between CPU kernels and machines outputs move by about 1e-5


def example(model: Model, name: str) -> Tokens:
    """Two samples of one modality as they come from the loader, always the same."""
    return collate([{name: t} for t in model.readers[name].example(2, 0)], [name])[name]


def golden(model: Model) -> dict[str, Tensor]:
    """The examples of every modality, field by field, and their pooled outputs, (2, dim)."""
    pairs: dict[str, Tensor] = {}
    for name in model.encoders:
        raw = example(model, name)
        pairs |= {f"{name}.{field}": value for field, value in raw._asdict().items() if value is not None}
        pairs[f"{name}.output"] = pooled(model, name, raw)
    return {key: value.contiguous() for key, value in pairs.items()}


@torch.no_grad()
def pooled(model: Model, name: str, raw: Tokens) -> Tensor:
    """(S, dim) of raw tokens, in evaluation mode, on the CPU."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    prepared = model.encoder(name).prepare(raw.map(lambda field: field.to(device)))
    vectors = model.represent({name: prepared})[name].x
    model.train(training)
    return vectors.float().cpu()


def check(model: Model, pairs: dict[str, Tensor]) -> None:
    """ValueError when a modality does not give the recorded output."""
    for name in model.encoders:
        raw = Tokens(**{field: pairs[key] for field in Tokens._fields if (key := f"{name}.{field}") in pairs})
        apart = gap(pooled(model, name, raw), pairs[f"{name}.output"])
        if not apart < TOLERANCE:
            raise ValueError(
                f"the weights of {name} were loaded, but its output differs from the recorded one by {apart:.1e} of its size "
                f"(allowed {TOLERANCE:.0e}); the code of its encoder has changed since the export. "
                "Load it with the version in card.yaml"
            )


def gap(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; infinite where the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
