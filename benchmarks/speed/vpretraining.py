"""What V-Pretraining costs beside the plain step of the same language model: time, peak memory, and how true its gradient is.

    OMP_WAIT_POLICY=passive python -m benchmarks.speed.vpretraining [--quick] [--rounds N] [--threads N]

The model and the text are those of `benchmarks.speed.lm`; the designer gives soft targets over the learner's 8 best answers, the
feedback is next-token prediction on held-out documents. Rows take turns, each for as many steps as lie between two batches of
feedback; figures are medians over rounds of the ratio to the plain row of the same round. The designer's gradient of each row is
compared with that of exact double backward on the whole batch. Peak memory is that of a process of its own. The last line is JSON,
where a ratio is the speed of the cheapest row beside the plain step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.speed.lm import QUICK, SHAPE, batches, held, pair, tokens
from benchmarks.speed.race import stepping
from benchmarks.speed.trunk import clock
from headwater.objectives import Causal, VPretraining
from headwater.objectives.designers import SoftTargets
from headwater.objectives.estimators import Difference, Double, Estimator, Forward
from headwater.objectives.probe import Probe
from headwater.objectives.vpretraining import piece
from headwater.pretrainer import Pretrainer
from headwater.training.groups import Groups


class Way(NamedTuple):
    """One way to look ahead. feedback: share of a batch's rows; most: the target on the time of a step beside a plain one."""

    estimator: Estimator
    every: int = 1
    pieces: int = 1
    feedback: float = 1.0
    where: str | None = None
    most: float | None = None


PLAIN = "plain"
Texts = tuple[Tensor, Tensor]  # ids (rows, length) to learn from, and of the feedback
LAST = r"blocks\.5\.|trunk\.norm"
WAYS = {
    "double backward": Way(Double()),
    "forward mode": Way(Forward()),
    "difference": Way(Difference(), most=2.5),
    "one-sided difference": Way(Difference(sides=1)),
    "last block, double backward": Way(Double(), where=LAST),
    "difference, quarter": Way(Difference(), 1, 4, 0.25, most=1.4),
    "difference, quarter, every 4": Way(Difference(), 4, 4, 0.25, most=1.2),
}
MEMORY = 1.1


def main(words: list[str] | None = None) -> None:
    """Time the rows, measure memory and truth, print verdicts and one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.vpretraining", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds: does it run, not how fast")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--peak", metavar="ROW", help="print the peak memory of a few steps and end")
    asked = parser.parse_args(words)
    torch.set_num_threads(asked.threads)
    shape, rounds = (QUICK, 2) if asked.quick else (SHAPE, asked.rounds)
    if asked.peak:
        print(peak(asked.peak, shape))
        return
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, threads {asked.threads}")
    train, test = batches(shape, 1)
    texts = train[0], test
    rows = {PLAIN: steps(None, shape, texts), **{name: steps(way, shape, texts) for name, way in WAYS.items()}}
    shares: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(rounds + 1):
        seconds = {}
        for name in list(rows) if number % 2 == 0 else list(rows)[::-1]:
            every = WAYS[name].every if name in WAYS else 1
            seconds[name] = clock(rows[name], every, "cpu") / every
        if number:  # the first round only warms up
            for name in WAYS:
                shares[name].append(seconds[name] / seconds[PLAIN])
    found = {name: round(statistics.median(values), 3) for name, values in shares.items()}
    memory = {name: measured(name, ["--quick"] * asked.quick) for name in rows}
    agreement = truths(shape, texts)
    for name, way in WAYS.items():
        share = memory[name] / memory[PLAIN]
        target = f"; target {way.most}: {'reached' if found[name] <= way.most else 'missed'}" if way.most else ""
        print(f"{name}: {found[name]:.2f} x a plain step, memory {share:.2f} x, cosine {agreement[name]:.4f}{target}")
        if way.most:
            print(f"  memory, target {MEMORY}: {'reached' if share <= MEMORY else 'missed'}")
    best = min(found.values())
    line: dict[str, Any] = {"bench": "vpretraining", "ratios": {PLAIN: round(1 / best, 3)}, "cost": found}
    print(json.dumps({**line, "MiB": memory, "cosine": agreement, "threads": asked.threads, "shape": shape}))


def steps(way: Way | None, shape: dict[str, int], texts: Texts) -> Any:
    """A function that makes one optimizer step; every `way.every`-th has feedback."""
    trained, batch, feedback = made(way, shape, texts)
    optimizer = torch.optim.AdamW(Groups().of(trained), lr=1e-4, betas=(0.9, 0.95), fused=True)
    plain = stepping(trained, batch, optimizer, clip=1.0)
    if way is None:
        return plain
    steered, done = stepping(trained, {**batch, "feedback": feedback}, optimizer, clip=1.0), iter(range(1 << 30))

    def step() -> Tensor:
        return steered() if next(done) % way.every == 0 else plain()

    return step


def made(way: Way | None, shape: dict[str, int], texts: Texts) -> tuple[Pretrainer, dict[str, Any], dict[str, Any]]:
    """What is trained, a batch, and a batch of feedback."""
    model, _ = pair("gpt2", shape)
    train, test = texts
    rows = max(1, round(shape["rows"] * (way.feedback if way else 1)))
    run = {"progress": 0.5, "step": 100}
    if way is None:
        return Pretrainer(model, Causal), {**tokens(train), **run}, {}
    options = {"estimator": way.estimator, "every": way.every, "pieces": way.pieces, "where": way.where}
    trained = Pretrainer(model, partial(VPretraining, inner=Causal, feedback=Causal, designer=SoftTargets, **options))
    return trained, {**tokens(train), **run}, tokens(test[:rows])


def truths(shape: dict[str, int], texts: Texts) -> dict[str, float]:
    """Cosine of each row's gradient by the designer with the exact one on the whole batch."""
    slopes = {}
    for name, way in WAYS.items():
        trained, batch, feedback = made(way, shape, texts)
        probe, objective = Probe(trained, trained.backbone, trained.call), trained.objective
        probe.among(way.where)
        with torch.no_grad():
            for p in objective.designer.parameters():  # somewhere, not at its start, where little depends on it
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        direction = objective._direction(probe, trained.backbone, {**feedback, "progress": 0.5, "step": 100})
        ask = objective._ask(probe, trained.backbone, piece(batch, way.pieces, 0))
        found = way.estimator(probe, ask, direction, list(objective.designer.parameters()))[1]
        slopes[name] = torch.cat([g.flatten() for g in found])
    exact = slopes["double backward"]
    return {name: round(float(torch.cosine_similarity(g, exact, dim=0)), 4) for name, g in slopes.items()}


def peak(row: str, shape: dict[str, int]) -> float:
    """Mebibytes that three steps take at most above what lies there after the first."""
    ids = torch.randint(shape["vocab"] - 1, (shape["rows"], shape["length"]), generator=torch.Generator().manual_seed(0))
    step = steps(WAYS.get(row), shape, (ids, ids))
    step()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = held("VmRSS")
    for _ in range(4):
        step()
    return round(max(1, held("VmHWM") - before) / 1024, 1)


def measured(row: str, options: list[str]) -> float:
    """`peak` in a process of its own, which gives back what it frees."""
    command = [sys.executable, "-m", "benchmarks.speed.vpretraining", "--peak", row, *options]
    eager = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=eager).stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
