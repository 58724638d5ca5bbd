"""Being told where texts come from: metadata before the text in all but the last tenth of the run (MeCo).

Gao et al. 2025, arXiv:2501.01956, on real text of many sources: the Python language reference, the docstrings of the standard
library by package, titles of pictures and missions of episodes. All arms see the same texts in the same order for the same
steps. Held-out passages are asked for as plain text, once more behind their source, and behind a wrong one. The control is
told nothing; a second one is told the source of another text, which helps nobody.

    python -m benchmarks.claims.metadata [--quick]
"""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.claims import trial
from benchmarks.claims.prose import SKIPPED, docstrings, passages
from headwater.modalities import Facts, Text
from headwater.model import Model
from headwater.objectives import Causal, Conditioned
from headwater.objectives.objective import Objective
from headwater.tokens import Tokens
from headwater.training.schedules import Step
from headwater.trunk import Trunk

LENGTH, MOST, HELD_OUT = 128, 1500, 24  # characters of a passage; passages of a source, and how many of them at most are held out
STEPS, RATE = 300, 3e-3  # optimizer steps, and their size, chosen on seed 100
Sourced = tuple[str, str]  # source and text


def sources() -> dict[str, list[str]]:
    """Source -> its texts, in the order of their documents."""
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_path("stdlib"))
    found = {"python reference": [p for name in sorted(topics) for p in passages(topics[name], LENGTH)]}
    for path in sorted(p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts)):
        package = path.relative_to(root).parts[0].removesuffix(".py")
        texts = [p for text in docstrings(path) for p in passages(text, LENGTH)]
        found.setdefault(f"docstrings of {package}", []).extend(texts)
    for name, shards in (("titles", "embedded:things-train-*.tar"), ("missions", "embedded:episodes-train-*.tar")):
        found[name] = [members["txt"].decode() for members in trial.samples(shards)]
    return {name: list(dict.fromkeys(texts))[:MOST] for name, texts in found.items() if len(texts) > 100}


def parts(seed: int) -> tuple[list[Sourced], list[Sourced]]:
    """Texts to train on and held-out ones, the last of each source, in an order that the seed draws."""
    known, held_out = [], []
    for name, texts in sources().items():
        count = min(HELD_OUT, len(texts) // 10)
        known += [(name, text) for text in texts[:-count]]
        held_out += [(name, text) for text in texts[-count:]]
    random.Random(seed).shuffle(known)
    return known, held_out


def members(texts: Sequence[Sourced], told: Sequence[Sourced]) -> list[trial.Members]:
    """Texts as samples that tell the sources of `told`."""
    return [
        {"txt": text.encode(), "json": json.dumps({"source": source}).encode()}
        for (_, text), (source, _) in zip(texts, told, strict=True)
    ]


@torch.no_grad()
def nats(model: Model, samples: list[trial.Members], told: bool) -> float:
    """Loss per byte of the texts, behind their metadata or as they are."""
    reader = Facts(["source"])
    batch = {"text": trial.signals(model.encoder("text").reader, samples), "metadata": trial.signals(reader, samples)}
    objective = Conditioned(model, reader, rate=float(told))
    total = number = 0.0
    for start in range(0, len(samples), 128):
        piece: dict[str, Tokens] = {name: t.map(lambda f, s=start: f[s : s + 128]) for name, t in batch.items()}  # type: ignore[misc]
        term = objective(model, objective.task({**piece, "seed": torch.arange(len(piece["text"].x))}))["causal"]
        total, number = total + float(term.total), number + float(term.number)
    return total / number


def arms(seed: int, steps: int) -> dict[str, float]:
    """Minus the held-out loss of every arm."""
    known, held_out = parts(seed)
    other = random.Random(seed + 1).sample(known, len(known))
    wrong = random.Random(seed + 2).sample(held_out, len(held_out))
    asked, misled = members(held_out, held_out), members(held_out, wrong)
    rate = Step(1.0, 0.0, 0.9)
    runs: dict[str, tuple[Callable[[Model], Objective], list[Sourced]]] = {
        "never told": (Causal, known),
        "told another's": (partial(Conditioned, reader=Facts(["source"]), rate=rate), other),
        "told": (partial(Conditioned, reader=Facts(["source"]), rate=rate), known),
    }
    found = {}
    for name, (objective, told) in runs.items():
        model = Model({"text": Text(Trunk(96, 2, 3, position="rotary"), length=LENGTH + 1)})
        with trial.written(members(known, told)) as shards:
            trial.pretrain(model, objective, shards, steps, seed, batch_size=32, rate=RATE)
        found[name] = -nats(model, asked, told=False)
    return found | {"told, asked so": -nats(model, asked, told=True), "told, asked wrong": -nats(model, misled, told=True)}


def main() -> None:
    """Print a row per arm and the claim as a line of JSON."""
    quick = trial.options(__doc__ or "")
    found: dict[str, list[float]] = {}
    for seed in range(2 if quick else 3):
        for arm, value in arms(seed, 10 if quick else STEPS).items():
            found.setdefault(arm, []).append(value)
    claim = "told sources in training, a model knows plain text better than one that was never told"
    trial.verdict("metadata", claim, "minus nats per byte of held-out plain text", found, "told", "never told", quick)


if __name__ == "__main__":
    main()
