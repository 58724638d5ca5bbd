"""What the parts of the benchmark of objectives share: our training step, rows that take turns, and a verdict."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.speed.stopwatch import Timing, ratio
from benchmarks.speed.trunk import clock
from headwater.objectives.objective import Batch, count, weighted_sum
from headwater.objectives.probe import Probe
from headwater.pretrainer import Pretrainer

Step = Callable[[], Tensor]  # one optimizer step, which returns its loss
OURS = "headwater"


def stepping(trained: Pretrainer, batch: Batch, optimizer: torch.optim.Optimizer, clip: float = 0.0) -> Step:
    """What a Pretrainer does in a step: look ahead, hide, count, ask, backward, update. clip: largest gradient norm; 0 = any."""

    def step() -> Tensor:
        optimizer.zero_grad()
        probe = Probe(trained, trained.backbone, trained.call)
        task = trained.hide(trained.objective.before_step(probe, batch))
        loss = weighted_sum(trained.ask(task), count([trained.objective.numbers(task)]), 1)
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(trained.parameters(), clip)
        probe.give(apart=True, clip=clip)
        optimizer.step()
        trained.objective.after_step(trained.backbone, 0.0)
        return loss.detach()

    return step


def race(rows: dict[str, Step], repeats: int, steps: int, samples: int) -> dict[str, Timing]:
    """Samples per second, rows in turn, `steps` steps each; the first repeat of each only warms up."""
    speeds: dict[str, list[float]] = {name: [] for name in rows}
    for repeat in range(repeats + 1):
        for name in list(rows) if repeat % 2 == 0 else list(rows)[::-1]:
            seconds = clock(rows[name], steps, "cpu")
            if repeat:
                speeds[name].append(steps * samples / seconds)
    return {name: Timing(speed, [], []) for name, speed in speeds.items()}


def verdict(name: str, timings: dict[str, Timing], peer: str, target: float) -> float:
    """Print medians and whether the target is reached; returns how many times as fast as the peer ours is."""
    found = ratio(timings[OURS], timings[peer])
    print(f"{name}: {medians(timings)}; {'reached' if found >= target else 'missed'}: {found:.2f} x {peer}, target {target}")
    return round(found, 3)


def medians(timings: dict[str, Timing]) -> str:
    """For people."""
    return "samples/s " + ", ".join(f"{row} {t.median:.1f}" for row, t in timings.items())


def product_rate(rows: int, width: int) -> float:
    """Floating-point operations per second of a feed-forward layer's bare matrix product, (rows, width) by (width, 4 width)."""
    a, b = torch.randn(rows, width), torch.randn(width, 4 * width)
    seconds = min(clock(lambda: a @ b, 20, "cpu") / 20 for _ in range(5))
    return 2 * rows * width * 4 * width / seconds
