"""Pictures of a run: how the losses fell, and what retrieval found."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any


def _plots():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def loss_plot(metrics: Path, target: Path) -> None:
    """One small panel per training loss of a metrics.csv (step, name, value): every value in light, a running mean in dark."""
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    with metrics.open() as file:
        for row in csv.DictReader(file):
            if row["name"].startswith("train/"):
                curves[row["name"].removeprefix("train/")].append((int(row["step"]), float(row["value"])))
    losses = {n: c for n, c in curves.items() if n.rpartition("/")[0] not in curves}  # below a loss stand its metrics
    if not losses:
        return
    plt = _plots()
    columns = min(3, len(losses))
    rows = -(-len(losses) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 2.4 * rows), squeeze=False, layout="constrained")
    for axis, (name, curve) in zip(axes.flat, losses.items()):
        steps, values = zip(*curve)
        axis.plot(steps, values, color="#9ecae1", linewidth=0.8)
        axis.plot(steps, running_mean(values), color="#08519c", linewidth=1.5)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in axes.flat[len(losses) :]:
        axis.axis("off")
    figure.savefig(target, dpi=110)
    plt.close(figure)


def running_mean(values: tuple[float, ...], decay: float = 0.9) -> list[float]:
    """Exponential running mean, corrected for its start."""
    total, weight, means = 0.0, 0.0, []
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        means.append(total / weight)
    return means


def contact_sheet(sheet: dict[str, Any], target: Path) -> None:
    """A row per caption: the right picture, then what was found, the right one framed in green."""
    plt = _plots()
    rows = sheet["rows"]
    columns = 1 + max(len(found) for _, _, found in rows)
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.15 * columns + 1.2, 1.2 * len(rows)), squeeze=False)
    for line, (caption, right, found) in zip(axes, rows):
        line[0].set_ylabel(caption, rotation=0, ha="right", va="center", fontsize=8, wrap=True)
        for axis, (picture, hit) in zip(line, [(right, None), *found]):
            if picture is not None:
                axis.imshow(picture)
            axis.set_xticks([])
            axis.set_yticks([])
            for side in axis.spines.values():
                side.set_color("#2ca02c" if hit else "#cccccc")
                side.set_linewidth(3 if hit else 0.8)
    axes[0][0].set_title("right", fontsize=8)
    axes[0][1].set_title("nearest", fontsize=8, loc="left")
    figure.suptitle(sheet["title"], fontsize=9)
    head = 0.6 / figure.get_figheight()  # inches for the two lines above the first row
    figure.subplots_adjust(left=0.22, right=0.98, top=1 - head, bottom=0.02, wspace=0.1, hspace=0.15)
    figure.savefig(target, dpi=110)
    plt.close(figure)
