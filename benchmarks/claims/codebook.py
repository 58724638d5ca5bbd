"""Codes that are short unit vectors stay in use: the codebook of an autoencoder of pictures, against long plain vectors.

VQ autoencoders of the embedded pictures, 32 x 32 pixels in patches of 4, that differ in the bottleneck alone: 256 unit vectors of 8
numbers (ViT-VQGAN, arXiv:2110.04627) or 256 plain vectors as wide as the encoder (the control, as VQ-VAE and VQGAN have them). The
figure is the share of the codebook that occurs in pictures of concepts that were not trained on. Beside it stand the squared error
of these pictures, painted from their ids, and that of 256 clusters (k-means) of the patches themselves. Two more arms show other
ways to keep codes in use: moving averages that start anew, and FSQ.

    python -m benchmarks.claims.codebook [--quick]
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.claims.trial import Members, interval, options, pretrain, samples, signals, verdict
from headwater import random
from headwater.modalities import Autoencoder, Image
from headwater.modalities.bottlenecks import FSQ, VQ, Bottleneck
from headwater.model import Model
from headwater.objectives import Reconstructed
from headwater.objectives.targets.codes import kmeans, nearest
from headwater.tokens import Tokens
from headwater.trunk import Trunk

CODES, WIDTH = 256, 96
STEPS, RATE = 700, 3e-3  # these were chosen on seed 100 and pictures that were trained on


def bottlenecks() -> dict[str, Bottleneck]:
    """A new one for every arm."""
    return {
        "short unit vectors": VQ(CODES, 8),
        "long plain vectors": VQ(CODES, WIDTH, normalise=False),
        "long, moving, revived": VQ(CODES, WIDTH, normalise=False, decay=0.95, revive=0.1),
        "FSQ": FSQ((8, 8, 4)),
    }


def made(bottleneck: Bottleneck) -> Model:
    trunks = [Trunk(width=WIDTH, depth=1, heads=3) for _ in range(2)]
    return Model({"image": Autoencoder(Image(trunks[0], size=32, patch=4), bottleneck, trunks[1])})


@torch.no_grad()
def measured(model: Model, t: Tokens) -> tuple[float, float]:
    """Share of the codebook that occurs in these pictures, and their squared error per number when painted from their ids."""
    encoder = model.encoder("image").eval()
    assert isinstance(encoder, Autoencoder)
    codes = encoder.codes(t)
    return len(codes.x.unique()) / CODES, float((encoder.decode(codes).x - t.x).square().mean())


def clustered(train: Tensor, test: Tensor, seed: int) -> float:
    """Squared error per number of patches (T, F) as the nearest of as many means of training patches."""
    few = random.uniform(random.fold(torch.arange(len(train)), seed), (), "patches").argsort()[:20_000]
    centres = kmeans(train[few], CODES, seed)
    return float((centres[nearest(test, centres)] - test).square().mean())


def main() -> None:
    """Print a row per arm and the claim as a line of JSON."""
    quick = options(__doc__ or "")
    reader = made(FSQ()).encoder("image").reader

    def pictures(members: list[Members]) -> Tokens:
        return signals(reader, members)._replace(valid=None)

    train, test = (pictures(samples(f"embedded:things-{part}-*.tar")) for part in ("train", "unseen"))
    usage: dict[str, list[float]] = {}
    error: dict[str, list[float]] = {"k-means": []}
    for seed in range(2 if quick else 3):
        error["k-means"].append(clustered(train.x.flatten(0, 1), test.x.flatten(0, 1), seed))
        for arm, bottleneck in bottlenecks().items():
            steps = 20 if quick else STEPS
            model = made(bottleneck)
            pretrain(model, Reconstructed, "embedded:things-train-*.tar", steps, seed, 32, RATE, modalities=["image"])
            used, wrong = measured(model, test)
            usage.setdefault(arm, []).append(used)
            error.setdefault(arm, []).append(wrong)
    below = interval([a - b for a, b in zip(error["k-means"], error["short unit vectors"], strict=True)])
    verdict(
        "codebook",
        "short unit vectors keep more of a codebook in use than long plain ones",
        f"share of {CODES} codes in use",
        usage,
        "short unit vectors",
        "long plain vectors",
        quick,
        error={arm: [round(x, 4) for x in values] for arm, values in error.items()},
        below_kmeans=[round(x, 4) for x in below],
    )


if __name__ == "__main__":
    main()
