"""Named slots of actions and states, and their statistics: what stands in which column, for robots that differ."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

# The first pattern that fits a name, in lower case with _ for every sign, says its kind. Names of robots in use: SO-100, ALOHA,
# LeKiwi, Franka in robomimic, LIBERO and DROID.
KINDS = (
    ("gripper", r"grip|finger|claw|jaw|suction"),
    ("terminate", r"terminate|(^|_)done$"),
    ("end_effector_velocity", r"(^|_)(eef?|tcp|tool|end_effector|cartesian)_.*vel"),
    ("joint_velocity", r"qvel|(joint|motor|qpos).*(vel|speed)"),
    ("joint_effort", r"effort|torque|(joint|motor).*(current|load)"),
    ("base_velocity", r"base.*(vel|_v[xy]\b)|(^|_)(linear|angular|lin|ang|cmd)_?vel|^(x|y|theta|yaw)_vel$|^v[xy]$|^omega$"),
    ("base_position", r"(^|_)(mobile_)?base_(pos|x|y|z|yaw|theta|ori|quat)"),
    ("joint", r"joint|motor|qpos|shoulder|elbow|wrist|waist|forearm|torso|hip(_|$)|knee|ankle|neck"),
    ("end_effector_rotation", r"rot|quat|euler|axis_?angle|(^|_)ori|(^|_)(d|delta_?)?(roll|pitch|yaw|r[xyz]|q[wxyz])(_|$)"),
    ("end_effector_position", r"(^|_)(eef?|tcp|tool|end_effector|cartesian)_(pos|state|xyz)|(^|_)(d|delta_?)?[xyz](_|$)|xyz"),
)
UNITS = (
    ("rad/s", r"_rad(ps|_s|_per_s)$"),
    ("m/s", r"_m(ps|_s|_per_s)$"),
    ("rad", r"_rad(ians?)?$"),
    ("deg", r"_deg(rees?)?$"),
    ("mm", r"_mm$"),
    ("m", r"_(m|met(er|re)s?)$"),
)


class Slot(NamedTuple):
    """One number of a step. kind: a name out of KINDS, "discrete" or "unknown"; unit: "" where the name does not tell."""

    name: str
    kind: str
    unit: str


def distinct(names: Iterable[str]) -> list[str]:
    """Names of which none comes twice: the second "gripper" is "gripper_2"."""
    taken: dict[str, None] = {}
    for name in names:
        free, count = name, 1
        while free in taken:
            count += 1
            free = f"{name}_{count}"
        taken[free] = None
    return list(taken)


def slots_of(names: Iterable[str]) -> tuple[Slot, ...]:
    """A slot for each name, with the kind and the unit that the name tells."""
    return tuple(Slot(name, _first(KINDS, name) or "unknown", _first(UNITS, name)) for name in distinct(names))


def numbered(name: str, size: int) -> list[str]:
    """Names for the `size` numbers of an array without names: "action_0", "action_1"; one number keeps the array's name."""
    return [name] if size == 1 else [f"{name}_{i}" for i in range(size)]


def _first(table: tuple[tuple[str, str], ...], name: str) -> str:
    plain = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return next((kind for kind, pattern in table if re.search(pattern, plain)), "")


def union(parts: Iterable[Sequence[Slot]]) -> tuple[Slot, ...]:
    """All slots by name, each at the place where it came first."""
    slots: dict[str, Slot] = {}
    for part in parts:
        for slot in part:
            slots.setdefault(slot.name, slot)
    return tuple(slots.values())


def align(values: np.ndarray, names: Sequence[str], slots: Sequence[str]) -> np.ndarray:
    """Columns moved to the places of their names: (T, D) -> float32 (T, S), NaN where `names` lacks a slot.

    Raises ValueError when names and columns differ in number or a name is not among `slots`.
    """
    if values.ndim != 2 or values.shape[1] != len(names):
        raise ValueError(f"found values of shape {values.shape} for {len(names)} names; expected (T, {len(names)})")
    if unknown := set(names) - set(slots):
        raise ValueError(f"found the name {min(unknown)!r}; expected one of {', '.join(slots)}")
    place = {name: i for i, name in enumerate(slots)}
    aligned = np.full((len(values), len(slots)), np.nan, np.float32)
    aligned[:, [place[name] for name in names]] = values
    return aligned


class Statistics:
    """Mean, deviation, range and quantiles per slot over finite values, in one pass; NaN marks an absent slot and never enters.

    Quantiles are exact for the first `keep` rows, then those of `keep` rows drawn evenly with a fixed seed (reservoir sampling,
    Vitter 1985). Moments are merged part by part (Chan, Golub, LeVeque 1979). Memory: keep x S numbers.
    """

    def __init__(self, size: int, keep: int = 1 << 16) -> None:
        self.keep, self.seen = keep, 0
        self.count = np.zeros(size, np.int64)
        self.mean, self.square = np.zeros(size), np.zeros(size)
        self.low, self.high = np.full(size, np.inf), np.full(size, -np.inf)
        self._rows = np.empty((0, size), np.float32)
        self._draw = np.random.default_rng(0)

    def update(self, values: np.ndarray) -> None:
        """Add rows (T, S)."""
        x = values.astype(np.float64)
        valid = np.isfinite(x)
        count = valid.sum(0)
        mean = np.where(valid, x, 0).sum(0) / np.maximum(count, 1)
        step, share = mean - self.mean, count / np.maximum(self.count + count, 1)
        self.square += (np.where(valid, x - mean, 0) ** 2).sum(0) + step**2 * self.count * share
        self.mean += step * share
        self.count += count
        self.low = np.minimum(self.low, np.where(valid, x, np.inf).min(0, initial=np.inf))
        self.high = np.maximum(self.high, np.where(valid, x, -np.inf).max(0, initial=-np.inf))
        self._retain(values.astype(np.float32))

    def _retain(self, rows: np.ndarray) -> None:
        room = self.keep - len(self._rows)
        self._rows = np.concatenate([self._rows, rows[:room]]) if room else self._rows
        late = rows[room:]
        number = self.seen + room + np.arange(len(late))
        place = (self._draw.random(len(late)) * (number + 1)).astype(np.int64)
        kept = place < self.keep
        self._rows[place[kept]] = late[kept]
        self.seen += len(rows)

    def summary(self) -> dict[str, list[Any]]:
        """Lists over the slots: count, mean, std (of all values), min, max, q01, q99; None where a slot has no value."""
        columns = [column[np.isfinite(column)].astype(np.float64) for column in self._rows.T]
        quantiles = [np.quantile(c, [0.01, 0.99]) if len(c) else (np.nan, np.nan) for c in columns]
        std = np.sqrt(self.square / np.maximum(self.count, 1))
        numbers = {"mean": self.mean, "std": std, "min": self.low, "max": self.high}
        numbers |= {"q01": np.array([q[0] for q in quantiles]), "q99": np.array([q[1] for q in quantiles])}
        lists = {name: [float(v) if n else None for v, n in zip(x, self.count)] for name, x in numbers.items()}
        return {**lists, "count": self.count.tolist()}
