"""Sparse plus low-rank weights against low-rank ones of as many parameters, and against full rank (SLTrain).

Han et al. 2024, arXiv:2406.02214, on a language model over bytes of prose: the same start of everything else, the same texts in the
same order, as many steps. The form is that of all linear layers in blocks. The low-rank control has a rank that gives it no fewer
parameters than the other one has, and starts with the product's deviation that of the full weight. The figure is minus the
bits per byte of documents that no arm has seen; so the claim is that some entries at random places are worth more than the
ranks that they cost. `gap_closed` is the share of the way from the control to full rank. Settings were chosen on seed 100.

    python -m benchmarks.claims.sltrain [--quick]
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from benchmarks.claims import trial
from benchmarks.claims.prose import members, prose
from headwater.forms import Form, LowRank, SparseLowRank
from headwater.modalities import Text
from headwater.model import Model
from headwater.objectives import Causal
from headwater.objectives.objective import cross_entropy
from headwater.trunk import Trunk

LENGTH, TEXTS, STEPS, BATCH = 48, 12000, 400, 48
RANK, DENSITY, LOW = 6, 0.06, 9  # of the sparse and low-rank weights; rank of the control
RATES = {"full rank": 2e-2, "low rank": 2e-2, "sparse + low rank": 4e-2}


def writer(forms: Sequence[Form]) -> Model:
    """A language model over bytes."""
    trunk = Trunk(64, 2, 2, "rotary", norm="rms", activation="silu", gated=True, mlp_ratio=2.5, bias="none")
    return Model({"text": Text(trunk, length=LENGTH)}, forms=forms)


def arms() -> dict[str, list[Form]]:
    """Name -> forms of the weights in blocks; new ones, for layers belong to a model."""
    return {
        "full rank": [],
        "low rank": [LowRank(rank=LOW)],
        "sparse + low rank": [SparseLowRank(rank=RANK, density=DENSITY)],
    }


@torch.no_grad()
def bits(model: Model, texts: Sequence[str]) -> float:
    """Per byte of the texts, each predicted from those before it."""
    reader, causal, total, number = model.encoder("text").reader, Causal(model), 0.0, 0
    for start in range(0, len(texts), 256):
        batch = {"text": trial.signals(reader, members(texts[start : start + 256]))}
        task = causal.task(batch | {"seed": torch.arange(len(batch["text"].x))})
        cost = cross_entropy(causal.predict(model, task), task["answer"])[task["asked"]]
        total, number = total + float(cost.double().sum()), number + cost.numel()
    return total / number / math.log(2)


def learned(seed: int, forms: Sequence[Form], steps: int, rate: float) -> Model:
    """A model trained on prose."""
    model = writer(forms)
    with trial.written(members(prose(seed, LENGTH - 1)[0][:TEXTS])) as shards:
        trial.pretrain(model, Causal, shards, steps, seed, BATCH, rate)
    return model.eval()


def size(model: Model) -> int:
    """Parameters of the blocks."""
    return sum(p.numel() for n, p in model.named_parameters() if ".blocks." in n)


def main() -> None:
    """Print minus bits per byte of every arm and seed, and the claim as a line of JSON."""
    quick = trial.options(__doc__ or "")
    found: dict[str, list[float]] = {}
    for seed in range(2 if quick else 3):
        for name, forms in arms().items():
            model = learned(seed, forms, 10 if quick else STEPS, RATES[name])
            found.setdefault(name, []).append(-bits(model, prose(seed, LENGTH - 1)[1][:1024]))
    trial.verdict(
        "sltrain",
        "sparse plus low-rank weights learn more than low-rank ones of as many parameters",
        "- bits per byte of held-out documents",
        found,
        "sparse + low rank",
        "low rank",
        quick,
        gap_closed=[round((ours - low) / (full - low), 3) for full, low, ours in zip(*found.values(), strict=True)],
        parameters={name: size(writer(forms)) for name, forms in arms().items()},
    )


if __name__ == "__main__":
    main()
