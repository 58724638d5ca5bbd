"""Replay and re-warming: going on with new data, nothing old is lost (Ibrahim et al. 2024, arXiv:2403.08763).

A language model learns English prose until its rate has fallen to a tenth, then with program code, the rate warmed up again.
Naive continuation forgets prose; with a share of prose among the code it shall not, and learn code as well. Losses are nats per
byte on passages of documents that were never seen. The figure is the smallest of three margins: how far the old loss stays below
102 % of what it was, how far naive continuation is beyond 110 %, and how far the new loss stays below 103 % of the naive one.

Beside these, what `headwater.training.Forgetting` saw on the way: depth and area of the drop of both runs.

    python -m benchmarks.claims.replay [--quick]
"""

from __future__ import annotations

from copy import deepcopy

from benchmarks.claims import trial
from benchmarks.claims.domains import Texts, domains, learned, nats, writer, written
from headwater.training.replay import Drop, Forgetting, drop
from headwater.training.schedules import Cosine, Rewarm

FIRST, SECOND = 800, 800  # steps; like all settings chosen on seed 100
RATE, AGAIN, SHARE = 4e-3, 3e-3, 0.25


def main() -> None:
    """Print losses per arm and seed, and the claim as a line of JSON."""
    quick = trial.options(__doc__ or "")
    arms: dict[str, list[float]] = {}
    drops: dict[str, list[Drop]] = {"naive": [], "replay": []}
    for seed in range(2 if quick else 3):
        texts = domains(seed, quick)
        with written(texts) as shards:
            found, seen = losses(texts, shards, seed, 20 if quick else FIRST, 20 if quick else SECOND)
        for name, value in (found | {"none": 0.0}).items():
            arms.setdefault(name, []).append(value)
        for name, one in seen.items():
            drops[name].append(one)
    trial.verdict(
        "replay",
        "a quarter of replay and re-warming keep the old loss, and the new one is learned as well",
        "nats per byte, and the smallest of three margins",
        arms,
        "smallest margin",
        "none",
        quick,
        depth={name: [round(d.depth, 4) for d in found] for name, found in drops.items()},
        area={name: [round(d.area, 1) for d in found] for name, found in drops.items()},
    )


def losses(texts: Texts, shards: dict[str, str], seed: int, first: int, second: int) -> tuple[dict[str, float], dict[str, Drop]]:
    """Of prose (old) and code (new), before and after, and the smallest margin; what happened to the old one on the way."""
    model = writer(seed)
    learned(model, shards, {"old": 1.0}, first, seed, RATE, Cosine(0.05, 0.1))
    before = nats(model, texts["old test"])
    found, drops = {"old, before": before}, {}
    for name, shares in {"naive": {"new": 1.0}, "replay": {"new": 1 - SHARE, "old": SHARE}}.items():
        watch, after = Forgetting(["old"], every=max(1, second // 30), batches=4), deepcopy(model)
        learned(after, shards, shares, second, seed, AGAIN, Rewarm(0.1, 0.05, 0.1), callbacks=[watch])
        found |= {f"old, {name}": nats(after, texts["old test"]), f"new, {name}": nats(after, texts["new test"])}
        drops[name] = drop(watch.curves["old"])
    margins = (
        1.02 - found["old, replay"] / before,
        found["old, naive"] / before - 1.10,
        1.03 - found["new, replay"] / found["new, naive"],
    )
    return found | {"smallest margin": min(margins)}, drops


if __name__ == "__main__":
    main()
