"""I-JEPA: an encoder that only predicted features knows more of what a picture shows (Assran et al. 2023, arXiv:2301.08243).

Drawings of the embedded things are learned from without labels, by Latent with four hidden blocks. A logistic regression on frozen
pooled features of the training drawings then names the category of held-out drawings, of another artist. The control is the same
encoder with its first weights. Accuracy of the ten nearest neighbours and the effective rank stand in the line of JSON.

    python -m benchmarks.claims.jepa_features [--quick]
"""

from __future__ import annotations

from functools import partial

from benchmarks.claims import trial
from headwater import init
from headwater.modalities import Image
from headwater.model import Model
from headwater.objectives import Latent
from headwater.objectives.masks.policies import Blocks
from headwater.training.schedules import HalfCosine
from headwater.trunk import Trunk

TRAIN, HELD_OUT = "embedded:things-train-*.tar", ("embedded:things-seen-*.tar", "embedded:things-unseen-*.tar")


def encoder(seed: int) -> Model:
    """A small vision transformer with first weights of its own."""
    model = Model({"image": Image(Trunk(128, 3, 4), size=64, patch=16)})
    init.initialise(model, seed, init.Normal())
    return model


def ijepa(seed: int, steps: int) -> Model:
    """The encoder after pretraining."""
    model = encoder(seed)
    blocks = partial(Latent, policy=Blocks((0.2, 0.2), (0.75, 1.5)), ratio=0.2, targets=4, momentum=HalfCosine(0.996, 1.0))
    trial.pretrain(model, blocks, TRAIN, steps, seed, views=["image"])
    return model


def main() -> None:
    """Print accuracies per arm and seed, and the claim as a line of JSON."""
    quick = trial.options(__doc__ or "")
    seeds, steps = (range(2), 20) if quick else (range(5), 300)
    known = trial.samples(TRAIN)
    asked = [sample for shards in HELD_OUT for sample in trial.samples(shards)]
    labels, truth = ([fact["category"] for fact in trial.facts(part)] for part in (known, asked))
    reader = encoder(0).readers["image"]
    pictures, others = trial.signals(reader, known), trial.signals(reader, asked)
    arms: dict[str, list[float]] = {"I-JEPA": [], "first weights": []}
    neighbours: dict[str, list[float]] = {name: [] for name in arms}
    ranks: dict[str, list[float]] = {name: [] for name in arms}
    for seed in seeds:
        for name, model in {"I-JEPA": ijepa(seed, steps), "first weights": encoder(seed)}.items():
            x, y = (trial.features(model, "image", part) for part in (pictures, others))
            arms[name].append(trial.probe(x, labels, y, truth))
            neighbours[name].append(round(trial.knn(x, labels, y, truth), 4))
            ranks[name].append(round(trial.rank(y), 1))
    trial.verdict(
        "jepa_features",
        "a linear probe on features of I-JEPA beats one on those of first weights",
        "probe accuracy, held-out drawings",
        arms,
        "I-JEPA",
        "first weights",
        quick,
        knn=neighbours,
        rank=ranks,
        pixels=round(trial.knn(pictures.x.flatten(1), labels, others.x.flatten(1), truth), 4),
        majority=round(max(map(truth.count, truth)) / len(truth), 4),
    )


if __name__ == "__main__":
    main()
