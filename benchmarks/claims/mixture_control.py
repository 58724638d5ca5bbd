"""A bandit finds the source that is worth learning from, and leaves it when it is learned (Exp3 on learning progress).

A small language model over bytes has learned the missions of robots (real text, solved). It goes on with three sources: those
missions, names of pictures that it has not seen (real text, useful, and few enough to be learned by heart), and hexadecimal
digests, which nobody can predict (noise). `headwater.training.Mixing` looks at held-out batches every ten steps and sets the
shares; nobody tells it which source is which. After Albalak et al. 2023 (arXiv:2312.02406) and Graves et al. 2017
(arXiv:1704.03003); that a bandit shall find the useful stream, and do no worse than the best fixed ratio, is what Schioppa et al.
2023 (arXiv:2305.11778) show for translation.

The figure is the smallest of three margins: how far the useful source's share went beyond 80 % until step 250, how far below 50 %
it is in the mean from then on, and how far the loss on all that can be known, the mean over names and missions, stays below 105 %
of that of the best of five fixed mixtures, which is chosen with hindsight. Not the end alone: what was left is forgotten, and asked
for again. On seed 100 the margins were 0.06, 0.11 and 0.02: a good fixed mixture is hard to beat here, and no better is claimed.

    python -m benchmarks.claims.mixture_control [--quick]
"""

from __future__ import annotations

import hashlib
import logging
import random
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.claims import trial
from benchmarks.claims.domains import nats
from benchmarks.claims.prose import members
from headwater import init
from headwater.controllers import Exp3
from headwater.datamodules.datamodule import ShardDataModule
from headwater.datamodules.sources import Source
from headwater.modalities import Text
from headwater.model import Model
from headwater.objectives import Causal
from headwater.pretrainer import Pretrainer
from headwater.training.mixing import Mixing
from headwater.training.schedules import WSD
from headwater.trunk import Trunk

LENGTH, NAMES, DIGESTS = 40, 100, 4000
FIRST, STEPS, SOON = 300, 400, 250  # steps before, in all arms, and until the useful source shall be found; chosen on seed 100
RATE, EVERY, FLOOR = 4e-3, 10, 0.04
GRID = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the useful source; the others share the rest
KNOWABLE = ("useful", "solved")
Texts = dict[str, list[str]]


def texts(seed: int) -> Texts:
    """The three sources; the seed draws which names, and the digests."""
    names = {m["txt"].decode() for m in trial.samples("embedded:things-train-*.tar")}
    missions = {m["txt"].decode() for m in trial.samples("embedded:episodes-train-*.tar")}
    digests = [hashlib.sha256(f"{seed} {k}".encode()).hexdigest()[:24].upper() for k in range(DIGESTS)]
    chosen = random.Random(seed).sample(sorted(name for name in names if len(name) < LENGTH), NAMES)
    return {"useful": chosen, "solved": sorted(missions), "noise": digests}


def writer(seed: int) -> Model:
    """A language model over bytes with first weights of its own."""
    model = Model({"text": Text(Trunk(64, 2, 2, "rotary", norm="rms", activation="silu", gated=True), length=LENGTH)})
    init.initialise(model, seed, init.Normal())
    return model


def learned(
    model: Model,
    shards: Mapping[str, str],
    shares: Mapping[str, float],
    steps: int,
    seed: int,
    callbacks: Sequence[pl.Callback] = (),
) -> ShardDataModule:
    """Train in place on the sources that have a share, as `headwater fit` does. Returns the data, whose ledger has what changed."""
    optimizer = partial(torch.optim.AdamW, lr=RATE, weight_decay=0.05, betas=(0.9, 0.95))
    data = ShardDataModule(
        train={name: Source(shards[name], weight=share) for name, share in shares.items()},
        held_out={name: Source(shards[name]) for name in shares},
        batch_size=32,
        workers=0,
        notice=1,
        seed=seed,
    )
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_steps=steps,
            accelerator="cpu",
            callbacks=list(callbacks),
            enable_model_summary=False,
            use_distributed_sampler=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            **quiet,
        )
        trainer.fit(Pretrainer(model, Causal, optimizer, WSD(0.05, 0.4), seed=seed), data)
    return data


def arms(seed: int, steps: int, first: int) -> tuple[dict[str, float], list[tuple[int, float]]]:
    """Minus the loss on what can be known, in every arm, and the three margins; the share of the useful source over steps."""
    with ExitStack() as stack:
        made = texts(seed)
        shards = {name: stack.enter_context(trial.written(members(found))) for name, found in made.items()}
        start, found = writer(seed), {}
        learned(start, shards, {"solved": 1.0}, first, seed)

        def run(shares: dict[str, float], make: Callable[[], list[pl.Callback]] = list) -> tuple[float, ShardDataModule]:
            model = deepcopy(start)
            data = learned(model, shards, shares, steps, seed, make())
            return -sum(nats(model, made[name]) for name in KNOWABLE) / len(KNOWABLE), data

        for share in GRID:
            found[f"fixed {share}"], _ = run({"useful": share, "solved": (1 - share) / 2, "noise": (1 - share) / 2})
        mixing = partial(Mixing, Exp3(rate=0.6, decay=0.8), losses="held_out", every=EVERY, floor=FLOOR, batches=2)
        found["controlled"], data = run({"useful": 1.0, "solved": 1.0, "noise": 1.0}, lambda: [mixing()])
    useful = [(step, weights[0] / sum(weights)) for step, weights in data.ledger.entries]
    best = max(value for name, value in found.items() if name.startswith("fixed"))
    margins = {
        "found": max(share for step, share in useful if step <= SOON) - 0.8,
        "left": 0.5 - statistics.mean([share for step, share in useful if step > SOON] or [useful[-1][1]]),
        "no worse": found["controlled"] / -best + 1.05,
    }
    return found | margins | {"smallest margin": min(margins.values()), "none": 0.0}, useful


def main() -> None:
    """Print every arm and seed, and the claim as a line of JSON."""
    quick = trial.options(__doc__ or "")
    found: dict[str, list[float]] = {}
    shares = []
    for seed in range(2 if quick else 3):
        values, useful = arms(seed, 30 if quick else STEPS, 10 if quick else FIRST)
        for name, value in values.items():
            found.setdefault(name, []).append(value)
        shares.append([round(share, 2) for _, share in useful])
    claim = "a bandit finds the useful source, leaves it when learned, and does no worse than the best fixed mixture"
    trial.verdict(
        "mixture_control",
        claim,
        "minus nats per byte, and the smallest of three margins",
        found,
        "smallest margin",
        "none",
        quick,
        useful_share_every_ten_steps=shares,
    )


if __name__ == "__main__":
    main()
