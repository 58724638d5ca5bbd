"""A mixture of denoisers lies between its specialists on both of their tasks (UL2, Tay et al. 2022, arXiv:2205.05131).

As in span_corruption, with a third model of the same size, prose and steps: short spans (R), long and many ones (X) and the rest of
a text (S), each told by a mode token. It is asked for gaps in mode R and to continue in mode S. The figure is the smaller of two
advantages in bits per byte: at filling in over causal prediction, and at continuing over span corruption; the specialists of the
two tasks stand beside it.

    python -m benchmarks.claims.ul2 [--quick]
"""

from __future__ import annotations

from functools import partial

from benchmarks.claims import trial
from benchmarks.claims.span_corruption import LAST, MEAN, RATE, STEPS, held_out, learned, specialists, written
from headwater.objectives import Denoising
from headwater.objectives.noise import Prefix, SpanCorruption

MIXTURE = {
    "r": SpanCorruption(RATE, MEAN, mode=0),
    "x": SpanCorruption(0.5, 8.0, mode=1),
    "s": Prefix((0.0, 1.0), mode=2),
}


def main() -> None:
    """Print bits per arm and seed, and the claim as a line of JSON."""
    quick = trial.options(__doc__ or "")
    arms: dict[str, list[float]] = {}
    for seed in range(2 if quick else 3):
        batch, steps = held_out(seed), 10 if quick else STEPS
        model = learned(seed, partial(Denoising, denoisers=MIXTURE), steps)
        fill, go_on = (written(model, batch, how, MIXTURE) for how in (MIXTURE["r"], Prefix((LAST, LAST), mode=2)))
        found = specialists(seed, steps, batch) | {"filling in, mixture": -fill, "continuing, mixture": -go_on}
        filling, continuing = -fill - found["filling in, causal"], -go_on - found["continuing, spans"]
        for name, value in (found | {"smaller advantage": min(filling, continuing), "none": 0.0}).items():
            arms.setdefault(name, []).append(value)
    trial.verdict(
        "ul2",
        "one mixture of denoisers fills gaps better than causal prediction, and continues better than span corruption",
        "- bits per byte of held-out documents; the smaller of both advantages",
        arms,
        "smaller advantage",
        "none",
        quick,
    )


if __name__ == "__main__":
    main()
