"""Pictures by a flow or by next-token prediction over the codes of a VQ autoencoder, at equal compute.

Both generators work behind an autoencoder that took the same steps and differs in the bottleneck alone. A block that takes the time
has half as many weights again for it, so the flow takes two steps where the other takes three. Pictures are compared with held-out
ones in the features of a masked autoencoder that was trained apart: by the Frechet distance of normal distributions (Heusel et al.
2017, arXiv:1706.08500) and by the kernel distance (Binkowski et al. 2018, arXiv:1801.01401). Real training pictures and the
rebuilt held-out ones say how small both can get. Reported seeds are 0 to 2; everything else was chosen on seed 100.

    python -m benchmarks.claims.vq_or_flow [--quick]
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.claims import trial
from headwater.datamodules.collate import collate
from headwater.generation import generate
from headwater.modalities import Autoencoder, Image, Tokenised
from headwater.modalities.bottlenecks import KL, VQ, Bottleneck
from headwater.model import Model
from headwater.objectives import Causal, Flow, Masked, Reconstructed
from headwater.tokens import Tokens
from headwater.trunk import Trunk

SIZE, PATCH, WIDTH = 32, 4, 96


def picture(width: int = WIDTH, depth: int = 2, **options: Any) -> Image:
    return Image(Trunk(width, depth, heads=width // 32, **options), SIZE, PATCH)


def split() -> tuple[list[trial.Members], list[trial.Members]]:
    """Training and held-out pictures, every third title on the other side."""
    found = trial.samples("embedded:things-train-*.tar")
    held = set(sorted({m["txt"] for m in found})[::3])
    return [m for m in found if m["txt"] not in held], [m for m in found if m["txt"] in held]


def tokeniser(bottleneck: Bottleneck, weight: float, shards: str, seed: int, steps: int) -> Autoencoder:
    """Trained, and never changed again. weight: of the bottleneck's own loss."""
    model = Model({"image": Autoencoder(picture(), bottleneck, Trunk(WIDTH, 2, heads=WIDTH // 32))})
    objective = partial(Reconstructed, modality="image", weight=weight)
    trained = trial.pretrain(model, objective, shards, steps, seed, batch_size=32, rate=2e-3)
    return trained.backbone.encoder("image")  # type: ignore[return-value]


def generator(codes: Autoencoder | None, objective: Any, shards: str, seed: int, steps: int) -> Model:
    flow = objective is Flow
    trunk = Trunk(WIDTH, 4, heads=WIDTH // 32, conditional=flow)
    model = Model({"image": picture(depth=4, conditional=flow) if codes is None else Tokenised(codes, trunk)})
    return trial.pretrain(model, partial(objective, modality="image"), shards, steps, seed, batch_size=32, rate=2e-3).backbone


def made(model: Model, count: int, seed: int) -> Tokens:
    """Pictures from the model, as patches that an encoder reads."""
    found: list[np.ndarray] = generate(model, "image", samples=count, seed=seed, steps=20)
    reader = picture().reader
    return reader.prepare(collate([{"it": reader.tokens(one)} for one in found], ["it"])["it"])


@torch.no_grad()
def rebuilt(codes: Autoencoder, t: Tokens) -> Tokens:
    codes.eval()
    return t._replace(x=codes.decode(codes.codes(t)).x)


def frechet(a: Tensor, b: Tensor) -> float:
    """|m - n|^2 + tr(S + T - 2 (S T)^(1/2)) of the means and covariances of (A, D) and (B, D)."""
    (m, s), (n, t) = ((x.double().mean(0), x.double().T.cov()) for x in (a, b))
    root = torch.linalg.eigvals(s @ t).real.clamp(min=0).sqrt().sum()
    return float((m - n).square().sum() + s.trace() + t.trace() - 2 * root)


def kernel(a: Tensor, b: Tensor) -> float:
    """The squared maximum mean discrepancy of (A, D) and (B, D) under (x y / D + 1)^3, without bias."""
    a, b = a.double(), b.double()

    def similar(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        every = similar(x, x)
        return (every.sum() - every.trace()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * similar(a, b).mean())


def pictures(shards: str, held: Tokens, seed: int, first: int, then: int, count: int) -> dict[str, Tokens]:
    """What each arm makes. first: steps of an autoencoder; then: of next-token prediction behind it."""
    vq, kl = tokeniser(VQ(256, 8), 1.0, shards, seed, first), tokeniser(KL(8), 1e-4, shards, seed, first)
    return {
        "flow in latents": made(generator(kl, Flow, shards, seed, then * 2 // 3), count, seed),
        "next code": made(generator(vq, Causal, shards, seed, then), count, seed),
        "flow on patches": made(generator(None, Flow, shards, seed, (first + then) * 2 // 3), count, seed),
        "rebuilt from latents": rebuilt(kl, held),
        "rebuilt from codes": rebuilt(vq, held),
    }


def main() -> None:
    quick = trial.options(__doc__ or "")
    seeds, first, then, count = ([100], 6, 6, 16) if quick else (range(3), 300, 450, 200)
    learned, other = split()
    train, held = (trial.signals(picture().reader, part) for part in (learned, other))
    arms: dict[str, dict[str, list[float]]] = {"Frechet": {}, "kernel": {}}
    with trial.written([{"png": m["png"]} for m in learned]) as shards:
        judge = trial.pretrain(
            Model({"image": picture(64)}), partial(Masked, modality="image", width=64), shards, first, 1000, batch_size=32
        ).backbone
        truth = trial.features(judge, "image", held)
        for seed in seeds:
            for arm, t in (pictures(shards, held, seed, first, then, count) | {"training pictures": train}).items():
                x = trial.features(judge, "image", t)
                for name, distance in (("Frechet", frechet), ("kernel", kernel)):
                    arms[name].setdefault(arm, []).append(-distance(x, truth))
            print(seed, {name: {arm: round(v[-1], 4) for arm, v in found.items()} for name, found in arms.items()}, flush=True)
    trial.verdict(
        "vq_or_flow",
        "at equal compute a flow in latents makes pictures nearer to real ones than next-token prediction of VQ codes",
        "- Frechet distance of features",
        arms["Frechet"],
        "flow in latents",
        "next code",
        quick,
        kernel={arm: [round(v, 5) for v in values] for arm, values in arms["kernel"].items()},
    )


if __name__ == "__main__":
    main()
