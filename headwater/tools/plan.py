"""What a run needs on devices that need not be here: `headwater plan clip --gpus 8x80GB`.

Parameters, optimizer state, activations and FLOPs are those of `headwater.tools.cost`, which runs a step on tensors without memory.
What strategies add is by formula, with n ranks, P bytes of parameters, G of gradients, O of optimizer state:

- DDP: P + 2 G + O on every rank, as its buckets are a copy of the gradients.
- FSDP2: (P + G + O) / n, and what is gathered meanwhile: parameters and gradients outside of blocks, and two blocks.

With checkpointing the blocks keep what they are given, and one of them is there a second time.
"""

from __future__ import annotations

import re
import sys
import time
from inspect import signature
from json import dumps
from math import ceil
from typing import Any, NamedTuple

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import nn

from headwater.cli import recipe_path
from headwater.datamodules.datamodule import ShardDataModule
from headwater.layers import Block
from headwater.tools.decode import in_bytes
from headwater.tools.describe import costs, devices, flops
from headwater.tools.train import built
from headwater.training.checkpointing import forgetful
from headwater.training.groups import stacked

UNITS = {"GB": 1e9, "GiB": 2**30, "MB": 1e6, "MiB": 2**20}
SPARE, SHARE = 1e9, 0.9  # bytes for the driver and its libraries; of the rest so much may be filled, as allocators leave gaps
PIECES = (1, 2, 4, 8, 16, 32, 64, 128)


class Way(NamedTuple):
    """One way to run. memory: part -> bytes on a rank; seconds: of a step; fits: into the memory of a device."""

    strategy: str
    checkpointed: bool
    micro: int
    memory: dict[str, float]
    flops: float
    seconds: float
    fits: bool

    @property
    def words(self) -> str:
        """What to set."""
        changes = [f"strategy {self.strategy}"]
        changes += ["the callback Checkpointed"] if self.checkpointed else []
        return ", ".join([*changes, f"model.micro: {self.micro}"])


def plan(
    recipe: str,
    gpus: str = "8x80GB",
    batch: int | None = None,
    tflops: float | None = None,
    bandwidth: float | None = None,
    json: bool = False,
) -> None:
    """Print what a recipe needs on given devices, without running it: memory per rank, FLOPs, step time.

    Under DDP and FSDP2, with and without activation checkpointing, and what to change where it does not fit. The time is that of
    a roofline: FLOPs by the rate of matrix products, and bytes that are moved by the bandwidth of memory, one after the other,
    without waiting for data or for other ranks.

    Args:
        recipe: a recipe by path or by bare name.
        gpus: how many devices, and the memory of each.
        batch: samples of a step over all ranks; None = the recipe's `data.batch_size`.
        tflops: of matrix products on one device, in 10^12 per second; None = measured on this machine.
        bandwidth: of a device's memory, in 10^9 bytes per second; None = measured on this machine.
        json: print it as JSON, for programs.
    """
    ranks, memory = parsed(gpus)
    path = recipe_path(recipe)
    with open(path, encoding="utf-8") as file:
        given = yaml.safe_load(file) or {}
    usual = signature(ShardDataModule).parameters["batch_size"].default
    whole = batch or int((given.get("data") or {}).get("batch_size", usual))
    told = planned(given, ranks, memory, whole, roofline(tflops, bandwidth)) | {"recipe": path}
    if json:
        print(dumps(told, indent=1))
    else:
        wide = None if sys.stdout.isatty() else 160
        show(told, Console(width=wide, markup=False, emoji=False, highlight=False, soft_wrap=True))


def parsed(gpus: str) -> tuple[int, float]:
    """Number of devices and bytes of each: "8x80GB" -> (8, 80e9)."""
    found = re.fullmatch(rf"(\d+)x(\d+(?:\.\d+)?)({'|'.join(UNITS)})", gpus)
    if found is None or not int(found[1]) or not float(found[2]):
        raise ValueError(f"found --gpus {gpus}; expected their number and the memory of each, such as 8x80GB or 1x24GiB")
    return int(found[1]), float(found[2]) * UNITS[found[3]]


def planned(recipe: dict[str, Any], ranks: int, memory: float, batch: int, machine: dict[str, Any]) -> dict[str, Any]:
    """All ways to run it as plain data. machine: of `roofline`."""
    share = ceil(batch / ranks)
    plain, again = costs_of(recipe, share, False), costs_of(recipe, share, True)
    kept = plain["memory"]["activations"] - again["memory"]["activations"]
    again["memory"]["computed again"] = again["largest"] * kept
    ways = []
    for strategy in ("ddp", "fsdp2") if ranks > 1 else ("one process",):
        for found in (plain, again):
            for micro in (found["micro"], *(m for m in PIECES if found["micro"] < m <= share)):
                ways.append(way(strategy, found, ranks, memory, share, micro, machine))
                if ways[-1].fits:
                    break
    told = {name: plain[name] for name in ("precision", "tokens", "parameters", "trained", "notes")}
    return {**told, "ranks": ranks, "device memory": memory, "batch": batch, "machine": machine} | {
        "ways": [one._asdict() for one in ways],
        "verdict": verdict(ways, memory) + ("" if plain["known"] else "; activations are not in it, for they are unknown"),
    }


