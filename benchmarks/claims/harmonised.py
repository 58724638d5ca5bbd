"""Samples with wrong names are found by gradients that pull apart, and left out of training.

A sample is a handwritten digit, its name, and another drawing of the same digit, read row by row; 30 % of the names are
those of other digits. One model is trained by contrast of pictures with names and of pictures with drawings. Where all parts
belong together, both pairs pull the vector of a picture the same way; the cosine between the two gradients tells the wrong ones
(Wu et al. 2022, arXiv:2211.02077). Measured is how often a right sample has a higher cosine than a wrong one, by the model that
was trained on all of them: the area under the curve, of which the claim is that it is above 0.7. Beside it stands what that is
worth: how often held-out pictures are nearest to their name, from training on all; with the gradients of the pairs harmonised; on
those whose cosine is above 0, after a quarter of the run; by both; on as many drawn at random, which is the control; and on the
right ones alone, which nobody knows.

    python -m benchmarks.claims.harmonised [--quick]
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image as Pictures
from torch import Tensor
from torch.nn import functional as F

from benchmarks.claims import trial
from headwater.modalities import Image, Series, Text
from headwater.model import Model
from headwater.objectives import Contrastive, Harmonised
from headwater.objectives.agreeing import Agreeing, agreement
from headwater.objectives.objective import Batch, Objective
from headwater.objectives.probe import Probe
from headwater.objectives.replaced import area
from headwater.pretrainer import Pretrainer
from headwater.trunk import Trunk

WRONG, STEPS, RATE, BATCH, HELD_OUT = 0.3, 200, 2e-3, 64, 497
PAIRS = [("image", "text", 1.0), ("image", "drawing", 1.0)]
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def threshold(progress: float) -> float:
    """All samples stay for a quarter of the run; then those stay whose pairs agree at all."""
    return -1.0 if progress < 0.25 else 0.0


class Drawn(Agreeing):
    """Every sample has the cosine of another one of the batch."""

    def pulls(self, probe: Probe, model: Any, batch: Batch) -> list[Tensor]:
        order = torch.randperm(len(batch["seed"]), generator=torch.Generator().manual_seed(batch["step"]))
        return [g[order] for g in super().pulls(probe, model, batch)]


PLAIN = partial(Contrastive, pairs=PAIRS)
FILTERED = partial(Agreeing, inner=PLAIN, modality="image", threshold=threshold)
ARMS: dict[str, Callable[[Model], Objective]] = {
    "all": PLAIN,
    "harmonised": partial(Harmonised, inner=PLAIN),
    "filtered": FILTERED,
    "both": partial(Harmonised, inner=FILTERED),
    "drawn": partial(Drawn, inner=PLAIN, modality="image", threshold=threshold),
    "right alone": PLAIN,
}


def made() -> Model:
    """Encoders of pictures, names and drawings, and a space that they share."""
    encoders = {
        "image": Image(Trunk(48, 2, 2), 8, 2),
        "text": Text(Trunk(48, 1, 2), length=8),
        "drawing": Series(Trunk(48, 2, 2), channels=8, steps=1, joint=True, scale=16.0),
    }
    return Model(encoders, space=32)  # type: ignore[arg-type]


def planted(seed: int) -> tuple[list[trial.Members], list[bool], list[trial.Members], list[int]]:
    """Samples to train on, which of them have a wrong name; and held-out pictures with their digits."""
    pictures, label = trial.digits()
    drawn, truth = random.Random(seed), label.tolist()
    known = range(HELD_OUT, len(pictures))
    same = {digit: [k for k in known if truth[k] == digit] for digit in range(10)}
    samples, wrong = [], []
    for k in known:
        wrong.append(drawn.random() < WRONG)
        name = drawn.choice([d for d in range(10) if d != truth[k]]) if wrong[-1] else truth[k]
        drawing = pictures[drawn.choice([other for other in same[truth[k]] if other != k])]["png"]
        samples.append({**pictures[k], "txt": DIGITS[name].encode(), "npy": rows(drawing)})
    return samples, wrong, pictures[:HELD_OUT], truth[:HELD_OUT]


def rows(png: bytes) -> bytes:
    """A picture as a series: a moment per row, a channel per column."""
    file = io.BytesIO()
    np.save(file, (255 - np.asarray(Pictures.open(io.BytesIO(png)).convert("L"), np.float32)) / 255 * 16)
    return file.getvalue()


def cosines(run: Pretrainer, samples: list[trial.Members]) -> Tensor:
    """Of every sample, in batches of the size that it was trained with."""
    judge, found = Agreeing(run.backbone, PLAIN, "image"), []
    judge.inner.load_state_dict(run.objective.state_dict())
    signals = {name: trial.signals(reader, samples) for name, reader in run.backbone.readers.items()}
    for start in range(0, len(samples) - BATCH + 1, BATCH):
        batch = {name: t.map(lambda f, s=start: f[s : s + BATCH]) for name, t in signals.items()}  # type: ignore[misc]
        probe = Probe(run, run.backbone, run.call)
        found.append(agreement(judge.pulls(probe, run.backbone, {**batch, "seed": torch.arange(BATCH)})))
    return torch.cat(found)


def accuracy(model: Model, pictures: list[trial.Members], truth: list[int]) -> float:
    """How often a picture is nearest to the name of its digit."""
    names = trial.signals(model.encoder("text").reader, [{"txt": name.encode()} for name in DIGITS])
    x, y = (
        trial.features(model, "image", trial.signals(model.encoder("image").reader, pictures)),
        trial.features(model, "text", names),
    )
    found = (F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T).argmax(1)
    return float((found == torch.tensor(truth)).float().mean())


def arms(seed: int, steps: int) -> dict[str, float]:
    """The area under the curve less 0.7, and the accuracy of every arm."""
    samples, wrong, pictures, truth = planted(seed)
    right = [sample for sample, bad in zip(samples, wrong, strict=True) if not bad]
    found = {}
    for name, objective in ARMS.items():
        with trial.written(right if name == "right alone" else samples) as shards:
            run = trial.pretrain(made(), objective, shards, steps, seed, BATCH, RATE)
        if name == "all":
            score = cosines(run, samples)
            bad = torch.tensor(wrong[: len(score)])
            found["area above 0.7"] = float(area(score, ~bad, torch.ones_like(bad))) - 0.7
        found[f"accuracy, {name}"] = accuracy(run.backbone, pictures, truth)
    return found


def main() -> None:
    """Print a row per arm and the claim as a line of JSON."""
    quick = trial.options(__doc__ or "")
    found: dict[str, list[float]] = {}
    for seed in range(2 if quick else 3):
        for arm, value in (arms(seed, 10 if quick else STEPS) | {"none": 0.0}).items():
            found.setdefault(arm, []).append(value)
    trial.verdict(
        "harmonised",
        "gradients that pull apart tell samples with wrong names (area under the curve above 0.7)",
        "area under the curve less 0.7; accuracy of naming held-out digits",
        found,
        "area above 0.7",
        "none",
        quick,
    )


if __name__ == "__main__":
    main()
