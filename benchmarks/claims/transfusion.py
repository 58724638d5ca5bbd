"""One set of weights writes titles and paints pictures nearly as well as two specialists do (Transfusion).

A model is trained on titles and pictures at once: next ids and flow, in one sequence and one pass. Each specialist is the same
model, with the same start, batches, steps and rate, of which only one of the two losses counts. The measure is the held-out loss
of each task, joint over specialist; the claim allows 5 % more. Pictures are split by title: no concept is on both sides.
After Zhou et al. 2024, arXiv:2408.11039.

    python -m benchmarks.claims.transfusion [--quick]
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import torch

from benchmarks.claims import trial
from headwater.fusion import JointTokens
from headwater.modalities import Image, Text
from headwater.model import Model
from headwater.objectives import Transfusion
from headwater.objectives.objective import Batch, Term
from headwater.process import Process
from headwater.trunk import Trunk

TRAIN = "embedded:things-train-*.tar"
TERMS = {"causal": "titles", "flow": "pictures"}
ALLOWED, WEIGHT = 1.05, 20.0


class Only(Transfusion):
    """Of the two losses only one counts."""

    def __init__(self, model: Model, kept: str) -> None:
        super().__init__(model)
        self.kept = kept

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        return {n: t if n == self.kept else t._replace(weight=0.0) for n, t in super().forward(model, batch).items()}


def made() -> Model:
    """One trunk for both; encoders are stems and heads."""
    encoders = {"text": Text(Trunk(128, 0, 4), length=32), "image": Image(Trunk(128, 0, 4), 32, 8)}
    joint = partial(JointTokens, trunk=Trunk(128, 4, 4, qk_norm=True))
    return Model(encoders, joint, processes={"image": Process(predicts="signal")})  # type: ignore[arg-type]


def split() -> tuple[list[trial.Members], list[trial.Members]]:
    """Training and held-out samples, every eighth title on the other side."""
    found = trial.samples(TRAIN)
    held = set(sorted({m["txt"] for m in found})[::8])
    return [m for m in found if m["txt"] not in held], [m for m in found if m["txt"] in held]


@torch.no_grad()
def losses(model: Model, batch: dict[str, Any]) -> dict[str, float]:
    """Held-out loss of both tasks: titles alone, pictures behind their titles; the same noise for every model."""
    objective = Transfusion(model, first=0.0)
    terms = objective(model.eval(), objective.task(batch))
    return {name: float(terms[name].total / terms[name].number) for name in TERMS}


def main() -> None:
    """Train all arms of all seeds and say whether the claim holds."""
    quick = trial.options(__doc__)
    steps, seeds = (10, range(2)) if quick else (300, range(1, 4))  # the weight was chosen on seed 100, after a look at seed 0
    train, test = split()
    model, start = made(), time.perf_counter()
    held = {name: trial.signals(model.readers[name], test) for name in ("text", "image")}
    batch = {**held, "seed": torch.arange(len(test)), "sample": torch.arange(len(test))}
    arms: dict[str, list[float]] = {}
    with trial.written(train) as shards:
        for seed in seeds:
            found = {}
            objectives = {"joint": partial(Transfusion, weight=WEIGHT), **{name: partial(Only, kept=name) for name in TERMS}}
            for arm, objective in objectives.items():
                model = made()
                trial.pretrain(model, objective, shards, steps, seed, rate=1e-3)
                found[arm] = losses(model, batch)
            for name, what in TERMS.items():
                arms.setdefault(f"joint {what}", []).append(found["joint"][name])
                arms.setdefault(f"specialist {what}", []).append(found[name][name])
            print(f"seed {seed}, {time.perf_counter() - start:.0f} s: {found}", flush=True)
    share = {w: [a / b for a, b in zip(arms[f"joint {w}"], arms[f"specialist {w}"], strict=True)] for w in TERMS.values()}
    margin = {"allowed": [ALLOWED] * len(seeds), "worse of both": [max(pair) for pair in zip(*share.values(), strict=True)]}
    claim = "one set of weights stays within 5 % of both specialists"
    figures = {what: round(statistics.mean(values), 4) for what, values in share.items()}
    trial.verdict(
        "transfusion",
        claim,
        "held-out loss, joint over specialist (smaller is better)",
        margin,
        "allowed",
        "worse of both",
        quick,
        steps=steps,
        share=figures,
        losses={arm: [round(v, 4) for v in values] for arm, values in arms.items()},
    )


if __name__ == "__main__":
    main()
