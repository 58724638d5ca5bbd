"""A constant rate and the mean of the last weights end where a rate that decays ends (LAWA, Kaddour 2022, arXiv:2209.14981).

English prose, byte by byte, split by document; one model, one peak rate, the same steps and order for all. The control's rate falls
to zero along a half cosine. The other run keeps its rate to the end, and the weights of its last third, taken every few steps, are
averaged. Beside them the last weights of that run as they are, which the noise of the large steps has left worse.

    python -m benchmarks.claims.averaging [--quick]
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from benchmarks.claims import trial
from benchmarks.claims.prose import members, prose
from headwater.modalities import Text
from headwater.model import Model
from headwater.objectives import Causal
from headwater.pretrainer import Pretrainer
from headwater.tokens import Tokens
from headwater.training.averaging import Average, kept
from headwater.training.schedules import WSD
from headwater.trunk import Trunk

LENGTH, BATCH = 64, 16
STEPS, RATE, LAST, EVERY = 700, 4e-3, 0.3, 10  # chosen on seed 100


def constant(progress: float) -> float:
    """1 after a warm-up as Cosine has it."""
    return min(1.0, progress / 0.1)


def run(seed: int, shards: str, steps: int, schedule: Callable[[float], float], average: Average | None = None) -> Pretrainer:
    """What was trained."""
    model = Model({"text": Text(Trunk(64, 2, 2, "rotary"), length=LENGTH)})
    watch = [average] if average else []
    return trial.pretrain(model, Causal, shards, steps, seed, BATCH, RATE, schedule=schedule, callbacks=watch)


@torch.no_grad()
def bits(model: Model, texts: Tokens) -> float:
    """Minus bits per byte of held-out passages."""
    objective, total, number = Causal(model), 0.0, 0
    for start in range(0, len(texts.x), 128):
        piece = texts.map(lambda f, s=start: f[s : s + 128])  # type: ignore[misc]
        term = objective(model, objective.task({"text": piece, "seed": torch.arange(len(piece.x))}))["causal"]
        total, number = total + float(term.total), number + int(term.number)
    return -total / number / math.log(2)


def arms(seed: int, steps: int) -> dict[str, float]:
    """Minus bits per byte of every arm."""
    known, unknown = prose(seed, LENGTH - 1)
    with trial.written(members(known[:16000])) as shards:
        decayed = run(seed, shards, steps, WSD(warmup=0.1, decay=LAST))
        flat = run(seed, shards, steps, constant, Average(momentum=1.0, every=EVERY, start=1 - LAST))
    texts = trial.signals(decayed.backbone.encoder("text").reader, members(unknown[:1024]))
    return {
        "decayed": bits(decayed.backbone, texts),
        "constant": bits(flat.backbone, texts),
        "constant, averaged": bits(kept(flat).eval(), texts),
    }


def main() -> None:
    """Print a row per arm and the claim as a line of JSON."""
    quick = trial.options(__doc__ or "")
    found: dict[str, list[float]] = {}
    for seed in range(2 if quick else 3):
        for arm, value in arms(seed, 20 if quick else STEPS).items():
            found.setdefault(arm, []).append(value)
    claim = "the mean of the last weights of a constant rate is at least as good as the end of a decayed one"
    trial.verdict("averaging", claim, "minus bits per byte of held-out prose", found, "constant, averaged", "decayed", quick)


if __name__ == "__main__":
    main()
