"""I-JEPA: who only predicts features learns features that tell pictures apart (Assran et al. 2023, arXiv:2301.08243).

Handwritten digits (scikit-learn's 1,797): 1,297 are learned from without labels, by Latent with two hidden blocks. The ten nearest
of these by pooled features then name each of the other 500. The control is the same encoder with its first weights.

    python -m benchmarks.claims.jepa_knn [--quick]
"""

from __future__ import annotations

from functools import partial

from benchmarks.claims.mae_labels import TEST, made
from benchmarks.claims.trial import digits, features, knn, options, pretrain, rank, signals, verdict, written
from headwater.objectives import Latent
from headwater.objectives.masks.policies import Blocks
from headwater.training.schedules import HalfCosine

STEPS = 800  # like all settings chosen on seed 100 without the test pictures


def main() -> None:
    """Print a row per arm and the claim as a line of JSON."""
    quick = options(__doc__ or "")
    members, labels = digits()
    pictures, digit = signals(made().encoder("image").reader, members), labels.tolist()
    objective = partial(Latent, policy=Blocks((0.15, 0.25), (0.75, 1.5)), ratio=0.25, targets=2, momentum=HalfCosine(0.99, 1.0))
    arms: dict[str, list[float]] = {"I-JEPA": [], "first weights": []}
    ranks: dict[str, list[float]] = {arm: [] for arm in arms}
    with written(members[:-TEST]) as shards:
        for seed in range(2 if quick else 4):
            for arm, steps in {"I-JEPA": 30 if quick else STEPS, "first weights": 0}.items():
                model = made()
                pretrain(model, objective, shards, steps, seed, batch_size=128)
                x = features(model, "image", pictures)
                arms[arm].append(knn(x[:-TEST], digit[:-TEST], x[-TEST:], digit[-TEST:]))
                ranks[arm].append(round(rank(x[-TEST:]), 1))
    pixels = pictures.x.flatten(1)
    verdict(
        "jepa_knn",
        "nearest neighbours by features of I-JEPA beat those by first weights",
        "accuracy on 500 digits",
        arms,
        "I-JEPA",
        "first weights",
        quick,
        rank=ranks,
        pixels=knn(pixels[:-TEST], digit[:-TEST], pixels[-TEST:], digit[-TEST:]),
    )


if __name__ == "__main__":
    main()
