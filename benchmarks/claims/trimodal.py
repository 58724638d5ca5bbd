"""One space for three modalities: a model of pictures, titles and spoken titles retrieves better than models of two of them.

Things have a picture, a title and the title spoken. One model is trained by contrast on all three pairs; the controls are three
models, each on one pair alone, with the same encoders, steps, batches and rate. The measure: R@5 on things-seen (known concepts,
pictures of another vendor, other voices), mean of both directions and of the three pairs, where each control answers for the pair
that it was trained on. things-unseen, new concepts, is printed beside it: for pictures it stays at chance at this size of data.
After Girdhar et al. 2023 (ImageBind, arXiv:2305.05665) and Guzhov et al. 2021 (AudioCLIP, arXiv:2106.13043).

    python -m benchmarks.claims.trimodal [--quick]
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from itertools import combinations

from benchmarks.claims import trial
from headwater.modalities import Audio, Image, Text
from headwater.model import Model
from headwater.objectives import Contrastive
from headwater.trunk import Trunk

PAIRS = list(combinations(("image", "text", "audio"), 2))
TRAIN = "embedded:things-train-*.tar"
GALLERIES = {"seen": "embedded:things-seen-*.tar", "unseen": "embedded:things-unseen-*.tar"}


def made(names: tuple[str, ...]) -> Model:
    """Encoders for these modalities and a space that they share."""
    kinds = {
        "image": lambda: Image(Trunk(96, 3, 3), 64, 16),
        "text": lambda: Text(Trunk(96, 2, 3), length=40),
        "audio": lambda: Audio(Trunk(96, 3, 3), seconds=1.6),
    }
    return Model({name: kinds[name]() for name in names}, space=64)


def recalls(model: Model, gallery: list[trial.Members]) -> dict[tuple[str, str], float]:
    """R@5 of every pair that the model has, the mean of both directions."""
    x = {name: trial.features(model, name, trial.signals(reader, gallery)) for name, reader in model.readers.items()}
    return {(a, b): (trial.recall(x[a], x[b]) + trial.recall(x[b], x[a])) / 2 for a, b in PAIRS if {a, b} <= set(x)}


def run(pairs: list[tuple[str, str]], seed: int, steps: int) -> list[dict[tuple[str, str], float]]:
    """Train on these pairs and score on every gallery."""
    names = tuple(dict.fromkeys(name for pair in pairs for name in pair))
    model, views = made(names), [name for name in names if name != "text"]
    objective = partial(Contrastive, pairs=[(a, b, 1.0) for a, b in pairs])
    trial.pretrain(model, objective, TRAIN, steps, seed, batch_size=64, rate=2e-3, views=views)
    return [recalls(model, trial.samples(gallery)) for gallery in GALLERIES.values()]


def main() -> None:
    """Train all arms of all seeds and say whether the claim holds."""
    quick = trial.options(__doc__)
    steps, seeds = (20, range(2)) if quick else (150, range(3))
    start = time.perf_counter()
    arms: dict[str, list[float]] = {}
    for seed in seeds:
        whole, alone = run(PAIRS, seed, steps), {pair: run([pair], seed, steps) for pair in PAIRS}
        for number, gallery in enumerate(GALLERIES):
            found = {"three": whole[number], "alone": {pair: alone[pair][number][pair] for pair in PAIRS}}
            for arm, recall in found.items():
                arms.setdefault(f"{arm} {gallery}", []).append(statistics.mean(recall.values()))
                for a, b in PAIRS:
                    arms.setdefault(f"{arm} {gallery} {a}-{b}", []).append(recall[a, b])
        print(f"seed {seed}, {time.perf_counter() - start:.0f} s", flush=True)
    shown = {arm: values for arm, values in arms.items() if arm.endswith(" seen")}
    others = {arm: [round(v, 4) for v in values] for arm, values in arms.items() if arm not in shown}
    claim, measure = (
        "three modalities in one space retrieve better than pairs alone",
        "R@5 on things-seen, mean of pairs and directions",
    )
    trial.verdict("trimodal", claim, measure, shown, "three seen", "alone seen", quick, steps=steps, others=others)


if __name__ == "__main__":
    main()
