"""Actions and states of robots: one token per step, discrete ids or vectors whose absent slots are marked."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from headwater import random
from headwater.embedded import place
from headwater.init import INPUT, Rule
from headwater.modalities.image import grid
from headwater.modalities.robots import Robot, Steps, aligned, robots, union
from headwater.model import Encoder, Reader
from headwater.pooling import Pooling
from headwater.tokens import Tokens
from headwater.trunk import Trunk
from headwater.view import View


class ActionReader(Reader):
    """An .npy array of steps -> tokens at the time of the step; order is the step, so step t sees the frames up to t.

    Integers (T,) are ids below `choices`. Floats (T, D) are vectors of `slots` numbers: a NaN, or a column that this robot
    does not have, is an absent slot.

    Robots that differ share one vector of named slots. Which column is which comes from the `statistics` of the sample's robot,
    from the sample's .json ({"robot": "so100", "action": {"slots": ["x", "gripper"]}}), or from `Steps`; values are scaled by the
    range of that robot. What is absent has no part in any statistics.

    Args:
        choices: number of discrete actions; 0 = continuous.
        slots: size of a continuous action, where narrower arrays are filled with absent slots; or names of the slots, where
            other columns are left out; 0 = the slots of all robots in `statistics`.
        steps: the most steps that are read.
        scale: continuous values are divided by this.
        statistics: JSON file of `headwater stats SHARDS --json FILE`; it travels with the weights. None = no ranges are known.
        chunk: steps in one token, at the time of the first (Zhao et al. 2023, arXiv:2304.13705); only for continuous actions.
    """

    extensions: ClassVar[tuple[str, ...]] = ("npy", "action.npy")
    part = "action"  # of the statistics

    def __init__(
        self,
        choices: int = 0,
        slots: int | list[str] = 0,
        steps: int = 64,
        scale: float = 1.0,
        statistics: str | None = None,
        chunk: int = 1,
    ) -> None:
        self.robots = robots(statistics, self.part) if statistics else {}
        names = slots if isinstance(slots, list) else union([*self.robots.values()])
        self.names, self.slots = tuple(names), len(names) or int(slots)  # type: ignore[arg-type]
        if (choices > 0) == (self.slots > 0):
            raise ValueError(f"found choices={choices} and slots={slots}; give exactly one: ids below choices, or vectors of slots")
        if chunk < 1 or (chunk > 1 and choices):
            raise ValueError(f"found chunk={chunk}; expected 1, or more steps per token of continuous actions")
        self.choices, self.steps, self.scale, self.statistics, self.chunk = choices, steps, scale, statistics, chunk
        self.vocab, self.features = (choices or None), self.slots * chunk
        if self.names:
            self.extensions = (*type(self).extensions, "json")  # type: ignore[misc]  # it names the robot

    def member(self, names: Iterable[str]) -> str | None:
        found = super().member(names)
        return None if found == "json" else found

    def decode(self, members: dict[str, bytes]) -> np.ndarray | Steps:
        values = array(members[str(self.member(members))])
        if not self.names or "json" not in members:
            return values
        told = json.loads(members["json"])
        if not isinstance(told, dict):
            return values
        part = told.get(self.part)
        slots = part.get("slots", []) if isinstance(part, dict) else []
        names = tuple(slot if isinstance(slot, str) else slot["name"] for slot in slots)
        return Steps(values, names, (told.get("robot") or "") if self.robots else "")

    def tokens(self, signal: Any, view: View | None = None) -> Tokens:
        if not np.size(signal.values if isinstance(signal, Steps) else signal):
            raise ValueError(f"the {self.part} sequence has no step")
        if self.vocab:
            x = self._ids(np.asarray(signal))
            return Tokens(x, grid(len(x)), order=moments(len(x)))
        steps = self.vectors(signal)
        if self.chunk > 1:
            steps = np.pad(steps, ((0, -len(steps) % self.chunk), (0, 0)), constant_values=np.nan).reshape(-1, self.features)
        count = len(steps)
        return Tokens(torch.from_numpy(steps), grid(count) * self.chunk, order=moments(count) * self.chunk)

    def _ids(self, steps: np.ndarray) -> Tensor:
        if steps.dtype.kind not in "iu" or steps.ndim != 1:
            raise ValueError(f"found actions {steps.dtype} {steps.shape}; expected whole numbers (T,) below {self.choices}")
        steps = steps[: self.steps]
        if steps.min() < 0 or steps.max() >= self.choices:
            raise ValueError(f"found actions from {steps.min()} to {steps.max()}; expected 0 to {self.choices - 1}")
        return torch.from_numpy(steps.astype(np.int64))

    def vectors(self, signal: np.ndarray | Steps) -> np.ndarray:
        """Steps of a robot -> float32 (T, S) in the order of the slots, in the range of the robot, NaN = absent."""
        values, names, robot = signal if isinstance(signal, Steps) else Steps(signal)
        values, known = np.asarray(values), self.robot(robot)
        names = names or (known.slots if known else self.names)
        if values.dtype.kind != "f" or values.ndim != 2 or values.shape[1] > (len(names) or self.slots):
            raise ValueError(
                f"found {self.part}s {values.dtype} {values.shape}; expected floats (T, up to {len(names) or self.slots})"
                + (f" with the columns {', '.join(names)}" if names else "")
            )
        if np.isinf(values).any():
            raise ValueError(f"the {self.part}s hold infinite values; expected numbers, or NaN where a slot is absent")
        values, names = values[: self.steps], names[: values.shape[1]]
        if known:
            if stray := set(names) - set(known.slots):
                raise ValueError(f"found the {self.part} column {min(stray)!r}; robot {robot!r} has {', '.join(known.slots)}")
            places = [known.slots.index(name) for name in names]
            values = (values - known.center[places]) / known.scale[places]
        return aligned(values, names or range(values.shape[1]), self.names or range(self.slots))

    def robot(self, name: str = "") -> Robot | None:
        """The robot of that name, "" for the only one; None when no statistics were given."""
        if not self.robots or (not name and len(self.robots) == 1):
            return next(iter(self.robots.values()), None)
        if name not in self.robots:
            raise ValueError(f"found the robot {name!r}; {self.statistics} knows {', '.join(self.robots)}: name it by Steps(...)")
        return self.robots[name]

    def length(self, facts: dict[str, float]) -> int | None:
        return math.ceil(min(int(facts["steps"]), self.steps) / self.chunk) if "steps" in facts else None

    def prepare(self, t: Tokens) -> Tokens:
        return t if self.vocab else t._replace(x=t.x.to(torch.float32) / self.scale)

    def restore(self, t: Tokens, robot: str = "") -> np.ndarray:
        """Ids (T,), or values (T, S) in the units of the shards; with `statistics` the columns of one robot."""
        x = t.x[0][t.real()[0]]
        if self.vocab:
            return x.cpu().numpy()
        steps = (x * self.scale).cpu().numpy().reshape(-1, self.slots)
        absent = np.isnan(steps[1 - self.chunk :]).all(1)[::-1] if self.chunk > 1 else np.zeros(1, bool)
        return self.physical(steps[: len(steps) - int(absent.cumprod().sum())], robot)

    def physical(self, steps: np.ndarray, robot: str = "") -> np.ndarray:
        """The inverse of `vectors`: (T, S) -> columns of the robot, in its units."""
        known = self.robot(robot)
        return steps if known is None else aligned(steps, self.names, known.slots) * known.scale + known.center

    def blank(self) -> Tokens:
        count = math.ceil(self.steps / self.chunk)
        return self.canvas(grid(count) * self.chunk, moments(count) * self.chunk)

    def files(self) -> dict[str, Path]:
        return {"statistics": Path(place(self.statistics))} if self.statistics else {}

    def example(self, n: int, seed: int) -> list[Tokens]:
        draws = random.uniform(torch.tensor(seed), (n, 6, max(self.slots, 1)), "action")
        if self.choices:
            return [self.tokens((d[: 3 + k % 4, 0] * self.choices).long().numpy()) for k, d in enumerate(draws)]
        names = [*self.robots]
        if names:
            return [self.tokens(self._drawn(d[: 3 + k % 4], names[k % len(names)])) for k, d in enumerate(draws)]
        return [self.tokens(d[: 3 + k % 4, : max(1, self.slots - k % 2)].numpy()) for k, d in enumerate(draws)]

    def _drawn(self, draws: Tensor, robot: str) -> Steps:
        known = self.robots[robot]
        return Steps(draws[:, : len(known.slots)].numpy() * known.scale + known.center, (), robot)


class StateReader(ActionReader):
    """What a robot feels, beside what it does: joint angles, forces, poses. Read as continuous actions are, from .state.npy."""

    extensions: ClassVar[tuple[str, ...]] = ("state.npy",)
    part = "state"


class Action(Encoder):
    """A transformer over steps. A continuous step enters with a flag per absent slot.

    Args:
        trunk: the transformer.
        choices: number of discrete actions; 0 = continuous.
        slots: size of a continuous action, or names of its slots; 0 = those of all robots in `statistics`.
        steps: the most steps that are read.
        scale: continuous values are divided by this.
        statistics: JSON file of `headwater stats SHARDS --json FILE`; see ActionReader.
        chunk: steps in one token.
        pooling: how tokens become one vector; see Encoder.
    """

    reads = ActionReader

    def __init__(
        self,
        trunk: Trunk,
        choices: int = 0,
        slots: int | list[str] = 0,
        steps: int = 64,
        scale: float = 1.0,
        statistics: str | None = None,
        chunk: int = 1,
        pooling: Pooling = "mean",
    ) -> None:
        super().__init__(self.reads(choices, slots, steps, scale, statistics, chunk), trunk, pooling)
        self.absent = None if choices else nn.Linear(self.features, trunk.width, bias=False)

    def init_rules(self) -> dict[str, Rule]:
        return super().init_rules() | ({} if self.absent is None else {"absent.weight": INPUT})

    def embed(self, raw: Tokens) -> Tokens:
        if self.absent is None:
            return super().embed(raw)
        missing = raw.x.isnan()
        return raw._replace(x=self.stem(raw.x.nan_to_num()) + self.absent(missing.to(raw.x.dtype)))


class State(Action):
    """A transformer over what a robot feels (proprioception), step by step.

    Args:
        trunk: the transformer.
        slots: size of a state, or names of its slots; 0 = those of all robots in `statistics`.
        steps: the most steps that are read.
        scale: values are divided by this.
        statistics: JSON file of `headwater stats SHARDS --json FILE`; see ActionReader.
        pooling: how tokens become one vector; see Encoder.
    """

    reads = StateReader

    def __init__(
        self,
        trunk: Trunk,
        slots: int | list[str] = 0,
        steps: int = 64,
        scale: float = 1.0,
        statistics: str | None = None,
        pooling: Pooling = "mean",
    ) -> None:
        super().__init__(trunk, 0, slots, steps, scale, statistics, 1, pooling)


def array(content: bytes) -> np.ndarray:
    """An .npy file as an array that shares its bytes. ValueError when it is none, is cut off, or holds Python objects."""
    wide = 2 if content[6:7] == b"\x01" else 4  # of the header's length, by the version of the format
    start = 8 + wide + int.from_bytes(content[8 : 8 + wide], "little")
    shape, by_column, dtype = header(content[:start])
    count = math.prod(shape)
    if len(content) < start + count * dtype.itemsize:
        raise ValueError(f"the .npy is cut off: {dtype} {shape} does not fit into its {len(content)} bytes")
    flat = np.frombuffer(content, dtype, count, start) if count else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if by_column else "C")


@lru_cache(maxsize=1024)
def header(content: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether it is stored by columns, and dtype; cached, because the files of a source share few headers."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version > (2, 0):
        raise ValueError(f"found an .npy of version {version}, with named columns; expected plain numbers")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_column, dtype = read(file)
    if dtype.hasobject:
        raise ValueError(f"the .npy holds Python objects ({dtype}) as a pickle, which is never decoded; save numbers instead")
    return shape, by_column, dtype


@lru_cache(maxsize=4096)
def moments(steps: int) -> Tensor:
    """0 to steps - 1, int64. Made once and shared: never write into it."""
    return torch.arange(steps)
