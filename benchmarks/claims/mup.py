"""muP: the best learning rate of a narrow model is the best of a wide one (Yang et al. 2022, arXiv:2203.03466).

A causal language model over bytes learns the titles and missions of the embedded shards at two widths, with a row of learning
rates, under MuP and, as the ablation, under Normal. Runs of a seed see the same batches. The effect is what the rate that was
found at the narrow width costs the wide model more under Normal than under MuP, in nats per byte.

    python -m benchmarks.claims.mup [--quick]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tarfile
import time

import torch

from headwater import init, random
from headwater.datamodules.collate import collate
from headwater.datamodules.files import expand
from headwater.modalities import Text
from headwater.model import Model
from headwater.objectives import Causal
from headwater.pretrainer import Pretrainer
from headwater.training.groups import Groups
from headwater.trunk import Trunk

HEAD, DEPTH, LENGTH = 32, 2, 32
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % of Student's t, by the number of seeds
SHARDS = ("embedded:things-train-000.tar", "embedded:episodes-train-000.tar")


def texts() -> list[str]:
    """Every text of the embedded training shards."""
    found = []
    for path in (path for name in SHARDS for path in expand(name)):
        with tarfile.open(path) as tar:
            found += [tar.extractfile(m).read().decode() for m in tar if m.name.endswith(".txt")]
    return found


def train(corpus: list[str], width: int, rate: float, seed: int, steps: int, scheme: init.Normal, rows: int = 8) -> float:
    """Mean loss of the last quarter of the steps, in nats per byte; every batch is new to the model until the corpus ends."""
    with torch.device("meta"):
        model = Model({"text": Text(Trunk(width, DEPTH, heads=width // HEAD, position="rotary"), length=LENGTH)})
        trained = Pretrainer(model, Causal)
    init.materialise(trained, "cpu", seed, scheme)
    optimizer = torch.optim.Adam(Groups().of(trained, init.factors(trained, scheme)), betas=(0.9, 0.95))
    order = random.uniform(torch.tensor(seed), (len(corpus),), "order").argsort().tolist()
    losses = []
    for step in range(steps):
        chosen = [corpus[order[(step * rows + k) % len(corpus)]] for k in range(rows)]
        batch = {"text": collate([{"text": model.readers["text"].tokens(text)} for text in chosen], ["text"])["text"]}
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("factor", 1.0) * min(1.0, (step + 1) / 5, 2 * (1 - step / steps))
        term = trained.objective(model, trained.objective.task(batch))["causal"]
        loss = term.total / term.number
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    late = losses[-(steps // 4) :]
    mean = sum(late) / len(late)
    return mean if math.isfinite(mean) else 100.0


def main(given: list[str] | None = None) -> None:
    """Print a table per scheme and the claim as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two widths a factor of eight apart, in less than a minute")
    quick = parser.parse_args(given).quick
    torch.set_num_threads(1)
    narrow, wide, steps, seeds = (32, 256, 20, 4) if quick else (64, 512, 80, 5)
    rates = [2.0**-n for n in ((4, 5.5, 7, 8.5, 10) if quick else (4, 5, 6, 7, 8, 9, 10))]
    corpus, start = texts(), time.perf_counter()
    best, cost = {}, {}
    for name, scheme in {"MuP": init.MuP(narrow), "Normal": init.Normal()}.items():
        loss = {w: [[train(corpus, w, r, s, steps, scheme) for r in rates] for s in range(seeds)] for w in (narrow, wide)}
        mean = {w: [statistics.mean(column) for column in zip(*rows, strict=True)] for w, rows in loss.items()}
        best[name] = {w: min(range(len(rates)), key=mean[w].__getitem__) for w in mean}
        cost[name] = [row[best[name][narrow]] - row[best[name][wide]] for row in loss[wide]]
        for w in mean:
            cells = (f"{x:.3f}{'*' if i == best[name][w] else ' '}" for i, x in enumerate(mean[w]))
            print(f"{name:>7} width {w:>4}  " + "  ".join(f"{r:.4f}: {c}" for r, c in zip(rates, cells, strict=True)), flush=True)
    effects = [a - b for a, b in zip(cost["Normal"], cost["MuP"], strict=True)]
    effect, spread = statistics.mean(effects), STUDENT[seeds] * statistics.stdev(effects) / math.sqrt(seeds)
    print(f"{time.perf_counter() - start:.0f} seconds")
    claim = {
        "claim": "mup: the best learning rate is the same at both widths",
        "holds": best["MuP"][narrow] == best["MuP"][wide],
        "effect": round(effect, 4),
        "ci95": [round(effect - spread, 4), round(effect + spread, 4)],
        "seeds": seeds,
        "ablation": {"Normal": {"holds": best["Normal"][narrow] == best["Normal"][wide]}},
    }
    print(json.dumps(claim))


if __name__ == "__main__":
    main()
