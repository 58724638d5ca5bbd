"""What this machine has, and the reason for what it has not: `headwater doctor`."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from json import dumps
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from headwater import fused
from headwater.modalities import decoding
from headwater.tools.decode import in_bytes
from headwater.tools.describe import devices, kernels, show_kernels

LIBRARIES = ("torch", "lightning", "timm", "open_clip_torch", "transformers", "webdataset", "torchcodec", "triton", "apex")
ACTIVE = "active"


def doctor(json: bool = False) -> None:
    """Print which kernels, decoders and devices this machine has, and why not.

    Fused operations (apex or torch), attention kernels, decoders, collectives and versions. What is missing is no error: something
    else serves, more slowly.

    Args:
        json: print it as JSON, for programs.
    """
    warnings.filterwarnings("ignore", message=".*batching rule.*")  # of trying what runs under vmap
    told = examined()
    if json:
        print(dumps(told, indent=1))
    else:
        wide = None if sys.stdout.isatty() else 160
        show(told, Console(width=wide, markup=False, emoji=False, highlight=False, soft_wrap=True))


def examined() -> dict[str, Any]:
    """All of it as plain data. state: "active", or why not; "runs": what serves instead."""
    here = devices()
    return {
        "versions": {"headwater": versions("headwater"), "python": platform.python_version()} | {n: versions(n) for n in LIBRARIES},
        "devices": {device: device_words(device) for device in here},
        "ops": {
            op: {"apex": fused.missing(op, here[-1]) or ACTIVE, "torch": fused.OPS[op].torch, "runs": runs(op, here[-1])}
            for op in fused.NAMES
        },
        "sparse tensor cores": sparse() or ACTIVE,
        "compile": compiler() or ACTIVE,
        "collectives": {name: collective(name) or ACTIVE for name in ("gloo", "nccl")},
        "decoders": [choice._asdict() for choice in decoding.chosen()],
        "attention": {device: kernels(device, "32-true", 64) for device in here},
    }


def versions(name: str) -> str:
    """Of an installed distribution."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def device_words(device: str) -> str:
    """A kind of device in a few words."""
    if device != "cuda":
        return f"{platform.machine()}, {os.cpu_count()} cores" if device == "cpu" else "1"
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    each = "; ".join(f"{p.name}, {in_bytes(p.total_memory)}, compute capability {p.major}.{p.minor}" for p in found)
    return f"{each}; CUDA {torch.version.cuda}"


def runs(op: fused.Name, device: str) -> str:
    """What a run that asks for apex gets."""
    return f"torch: {fused.OPS[op].torch}" if fused.missing(op, device) else f"apex: {fused.OPS[op].module}.{fused.OPS[op].name}"


def sparse() -> str:
    """Why 2:4 sparse matrices give no speed; "" = they do."""
    if not torch.cuda.is_available():
        return "needs a CUDA device of compute capability 8.0 or more; there is none"
    major, minor = torch.cuda.get_device_capability()
    return "" if major >= 8 else f"needs compute capability 8.0 or more; found {major}.{minor}"


def compiler() -> str:
    """Why torch.compile's own backend does not work here, by compiling a sum; "" = it does."""
    try:
        device = devices()[-1]
        torch.compile(torch.add, fullgraph=True)(torch.ones(2, device=device), torch.ones(2, device=device))
    except Exception as error:  # a missing compiler, headers or driver raise in many ways
        return fused.words(error)
    return ""


def collective(name: str) -> str:
    """Why ranks cannot talk by it; "" = they can."""
    if not dist.is_available() or not dist.is_backend_available(name):
        return "torch was built without it"
    return "" if name != "nccl" or torch.cuda.is_available() else "needs a CUDA device; there is none"


def show(told: dict[str, Any], console: Console) -> None:
    """Print what was found, tables first."""
    console.print(", ".join(f"{name} {found}" for name, found in told["versions"].items()))
    for device, found in told["devices"].items():
        console.print(f"{device}: {found}")
    table = Table("op", "a run that asks for apex gets", "apex", title="fused operations (trainer.callbacks: Fused)")
    for op, row in told["ops"].items():
        table.add_row(op, row["runs"], row["apex"])
    console.print(table)
    table = Table("decodes", "by", "state", title="decoders")
    for choice in told["decoders"]:
        table.add_row(choice["kind"], choice["backend"], choice["state"])
    console.print(table)
    table = Table("what", "state", title="others")
    for name in ("compile", "sparse tensor cores"):
        table.add_row(name, told[name])
    for name, state in told["collectives"].items():
        table.add_row(f"collectives by {name}", state)
    console.print(table)
    for device, found in told["attention"].items():
        show_kernels(device, found, console)
