"""Rows of tables: one token per column that has a value.

Each column has a weight and a bias of its own, as in the feature tokeniser of FT-Transformer (Gorishniy et al. 2021,
arXiv:2106.11959): a token's vector holds one slot per numeric column and one per choice of each categorical column, all absent
(NaN) but those of its own column, so that one linear layer over slots is all the columns' layers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from numbers import Real
from statistics import NormalDist, fmean, pstdev, quantiles
from typing import Any

import numpy as np
import torch

from headwater import random
from headwater.init import Rule
from headwater.modalities.series import Slots
from headwater.model import Encoder, Reader
from headwater.pooling import Pooling
from headwater.tokens import Tokens
from headwater.trunk import Trunk
from headwater.view import View

Scale = Sequence[float]  # [mean, deviation], or three and more rising quantiles
Choice = str | int | float


class TableReader(Reader):
    """A JSON object of one row -> a token per column, at (0, number of the column), numeric columns first.

    A column that is left out, null or NaN is absent and has no token; columns that are not named here are not read. A number
    becomes its score (see `line`). A category of K becomes K numbers, sqrt(K - 1) for its own choice and -1 / sqrt(K - 1) for
    the others: mean 0 and deviation 1 where all choices are equally frequent, so that squared errors of both kinds compare.

    Args:
        numeric: name -> [mean, deviation], or n >= 3 quantiles at the levels (i + 1/2) / n.
        choices: name -> the values that a categorical column may have. `measured` makes both from rows.
    """

    extensions = ("table.json", "json")

    def __init__(self, numeric: dict[str, Scale] | None = None, choices: dict[str, Sequence[Choice]] | None = None) -> None:
        self.lines = {name: line(scale, name) for name, scale in (numeric or {}).items()}
        self.choices = {name: list(values) for name, values in (choices or {}).items()}
        for name, values in self.choices.items():
            if name in self.lines or len(set(values)) < max(2, len(values)):
                raise ValueError(f"found the choices {values} of column {name!r}; expected two or more, of a column not in numeric")
        self.columns = [*self.lines, *self.choices]
        if not self.columns:
            raise ValueError("a table needs columns; name some under numeric or choices, for example `**measured(rows)`")
        sizes = [1] * len(self.lines) + [len(values) for values in self.choices.values()]
        self.ends = list(accumulate(sizes, initial=0))
        self.features = self.ends[-1]

    def decode(self, members: dict[str, bytes]) -> dict[str, Any]:
        return json.loads(members[str(self.member(members))])

    def tokens(self, signal: Mapping[str, Any], view: View | None = None) -> Tokens:
        """There is no random view of a row."""
        if not isinstance(signal, Mapping):
            raise ValueError(f"found a row of {type(signal).__name__}; expected an object of named columns")
        found = [k for k, name in enumerate(self.columns) if not absent(signal.get(name))]
        if not found:
            raise ValueError(f"the row has no value in any of the columns {', '.join(self.columns)}")
        x = torch.full((len(found), self.features), math.nan)
        for row, k in zip(x, found, strict=True):
            name = self.columns[k]
            row[self.ends[k] : self.ends[k + 1]] = torch.tensor(self._slots(name, signal[name]))
        return Tokens(x, torch.tensor([[0, k] for k in found], dtype=torch.int32))

    def _slots(self, name: str, value: Any) -> list[float]:
        """The numbers of one value."""
        if name in self.lines:
            if not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(f"found {value!r} in the column {name!r}; expected a finite number, or null where it is absent")
            return [bent(float(value), *self.lines[name])]
        choices = self.choices[name]
        if value not in choices:
            raise ValueError(f"found {value!r} in the column {name!r}; expected one of {', '.join(map(repr, choices))}")
        own = math.sqrt(len(choices) - 1)
        return [own if value == choice else -1 / own for choice in choices]

    def length(self, facts: dict[str, float]) -> int | None:
        """The number of columns; too large by the absent ones."""
        return len(self.columns)

    def prepare(self, t: Tokens) -> Tokens:
        return t._replace(x=t.x.to(torch.float32))

    def restore(self, t: Tokens) -> dict[str, Any]:
        """The columns that have a token; of a category the choice with the largest number."""
        real, row = t.real()[0], {}
        for slots, k in zip(t.x[0][real].tolist(), t.position[0][real][:, 1].tolist(), strict=True):
            name, own = self.columns[k], slots[self.ends[k] : self.ends[k + 1]]
            row[name] = bent(own[0], *self.lines[name][::-1]) if name in self.lines else self.choices[name][np.argmax(own)]
        return row

    def example(self, n: int, seed: int) -> list[Tokens]:
        draws = random.uniform(torch.tensor(seed), (n, len(self.columns)), "table").tolist()
        return [self.tokens(self._row(draw, k)) for k, draw in enumerate(draws)]

    def _row(self, draw: list[float], k: int) -> dict[str, Any]:
        """A row from one number of [0, 1) per column; every third column is absent in every other row."""
        row: dict[str, Any] = {name: bent(4 * d - 2, *self.lines[name][::-1]) for name, d in zip(self.lines, draw)}
        row |= {name: values[int(d * len(values))] for (name, values), d in zip(self.choices.items(), draw[len(row) :])}
        return {name: value for i, (name, value) in enumerate(row.items()) if k % 2 == 0 or i % 3 != 2}


class Table(Encoder):
    """A transformer over the columns of a row.

    Args:
        trunk: the transformer.
        numeric: name -> [mean, deviation], or three and more quantiles.
        choices: name -> the values that a categorical column may have. `measured` makes both from rows.
        pooling: how tokens become one vector; see Encoder.
    """

    def __init__(
        self,
        trunk: Trunk,
        numeric: dict[str, Scale] | None = None,
        choices: dict[str, Sequence[Choice]] | None = None,
        pooling: Pooling = "mean",
    ) -> None:
        super().__init__(TableReader(numeric, choices), trunk, pooling)
        self.stem = Slots(self.features, trunk.width)

    def init_rules(self) -> dict[str, Rule]:
        """A token has a value and its flag, however many slots there are."""
        return super().init_rules() | {"stem.weight": Rule("input", fan_in=2)}


def measured(rows: Sequence[Mapping[str, Any]], levels: int = 0) -> dict[str, dict[str, list]]:
    """What `Table` wants to know of its columns, from rows of the training data: {"numeric": ..., "choices": ...}.

    Columns of numbers get mean and deviation, or so many quantiles where these differ; others their choices. Categories that
    are written as numbers have to be moved by hand. Columns that never change are left out.
    """
    columns: dict[str, list] = {}
    for row in rows:
        for name, value in row.items():
            if not absent(value):
                columns.setdefault(name, []).append(value)
    made: dict[str, dict[str, list]] = {"numeric": {}, "choices": {}}
    for name, values in columns.items():
        if len(set(values)) < 2:
            continue
        if not all(isinstance(value, Real) and not isinstance(value, bool) for value in values):
            made["choices"][name] = sorted(set(values), key=str)
            continue
        knots = quantiles(values, n=2 * levels, method="inclusive")[::2] if levels > 2 else []  # odd ones: the middles of n parts
        rising = len(set(knots)) == levels > 2
        made["numeric"][name] = [float(v) for v in (knots if rising else (fmean(values), pstdev(values)))]
    return made


def absent(value: Any) -> bool:
    """None or NaN."""
    return value is None or value != value


def line(scale: Scale, name: str) -> tuple[list[float], list[float]]:
    """A rising broken line from values to scores, as the values and the scores of its corners.

    [mean, deviation]: the straight line of z-scores. Quantiles: the i-th of n has the score that i + 1/2 of n standard normal
    numbers lie below.
    """
    n, xs = len(scale), [float(value) for value in scale]
    if n == 2:
        xs = [xs[0], xs[0] + xs[1]]
    if n < 2 or not all(math.isfinite(x) for x in xs) or any(b <= a for a, b in pairwise(xs)):
        raise ValueError(f"found the scale {list(scale)} of {name!r}; expected [mean, deviation above 0] or rising quantiles")
    return xs, [0.0, 1.0] if n == 2 else [NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)]


def bent(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """The broken line through (xs, ys) at x; beyond the ends its outer pieces go on."""
    i = min(max(int(np.searchsorted(xs, x)), 1), len(xs) - 1)
    return ys[i - 1] + (x - xs[i - 1]) * (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1])