def costs_of(recipe: dict[str, Any], share: int, checkpointed: bool) -> dict[str, Any]:
    """Of a step of `share` samples on a device: bytes, FLOPs, what FSDP2 gathers, and the largest block's part of all blocks."""
    pretrainer = built(recipe)
    if checkpointed:
        forgetful(pretrainer)
    told = costs(pretrainer, recipe, share)
    blocks = [m for m in pretrainer.modules() if isinstance(m, Block)]  # which FSDP2 gathers one by one
    alone = max(map(size, blocks), default=0)
    stacks = [size(pretrainer.get_submodule(name)) for name in stacked(pretrainer, "")]
    memory = {name: float(n or 0) for name, n in told["memory"].items() if name != "sum"}
    return {
        **{name: told[name] for name in ("precision", "tokens", "micro", "notes")},
        **{name: told["total"][name] for name in ("parameters", "trained")},
        "checkpointed": checkpointed,
        "known": told["memory"]["activations"] is not None,
        "memory": memory,
        "flops": told["total"].get("forward", 0) + told["total"].get("backward", 0),
        "gathered": 2 * (size(pretrainer) - sum(map(size, blocks)) + 2 * alone),
        "largest": max(stacks, default=0) / max(1, sum(stacks)),
    }


def size(module: nn.Module) -> int:
    """Bytes of its parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def way(strategy: str, found: dict[str, Any], ranks: int, memory: float, share: int, micro: int, machine: dict[str, Any]) -> Way:
    """Memory and time of one way. Activations of a smaller piece are taken to be in proportion."""
    shrink = found["micro"] / micro
    held = {n: b * shrink if n in ("activations", "computed again") else b for n, b in found["memory"].items()}
    work, moved = found["flops"] * share, traffic(held, micro)
    if strategy == "fsdp2":
        held = {n: b / ranks if n in ("parameters", "gradients", "optimizer") else b for n, b in held.items()}
        held["gathered"] = found["gathered"]
    elif strategy == "ddp":
        held["buckets"] = held["gradients"]
    seconds = work / machine["flops"] + moved / machine["bytes"]
    return Way(strategy, found["checkpointed"], micro, held, work, seconds, sum(held.values()) <= SHARE * (memory - SPARE))


def traffic(held: dict[str, float], micro: int) -> float:
    """Bytes that a step moves at least: activations are written and read, parameters read twice per piece, the update does both."""
    update = 2 * (held["parameters"] + held["optimizer"]) + held["gradients"]
    return micro * 2 * (held["activations"] + held["parameters"]) + held["gradients"] * (2 * micro - 1) + update


def verdict(ways: list[Way], memory: float) -> str:
    """Whether it fits as the recipe is, and what to change where not."""
    first = ways[0]
    room = f"{in_bytes(sum(first.memory.values()))} of {in_bytes(memory)} on each device"
    if first.fits:
        return f"fits as it is, with {first.words}: {room}"
    if fitting := [one for one in ways if one.fits]:
        best = min(fitting, key=lambda one: one.seconds)
        return f"does not fit as it is ({room}); the fastest that fits: {best.words}"
    least = min(ways, key=lambda one: sum(one.memory.values()))
    return (
        f"does not fit in any way: at least {in_bytes(sum(least.memory.values()))} on each device, with {least.words}. Take more "
        "or larger devices, a smaller model, shorter signals, or an optimizer with less state (docs/optimizers.md)"
    )


def roofline(tflops: float | None, bandwidth: float | None) -> dict[str, Any]:
    """FLOPs and bytes per second of a device, and where the numbers are from; what is not given is measured in about a second."""
    if tflops is not None and bandwidth is not None:
        return {"flops": tflops * 1e12, "bytes": bandwidth * 1e9, "source": "as given"}
    device = devices()[-1]
    dtype, edge = (torch.float32, 768) if device == "cpu" else (torch.bfloat16, 8192)
    a, b = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
    x = torch.empty((1 << 24) if device == "cpu" else (1 << 28), device=device)
    y = torch.empty_like(x)
    rate = 2 * edge**3 / fastest(lambda: torch.mm(a, b), device)
    moved = 2 * x.numel() * x.element_size() / fastest(lambda: y.copy_(x), device)
    note = " (the CPU of this machine: give --tflops and --bandwidth of the devices that are meant)" if device == "cpu" else ""
    return {
        "flops": rate if tflops is None else tflops * 1e12,
        "bytes": moved if bandwidth is None else bandwidth * 1e9,
        "source": f"measured on {device}{note}",
    }


def fastest(call: Any, device: str, limit: float = 0.4) -> float:
    """Seconds of the fastest call within some tenths of a second."""
    best, end = float("inf"), time.perf_counter() + limit
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def show(told: dict[str, Any], console: Console) -> None:
    """Print the plan."""
    still = "" if told["trained"] == told["parameters"] else f" ({told['trained']:,} train)"
    console.print(
        f"{told['recipe']}: {told['parameters']:,} parameters{still}, {told['batch']} samples per step on {told['ranks']} x "
        f"{in_bytes(told['device memory'])}, precision {told['precision']}"
    )
    machine = told["machine"]
    console.print(f"roofline {flops(machine['flops'])}FLOP/s, {in_bytes(machine['bytes'])}/s, {machine['source']}")
    parts = list(dict.fromkeys(part for one in told["ways"] for part in one["memory"]))
    table = Table("strategy", "checkpointed", "micro", *parts, "sum", "fits", "FLOPs of a rank", "step at best")
    for one in told["ways"]:
        cells = [in_bytes(one["memory"][part]) if part in one["memory"] else "" for part in parts]
        whole = in_bytes(sum(one["memory"].values()))
        said = ("yes" if one["checkpointed"] else "no", str(one["micro"]), *cells, whole, "yes" if one["fits"] else "no")
        table.add_row(one["strategy"], *said, flops(one["flops"]), f"{one['seconds']:.3g} s")
    console.print(table)
    for note in told["notes"]:
        console.print(note)
    console.print(told["verdict"])
