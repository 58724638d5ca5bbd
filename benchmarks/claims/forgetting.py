"""Going on without old data: whoever listens to the old model's answers, too, forgets less than half (LwF, arXiv:1606.09282).

A language model learns English prose, then program code. Naive continuation forgets prose. Three ways to hold on to it train on no
prose at all: the old model's own answers about the new text are listened to (learning without forgetting, `Distilled` from the
start); a pull to the start that is equal everywhere (L2-SP, arXiv:1802.01483); and one that is weighed by Fisher information from
256 old passages (EWC, arXiv:1612.00796). The two pulls are shown beside and not claimed: on seed 100 they keep a third of what is
lost, alike, and cost 9 % of the new loss.

Losses are nats per byte of documents that were never seen. The figure is the smaller of two margins: by how much the rise of the
old loss is below half of the naive one, as a share of that, and how far the new loss stays below 105 % of the naive one.

    python -m benchmarks.claims.forgetting [--quick]
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial

from benchmarks.claims import trial
from benchmarks.claims.domains import Texts, domains, learned, nats, writer, written
from headwater.model import Model
from headwater.objectives import Anchored, Causal, Distilled, Objective, Weighted
from headwater.training.fisher import Fisher
from headwater.training.schedules import Cosine, Rewarm

FIRST, SECOND, RATE = 800, 400, 4e-3  # like all settings chosen on seed 100
LWF, L2, EWC = 0.2, 0.01, 300.0


def anchored(weight: float, fisher: bool) -> Callable[[Model], Objective]:
    """Next-byte prediction beside a penalty."""
    return partial(Weighted, parts={"next": Causal, "anchor": partial(Anchored, fisher=fisher)}, weights={"anchor": weight})


ARMS: dict[str, Callable[[Model], Objective]] = {
    "naive": Causal,
    "LwF": partial(Distilled, inner=Causal, teachers="start", weight=LWF),
    "L2-SP": anchored(L2, False),
    "EWC": anchored(EWC, True),
}


def losses(texts: Texts, shards: dict[str, str], seed: int, first: int, second: int) -> dict[str, float]:
    """Of prose (old) and code (new), before and after every arm, and the smaller margin."""
    model = writer(seed)
    learned(model, shards, {"old": 1.0}, first, seed, RATE, Cosine(0.05, 0.1))
    before = nats(model, texts["old test"])
    found = {"old, before": before}
    for name, objective in ARMS.items():
        after = deepcopy(model)
        callbacks = [Fisher("known", 256, part="next")] if name == "EWC" else []
        learned(after, shards, {"new": 1.0}, second, seed, RATE, Rewarm(0.1, 0.05, 0.1), objective, callbacks)
        found |= {f"old, {name}": nats(after, texts["old test"]), f"new, {name}": nats(after, texts["new test"])}
    rise = (found["old, LwF"] - before) / (found["old, naive"] - before)
    return found | {"smaller margin": min(0.5 - rise, 1.05 - found["new, LwF"] / found["new, naive"])}


def main() -> None:
    """Print losses per arm and seed, and the claim as a line of JSON."""
    quick = trial.options(__doc__ or "")
    arms: dict[str, list[float]] = {}
    for seed in range(2 if quick else 3):
        texts = domains(seed, quick)
        with written(texts) as shards:
            found = losses(texts, shards, seed, 10 if quick else FIRST, 10 if quick else SECOND)
        for name, value in (found | {"none": 0.0}).items():
            arms.setdefault(name, []).append(value)
    trial.verdict(
        "forgetting",
        "answers of the old model halve what is forgotten, and the new is learned",
        "nats per byte, and the smaller of two margins",
        arms,
        "smaller margin",
        "none",
        quick,
    )


if __name__ == "__main__":
    main()
