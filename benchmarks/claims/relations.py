"""Three domains of pictures with titles, one after the other, and no old data: relations that are kept forget less.

A model of pictures and titles learns by contrast on animals and food, then on objects, then on places and people's doings. Naive
continuation loses much of the first domain. With a second term the similarities of pictures and titles within a batch of new data
shall be those that the model of the stage before gave (Mod-X, Ni et al. 2023, arXiv:2305.07437; CTP, Zhu et al. 2023,
arXiv:2308.07146). Beside it: a pull of all weights to the start of each stage (L2-SP, arXiv:1802.01483).

R@5 on pictures of another vendor with the same titles (things-seen), mean of both directions, within the pictures of a domain. The
figure is the smaller of two margins: by how much the drop of the first domain's recall, from after its own stage to the end, is
below half of the naive drop, as a share of that; and how far the last domain's recall stays above 95 % of the naive one.

    python -m benchmarks.claims.relations [--quick]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial

from benchmarks.claims import trial
from headwater import init
from headwater.modalities import Image, Text
from headwater.model import Model
from headwater.objectives import Anchored, Contrastive, Objective, Related, Weighted
from headwater.trunk import Trunk

DOMAINS = [{"animals & nature", "food & drink"}, {"objects"}, {"travel & places", "activities", "people & body"}]
FIRST, NEXT, RATE = 150, 100, 1e-3  # like all settings chosen on seed 100
KEPT, PULL = 10.0, 0.01
PAIR = partial(Contrastive, a="image", b="text")
RELATED = partial(Related, teacher="start", a="image", b="text", temperature=0.05, teacher_temperature=0.05)
ARMS: dict[str, Callable[[Model], Objective]] = {
    "naive": PAIR,
    "relations": partial(Weighted, parts={"pair": PAIR, "kept": RELATED}, weights={"kept": KEPT}),
    "pull": partial(Weighted, parts={"pair": PAIR, "anchor": Anchored}, weights={"anchor": PULL}),
}


def made(seed: int) -> Model:
    """Encoders and a space that they share."""
    model = Model({"image": Image(Trunk(96, 3, 3), 64, 16), "text": Text(Trunk(96, 2, 3), length=40)}, space=64)
    init.initialise(model, seed, init.Normal())
    return model


def of(domain: set[str], shards: str) -> list[trial.Members]:
    """Samples of some categories."""
    found = trial.samples(shards)
    return [m for m, about in zip(found, trial.facts(found), strict=True) if about["category"] in domain]


def learn(model: Model, objective: Callable[[Model], Objective], members: Sequence[trial.Members], steps: int, seed: int) -> None:
    """One stage, in place."""
    with trial.written(members) as shards:
        trial.pretrain(model, objective, shards, steps, seed, 64, RATE, ["image"], None)


def recall(model: Model, gallery: Sequence[trial.Members]) -> float:
    """R@5, mean of both directions."""
    x, y = (trial.features(model, name, trial.signals(reader, gallery)) for name, reader in model.readers.items())
    return (trial.recall(x, y) + trial.recall(y, x)) / 2


def recalls(seed: int, first: int, following: int) -> dict[str, float]:
    """Of the first domain and the last, after every arm, and the smaller margin."""
    train = [of(domain, "embedded:things-train-*.tar") for domain in DOMAINS]
    seen = [of(domain, "embedded:things-seen-*.tar") for domain in DOMAINS]
    start = made(seed)
    learn(start, PAIR, train[0], first, seed)
    before = recall(start, seen[0])
    found = {"first, at first": before}
    for name, objective in ARMS.items():
        model = deepcopy(start)
        for members in train[1:]:
            learn(model, objective, members, following, seed)
        found |= {f"first, {name}": recall(model, seen[0]), f"last, {name}": recall(model, seen[2])}
    lost = (before - found["first, relations"]) / max(1e-6, before - found["first, naive"])
    return found | {"smaller margin": min(0.5 - lost, found["last, relations"] / max(1e-6, found["last, naive"]) - 0.95)}


def main() -> None:
    """Print recalls per arm and seed, and the claim as a line of JSON."""
    quick = trial.options(__doc__ or "")
    arms: dict[str, list[float]] = {}
    for seed in range(2 if quick else 3):
        found = recalls(seed, 5 if quick else FIRST, 5 if quick else NEXT)
        for name, value in (found | {"none": 0.0}).items():
            arms.setdefault(name, []).append(value)
    trial.verdict(
        "relations",
        "relations that are kept halve what is forgotten of the first of three domains",
        "R@5, and the smaller of two margins",
        arms,
        "smaller margin",
        "none",
        quick,
    )


if __name__ == "__main__":
    main()
