"""Every schedule equals its closed form at every step of a run."""

import inspect
import math
import time
from datetime import timedelta
from functools import partial
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import runs
import torch
from jsonargparse import ArgumentParser

from headwater import training
from headwater.objectives.objective import Curve, Schedule
from headwater.training import schedules
from headwater.training.schedules import (
    WSD,
    Cosine,
    Geometric,
    HalfCosine,
    Infinite,
    InverseSqrt,
    Linear,
    Points,
    Rewarm,
    Step,
    areas,
    constant,
)

STEPS = 400
FORMS = {  # name -> a schedule, and what it should be after k of N steps, typed by counting steps
    "cosine": (Cosine(0.1, 0.2), lambda k, n: k / 40 if k < 40 else 0.2 + 0.4 * (1 + math.cos(math.pi * (k - 40) / 360))),
    "no warm-up": (Cosine(0.0), lambda k, n: 0.5 + 0.5 * math.cos(math.pi * k / n)),
    "re-warmed": (
        Rewarm(0.1, 0.05, 0.1),
        lambda k, n: 0.1 + 0.9 * (k / 20 if k < 20 else (1 + math.cos(math.pi * (k - 20) / 380)) / 2),
    ),
    "stable, linear": (WSD(0.1, 0.25), lambda k, n: min(1, k / 40, (n - k) / 100)),
    "stable, sqrt": (WSD(0.1, 0.25, shape="sqrt"), lambda k, n: k / 40 if k < 40 else 1 - max(0, (k - 300) / 100) ** 0.5),
    "stable, square": (WSD(0, 0.25, 0.5, "square"), lambda k, n: 1 - 0.5 * max(0, (k - 300) / 100) ** 2),
    "stable, cosine": (WSD(0, 0.25, shape="cosine"), lambda k, n: math.cos(math.pi / 2 * max(0, (k - 300) / 100)) ** 2),
    "stable, exponential": (WSD(0, 0.25, 0.01, "exponential"), lambda k, n: 10 ** (-2 * max(0, (k - 300) / 100))),
    "stable without end": (WSD(0.1, 0), lambda k, n: min(1, k / 40)),
    "to a deadline": (WSD(0.25, 0.75), lambda k, n: k / 100 if k < 100 else (400 - k) / 300),
    "infinite": (
        Infinite(0.05, 0.25, 0.4, 0.2, 0.1),
        lambda k, n: (
            k / 20
            if k < 20
            else 0.4 + 0.3 * (1 + math.cos(math.pi * (k - 20) / 100))
            if k < 120
            else 0.4
            if k < 320
            else 0.4 * (0.1 / 0.4) ** ((k - 320) / 80)
        ),
    ),
    "infinite, inverse sqrt": (
        Infinite(0.05, 0.25, 0.4, 0, shape="inverse sqrt"),
        lambda k, n: (
            k / 20
            if k < 20
            else 1 - 0.6 * (1 - 1 / math.sqrt(1 + 10 * (k - 20) / 100)) / (1 - 1 / math.sqrt(11))
            if k < 120
            else 0.4
        ),
    ),
    "inverse sqrt": (InverseSqrt(0.1), lambda k, n: min(k * 40**-1.5, k**-0.5 if k else 0) * 40**0.5),
    "inverse sqrt, ended": (InverseSqrt(0.1, 0.25), lambda k, n: min(k / 40, (40 / max(k, 1)) ** 0.5) * min(1, (n - k) / 100)),
    "linear": (Linear(0.3, 0.15), lambda k, n: 0.3 - 0.15 * k / n),
    "half cosine": (HalfCosine(0.99), lambda k, n: 1 - 0.01 * (math.cos(math.pi * k / n) + 1) / 2),
    "geometric": (Geometric(2.0, 0.5), lambda k, n: 2 * 0.25 ** (k / n)),
    "step": (Step(1.0, 0.0, 0.5), lambda k, n: float(k < 200)),
    "points": (
        Points([(0.25, 1.0), (0.5, 3.0), (0.5, 0.0), (1.0, 1.0)]),
        lambda k, n: 1.0 if k < 100 else 1 + (k - 100) / 50 if k < 200 else (k - 200) / 200,
    ),
    "constant": (constant, lambda k, n: 1.0),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_schedule_equals_its_closed_form_at_every_step(name):
    schedule, form = FORMS[name]
    values = [schedule(k / STEPS) for k in range(STEPS + 1)]
    assert values == pytest.approx([form(k, STEPS) for k in range(STEPS + 1)], abs=1e-12)
    assert [schedule(k / STEPS) for k in range(STEPS + 1)] == values  # nothing is remembered


def test_every_schedule_is_checked_and_exported():
    every = {c for c in vars(schedules).values() if inspect.isclass(c) and issubclass(c, Curve) and c is not Curve}
    assert every == {type(s) for s, _ in FORMS.values() if isinstance(s, Curve)}
    assert {c.__name__ for c in every} <= set(training.__all__)


@pytest.mark.parametrize("schedule", [WSD(0.1, 0.2), Infinite(0.1, 0.2), InverseSqrt(0.1), Cosine(0.1), Rewarm()])
def test_parts_join_without_a_jump(schedule):
    values = [schedule(k / 10000) for k in range(10001)]
    assert max(abs(a - b) for a, b in pairwise(values)) < 0.01


def test_the_constant_part_does_not_depend_on_the_length_of_the_run():
    short, long = Infinite(0.1, 0.3, 0.5, 0.2), Infinite(0.01, 0.03, 0.5, 0.02)
    assert {short(k / 100) for k in range(40, 81)} == {long(k / 1000) for k in range(40, 981)} == {0.5}


@pytest.mark.parametrize(
    "make",
    [
        partial(Cosine, 1.2),
        partial(WSD, 0.6, 0.6),
        partial(WSD, -0.1),
        partial(WSD, shape="exponential"),
        partial(Infinite, 0.5, 0.4, anneal=0.2),
        partial(Infinite, level=0.1, end=0.5),
        partial(Infinite, end=0.0),
        partial(InverseSqrt, 0.0),
        partial(Geometric, 0.0, 1.0),
        partial(Points, []),
        partial(Points, [(0.5, 1.0), (0.2, 1.0)]),
        partial(Points, [(0.0, 1.0), (20.0, 1.0)]),
    ],
)
def test_what_makes_no_sense_is_refused(make):
    with pytest.raises(ValueError, match=r"found .*expected"):
        make()


def test_areas_follow_their_sums():
    rates = [1.0, 1.0, 0.7, 0.4, 0.4, 0.1]
    area = sum((rates[k - 1] - rates[k]) * 0.9 ** (i - k) for i in range(1, 6) for k in range(1, i + 1))
    assert areas(rates, 0.9) == pytest.approx((sum(rates), area))
    assert areas([1.0] * 50) == (50.0, 0.0)


class Takes:
    """Something with scheduled settings."""

    def __init__(self, rate: float | Schedule = 0.5, along: Schedule | None = None) -> None:
        self.rate, self.along = rate, along


@pytest.mark.parametrize(
    "given",
    [
        "WSD",
        {"class_path": "WSD", "init_args": {"decay": 0.5}},
        {"class_path": "headwater.training.schedules.WSD"},
        {"class_path": "Points", "init_args": {"points": [[0, 0.3], [1, 0.15]]}},
        "headwater.training.schedules.constant",
    ],
    ids=str,
)
def test_a_schedule_is_one_line_of_a_recipe(given):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Takes, "it")
    made = parser.instantiate(parser.parse_object({"it": {"rate": given, "along": given}})).it
    assert made.rate(0.3) == made.along(0.3) > 0


