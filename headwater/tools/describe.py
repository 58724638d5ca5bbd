"""What a recipe builds and costs, without the memory for it: `headwater describe clip --batch 4096`."""

from __future__ import annotations

import sys
import warnings
from inspect import signature
from json import dumps
from typing import Any, get_args

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import nn

from headwater import attention
from headwater.cli import recipe_path
from headwater.datamodules.datamodule import ShardDataModule
from headwater.init import Row, audit, lines
from headwater.position import Position
from headwater.pretrainer import Pretrainer
from headwater.tools import curves
from headwater.tools import stages as plan
from headwater.tools.built import built
from headwater.tools.cost import longest, measure, parts_of
from headwater.tools.decode import in_bytes
from headwater.tools.train import STEPS, read_stages
from headwater.trunk import Trunk

POWERS: tuple[attention.Power, ...] = ("double backward", "forward mode", "vmap")


def describe(recipe: str, batch: int | None = None, json: bool = False, init: bool = False, plot: str | None = None) -> None:
    """Print what a recipe builds and costs, without the memory for it.

    Parameters, FLOPs and activations of every part in a step, the memory of a training step, and which attention kernels this
    machine has. Samples are as long as the readers let them be, and have everything that the objective needs. Of a recipe with
    `stages`, the plan, and the costs without what stages change.

    Args:
        recipe: a recipe by path or by bare name.
        batch: samples of a step on one device; None = the recipe's `data.batch_size`.
        json: print it as JSON, for programs.
        init: print how every parameter starts too.
        plot: a picture file, for the learning rate and every other schedule over the run, or over all of its stages.
    """
    warnings.filterwarnings("ignore", message=".*batching rule.*")  # of trying what runs under vmap
    path = recipe_path(recipe)
    with open(path, encoding="utf-8") as file:
        given = yaml.safe_load(file) or {}
    pretrainer = built(given)
    rows = audit(pretrainer, pretrainer.seed, pretrainer.init) if init else []
    runs = planned(path, given, pretrainer)
    if plot:
        curves.plot([curves.course(made, steps, name) for name, steps, made, _ in runs], plot)
    usual = signature(ShardDataModule).parameters["batch_size"].default
    told = {"recipe": path, **costs(pretrainer, given, batch or int((given.get("data") or {}).get("batch_size", usual)))}
    told["rates"] = {name: curves.sums(made, steps)._asdict() for name, steps, made, _ in runs if steps}
    told["attention"] = {device: kernels(device, told["precision"], head_size(pretrainer)) for device in devices()}
    if json:
        told["stages"] = [line._asdict() for *_, line in runs if line]
        print(dumps(told | ({"init": [row._asdict() for row in rows]} if init else {}), indent=1))
    else:
        plan.show([line for *_, line in runs if line])
        wide = None if sys.stdout.isatty() else 160
        show(told, rows, Console(width=wide, markup=False, emoji=False, highlight=False, soft_wrap=True))


def planned(
    path: str, recipe: dict[str, Any], pretrainer: Pretrainer
) -> list[tuple[str, int | None, Pretrainer, plan.Line | None]]:
    """Of every stage: name, steps, what it builds, its line of the plan. Of a run without stages: itself, without a line."""
    stages = plan.stages_of(recipe)
    if not stages:
        steps = int((recipe.get("trainer") or {}).get("max_steps", STEPS))
        return [("", steps if steps > 0 else None, pretrainer, None)]
    found, made = read_stages(["fit", "--config", path], stages)
    steps_of = [run.trainer.max_steps if run.trainer.max_steps > 0 else None for run in found]
    lines = [plan.line(stages, k, run, made[k]) for k, run in enumerate(found)]
    return list(zip((stage.name for stage in stages), steps_of, made, lines, strict=True))


