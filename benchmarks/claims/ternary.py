"""Ternary weights with 8-bit inputs from the first step, or after a start in full precision.

Nielsen et al. 2025, arXiv:2502.11895, on a language model over bytes of prose, with BitNet b1.58's rounding (arXiv:2402.17764) of
all linear layers in blocks. All arms take as many steps, on the same texts in the same order and from the same first weights; the
moments of the optimizer are kept at the switch, which comes at once or by degrees. The figure is minus the bits per byte of
documents that no arm has seen; full precision is beside it. The spike of a switch is the largest mean of the training loss over
SMOOTH steps after it, less that before it, in bits.

    python -m benchmarks.claims.ternary [--quick]
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from benchmarks.claims import trial
from benchmarks.claims.prose import members, prose
from benchmarks.claims.sltrain import BATCH, LENGTH, TEXTS, bits, writer
from headwater.forms import Form, Ternary
from headwater.model import Model
from headwater.objectives import Causal
from headwater.objectives.objective import Batch, Term
from headwater.training.schedules import Points, Step

STEPS, RATE, SWITCH, SMOOTH = 400, 1e-2, 0.2, 5  # chosen on seed 100; the switch as a share of the run


class Told(Causal):
    """Causal prediction that keeps the loss of every step."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.losses: list[float] = []

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        terms = super().forward(model, batch)
        if self.training:
            self.losses.append(float(terms["causal"].total.detach() / terms["causal"].number) / math.log(2))
        return terms


def arms() -> dict[str, list[Form]]:
    """Name -> forms of the weights in blocks, whose parameters have the same names and so the same start."""
    return {
        "full precision": [Ternary(strength=0.0)],
        "ternary": [Ternary()],
        "switch at once": [Ternary(strength=Step(0.0, 1.0, SWITCH))],
        "switch by degrees": [Ternary(strength=Points([(SWITCH, 0.0), (2 * SWITCH, 1.0)]))],
    }


def spike(losses: Sequence[float]) -> float:
    """How far the loss goes up after the switch."""
    smooth = [statistics.mean(losses[i : i + SMOOTH]) for i in range(len(losses) - SMOOTH + 1)]
    switch = int(SWITCH * len(losses))
    return max(smooth[switch:]) - smooth[max(0, switch - SMOOTH)]


def learned(seed: int, forms: Sequence[Form], steps: int, rate: float = RATE) -> tuple[Model, list[float]]:
    """A model trained on prose, and its losses in bits."""
    model = writer(forms)
    with trial.written(members(prose(seed, LENGTH - 1)[0][:TEXTS])) as shards:
        trained = trial.pretrain(model, Told, shards, steps, seed, BATCH, rate)
    return model.eval(), trained.objective.losses  # type: ignore[return-value]


def main() -> None:
    """Print minus bits per byte of every arm and seed, and the claim as a line of JSON."""
    quick = trial.options(__doc__ or "")
    found: dict[str, list[float]] = {}
    spikes: dict[str, list[float]] = {}
    for seed in range(2 if quick else 3):
        for name, forms in arms().items():
            model, losses = learned(seed, forms, 20 if quick else STEPS)
            found.setdefault(name, []).append(-bits(model, prose(seed, LENGTH - 1)[1][:1024]))
            spikes.setdefault(name, []).append(round(spike(losses), 3))
    trial.verdict(
        "ternary",
        "full precision first and ternary weights then end lower than ternary weights from the first step",
        "- bits per byte of held-out documents",
        found,
        "switch at once",
        "ternary",
        quick,
        spikes={name: values for name, values in spikes.items() if name.startswith("switch")},
    )


if __name__ == "__main__":
    main()
