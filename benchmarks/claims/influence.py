"""Choosing samples by what they do for a target: by gradients (training.ghost), and by a model of their influence (MATES).

Yu et al. 2024, arXiv:2406.06046. A pool of real texts, 10 % of them English prose and the rest program code; the target is prose of
other documents. A small language model over bytes is warmed up on the pool, then every sample is scored: by the cosine of its
gradient with the target's, and by a ridge regression from its pooled features to the drop of the target's loss after one step on
it, fitted to a few. The model goes on with what scored best, for half of the steps of the control, which goes on with the pool.
Further arms: the same number of samples at random, and those that scored worst.

The claim holds where the chosen half-run ends below the whole random one on the target's test documents, more than .8 of what is
chosen are planted, and the ranks of predicted and true influence on samples outside of the fit correlate above .5, on every seed.

    python -m benchmarks.claims.influence [--quick]
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from copy import deepcopy

import torch
from torch import Tensor

from benchmarks.claims import trial
from benchmarks.claims.domains import code
from benchmarks.claims.prose import members, prose
from headwater import init
from headwater.modalities import Text
from headwater.model import Model
from headwater.objectives import Causal
from headwater.objectives.objective import Batch
from headwater.pretrainer import Pretrainer
from headwater.training.ghost import Ghost
from headwater.training.influence import Target, aligned, draw, features, oracle, rank_correlation, ridge
from headwater.training.schedules import constant
from headwater.trunk import Trunk

LENGTH, POOL, PLANTED = 256, 1200, 0.1  # bytes of a passage (shorter ones are told apart less well), passages, share that is useful
WARM, STEPS, ROWS, RATE = 80, 160, 16, 3e-3  # steps before scores are taken and after
PROBES, AIM = 120, 64  # samples whose influence is measured, a third of them to judge the fit; passages of the target


def pool(seed: int, size: int) -> tuple[list[str], Tensor, list[str], list[str]]:
    """Passages, which of them are prose (size,), passages of the target, and those on which it is tested."""
    (good, other), (bad, _) = prose(seed, LENGTH - 1), code(seed, LENGTH - 1)
    count = round(PLANTED * size)
    mixed = [(text, True) for text in good[:count]] + [(text, False) for text in bad[: size - count]]
    random.Random(seed).shuffle(mixed)
    return [text for text, _ in mixed], torch.tensor([useful for _, useful in mixed]), other[:AIM], other[AIM : AIM + 128]


def batches(model: Model, texts: Sequence[str]) -> Iterator[Batch]:
    """Passages as prepared batches."""
    for start in range(0, len(texts), 64):
        part = texts[start : start + 64]
        signals = trial.signals(model.encoder("text").reader, members(part))
        yield {"text": signals, "seed": torch.arange(start, start + len(part))}


def trained(model: Model, texts: Sequence[str], steps: int, seed: int) -> Pretrainer:
    """A copy that went on with these passages."""
    with trial.written(members(texts)) as shards:
        return trial.pretrain(deepcopy(model), Causal, shards, steps, seed, ROWS, RATE, scheme=None, schedule=constant)


def influence(
    target: Target, optimizer: torch.optim.Optimizer, texts: Sequence[str], seed: int, probes: int
) -> tuple[Tensor, float]:
    """(K,) predicted influence of every passage, and the rank correlation with the true one on probes outside of the fit."""
    model = target.model
    asked = draw(torch.zeros(len(texts)), probes, 1.0, seed)
    asked = asked[torch.randperm(probes, generator=torch.Generator().manual_seed(seed))]
    known = oracle(target.objective, target, batches(model, [texts[i] for i in asked]), optimizer)
    x, fitted = torch.cat([features(model, batch) for batch in batches(model, texts)]), 2 * probes // 3
    line = ridge(x[asked[:fitted]], known[:fitted])
    return line(x), rank_correlation(line(x[asked[fitted:]]), known[fitted:])


def arms(seed: int, quick: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Minus the loss on the target's test passages of every arm; how good the scores are."""
    size, steps, probes = (200, 8, 30) if quick else (POOL, STEPS, PROBES)
    texts, useful, aim, test = pool(seed, size)
    model = Model({"text": Text(Trunk(64, 2, 2, "rotary", norm="rms", activation="silu", gated=True), length=LENGTH)})
    init.initialise(model, seed, init.Normal())
    warm = trained(model, texts, 4 if quick else WARM, seed)
    model, objective = warm.backbone, warm.objective
    target, ghost, keep = Target(model, objective, list(batches(model, aim))), Ghost(model, objective), int(useful.sum())
    cosine = aligned(ghost, target.gradient(ghost.names), batches(model, texts))
    predicted, agreement = influence(target, warm.trainer.optimizers[0], texts, seed, probes)
    chosen = {
        "cosine, half": draw(cosine, keep),
        "predicted, half": draw(predicted, keep),
        "as many, half": draw(torch.zeros(size), keep, 1.0, seed),
        "worst, half": draw(-cosine, keep),
    }
    runs = {name: trained(model, [texts[i] for i in index], steps // 2, seed + 1) for name, index in chosen.items()}
    runs["random, half"], runs["random"] = (trained(model, texts, n, seed + 1) for n in (steps // 2, steps))
    found = {n: -Target(run.backbone, run.objective, list(batches(model, test))).loss() for n, run in runs.items()}
    right = {name: float(useful[chosen[f"{name}, half"]].double().mean()) for name in ("cosine", "predicted")}
    return found, {"precision": right["cosine"], "precision predicted": right["predicted"], "rank correlation": agreement}


def main() -> None:
    """Print a row per arm and the claim as a line of JSON."""
    quick = trial.options(__doc__ or "")
    found: dict[str, list[float]] = {}
    told: dict[str, list[float]] = {}
    for seed in range(2 if quick else 3):
        values, scores = arms(seed, quick)
        for name, value in values.items():
            found.setdefault(name, []).append(value)
        for name, value in scores.items():
            told.setdefault(name, []).append(round(value, 3))
    effects = [a - b for a, b in zip(found["cosine, half"], found["random"], strict=True)]
    holds = trial.interval(effects)[0] > 0 and min(told["precision"]) > 0.8 and min(told["rank correlation"]) > 0.5
    claim = "what gradients choose for a target brings in half of the steps what a random run brings in all"
    trial.verdict(
        "influence", claim, "minus nats per byte of the target", found, "cosine, half", "random", quick, holds=holds, scores=told
    )


if __name__ == "__main__":
    main()
