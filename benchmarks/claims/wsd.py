"""A constant rate that is annealed where one likes reaches what a cosine of that length reaches (WSD, arXiv:2404.06395).

One run with warm-up, a constant rate and a decay leaves checkpoints in its constant part. From the early one the decay of a run of
half the length branches off; the late one goes on to the end. Both are compared with cosine runs made for exactly these lengths, on
real English byte by byte, nats per byte of documents that were never seen. The figure is the smaller of two margins: how far each
annealed loss stays below 101 % of its cosine run's. It is -1 unless the branch is, bit for bit, the model of one run of half the
length without any interruption. The run whose rate stays constant to the end is the control that shows what annealing brings.

    python -m benchmarks.claims.wsd [--quick]
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.claims import trial
from benchmarks.claims.domains import Texts, domains, learned, nats, writer, written
from headwater.training.schedules import WSD, Cosine

STEPS, RATE = 768, 3e-3  # like all settings chosen on seed 100
WARMUP, DECAY, END = 1 / 32, 1 / 4, 0.0


class Saving(pl.Callback):
    """Checkpoints after these steps."""

    def __init__(self, folder: str, steps: Sequence[int]) -> None:
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(f"{self.folder}/{trainer.global_step}.ckpt")


def losses(texts: Texts, shards: dict[str, str], seed: int, steps: int) -> dict[str, float]:
    """Of every run, and the smaller margin."""
    half = steps // 2

    def run(length: int, schedule: Any, **options: Any) -> torch.nn.Module:
        return learned(writer(seed), shards, {"old": 1.0}, length, seed, RATE, schedule, **options).backbone

    def short() -> WSD:
        return WSD(2 * WARMUP, DECAY, END)  # as many steps of warm-up, of a run of half the length

    with tempfile.TemporaryDirectory() as folder:
        early = round(half * (1 - DECAY))
        whole = run(steps, WSD(WARMUP, DECAY, END), callbacks=[Saving(folder, [early])])
        branch = run(half, short(), resume=f"{folder}/{early}.ckpt")
    runs = {
        "cosine, half": run(half, Cosine(2 * WARMUP, END)),
        "annealed, half": branch,
        "cosine": run(steps, Cosine(WARMUP, END)),
        "annealed": whole,
        "constant": run(steps, WSD(WARMUP, 0.0)),
    }
    straight = run(half, short()).state_dict()
    found = {name: nats(model, texts["old test"]) for name, model in runs.items()}  # type: ignore[arg-type]
    margins = [1.01 - found[f"annealed{x}"] / found[f"cosine{x}"] for x in ("", ", half")]
    equal = all(torch.equal(p, straight[name]) for name, p in branch.state_dict().items())
    return found | {"smaller margin": min(margins) if equal else -1.0}


def main() -> None:
    """Print losses per arm and seed, and the claim as a line of JSON."""
    quick = trial.options(__doc__ or "")
    arms: dict[str, list[float]] = {}
    for seed in range(2 if quick else 3):
        texts = domains(seed, quick)
        with written(texts) as shards:
            found = losses(texts, shards, seed, 32 if quick else STEPS)
        for name, value in (found | {"none": 0.0}).items():
            arms.setdefault(name, []).append(value)
    trial.verdict(
        "wsd",
        "annealed from a constant rate, a run is as good as a cosine made for its length",
        "nats per byte, and the smaller of two margins",
        arms,
        "smaller margin",
        "none",
        quick,
    )


if __name__ == "__main__":
    main()
