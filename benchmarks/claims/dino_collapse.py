"""DINO collapses unless the teacher's answers are balanced, by a centre or by Sinkhorn and Knopp (arXiv:2104.14294, figure 7).

Pictures of things, views by the real reader, equal seeds and steps in every arm; features of held-out pictures. Reported seeds
are 0 to 2; everything else was chosen on seed 10.

    python -m benchmarks.claims.dino_collapse [--quick]
"""

from __future__ import annotations

import math
from functools import partial

import torch

from benchmarks.claims import trial
from headwater.modalities import Image
from headwater.model import Model
from headwater.objectives import SelfDistillation
from headwater.objectives.comparison import Prototypes
from headwater.tokens import Tokens
from headwater.trunk import Trunk
from headwater.view import View

ARMS = ("centre", "sinkhorn", "none")
PROTOTYPES = 256


def model() -> Model:
    return Model({"image": Image(Trunk(64, depth=2, heads=2, registers=1), size=32, patch=8, pooling="class")})


def trained(balance: str, seed: int, steps: int) -> tuple[Model, SelfDistillation]:
    compare = partial(Prototypes, prototypes=PROTOTYPES, sizes=[192, 192, 64], balance=balance)  # type: ignore[arg-type]
    objective = partial(SelfDistillation, compare=compare, smalls=2, small=View((0.1, 0.5), 0.5, 1.0), momentum=0.98)
    made = trial.pretrain(model(), objective, "embedded:things-train-*.tar", steps, seed, rate=1e-3)
    return made.backbone, made.objective  # type: ignore[return-value]


@torch.no_grad()
def answers(objective: SelfDistillation, pictures: Tokens) -> dict[str, float]:
    """Of the teacher's answers to pictures: the mean of their entropies and the entropy of their mean, as shares of log K, and
    their difference in nats, which is what an answer tells of its picture. Both ways of collapse, to one prototype and to all
    alike, make it 0."""
    taught = objective.teacher.module  # type: ignore[union-attr]
    x = trial.features(taught["model"], "image", pictures)  # type: ignore[arg-type, index]
    shares = objective.compare.targets(taught["head"](x), 1.0)  # type: ignore[operator, index]
    each, mean = (float(torch.special.entr(p).sum(-1).mean()) for p in (shares, shares.mean(0)))
    return {"entropy": each / math.log(PROTOTYPES), "used": mean / math.log(PROTOTYPES), "told": mean - each}


def main() -> None:
    quick = trial.options(__doc__ or "")
    seeds, steps = ([10], 30) if quick else (range(3), 200)
    reader = model().encoder("image").reader
    train, held = (trial.samples(f"embedded:things-{part}-*.tar") for part in ("train", "seen"))
    seen, other = (trial.signals(reader, part) for part in (train, held))
    labels, truth = ([fact["category"] for fact in trial.facts(part)] for part in (train, held))
    figures: dict[str, dict[str, list[float]]] = {}
    for seed in seeds:
        for arm in (*ARMS, "untrained"):
            net, objective = trained(arm if arm in ARMS else "centre", seed, steps if arm in ARMS else 1)
            x = trial.features(net, "image", other)
            found = answers(objective, other) | {"rank": trial.rank(x)}
            found["knn"] = trial.knn(trial.features(net, "image", seen), labels, x, truth)
            for name, value in found.items():
                figures.setdefault(name, {}).setdefault(arm, []).append(value)
            print(f"{arm:>10} {seed}", {name: round(value, 3) for name, value in found.items()}, flush=True)
    trial.verdict(
        "dino_collapse",
        "the teacher's answers collapse unless they are balanced",
        "what an answer tells of a held-out picture, in nats",
        figures.pop("told"),
        "centre",
        "none",
        quick,
        figures={name: {arm: [round(v, 4) for v in values] for arm, values in arms.items()} for name, arms in figures.items()},
    )


if __name__ == "__main__":
    main()