class Clock(pl.Callback):
    """Makes steps slow, and notes when they end and with which rate."""

    def __init__(self, pause):
        self.pause, self.ends, self.rates = pause, [], []

    def on_train_start(self, trainer, pl_module):
        self.began = time.monotonic()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        time.sleep(self.pause)
        self.ends.append(time.monotonic() - self.began)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("pause", [0.0, 0.1])
def test_a_budget_of_time_ends_at_its_deadline_whatever_steps_take(tmp_path, pause):
    clock, seconds = Clock(pause), 2.0
    module = runs.make(schedule=WSD(0.0, 1.0), optimizer=partial(torch.optim.SGD, lr=1.0))
    runs.trainer(-1, max_time=timedelta(seconds=seconds), callbacks=[clock]).fit(module, runs.pairs(runs.write_pairs(tmp_path)))
    slowest = max(b - a for a, b in pairwise([0.0, *clock.ends]))
    assert seconds <= clock.ends[-1] + 0.1  # the timer began a little earlier
    assert clock.ends[-1] < seconds + 2 * slowest
    assert clock.rates == sorted(clock.rates, reverse=True)
    assert clock.rates[-1] < 2 * slowest / seconds
    for end, rate in zip(clock.ends, clock.rates):
        assert rate == pytest.approx(1 - end / seconds, abs=2 * slowest / seconds + 0.05)
