"""How fast fused operations are: apex, torch's own, and the plain form of each, in turns, on the device at hand.

    OMP_WAIT_POLICY=passive python -m benchmarks.speed.fused [--quick] [--device cuda] [--repeats N]

Norms, cross entropy and clipping on shapes of a transformer, the optimizer step on all its parameters; norms and cross entropy
forward and backward. Where apex does not serve, the table says why. The last line is JSON. Only ratios on one machine count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.speed.trunk import clock
from headwater import fused
from headwater.fused import Backend, Name
from headwater.training.fused_optimizers import FusedAdamW, FusedLamb, FusedNovograd, FusedSgd
from headwater.trunk import Trunk

STEPS: dict[Name, type[Any]] = {"adam": FusedAdamW, "lamb": FusedLamb, "novograd": FusedNovograd, "sgd": FusedSgd}
ROWS: tuple[Name, ...] = (*STEPS, "clip", "layer_norm", "rms_norm", "xentropy")


class Shape(NamedTuple):
    """A transformer of `depth` blocks of this width, and a batch of so many tokens with so many answers each."""

    width: int
    depth: int
    tokens: int
    vocab: int


SHAPES = {"quick": Shape(32, 1, 64, 64), "cpu": Shape(256, 6, 2048, 8192), "cuda": Shape(1024, 24, 16384, 32768)}


def main(words: list[str] | None = None) -> None:
    """Time every op on every backend, and print a table, the reasons, and one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.fused", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two repeats: does it run, not how fast")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=9)
    asked = parser.parse_args(words)
    shape = SHAPES["quick" if asked.quick else asked.device]
    card = f", {torch.cuda.get_device_name()}" if asked.device == "cuda" else ""
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {asked.device}{card}, torch {torch.__version__}, {shape}")
    found, why = {}, {op: fused.missing(op, asked.device) for op in ROWS}
    for op in ROWS:
        every: tuple[Backend, ...] = (
            ("eager", "apex") if op == "novograd" else ("eager", "torch", "apex")
        )  # timm has one form of it
        backends = [b for b in every if b != "apex" or not why[op]]
        seconds = race(op, backends, shape, asked.device, 2 if asked.quick else asked.repeats)
        found[op] = {b: round(s * 1e3, 4) for b, s in seconds.items()}
        times = {b: round(seconds["eager"] / s, 2) for b, s in seconds.items() if b != "eager"}
        said = ", ".join(f"{b} {ratio} x the plain form" for b, ratio in times.items())
        print(f"{op:<11} plain {found[op]['eager']} ms; {said}" + (f"; no apex: {why[op]}" if why[op] else ""))
    ratios = {op: {b: round(row["eager"] / ms, 3) for b, ms in row.items()} for op, row in found.items()}
    result = {"bench": "fused", "device": asked.device + card, "shape": shape._asdict(), "ms": found, "ratios": ratios}
    print(json.dumps(result | {"left_out": {op: reason for op, reason in why.items() if reason}}))


def race(op: Name, backends: list[Backend], shape: Shape, device: str, repeats: int) -> dict[Backend, float]:
    """Median seconds of a call on each backend, in turns; the first of each only warms up."""
    calls = {backend: call(op, backend, shape, device) for backend in backends}
    seconds: dict[Backend, list[float]] = {backend: [] for backend in backends}
    for repeat in range(repeats + 1):
        for backend in backends if repeat % 2 == 0 else backends[::-1]:
            took = clock(calls[backend], 3, device) / 3
            if repeat:
                seconds[backend].append(took)
    return {backend: statistics.median(times) for backend, times in seconds.items()}


def call(op: Name, backend: Backend, shape: Shape, device: str) -> Callable[[], Any]:
    """One call of an op."""
    like: dict[str, Any] = {"device": device, "dtype": torch.float32}
    if op == "xentropy":
        logits = torch.randn(shape.tokens, shape.vocab, requires_grad=True, **like)
        target = torch.randint(shape.vocab, (shape.tokens,), device=device)
        return lambda: torch.autograd.grad(fused.cross_entropy(logits, target, backend=backend).sum(), logits)
    if op in ("layer_norm", "rms_norm"):
        return norm(op, backend, torch.randn(shape.tokens, shape.width, requires_grad=True, **like))
    params = [*Trunk(shape.width, shape.depth, max(1, shape.width // 64)).to(**like).parameters()]
    gradients = [torch.randn_like(p) for p in params]
    if op == "clip":
        return lambda: fused.scale_gradients(gradients, 1.0, fused.gradient_norm(gradients, backend), backend)
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient
    return STEPS[op](params, lr=1e-4, weight_decay=0.1, backend=backend).step  # type: ignore[no-any-return]


def norm(op: Name, backend: Backend, x: torch.Tensor) -> Callable[[], Any]:
    """Forward and backward of a norm over the last dimension."""
    kind: Any = nn.LayerNorm if op == "layer_norm" else nn.RMSNorm
    module = kind(x.shape[-1], eps=1e-6, device=x.device)
    plain: Any = fused.layer_norm if op == "layer_norm" else fused.rms_norm
    fused.swap_norms(module)

    def run() -> None:
        with fused.preferring({op: backend}):
            y = plain(x, *module.parameters(), 1e-6) if backend == "eager" else module(x)
            torch.autograd.grad(y.sum(), [x, *module.parameters()])

    return run


if __name__ == "__main__":
    main()
