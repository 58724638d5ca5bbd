"""A larger rotary base lets a model of short texts find the first token of long ones (Xiong et al. 2023, arXiv:2309.16039).

English prose in lower case, byte by byte, split by document. Texts of most lengths up to 128 begin with a capital that comes once
more behind a question mark at their end; a model is trained on them, and finds it there in texts of 128 but not in texts of 512.
Then it goes on for a few steps with longer texts among short ones, once with a larger base and once with the old one. Asked are
held-out texts of 512. The figure is the share of first letters that are found; beside it the bits per byte of plain short texts,
which may not rise by more than 2 %.

    python -m benchmarks.claims.context [--quick]
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from copy import deepcopy

import torch

from benchmarks.claims import trial
from benchmarks.claims.prose import members, prose
from headwater import init
from headwater.modalities import Text
from headwater.model import Encoder, Model
from headwater.objectives import Causal
from headwater.position import Rotary
from headwater.surgery import longer
from headwater.trunk import Trunk

SHORT, LONG = 128, 512
BASE, LARGER = 100.0, 10000.0  # both, and the steps and rates, chosen on seed 100
STEPS, MORE, BATCH = 1500, 150, 32
RATE, LATER = 3e-3, 1e-3
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def keyed(texts: Sequence[str], least: int, most: int, seed: int) -> list[str]:
    """A capital, a text cut to some length, and behind a question mark the capital again: `least` to `most` bytes each."""
    draw, found = random.Random(seed), []
    for text in texts:
        length = round(least * (most / least) ** draw.random())  # many are short, from which much is learned in few bytes
        key = draw.choice(LETTERS)
        if len(text) >= length - 3:
            found.append(f"{key}{text[: length - 3]}?{key}")
    return found


def plain(seed: int, length: int) -> tuple[list[str], list[str]]:
    """Passages in lower case, in letters of one byte."""
    return tuple([t.lower().encode("ascii", "ignore").decode() for t in part] for part in prose(seed, length))  # type: ignore[return-value]


def writer(seed: int) -> Encoder:
    encoder = Text(Trunk(64, 2, 2, Rotary(BASE)), length=SHORT + 1)
    init.initialise(encoder, seed, init.Normal())
    return encoder


def trained(encoder: Encoder, texts: list[str], steps: int, batch: int, rate: float, seed: int) -> Encoder:
    with trial.written(members(texts)) as shards:
        trial.pretrain(Model({"text": encoder}), Causal, shards, steps, seed, batch, rate, scheme=None)
    return encoder.eval()


@torch.no_grad()
def asked(encoder: Encoder, texts: list[str]) -> tuple[float, float]:
    """The share of texts whose last byte is the likeliest one behind what comes before, and bits per byte of the whole texts."""
    model, right, nats, number = Model({"text": encoder.eval()}), 0, 0.0, 0
    objective = Causal(model)
    for start in range(0, len(texts), 64):
        t = trial.signals(encoder.reader, members(texts[start : start + 64]))
        batch = objective.task({"text": t, "seed": torch.arange(len(t.x))})
        term = objective(model, batch)["causal"]
        last = t.real().sum(1) - 2  # before the mark of the end
        rows = torch.arange(len(t.x))
        right += int((objective.predict(model, batch)[rows, last].argmax(-1) == t.x[rows, last]).sum())
        nats, number = nats + float(term.total), number + int(term.number)
    return right / len(texts), nats / number / math.log(2)


def arms(seed: int, share: float = 1.0) -> dict[str, float]:
    """Found first letters of every arm, and beside them bits per byte of short texts."""
    (short, short_out), (long, long_out) = plain(seed, SHORT), plain(seed, LONG - 2)
    steps, more = (max(2, round(share * n)) for n in (STEPS, MORE))
    begin = trained(writer(seed), keyed(short, 8, SHORT, seed)[:16000] + short[:4000], steps, BATCH, RATE, seed)
    near, far = keyed(short_out, SHORT - 20, SHORT, seed)[:256], keyed(long_out, LONG - 40, LONG, seed)[:128]
    mixed = keyed(long, SHORT, LONG, seed) + keyed(short, 8, SHORT, seed)[:1000] + short[:1000]
    found = {"128, before": asked(begin, near)[0], "512, before": asked(longer(begin, LONG + 1), far)[0]}
    found["bits before"] = bits = asked(begin, short_out[:512])[1]
    for name, base in (("larger base", LARGER), ("same base", BASE)):
        made = trained(longer(deepcopy(begin), LONG + 1, base), mixed, more, BATCH // 2, LATER, seed)
        found |= {f"512, {name}": asked(made, far)[0], f"bits, {name}": (after := asked(made, short_out[:512])[1])}
        found[f"rise of bits, {name}"] = after / bits - 1
    return found


def main() -> None:
    """Print a row per arm and the claim as a line of JSON."""
    quick = trial.options(__doc__ or "")
    found: dict[str, list[float]] = {}
    for seed in range(2 if quick else 3):
        for arm, value in arms(seed, 0.02 if quick else 1.0).items():
            found.setdefault(arm, []).append(value)
    more = {name: [round(v, 4) for v in found.pop(name)] for name in list(found) if "bits" in name}
    claim = "a short continuation with a larger base finds the first of 512 tokens, with the old base it does not as well"
    print(json.dumps(more))
    trial.verdict("context", claim, "share of first letters found", found, "512, larger base", "512, same base", quick, beside=more)


if __name__ == "__main__":
    main()
