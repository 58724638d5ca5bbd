"""What claims share: runs of the real trainer on the embedded shards, scores of frozen features, and a verdict with a picture."""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.nn import functional as F

from headwater import init
from headwater.datamodules.collate import collate
from headwater.datamodules.datamodule import ShardDataModule
from headwater.datamodules.files import expand
from headwater.datamodules.sources import Source
from headwater.datamodules.writer import ShardWriter
from headwater.model import Model, Reader
from headwater.objectives.objective import Objective, Schedule
from headwater.pretrainer import Pretrainer
from headwater.tokens import Tokens

RESULTS = Path(__file__).parent.parent / "results"
Members = dict[str, bytes]


def options(description: str) -> bool:
    """Parse the command line; True = --quick."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer seeds and steps: does it run, not what holds")
    torch.set_num_threads(1)
    return parser.parse_args().quick


def samples(shards: str) -> list[Members]:
    """Every sample of shards ("embedded:things-seen-*.tar") with its members by extension, in the order of the tars."""
    found: dict[str, Members] = {}
    for path in expand(shards):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                found.setdefault(f"{path}/{key}", {})[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return list(found.values())


def facts(members: Sequence[Members]) -> list[dict[str, Any]]:
    """What the .json of each sample says: category, tags, voice, vendor, concept, ... of things."""
    return [json.loads(m["json"]) for m in members]


def signals(reader: Reader, members: Sequence[Members]) -> Tokens:
    """All samples of one modality as one prepared batch of plain (not random) signals, (S, N, ...)."""
    return reader.prepare(collate([{"it": reader.tokens(reader.decode(m))} for m in members], ["it"])["it"])


def digits() -> tuple[list[dict[str, bytes]], Tensor]:
    """The 1,797 handwritten digits of scikit-learn as PNGs, in an order that is drawn once, and which digit each is."""
    from PIL import Image as Pictures
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    members = []
    for picture in found.images[order]:
        file = BytesIO()
        Pictures.fromarray((255 - picture * 255 / 16).astype(np.uint8)).save(file, "png")
        members.append({"png": file.getvalue()})
    return members, torch.from_numpy(found.target[order]).long()


@contextmanager
def written(members: Sequence[Members]) -> Iterator[str]:
    """These samples as shards in a folder that is there for a while: their pattern."""
    with tempfile.TemporaryDirectory() as folder:
        with ShardWriter(f"{folder}/it-{{:05d}}.tar", samples=2000) as writer:
            for number, member in enumerate(members):
                writer.write(f"{number:06d}", member)
        yield f"{folder}/it-*.tar"


def pretrain(
    model: Model,
    objective: Callable[[Model], Objective],
    shards: str,
    steps: int,
    seed: int,
    batch_size: int = 64,
    rate: float = 1e-3,
    views: Sequence[str] = (),
    scheme: init.Normal | None = init.Normal(),  # noqa: B008
    optimizer: OptimizerCallable | None = None,
    schedule: Schedule | None = None,
    callbacks: Sequence[pl.Callback] = (),
    **source: Any,
) -> Pretrainer:
    """Train as `headwater fit` does: order, views, masks and first weights are functions of `seed`. Returns what was trained.

    optimizer: None = AdamW at `rate`. schedule: None = the usual cosine.
    """
    adamw = partial(torch.optim.AdamW, lr=rate, weight_decay=0.05, betas=(0.9, 0.95))
    pretrainer = Pretrainer(model, objective, optimizer or adamw, schedule, seed=seed, init=scheme)
    data = ShardDataModule(
        train={"it": Source(shards, views=list(views) or None, **source)}, batch_size=batch_size, workers=0, seed=seed
    )
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=list(callbacks),
        )
        trainer.fit(pretrainer, data)
    pretrainer.eval()
    return pretrainer


@torch.no_grad()
def features(model: Model, name: str, t: Tokens, rows: int = 256) -> Tensor:
    """Pooled vectors of prepared signals, (S, dim)."""
    model.eval()
    starts = range(0, len(t.x), rows)
    return torch.cat([model.represent({name: t.map(lambda f, s=s: f[s : s + rows])})[name].x for s in starts])  # type: ignore[misc]


def knn(train: Tensor, labels: Sequence[Any], test: Tensor, truth: Sequence[Any], k: int = 10) -> float:
    """Accuracy of the majority among the k nearest by cosine; the nearer class wins a tie."""
    train, test = (F.normalize(x.float() - train.float().mean(0), dim=-1) for x in (train, test))
    near = (test @ train.T).topk(k, 1)
    known = sorted(set(labels))
    number = torch.tensor([known.index(y) for y in labels])
    votes = torch.zeros(len(test), len(known)).scatter_add_(1, number[near.indices], 1 + 1e-3 * near.values)
    return statistics.mean(known[i] == y for i, y in zip(votes.argmax(1).tolist(), truth, strict=True))


def probe(train: Tensor, labels: Sequence[Any], test: Tensor, truth: Sequence[Any], strength: float = 1.0) -> float:
    """Accuracy of a logistic regression on frozen features; strength: inverse of its penalty."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train.double().numpy())
    model = LogisticRegression(C=strength, max_iter=500).fit(scaler.transform(train.double().numpy()), list(labels))
    return float(model.score(scaler.transform(test.double().numpy()), list(truth)))


