"""V-Pretraining on a toy: one of two families of views destroys what is wanted, and feedback turns the learner away from it.

Handwritten digits on grounds of any grey. A contrastive learner draws one family of views per step. Two views of "shade" show most
of a picture in other brightness and contrast: what they share is the digit. Two views of "cut" show a small part each: what they
share is the ground, and the digit is lost. The designer has one share per family, which begin equal, and does not know what they
do. Feedback: 15 % of the pictures with their digits; measured is a linear probe of digits on 500 others. Controls: equal shares
(plain, also for as long as V-Pretraining takes), a designer that moves at random, feedback with shuffled labels. Reference: an
oracle that learns from "shade" alone.

The designer waits for 100 steps: before, the feedback's gradient does not tell the families apart (seed 100).

    python -m benchmarks.claims.vpretraining.toy [--quick]
"""

from __future__ import annotations

from functools import partial

from benchmarks.claims import trial
from benchmarks.claims.vpretraining.grounds import Run, asked, report
from benchmarks.claims.vpretraining.steering import Steering
from headwater.model import Model
from headwater.objectives import Contrastive, Objective, Weighted
from headwater.objectives.designers import PartWeights
from headwater.objectives.weighted import Draw
from headwater.view import View

STEPS, AFTER = 480, 100
VIEWS = {"shade": View((0.7, 1.0), strength=1.0), "cut": View((0.03, 0.06))}


def family(name: str, model: Model) -> Objective:
    """Two views of one family, told apart from those of other pictures."""
    a, b = f"image@{name}0", f"image@{name}1"
    return Contrastive(model, a, b, views={a: VIEWS[name], b: VIEWS[name]})


def families(model: Model, turns: Draw | None = None) -> Objective:
    return Weighted(model, {name: partial(family, name) for name in VIEWS}, turns=turns)


def main() -> None:
    """Print every arm and seed, and the claim as a line of JSON."""
    quick = trial.options(__doc__ or "")
    steering = Steering(partial(PartWeights, draw=True), asked("digit"), 150.0, {"every": 4, "after": 0 if quick else AFTER})
    plain, best = partial(families, turns=Draw()), partial(family, "shade")
    run = Run(families, plain, best, {"grey": 1.0}, ("grey",), 12 if quick else STEPS, 2e-3, steering)
    report("vpretraining_toy", "feedback turns a learner away from views that destroy what is wanted", run, quick)


if __name__ == "__main__":
    main()
