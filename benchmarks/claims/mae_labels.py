"""Masked autoencoding saves labels: with 5 % of the labels a pretrained encoder beats the same one trained on them alone.

Handwritten digits (1,797 pictures of the UCI test set, in scikit-learn): 1,297 to learn from, of which one in twenty has a
label, and 500 to test. Both arms train all weights on the same labels in the same way, from a masked autoencoder or from a random
start; each has the learning rate that was best for it on seeds that are not reported. The control is the random start.

    python -m benchmarks.claims.mae_labels [--quick]
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.claims.trial import digits, features, options, pretrain, signals, verdict, written
from headwater import random
from headwater.modalities import Image
from headwater.model import Model
from headwater.objectives import Masked
from headwater.tokens import Tokens
from headwater.trunk import Trunk

TEST, SHARE = 500, 0.05
STEPS, TUNING = 1500, 200  # of pretraining, of training on labels
RATES = {"pretrained": 1e-3, "from scratch": 1e-3}  # like all settings, chosen on seeds 100 to 102 without the test pictures


def made() -> Model:
    return Model({"image": Image(Trunk(width=96, depth=3, heads=3), size=16, patch=4)})


def tuned(model: Model, t: Tokens, target: Tensor, test: Tokens, truth: Tensor, seed: int, rate: float) -> float:
    """Accuracy on the test pictures after training all weights, and a new linear layer, on a few labelled ones."""
    torch.manual_seed(seed)
    head = nn.Linear(model.dim("image"), 10)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, TUNING)
    model.train()
    for _ in range(TUNING):
        loss = F.cross_entropy(head(model.represent({"image": t})["image"].x), target, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float((head(features(model, "image", test)).argmax(-1) == truth).float().mean())


def both(seed: int, shards: str, pictures: Tokens, labels: Tensor, steps: int, rates: dict[str, float]) -> dict[str, float]:
    """Accuracy of each arm on one seed, which draws weights, masks, order and which pictures have labels."""
    few = random.uniform(random.fold(torch.arange(len(labels) - TEST), seed), (), "labels").argsort()
    few = few[: round(SHARE * (len(labels) - TEST))]
    test = pictures.map(lambda field: field[-TEST:])
    found = {}
    for arm, rate in rates.items():
        model = made()
        masked = partial(Masked, modality="image", ratio=0.75, depth=1, width=48)
        pretrain(model, masked, shards, steps if arm == "pretrained" else 1, seed, batch_size=128, rate=2e-3)
        t = pictures.map(lambda field: field[few])
        found[arm] = tuned(model, t, labels[few], test, labels[-TEST:], seed, rate)
    return found


def main() -> None:
    """Print a row per arm and the claim as a line of JSON."""
    quick = options(__doc__ or "")
    members, labels = digits()
    pictures = signals(made().encoder("image").reader, members)
    arms: dict[str, list[float]] = {arm: [] for arm in RATES}
    with written(members[:-TEST]) as shards:
        for seed in range(2 if quick else 5):
            found = both(seed, shards, pictures, labels, 30 if quick else STEPS, RATES)
            for arm, value in found.items():
                arms[arm].append(value)
    claim = "with 5 % of the labels a masked autoencoder beats training from scratch"
    count = round(SHARE * (len(labels) - TEST))
    verdict("mae_labels", claim, "accuracy on 500 digits", arms, "pretrained", "from scratch", quick, labels=count)


if __name__ == "__main__":
    main()
