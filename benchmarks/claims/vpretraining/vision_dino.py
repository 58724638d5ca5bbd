"""V-Pretraining on self-distillation: a few labels tell which views of a picture should be alike.

Handwritten digits on grounds of any grey. DINO (Caron et al. 2021, arXiv:2104.14294) learns, in equal parts, that what a student
says of a view is what its teacher says of another one. Views of "shade" show most of a picture in other brightness and contrast, so
that the digit is what stays; views of "cut" show a small part each, so that the ground is what stays. The designer has one weight
per family, equal at first. Feedback: 15 % of the pictures with their digits; measured is a linear probe of digits on 500 others.
Controls: equal weights (plain, also for as long as V-Pretraining takes), a designer that moves at random, feedback with shuffled
labels. Reference: an oracle that learns from "shade" alone.

    python -m benchmarks.claims.vpretraining.vision_dino [--quick]
"""

from __future__ import annotations

from functools import partial

from benchmarks.claims import trial
from benchmarks.claims.vpretraining.grounds import Run, asked, report
from benchmarks.claims.vpretraining.steering import Steering
from benchmarks.claims.vpretraining.toy import VIEWS
from headwater.model import Model
from headwater.objectives import JointEmbedding, Objective, Weighted
from headwater.objectives.designers import PartWeights
from headwater.objectives.weighted import Draw

STEPS, AFTER = 400, 100


class Family(JointEmbedding):
    """Two views of one family, under names of its own."""

    def __init__(self, model: Model, name: str) -> None:
        super().__init__(model, projector=[128, 128])
        self.needs = tuple(f"image@{name}{i}" for i in range(2))
        self.keys, self.views = {"image": self.needs}, dict.fromkeys(self.needs, VIEWS[name])


def families(model: Model, turns: Draw | None = None) -> Objective:
    return Weighted(model, {name: partial(Family, name=name) for name in VIEWS}, turns=turns)


def main() -> None:
    """Print every arm and seed, and the claim as a line of JSON."""
    quick = trial.options(__doc__ or "")
    steering = Steering(partial(PartWeights, draw=True), asked("digit"), 150.0, {"every": 4, "after": 0 if quick else AFTER})
    plain, best, steps = partial(families, turns=Draw()), partial(Family, name="shade"), 12 if quick else STEPS
    run = Run(families, plain, best, {"grey": 1.0}, ("grey",), steps, 2e-3, steering)
    report("vpretraining_vision_dino", "a few labels tell which views of a picture should be alike", run, quick)


if __name__ == "__main__":
    main()
