"""V-Pretraining on language: answers to some problems tell which source of problems deserves trust.

A small language model over bytes has learned English prose and word problems (additions), and goes on with a mixture of four
sources: prose (40 %), problems with right answers (15 %), problems whose answers follow another rule (15 %), and problems with
random answers (30 %). The designer has one weight per source, and the source of each sample, but not what it is. Feedback: as
many of the right problems, with their answers, as make 12 % of them; its loss is that of the answers' bytes. Asked for is pass@1,
greedy, on problems that are in no training text, right or wrong. Controls: uniform weights (plain, also for as long as
V-Pretraining takes), a designer that moves at random, feedback with shuffled answers. References: an oracle that has right
problems and prose alone, and the feedback's answers as a fifth source that trains. The loss of held-out prose stands beside.

The model must know the problems before: where it does not yet, the three kinds of answers teach it alike which bytes are answers at
all, and on seed 100 the weight went to the random ones (largest share), with a score no better than plain.

    python -m benchmarks.claims.vpretraining.language [--quick]
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor

from benchmarks.claims import trial
from benchmarks.claims.domains import nats
from benchmarks.claims.prose import members, prose
from benchmarks.claims.vpretraining.steering import CONTROLS, Steering, arms, trained
from headwater import init
from headwater.datamodules.feedback import Feedback
from headwater.datamodules.sources import Source
from headwater.modalities import Text
from headwater.model import Model
from headwater.objectives import Causal
from headwater.objectives.designers import SourceWeights
from headwater.objectives.likelihood import HashDrop, Likelihood
from headwater.tokens import Tokens
from headwater.trunk import Trunk

LENGTH, RATE, FIRST, STEPS = 48, 4e-3, 800, 300  # like all settings chosen on seed 100
SHARES = {"prose": 0.4, "right": 0.15, "other": 0.15, "random": 0.3}
NAMES, THINGS = ("Ann", "Bob", "Eve", "Max", "Mia", "Tom"), ("pears", "coins", "books", "stamps", "shells")
MOST = 6  # numbers are below it


class Answers(HashDrop):
    """Only what stands behind the sign of equality is asked for."""

    def __init__(self) -> None:
        super().__init__()

    def keeps(self, raw: Tokens) -> Tensor:
        sign = raw.x == ord("=")
        return (sign.cumsum(1) > 0) & ~sign


Problem = tuple[str, str, int, int]


def words(problem: Problem) -> str:
    """A word problem, up to the sign behind which its answer stands."""
    name, thing, a, b = problem
    return f"{name} has {a} {thing}, gets {b}, now ="


def texts(seed: int, number: int) -> dict[str, list[str]]:
    """Every set of texts. Problems of "test" occur nowhere else, with whatever answer."""
    draw = random.Random(seed)
    every: list[Problem] = list(itertools.product(NAMES, THINGS, range(MOST), range(MOST)))
    draw.shuffle(every)
    held, known = every[: len(every) // 5], every[len(every) // 5 :]
    english, test = prose(seed, LENGTH - 1)
    rules: dict[str, Callable[[int, int], int]] = {
        "right": lambda a, b: a + b,
        "other": lambda a, b: abs(a - b),
        "random": lambda a, b: draw.randrange(2 * MOST - 1),
    }
    sets = {"prose": english, "prose test": test[:512]}
    for kind, rule in rules.items():
        sets[kind] = [f"{words(p)}{rule(p[2], p[3])}" for p in (draw.choice(known) for _ in range(number))]
    sets["feedback"] = sets["right"][: round(0.12 * number)]
    questions, answers = zip(*(text.split("=") for text in sets["feedback"]), strict=True)
    sets["shuffled"] = [f"{q}={a}" for q, a in zip(questions, draw.sample(answers, len(answers)), strict=True)]
    sets["test"] = [f"{words(p)}{p[2] + p[3]}" for p in held]
    return sets


def writer(seed: int) -> Model:
    """A language model over bytes with first weights of its own."""
    model = Model({"text": Text(Trunk(64, 2, 2, "rotary", norm="rms", activation="silu", gated=True), length=LENGTH)})
    init.initialise(model, seed, init.Normal())
    return model


@torch.no_grad()
def solved(model: Model, problems: Sequence[str]) -> float:
    """Share of the problems whose greedy answer is right: every byte of it, and the end behind."""
    objective, reader = Causal(model.eval()), model.encoder("text").reader
    raw = trial.signals(reader, members(problems))
    task = objective.task({"text": raw, "seed": torch.arange(len(problems))})
    guess = objective.predict(model, task).argmax(-1)
    wanted = Answers().keeps(raw) & raw.real()
    return float(((guess == task["answer"]) | ~wanted).all(1).float().mean())


def main() -> None:
    """Print every arm and seed, and the claim as a line of JSON."""
    quick = trial.options(__doc__ or "")
    steps = 8 if quick else STEPS
    figures: dict[str, list[float]] = {}
    beside: dict[str, list[float]] = {}
    wants = []
    for seed in range(2 if quick else 5):
        found, wanted = seeded(seed, steps, quick)
        wants.append(wanted)
        for name, said in found.items():
            figures.setdefault(name, []).append(said["pass@1"])
            beside.setdefault(name, []).append(round(said["prose"], 4))
    figures["best control"] = [max(row) for row in zip(*(figures[name] for name in CONTROLS), strict=True)]
    trial.verdict(
        "vpretraining_language",
        "answers to 12 % of the problems tell which source to trust",
        "pass@1 on unseen problems",
        figures,
        "V-Pretraining",
        "best control",
        quick,
        prose=beside,
        wants=wants,
    )


def seeded(seed: int, steps: int, quick: bool = False) -> tuple[dict[str, dict[str, float]], dict[str, list[float]]]:
    """All arms of one seed."""
    sets = texts(seed, 400 if quick else 6000)
    with ExitStack() as stack:
        shards = {n: stack.enter_context(trial.written(members(sets[n]))) for n in (*SHARES, "feedback", "shuffled")}
        data = {name: Source(shards[name], weight=share) for name, share in SHARES.items()}
        first = writer(seed)
        before = {"prose": Source(shards["prose"], weight=0.4), "right": Source(shards["right"], weight=0.6)}
        trained(first, Causal, before, 8 if quick else FIRST, seed, RATE, batch_size=32)

        def judge(model: Model) -> Mapping[str, float]:
            return {"pass@1": solved(model, sets["test"]), "prose": nats(model, sets["prose test"])}

        answers = partial(Causal, likelihood=Likelihood(drop=Answers()))
        steering = Steering(partial(SourceWeights, groups=len(SHARES)), answers, 60.0, {"every": 5, "after": 0 if quick else 20})
        given, wrong = (Feedback(Source(shards[name]), 32) for name in ("feedback", "shuffled"))
        found, wants = arms(
            partial(deepcopy, first), Causal, steering, data, given, wrong, judge, steps, seed, RATE / 2, batch_size=32
        )
        oracle = {name: data[name] for name in ("prose", "right")}
        direct = {**data, "feedback": Source(shards["feedback"], weight=0.15)}
        for name, sources in (("oracle", oracle), ("trained on feedback", direct)):
            found[name] = dict(judge(trained(deepcopy(first), Causal, sources, steps, seed, RATE / 2, batch_size=32)[0].backbone))
        found["before"] = dict(judge(first))
    return found, wants


if __name__ == "__main__":
    main()
