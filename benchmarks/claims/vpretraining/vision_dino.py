"""V-Pretraining on self-distillation: could a few labels tell which pictures are worth learning from? Not this way.

Handwritten digits from two sources of equal size, bare or on grounds of any grey. DINO (Caron et al. 2021, arXiv:2104.14294) on
crops tells the latter apart by their grounds, which leaves less to learn about digits. The designer has one weight per source,
equal at first, and the source of each picture, but not what it is. Feedback: 15 % of the bare pictures with their digits; measured
is a linear probe of digits on 500 other bare ones. Controls: the mixture as it is (plain, also for as long as V-Pretraining
takes), a designer that moves at random, feedback with shuffled labels. Reference: an oracle that sees bare pictures alone.

Seen on seed 100, with a quarter of bare pictures and 300 steps: plain .730, random .694, shuffled .694, V-Pretraining .742, oracle
.818. There is something to win, and the value does not show it: along a plain run (with equal sources) the cosine between the
feedback's gradient and that of either source is between -.08 and .06, +- .02 to .2, in windows of 50 steps (once -.3 for the bare
ones, at the end), no higher for the bare ones and no other for shuffled labels, with Adam's scale of each weight or without. What
makes bare pictures better comes over hundreds of steps; no single one of them lowers the feedback's loss. With a quarter of bare
pictures the designer followed the larger source (weight 1.75): a source's value is then a sum over its samples.

    python -m benchmarks.claims.vpretraining.vision_dino [--quick]
"""

from __future__ import annotations

from functools import partial

from benchmarks.claims import trial
from benchmarks.claims.vpretraining.grounds import Run, asked, report
from benchmarks.claims.vpretraining.steering import Steering
from headwater.objectives import SelfDistillation
from headwater.objectives.comparison import Prototypes
from headwater.objectives.designers import SourceWeights
from headwater.view import View

STEPS, AFTER = 300, 40
SHARES = {"bare": 0.5, "grey": 0.5}


def main() -> None:
    """Print every arm and seed, and the claim as a line of JSON."""
    quick = trial.options(__doc__ or "")
    compare = partial(Prototypes, prototypes=256, sizes=[128, 128, 64])
    dino = partial(SelfDistillation, compare=compare, smalls=0, large=View((0.5, 1.0)), momentum=0.98)
    designer = partial(SourceWeights, groups=len(SHARES))
    steering = Steering(designer, asked("digit"), 100.0, {"every": 5, "after": 0 if quick else AFTER})
    run = Run(dino, dino, dino, SHARES, ("bare",), 12 if quick else STEPS, 2e-3, steering)
    report("vpretraining_vision_dino", "a few labels tell which pictures are worth learning from", run, quick)


if __name__ == "__main__":
    main()