def recall(queries: Tensor, gallery: Tensor, k: int = 5) -> float:
    """Share of queries whose own entry is among the k nearest of the gallery. Both (S, D) in one order."""
    near = (F.normalize(queries.float(), dim=-1) @ F.normalize(gallery.float(), dim=-1).T).topk(k, 1).indices
    return float((near == torch.arange(len(queries))[:, None]).any(1).float().mean())


def rank(x: Tensor) -> float:
    """Effective rank of features (S, D): exp of the entropy of their singular values (Roy and Vetterli 2007), mean taken away."""
    values = torch.linalg.svdvals(x.double() - x.double().mean(0))
    share = values / values.sum().clamp(min=1e-12)
    return float(torch.special.entr(share).sum().exp())


def interval(effects: Sequence[float]) -> tuple[float, float]:
    """95 % by Student's t over seeds."""
    from scipy.stats import t

    spread = t.ppf(0.975, len(effects) - 1) * statistics.stdev(effects) / math.sqrt(len(effects)) if len(effects) > 1 else math.inf
    return float(statistics.mean(effects) - spread), float(statistics.mean(effects) + spread)


def verdict(
    name: str, claim: str, measure: str, arms: Mapping[str, Sequence[float]], ours: str, control: str, quick: bool, **more: Any
) -> None:
    """Print every arm, draw them, and end with the claim as one line of JSON: it holds when the interval of the paired
    differences ours - control lies above zero.

    arms: name -> one figure per seed, larger is better, seeds in one order. more: further figures for the line. A quick run
    leaves no files.
    """
    effects = [a - b for a, b in zip(arms[ours], arms[control], strict=True)]
    low, high = interval(effects)
    for arm, values in arms.items():
        print(f"{arm:>28}  {statistics.mean(values):8.4f}   " + "  ".join(f"{v:.4f}" for v in values))
    line = {
        "claim": f"{name}: {claim}",
        "holds": low > 0,
        "effect": round(statistics.mean(effects), 4),
        "ci95": [round(low, 4), round(high, 4)] if math.isfinite(low) else None,
        "seeds": len(effects),
        "measure": measure,
        "arms": {arm: [round(v, 4) for v in values] for arm, values in arms.items()},
        **more,
    }
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.png").write_bytes(picture(claim, measure, arms))
        with (RESULTS / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    print(json.dumps(line))


def picture(claim: str, measure: str, arms: Mapping[str, Sequence[float]]) -> bytes:
    """One column per arm: a point per seed, lines that join what a seed gave, and the means."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    values = np.array(list(arms.values()))
    figure, axes = plt.subplots(figsize=(1.2 + 1.3 * len(arms), 3.4), dpi=110)
    axes.plot(values, color="0.75", linewidth=0.8, zorder=1)
    for column, row in enumerate(values):
        axes.scatter([column] * len(row), row, s=18, color="tab:blue", zorder=2)
        axes.plot([column - 0.2, column + 0.2], [row.mean()] * 2, color="black", linewidth=2, zorder=3)
    axes.set_xticks(range(len(arms)), [a.replace(" ", "\n") for a in arms], fontsize=8)
    axes.set_ylabel(measure, fontsize=8)
    axes.set_title(claim, fontsize=8, wrap=True)
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    file = BytesIO()
    figure.savefig(file, format="png")
    plt.close(figure)
    return file.getvalue()
