"""One decoder writes, paints and speaks: pictures and sounds of names, and names of pictures, are right more often than by chance.

The recipe `any_to_any` is run by the command line, and its exported backbone is loaded: it paints and speaks titles of things, and
names pictures of another vendor, which it has never seen. A judge that was trained apart, by contrast of pictures, titles and
spoken titles, ranks the titles for every picture and sound that was made: R@5 among them. The name of a picture is written under
the constraint that it is one of these titles (beams). The control has the same answers in another order. The model is trained
once, which takes most of the time; the seeds are of the judge, of the titles, and of the noise from which it paints.
After Zhou et al. 2024 (Transfusion, arXiv:2408.11039) and Lu et al. 2023 (Unified-IO 2, arXiv:2312.17172).

    python -m benchmarks.claims.any_to_any [--quick]      # HEADWATER_BACKBONE=FOLDER takes one that was trained before
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import headwater
from benchmarks.claims import trial
from headwater.datamodules.collate import collate
from headwater.modalities import Audio, Image, Text
from headwater.modalities.griffin_lim import griffin_lim
from headwater.model import Model
from headwater.objectives import Contrastive
from headwater.tokens import Tokens
from headwater.trunk import Trunk

TRAIN, SEEN = "embedded:things-train-*.tar", "embedded:things-seen-*.tar"
TASKS = ("pictures of names", "sounds of names", "names of pictures")


def trained(quick: bool) -> Any:
    """The backbone of the recipe's run."""
    if folder := os.environ.get("HEADWATER_BACKBONE"):
        return headwater.load_backbone(folder)
    with tempfile.TemporaryDirectory() as runs:
        steps = ["--trainer.max_steps", "4"] if quick else []
        words = [sys.executable, "-m", "headwater.cli", "fit", "--config", "any_to_any", "--runs", runs, *steps]
        subprocess.run(words, check=True)
        return headwater.load_backbone(next(Path(runs).glob("*/*/backbone")))


def judge(seed: int, steps: int) -> Model:
    """Pictures, titles and spoken titles in one space."""
    encoders = {
        "image": Image(Trunk(96, 3, 3), 48, 16),
        "text": Text(Trunk(96, 2, 3), length=40),
        "audio": Audio(Trunk(96, 3, 3), seconds=1.5),
    }
    model = Model(encoders, space=64)  # type: ignore[arg-type]
    objective = partial(Contrastive, pairs=[("image", "text", 1.0), ("audio", "text", 1.0)])
    trial.pretrain(model, objective, TRAIN, steps, seed, batch_size=64, rate=2e-3, views=["image", "audio"])
    return model


def ranked(model: Model, name: str, t: Tokens, titles: Tokens) -> float:
    """R@5 of the titles for what was made, in one order."""
    return trial.recall(trial.features(model, name, t), trial.features(model, "text", titles))


def main() -> None:
    """Train, make, rank, and say whether the claim holds."""
    quick = trial.options(__doc__)
    count, seeds, steps = (8, range(2), 10) if quick else (64, range(3), 300)
    backbone, start = trained(quick), time.perf_counter()
    unique = {m["txt"].decode().strip(): m for m in trial.samples(SEEN)}
    arms: dict[str, list[float]] = {}
    for seed in seeds:
        drawn = np.random.default_rng(seed).permutation(len(unique))[:count].tolist()
        chosen = {name: unique[name] for name in (sorted(unique)[i] for i in drawn)}
        names, shown = list(chosen), [backbone.reader["image"].decode(m) for m in chosen.values()]
        asked = judge(seed, steps)
        titles = trial.signals(asked.readers["text"], [{"txt": name.encode()} for name in names])
        how: dict[str, Any] = {
            "layout": "interleaved",
            "seed": seed,
            "guidance": 2.0,
            "steps": 4 if quick else 24,
            "solver": "euler",
        }
        painted = headwater.generate(backbone, "image", text=names, **how)
        spoken = headwater.generate(backbone, "audio", text=names, **how)
        rate = backbone.reader["audio"].rate
        waves = [(griffin_lim(torch.from_numpy(mel), rate), rate) for mel in spoken]
        made = {"image": seen(asked, "image", painted), "audio": seen(asked, "audio", waves)}
        said = headwater.generate(backbone, "text", image=shown, choices=names, beams=16)
        other = np.random.default_rng(seed).permutation(count).tolist()
        figures = {
            TASKS[0]: [ranked(asked, "image", t, titles) for t in (made["image"], mixed(made["image"], other))],
            TASKS[1]: [ranked(asked, "audio", t, titles) for t in (made["audio"], mixed(made["audio"], other))],
            TASKS[2]: [right(said, names), right([said[i] for i in other], names)],
        }
        for task, (found, shuffled) in figures.items():
            arms.setdefault(task, []).append(found)
            arms.setdefault(f"shuffled {task}", []).append(shuffled)
        print(f"seed {seed}, {time.perf_counter() - start:.0f} s: {figures}; says {said[:6]} of {names[:6]}", flush=True)
        if not quick and seed == 0:
            (trial.RESULTS.parents[1] / "docs" / "any_to_any.png").write_bytes(sheet(names, painted, shown, said))
    apart = {t: trial.interval([a - b for a, b in zip(arms[t], arms[f"shuffled {t}"], strict=True)]) for t in TASKS}
    trial.verdict(
        "any_to_any",
        "one decoder of five million parameters paints, speaks and names above chance",
        f"R@5 of {count} titles by a judge; share of right names of {count}",
        arms,
        TASKS[0],
        f"shuffled {TASKS[0]}",
        quick,
        holds=all(low > 0 for low, _ in apart.values()),
        intervals={task: [round(x, 4) for x in pair] for task, pair in apart.items()},
        parameters=backbone.card["parameters"],
    )


def right(said: list[str], names: list[str]) -> float:
    """Share of names that are right letter by letter."""
    return statistics.mean(a.strip() == b for a, b in zip(said, names, strict=True))


def seen(model: Model, name: str, signals: list[Any]) -> Tokens:
    """What was made, as the judge's reader sees it."""
    reader = model.readers[name]
    return reader.prepare(collate([{name: reader.tokens(signal)} for signal in signals], [name])[name])


def mixed(t: Tokens, order: list[int]) -> Tokens:
    """Rows in another order."""
    return t.map(lambda field: field[order])


def sheet(names: list[str], painted: list[np.ndarray], shown: list[np.ndarray], said: list[str]) -> bytes:
    """What was painted for twelve names, and what was said of twelve pictures."""
    from io import BytesIO

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(4, 12, figsize=(13, 5.2), dpi=110)
    pick = torch.linspace(0, len(names) - 1, 24).long().tolist()
    for column, (row, index) in zip(range(24), [(k // 12, i) for k, i in enumerate(pick)], strict=True):
        above, below = axes[row, column % 12], axes[row + 2, column % 12]
        above.imshow(painted[index])
        above.set_title(names[index][:16], fontsize=7)
        below.imshow(shown[index])
        below.set_title(said[index][:16], fontsize=7, color="tab:green" if said[index].strip() == names[index] else "tab:red")
    for axis in axes.flat:
        axis.axis("off")
    figure.suptitle("above: painted for the name; below: the name that was written for the picture", fontsize=8)
    figure.tight_layout()
    file = BytesIO()
    figure.savefig(file, format="png")
    plt.close(figure)
    return file.getvalue()


if __name__ == "__main__":
    main()
