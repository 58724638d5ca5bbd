"""V-Pretraining on masked pictures: could a few labels tell what should be asked of hidden patches? Not this way.

Handwritten digits on grounds of any grey. A masked autoencoder (He et al. 2021, arXiv:2111.06377) is asked for hidden patches in
two ways at once: for their values, in which the ground is what matters most, and for their values with mean 0 and deviation 1,
which are strokes alone. The designer has one weight per target, equal at first. Feedback: 15 % of the pictures with their digits;
measured is a linear probe of digits on 500 others. Controls: equal weights (plain, also for as long as V-Pretraining takes), a
designer that moves at random, feedback with shuffled labels. Reference: an oracle that is asked for strokes alone.

Seen on seed 100: plain .712, random .740, shuffled .784, V-Pretraining .616, oracle .838. There is much to win, and the value does
not show it: along a plain run the cosine between the feedback's gradient and that of either target is between -.04 and .04, +- .04
to .15, in windows of 80 steps, no other for shuffled labels, with Adam's scale of each weight or without. At half the learning
rate and with an easier label (closed loops) it is no better. So the designer goes where chance sends it, and where it sends it
matters. The probe of 194 labelled pictures explains 2 to 8 % of the digits, so little of the feedback's gradient is about them;
and masked prediction changes what pooled features say slowly, over hundreds of steps.

    python -m benchmarks.claims.vpretraining.vision_mae [--quick]
"""

from __future__ import annotations

from functools import partial

from benchmarks.claims import trial
from benchmarks.claims.vpretraining.grounds import Run, asked, report
from benchmarks.claims.vpretraining.steering import Steering
from headwater.model import Model
from headwater.objectives import Masked, Objective, Weighted
from headwater.objectives.designers import PartWeights
from headwater.objectives.targets.target import Values

STEPS, AFTER = 500, 60
NORMALIZE = {"level": False, "stroke": True}


def target(name: str, model: Model) -> Objective:
    """Masked autoencoding of one target."""
    return Masked(model, ratio=0.6, depth=1, width=48, target=partial(Values, normalize=NORMALIZE[name]))


def targets(model: Model) -> Objective:
    return Weighted(model, {name: partial(target, name) for name in NORMALIZE})


def main() -> None:
    """Print every arm and seed, and the claim as a line of JSON."""
    quick = trial.options(__doc__ or "")
    steering = Steering(PartWeights, asked("digit"), 100.0, {"every": 5, "after": 0 if quick else AFTER})
    best, steps = partial(target, "stroke"), 12 if quick else STEPS
    run = Run(targets, targets, best, {"grey": 1.0}, ("grey",), steps, 2e-3, steering)
    report("vpretraining_vision_mae", "a few labels tell what should be asked of hidden patches", run, quick)


if __name__ == "__main__":
    main()