def costs(pretrainer: Pretrainer, recipe: dict[str, Any], batch: int) -> dict[str, Any]:
    """Parts, totals and memory as plain data. FLOPs are per sample; activations are those of one of the `micro` pieces."""
    precision = str((recipe.get("trainer") or {}).get("precision") or "32-true")
    piece = -(-batch // pretrainer.micro)
    views = pretrainer.objective.views
    tokens = {name: longest(pretrainer.readers[name], views.get(name)) for name in pretrainer.objective.needs}
    parts, notes, state = counted(pretrainer), [], None
    for real in (False, True):
        try:
            pretrainer = built(recipe, "cpu") if real else pretrainer
            found, state = measure(pretrainer, precision, piece, real)
            for part, cost in found.items():
                parts[part] |= {"forward": cost.forward / piece, "backward": cost.backward / piece, "activations": cost.activations}
            break
        except Exception as error:  # code that asks for values, which fake tensors do not have, fails in many ways
            said = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            notes.append(f"{'a real step' if real else 'a step without memory'} failed, {said}")
    columns = [name for name in next(iter(parts.values())) if name != "built"]
    total = {name: sum(row[name] for row in parts.values()) for name in columns}
    size = [(p.numel() * p.element_size(), p.requires_grad) for p in pretrainer.parameters()]
    memory = {
        "parameters": sum(n for n, _ in size),
        "gradients": sum(n for n, trains in size if trains),
        "optimizer": state,
        "activations": total.get("activations"),
    }
    memory["sum"] = sum(n or 0 for n in memory.values())
    step = {"precision": precision, "batch": batch, "micro": pretrainer.micro, "tokens": tokens}
    return {**step, "parts": parts, "total": total, "memory": memory, "notes": notes}


def counted(pretrainer: Pretrainer) -> dict[str, dict[str, Any]]:
    """Part -> what it is, its parameters, and how many of them train; shared ones count where they come first."""
    found = {}
    for part, (prefix, module) in parts_of(pretrainer).items():
        own = [p for name, p in pretrainer.named_parameters() if name.startswith(prefix)]
        trained = sum(p.numel() for p in own if p.requires_grad)
        found[part] = {"built": words(module), "parameters": sum(p.numel() for p in own), "trained": trained}
    return found


def words(module: nn.Module) -> str:
    """A part in a few words: its trunks, or what it is."""
    trunks = [m for m in module.modules() if isinstance(m, Trunk)]
    told = (f"{len(t.blocks)} x {t.width}, {t.heads} heads of {t.size}, {position_of(t)}, {norm_of(t)}" for t in trunks)
    if isinstance(module, nn.ModuleDict):
        return ", ".join(f"{name} {layer.in_features} to {layer.out_features}" for name, layer in module.items())
    return "; ".join(told) or type(getattr(module, "tower", module)).__name__


def position_of(trunk: Trunk) -> str:
    """The class of its positions."""
    return "no position" if type(trunk.position) is Position else type(trunk.position).__name__


def norm_of(trunk: Trunk) -> str:
    """The class of its norms."""
    norms = [type(m).__name__ for m in trunk.modules() if "Norm" in type(m).__name__ or type(m).__name__ == "DynamicTanh"]
    return norms[0] if norms else "no norm"


def head_size(pretrainer: Pretrainer) -> int:
    """d of the heads of the first trunk; 64 where there is none."""
    return next((m.size for m in pretrainer.modules() if isinstance(m, Trunk)), 64)


def devices() -> list[str]:
    """Kinds of device of this machine."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ["cpu", *([found.type] if found is not None else [])]


def kernels(device: str, precision: str, size: int) -> dict[str, Any]:
    """Attention on a device.

    kernels: kernel -> kind of mask, or power -> why it does not run, "" = it does. used: kind of mask -> kernel of the trunk.
    """
    dtype = torch.bfloat16 if device != "cpu" or precision.startswith("bf16") else torch.float32
    found = attention.kernels(device, dtype, size)
    rows = {
        kernel: {kind: found[kind][kernel] for kind in found}
        | {power: attention.fails(kernel, "full", device, dtype, size, power) for power in POWERS}
        for kernel in get_args(attention.Kernel)
    }
    used = {kind: attention.runs(kind, device, dtype, size) for kind in found}
    return {"dtype": str(dtype).removeprefix("torch."), "head": size, "kernels": rows, "used": used}


def show(told: dict[str, Any], rows: list[Row], console: Console) -> None:
    """Print what `describe` found."""
    lengths = ", ".join(f"{name} {count or 'as its example'}" for name, count in told["tokens"].items())
    console.print(f"{told['recipe']}: {told['batch']} samples per step, precision {told['precision']}; tokens: {lengths}")
    table, whole = Table("part", "built", "parameters", "share", "forward", "backward", "activations"), told["total"]
    for part, row in [*told["parts"].items(), ("total", {"built": "", **whole})]:
        still = "" if row["trained"] == row["parameters"] else f" ({row['trained']:,} train)"
        share = f"{row['parameters'] / max(whole['parameters'], 1):.1%}"
        costs = (flops(row["forward"]), flops(row["backward"]), in_bytes(row["activations"])) if "forward" in row else ()
        table.add_row(part, row["built"], f"{row['parameters']:,}{still}", share, *costs)
    console.print(table)
    pieces = f"{told['micro']} pieces, one of which has the activations. " if told["micro"] > 1 else ""
    memory = ", ".join(f"{name} {'unknown' if n is None else in_bytes(n)}" for name, n in told["memory"].items())
    console.print(f"FLOPs are per sample. {pieces}Memory of a step: {memory}")
    for name, found in told["rates"].items():
        console.print(f"Sum of the learning rates{name and f' of {name}'} (S1) {found['s1']:.4g}, annealed (S2) {found['s2']:.4g}")
    for note in told["notes"]:
        console.print(note)
    for device, found in told["attention"].items():
        show_kernels(device, found, console)
    if rows:
        console.print(lines(rows))
        console.print(f"{sum(bool(row.fault) for row in rows)} of {len(rows)} parameters do not start as they should")


def flops(count: float) -> str:
    """A number of operations with its unit: 1.25e9 -> "1.25 G"."""
    for unit in ("", " K", " M", " G", " T"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} P"


def show_kernels(device: str, found: dict[str, Any], console: Console) -> None:
    """One line per kernel, reasons below."""
    kinds = list(found["used"])
    table = Table("kernel", *kinds, *POWERS, title=f"attention on {device}, {found['dtype']}, heads of {found['head']}")
    reasons: list[str] = []
    for kernel, row in found["kernels"].items():
        reasons += dict.fromkeys(why for why in row.values() if why and why not in reasons)
        cells = {key: f"no ({reasons.index(why) + 1})" if why else "yes" for key, why in row.items()}
        table.add_row(kernel, *(cells[key] + (", used" if found["used"].get(key) == kernel else "") for key in (*kinds, *POWERS)))
    console.print(table)
    for number, why in enumerate(reasons, 1):
        console.print(f"({number}) {why}")
