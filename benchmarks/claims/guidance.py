"""Guidance puts samples of a class-conditional flow into the class that was asked for (Ho and Salimans 2022, arXiv:2207.12598).

A diffusion transformer learns the handwritten digits of scikit-learn, 8 by 8, with the digit in its norms, which a tenth of the
samples lacks. One model is then asked for every digit with more and more guidance; a support vector machine, which learned from
digits that the model never saw, says what they are. Reported seeds are 0 to 2; everything else was chosen on seed 100.

    python -m benchmarks.claims.guidance [--quick]
"""

from __future__ import annotations

import statistics
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor

from benchmarks.claims import trial
from headwater.modalities import Category, Image
from headwater.model import Encoder, Model
from headwater.objectives import Dropped, Flow
from headwater.process import Process
from headwater.samplers import draw
from headwater.tokens import Tokens
from headwater.trunk import Trunk

LEARNED = 1200  # digits that the model sees; the judge learns from the others
WIDTH = 96
SCALES = (0.0, 1.0, 2.0, 4.0)


def model() -> Model:
    label = Encoder(Category(10, field=None, member="cls"), Trunk(WIDTH, depth=0))
    image = Image(Trunk(WIDTH, depth=4, heads=3, conditional=True), size=8, patch=2)
    return Model({"image": image, "label": label}, processes={"image": Process(told=["label"])})


def judged(judge: SVC, net: Model, t: Tokens, asked: Tensor) -> float:
    """Share of the pictures (S, N) that are of the digit asked for."""
    reader = net.encoder("image").reader
    pixels = [reader.restore(t.map(lambda field, s=s: field[s : s + 1]))[..., 0].flatten() for s in range(len(t.x))]  # type: ignore[misc]
    found = judge.predict(np.stack(pixels).astype(np.float32))
    return statistics.mean(int(a == b) for a, b in zip(found.tolist(), asked.tolist(), strict=True))


def main() -> None:
    quick = trial.options(__doc__ or "")
    seeds, steps, each = ([100], 30, 4) if quick else (range(3), 600, 30)
    members, truth = trial.digits()
    reader = model().encoder("image").reader
    pixels = np.stack([reader.decode(m)[..., 0].ravel() for m in members]).astype(np.float32)
    judge = SVC(C=10, gamma="scale").fit(pixels[LEARNED:], truth[LEARNED:].numpy())
    right = float(judge.score(pixels[:LEARNED], truth[:LEARNED].numpy()))
    labelled = [{**m, "cls": str(int(k)).encode()} for m, k in zip(members[:LEARNED], truth[:LEARNED], strict=True)]
    objective = partial(Dropped, inner=partial(Flow, modality="image"), rates={"label": 0.1})
    asked = torch.arange(10).repeat_interleave(each)
    arms: dict[str, list[float]] = {f"guidance {scale:g}": [] for scale in SCALES}
    with trial.written(labelled) as shards:
        for seed in seeds:
            net = trial.pretrain(model(), objective, shards, steps, seed, rate=2e-3).backbone
            blank = net.encoder("image").blank()
            canvas = blank.map(lambda field: field.expand(len(asked), *field.shape[1:]))
            label = Tokens(asked[:, None], torch.zeros(len(asked), 1, 1))
            for scale, shares in zip(SCALES, arms.values(), strict=True):
                made = draw(net.eval(), "image", canvas, torch.arange(len(asked)) + 1000 * seed, {"label": label}, scale, steps=15)
                shares.append(judged(judge, net, made, asked))
            print(seed, {name: round(values[-1], 3) for name, values in arms.items()}, flush=True)
    trial.verdict(
        "guidance",
        "guidance of 2 puts more samples into the digit asked for than none",
        "share of samples in the class asked for",
        arms,
        "guidance 2",
        "guidance 1",
        quick,
        at_least_80=min(arms["guidance 2"]) >= 0.8,
        rising=all(a < b for a, b in pairwise(map(statistics.mean, arms.values()))),
        judge=round(right, 3),
    )


if __name__ == "__main__":
    main()
