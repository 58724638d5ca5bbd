"""A model grown from one of half its width and depth reaches in half of the steps what it reaches from scratch.

English prose, byte by byte, split by document. Every arm is a whole run with its own schedule. The small model is trained first;
with its learned multi-linear growth (Mango, Pan et al. 2023, arXiv:2310.10699) cores are trained for some steps on the same loss,
and then the large model's own weights. All of that is paid from half of the steps that the large model has from scratch: a step of
the small model counts by its multiplications, a step of the cores as two. Beside it stand growth by copies that says the same at
first (wider and deeper), and a large model from scratch with half of the steps.

    python -m benchmarks.claims.growth [--quick]
"""

from __future__ import annotations

import math
from functools import partial

import torch

from benchmarks.claims import trial
from benchmarks.claims.prose import members, prose
from headwater import init
from headwater.modalities import Text
from headwater.model import Encoder, Model
from headwater.objectives import Causal
from headwater.surgery import Growing, deeper, grown, wider
from headwater.tokens import Tokens
from headwater.trunk import Trunk

LENGTH, BATCH = 64, 16
SMALL, LARGE = (32, 2), (64, 4)  # width and depth
STEPS, FIRST, CORES = 400, 500, 10  # of the large model from scratch, of the small one, of the cores; like the rates from seed 100
RATE, LATER, CORE = 4e-3, 3e-3, 3e-3


def writer(seed: int, size: tuple[int, int]) -> Encoder:
    """A language model over bytes with first weights of its own."""
    encoder = Text(Trunk(size[0], size[1], size[0] // 16, "rotary"), length=LENGTH)
    init.initialise(encoder, seed, init.Normal())
    return encoder


def multiplications(size: tuple[int, int]) -> float:
    """Per byte, of the blocks and the head."""
    width, depth = size
    return 12 * width * width * depth + 257 * width


def trained(encoder: Encoder, seed: int, shards: str, steps: int, rate: float) -> Encoder:
    """The same encoder after a run."""
    trial.pretrain(Model({"text": encoder}), Causal, shards, steps, seed, BATCH, rate, scheme=None)
    return encoder


@torch.no_grad()
def bits(encoder: Encoder, texts: Tokens) -> float:
    """Minus bits per byte of held-out passages."""
    model, total, number = Model({"text": encoder.eval()}), 0.0, 0
    objective = Causal(model)
    for start in range(0, len(texts.x), 128):
        piece = texts.map(lambda f, s=start: f[s : s + 128])  # type: ignore[misc]
        term = objective(model, objective.task({"text": piece, "seed": torch.arange(len(piece.x))}))["causal"]
        total, number = total + float(term.total), number + int(term.number)
    return -total / number / math.log(2)


def arms(seed: int, share: float = 1.0) -> dict[str, float]:
    """Minus bits per byte of every arm. share: of the steps."""
    known, unknown = prose(seed, LENGTH - 1)
    steps, first, cores = (max(2, round(share * n)) for n in (STEPS, FIRST, CORES))
    half = steps // 2
    paid = math.ceil(first * multiplications(SMALL) / multiplications(LARGE))
    with trial.written(members(known[:16000])) as shards:
        texts = trial.signals(writer(seed, SMALL).reader, members(unknown[:1024]))
        run = partial(trained, seed=seed, shards=shards)
        small = run(writer(seed, SMALL), steps=first, rate=RATE)
        found = {
            "scratch": bits(run(writer(seed, LARGE), steps=steps, rate=RATE), texts),
            "scratch, half the steps": bits(run(writer(seed, LARGE), steps=half, rate=RATE), texts),
            "small": bits(small, texts),
        }
        copied = deeper(wider(small, LARGE[0]), LARGE[1], "interleave", quiet=True)
        growing = Growing(small, *LARGE, how="interleave")
        found["copied, half the steps"] = bits(run(copied, steps=max(1, half - paid), rate=LATER), texts)
        large = grown(run(growing, steps=cores, rate=CORE))
        found["learned, half the steps"] = bits(run(large, steps=max(1, half - paid - 2 * cores), rate=LATER), texts)
    return found


def main() -> None:
    """Print a row per arm and the claim as a line of JSON."""
    quick = trial.options(__doc__ or "")
    found: dict[str, list[float]] = {}
    for seed in range(2 if quick else 3):
        for arm, value in arms(seed, 0.02 if quick else 1.0).items():
            found.setdefault(arm, []).append(value)
    claim = "a grown model is past in half of the steps, growing included, where one from scratch ends"
    trial.verdict("growth", claim, "minus bits per byte of held-out prose", found, "learned, half the steps", "scratch", quick)


if __name__ == "__main__":
    main()
