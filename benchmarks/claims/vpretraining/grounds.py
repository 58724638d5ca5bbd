"""Handwritten digits, bare or on grounds of any grey: what the claims about pictures share.

The 1,797 scans of scikit-learn, 500 of them to test, 15 % of the others with labels. Where pictures have grounds, those tell them
apart more easily than digits do, and a learner without labels may take to either.

Settings were chosen on seed 100 by other 500 digits than those that reported seeds are tested on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np

from benchmarks.claims import trial
from benchmarks.claims.vpretraining.steering import CONTROLS, Make, Steering, arms, trained
from headwater import init
from headwater.datamodules.feedback import Feedback
from headwater.datamodules.sources import Source
from headwater.modalities import Category, Image
from headwater.model import Model
from headwater.objectives import Probed
from headwater.trunk import Trunk

TEST, LABELLED, SIDE, BATCH = 500, 0.15, 32, 128
TUNED = 100  # the seed on which settings were chosen
CLASSES = {"digit": 10, "ground": 5}
Figures = dict[str, dict[str, float]]
Wants = dict[str, list[float]]


class Run(NamedTuple):
    """What a claim sets. inner: of the designer that `steering` makes; plain: the same without one; best: the task of the oracle,
    which learns from `best_sources`. sources: style of pictures -> share; the first style is tested, and has labels."""

    inner: Make
    plain: Make
    best: Make
    sources: Mapping[str, float]
    best_sources: tuple[str, ...]
    steps: int
    rate: float
    steering: Steering


def pictures(style: str, seed: int) -> list[trial.Members]:
    """Every digit in white, "bare" on black or on a "grey" of its own, 40 to 180 of 255, and what is known of it: "digit",
    and which fifth of its range its "ground" is."""
    from PIL import Image as Pictures

    members, digit = trial.digits()
    level = np.random.default_rng(seed).uniform(0, 1, len(members))
    found = []
    for member, number, share in zip(members, digit.tolist(), level.tolist(), strict=True):
        ink = 1 - np.asarray(Pictures.open(BytesIO(member["png"])).convert("L").resize((SIDE, SIDE)), np.float64) / 255
        grey, file = 40 + 140 * share if style == "grey" else 0.0, BytesIO()
        Pictures.fromarray((grey + ink * (255 - grey)).astype(np.uint8)).save(file, "png")
        told = {"digit": number} | ({"ground": int(share * CLASSES["ground"])} if style == "grey" else {})
        found.append({"png": file.getvalue(), "json": json.dumps(told).encode()})
    return found


def learner(seed: int) -> Model:
    """With first weights of its own."""
    model = Model({"image": Image(Trunk(64, 2, 4), size=16, patch=4)})
    init.initialise(model, seed, init.Normal())
    return model


def asked(factor: str) -> Make:
    """Feedback: how well a linear probe reads a factor."""
    return partial(Probed, label=Category(CLASSES[factor], factor), name=factor, ridge=0.1)


class Judge:
    """Accuracy of linear probes of frozen features: of what is known of the test pictures, and of the category of other pictures,
    the embedded ones of things, which nothing here is about."""

    def __init__(self, train: list[trial.Members], held: list[trial.Members]) -> None:
        reader = learner(0).encoder("image").reader
        things = [trial.samples(f"embedded:things-{part}-*.tar") for part in ("train", "seen")]
        self.sets: dict[str, Any] = {}
        for names, parts in ((tuple(trial.facts(train[:1])[0]), (train, held)), (("category",), things)):
            seen, other = (trial.signals(reader, part) for part in parts)
            self.sets |= {n: (seen, other, *([fact[n] for fact in trial.facts(part)] for part in parts)) for n in names}

    def __call__(self, model: Model) -> dict[str, float]:
        found = {}
        for name, (seen, other, known, truth) in self.sets.items():
            x, y = (trial.features(model, "image", t) for t in (seen, other))
            found[name] = round(trial.probe(x, known, y, truth), 4)
        return found


def seeded(run: Run, seed: int) -> tuple[Figures, Wants]:
    """All arms of one seed, and what the designer wants in the end."""
    whole = {style: pictures(style, seed) for style in run.sources}
    styles = whole if seed == TUNED else {style: members[TEST:] + members[:TEST] for style, members in whole.items()}
    first = next(iter(styles.values()))
    few = [first[k] for k in np.random.default_rng(seed).permutation(len(first) - TEST)[: round(LABELLED * (len(first) - TEST))]]
    judge, fresh = Judge(first[:-TEST], first[-TEST:]), partial(learner, seed)
    with ExitStack() as stack:
        data = {
            style: Source(stack.enter_context(trial.written(members[:-TEST])), weight=run.sources[style])
            for style, members in styles.items()
        }
        labels = Source(stack.enter_context(trial.written(few)))
        given, wrong = (Feedback(labels, BATCH, shuffled) for shuffled in ([], ["digit"]))
        common = (run.steps, seed, run.rate)
        found, wants = arms(fresh, run.inner, run.steering, data, given, wrong, judge, *common, plain=run.plain)
        best = {style: data[style] for style in run.best_sources}
        found["oracle"] = judge(trained(fresh(), run.best, best, *common)[0].backbone)
        found["first weights"] = judge(fresh())
    return found, wants


def report(name: str, claim: str, run: Run, quick: bool) -> None:
    """All seeds, and the verdict about digits: V-Pretraining against the best control of each seed."""
    figures: dict[str, list[float]] = {}
    beside: dict[str, dict[str, list[float]]] = {}
    wants = []
    for seed in [TUNED] if quick else range(5):
        found, wanted = seeded(run, seed)
        wants.append(wanted)
        for arm, said in found.items():
            figures.setdefault(arm, []).append(said.pop("digit"))
            for other, value in said.items():
                beside.setdefault(other, {}).setdefault(arm, []).append(value)
        print(seed, {arm: values[-1] for arm, values in figures.items()}, wanted, flush=True)
    figures["best control"] = [max(row) for row in zip(*(figures[arm] for arm in CONTROLS), strict=True)]
    measure = f"accuracy of a linear probe on {TEST} digits"
    trial.verdict(name, claim, measure, figures, "V-Pretraining", "best control", quick, beside=beside, wants=wants)
