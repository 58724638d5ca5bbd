"""I-JEPA: features of an encoder that only predicted features know what a picture shows (Assran et al. 2023, arXiv:2301.08243).

Drawings of the embedded things are learned from without labels, by Latent as in the recipe ijepa. Then every drawing of the
held-out shards gets the category of its nearest training drawings, by cosine of pooled features. The control is the same encoder
with its first weights; raw pixels stand beside them.

    python -m benchmarks.claims.jepa_knn [--quick]
"""

from __future__ import annotations

from functools import partial
from statistics import mean

from benchmarks.claims import trial
from headwater import init
from headwater.modalities import Image
from headwater.model import Model
from headwater.objectives import Latent
from headwater.objectives.masking import Blocks
from headwater.training.schedules import HalfCosine
from headwater.trunk import Trunk

TRAIN, HELD_OUT = "embedded:things-train-*.tar", ("embedded:things-seen-*.tar", "embedded:things-unseen-*.tar")


def encoder(seed: int) -> Model:
    """A small vision transformer with first weights of its own."""
    model = Model({"image": Image(Trunk(128, 3, 4), size=64, patch=8)})
    init.initialise(model, seed, init.Normal())
    return model


def ijepa(seed: int, steps: int, momentum: float = 0.99, rate: float = 1e-3, **changes) -> Model:
    """The encoder after pretraining."""
    model = encoder(seed)
    settings = {"policy": Blocks((0.2, 0.2), (0.75, 1.5)), "ratio": 0.175, "targets": 4, "momentum": HalfCosine(momentum, 1.0)}
    trial.pretrain(model, partial(Latent, **settings | changes), TRAIN, steps, seed, rate=rate, views=["image"])
    return model


def main() -> None:
    """Print accuracies and ranks per arm and seed, and the claim as a line of JSON."""
    quick = trial.options(__doc__ or "")
    seeds, steps = (range(2), 20) if quick else (range(5), 400)
    known = trial.samples(TRAIN)
    asked = [sample for shards in HELD_OUT for sample in trial.samples(shards)]
    labels, truth = ([fact["category"] for fact in trial.facts(part)] for part in (known, asked))
    reader = encoder(0).readers["image"]
    pictures, others = trial.signals(reader, known), trial.signals(reader, asked)
    arms: dict[str, list[float]] = {"I-JEPA": [], "untrained": [], "pixels": []}
    ranks: dict[str, list[float]] = {"I-JEPA": [], "untrained": []}
    for seed in seeds:
        for name, model in {"I-JEPA": ijepa(seed, steps), "untrained": encoder(seed)}.items():
            x, y = (trial.features(model, "image", part) for part in (pictures, others))
            arms[name].append(trial.knn(x, labels, y, truth))
            ranks[name].append(trial.rank(y))
        arms["pixels"].append(trial.knn(pictures.x.flatten(1), labels, others.x.flatten(1), truth))
    trial.verdict(
        "jepa_knn",
        "features of I-JEPA beat those of first weights at naming the category of a drawing",
        "kNN accuracy, held-out drawings",
        arms,
        "I-JEPA",
        "untrained",
        quick,
        rank={name: round(mean(values), 1) for name, values in ranks.items()},
        majority=round(max(map(truth.count, truth)) / len(truth), 4),
    )


if __name__ == "__main__":
    main()
