"""Point clouds as groups of neighbouring points around centres that are far from one another.

Grouping and stem follow Point-BERT and Point-MAE (Pang et al. 2022, arXiv:2203.06604;
https://github.com/Pang-Yatian/Point-MAE): farthest-point sampling, nearest neighbours, a small PointNet per group.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import torch
from numpy.lib.recfunctions import structured_to_unstructured
from torch import Tensor, nn

from headwater import random
from headwater.init import INPUT, Rule
from headwater.modalities.action import array
from headwater.model import Encoder, Reader
from headwater.pooling import Pooling
from headwater.tokens import Tokens
from headwater.trunk import Trunk
from headwater.view import View

PLY = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4", "double": "f8"}
PLY |= {"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4", "float32": "f4", "float64": "f8"}
ORDER = {"binary_little_endian": "<", "binary_big_endian": ">"}


class PointsReader(Reader):
    """A cloud (n, 3 + extra) from .npy or .ply -> groups of `neighbours` points around `groups` centres.

    The cloud is moved and scaled into the unit ball. Its size is lost. A token holds its group's points relative to their mean,
    in the order of `along`, so that a squared error between groups means something; its position is (0, x, y, z), the cell of
    the mean on a grid of `cells` between -1 and 1. Centres are points: the outermost first, then the one farthest from those
    before. So tokens go from coarse to fine, and the numbering of the points does not matter, but for ties.

    Rows with a NaN in x, y or z are left out, as depth cameras mark them. Columns beyond 3 + extra are not read, missing ones
    are absent, and a cloud of fewer points than a group fills it with absent ones. A random view has a random 60 to 100 % of
    the points.

    Args:
        groups: the most groups.
        neighbours: points per group.
        extra: numbers per point beside x, y, z (colour, normal, intensity), as they are.
        cells: places along each axis that positions tell apart.
    """

    extensions = ("points.npy", "ply", "npy")

    def __init__(self, groups: int = 64, neighbours: int = 32, extra: int = 0, cells: int = 64) -> None:
        if min(groups, neighbours, cells) < 1 or extra < 0:
            raise ValueError(f"found {groups=}, {neighbours=}, {cells=}, {extra=}; expected all above 0, extra 0 or more")
        self.groups, self.neighbours, self.extra, self.cells = groups, neighbours, extra, cells
        self.features = neighbours * (3 + extra)

    def decode(self, members: dict[str, bytes]) -> np.ndarray:
        member = str(self.member(members))
        return vertices(members[member]) if member == "ply" else array(members[member])

    def tokens(self, signal: Any, view: View | None = None) -> Tokens:
        """signal: a cloud (n, 3 or more), or groups that were made already, (g, neighbours, 3 + extra) as `restore` gives."""
        points = np.asarray(signal)
        found = points.ndim == 3 and points.shape[1:] == (self.neighbours, 3 + self.extra)
        if points.dtype.kind not in "fiu" or not points.size or (not found and (points.ndim != 2 or points.shape[1] < 3)):
            raise ValueError(f"found points {points.dtype} {points.shape}; expected a cloud (n, 3 or more), n at least 1")
        if np.isinf(points).any():
            raise ValueError("the cloud holds infinite coordinates; mark points that are absent as NaN")
        x = points.astype(np.float32) if found else self._grouped(unit(self._columns(points)), view)
        mean = np.nanmean(x[..., :3], 1)
        x = np.concatenate([x[..., :3] - mean[:, None], x[..., 3:]], -1)
        place = np.floor((mean + 1) / 2 * self.cells).clip(0, self.cells - 1)
        position = np.concatenate([np.zeros((len(x), 1)), place], 1).astype(np.int32)
        return Tokens(torch.from_numpy(x.reshape(len(x), -1)), torch.from_numpy(position))

    def _columns(self, points: np.ndarray) -> np.ndarray:
        """float64 (n, 3 + extra), only points that have a place."""
        wide = np.full((len(points), 3 + self.extra), np.nan)
        wide[:, : points.shape[1]] = points[:, : 3 + self.extra]
        wide = wide[~np.isnan(wide[:, :3]).any(1)]
        if not len(wide):
            raise ValueError("no point of the cloud has all of x, y and z")
        return wide

    def _grouped(self, points: np.ndarray, view: View | None) -> np.ndarray:
        """(n, 3 + extra) -> (g, neighbours, 3 + extra)."""
        if view is not None:
            count = max(1, round(view.part(view.uniform((1,), "share").item(), (0.6, 1.0)) * len(points)))
            points = points[view.uniform((len(points),), "points").argsort()[:count].sort().values.numpy()]
        near = nearest(points[farthest(points[:, :3], self.groups), :3], points[:, :3], self.neighbours)
        group = np.full((len(near), self.neighbours, points.shape[1]), np.nan, np.float32)
        group[:, : near.shape[1]] = along(points[near])
        return group

    def length(self, facts: dict[str, float]) -> int | None:
        """At most `groups`, and with "steps" at most one per point."""
        return min(self.groups, int(facts.get("steps", self.groups)))

    def prepare(self, t: Tokens) -> Tokens:
        """Offsets times sqrt(groups): so many groups of equal area on a surface of the size of the ball have offsets near 1."""
        return t._replace(x=t.x.to(torch.float32) * self._scale(t.x))

    def _scale(self, like: Tensor) -> Tensor:
        """(features,) what values are multiplied by: sqrt(groups) for x, y and z, 1 for what else a point has."""
        return like.new_tensor([self.groups**0.5] * 3 + [1.0] * self.extra, dtype=torch.float32).repeat(self.neighbours)

    def restore(self, t: Tokens) -> np.ndarray:
        """Groups (g, neighbours, 3 + extra) at the middles of their cells, in the unit ball; points of groups may be the same."""
        real = t.real()[0]
        x = (t.x[0][real].float() / self._scale(t.x)).cpu().unflatten(-1, (self.neighbours, -1))
        x[..., :3] += ((t.position[0][real][:, None, 1:4].cpu() + 0.5) / self.cells) * 2 - 1
        return x.numpy()

    def example(self, n: int, seed: int) -> list[Tokens]:
        draws = random.normal(torch.tensor(seed), (n, 10, 3 + self.extra), "points").numpy()
        return [self.tokens(d[: 7 + k % 4]) for k, d in enumerate(draws)]


class Points(Encoder):
    """A transformer over groups of points.

    Args:
        trunk: the transformer.
        groups: the most groups.
        neighbours: points per group.
        extra: numbers per point beside x, y, z.
        cells: places along each axis that positions tell apart.
        pooling: how tokens become one vector; see Encoder.
    """

    def __init__(
        self, trunk: Trunk, groups: int = 64, neighbours: int = 32, extra: int = 0, cells: int = 64, pooling: Pooling = "mean"
    ) -> None:
        super().__init__(PointsReader(groups, neighbours, extra, cells), trunk, pooling)
        self.stem = GroupStem(3 + extra, trunk.width)


class GroupStem(nn.Module):
    """A small PointNet (Qi et al. 2016, arXiv:1612.00593): every point alone, the largest of each number, once more with that.

    x: (..., k * size) -> (..., width). The order of the points does not matter; absent ones (NaN) do not count.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size = size
        self.first = nn.Sequential(nn.Linear(2 * size, width), nn.GELU(), nn.Linear(width, width))
        self.second = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, width))

    def init_rules(self) -> dict[str, Rule]:
        return {"first.0.weight": INPUT}

    def forward(self, x: Tensor) -> Tensor:
        points = x.unflatten(-1, (-1, self.size))
        absent = points.isnan()
        gone = absent[..., :3].any(-1, keepdim=True)
        gone = gone & ~gone.all(-2, keepdim=True)  # of a group without any point all are taken, so that it stays finite
        y = self.first(torch.cat([points.masked_fill(absent, 0), absent.to(x.dtype)], -1))
        y = self.second(torch.cat([y, peak(y, gone).expand_as(y)], -1))
        return peak(y, gone)[..., 0, :]


def peak(x: Tensor, gone: Tensor) -> Tensor:
    """The largest of each number over a group, (..., k, D) -> (..., 1, D), without the points that are gone (..., k, 1)."""
    return x.masked_fill(gone, -math.inf).amax(-2, keepdim=True)


def unit(points: np.ndarray) -> np.ndarray:
    """(n, 3 or more) with x, y, z moved to mean 0 and scaled so that the outermost point is at distance 1."""
    place = points[:, :3] - points[:, :3].mean(0)
    reach = np.linalg.norm(place, axis=1).max()
    return np.concatenate([place / (reach or 1.0), points[:, 3:]], 1)


def farthest(points: np.ndarray, count: int) -> np.ndarray:
    """Indices of at most `count` of (n, 3) points: the outermost one, then always the farthest from all before."""
    chosen, distance = [int(np.linalg.norm(points, axis=1).argmax())], np.full(len(points), np.inf)
    while len(chosen) < count:
        distance = np.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(1))
        if not distance.max():
            break  # all that is left are copies
        chosen.append(int(distance.argmax()))
    return np.array(chosen)


def nearest(centres: np.ndarray, points: np.ndarray, count: int) -> np.ndarray:
    """Indices (g, min(count, n)) of the points nearest to each centre. centres: (g, 3); points: (n, 3)."""
    return np.stack([((points - centre) ** 2).sum(1).argsort(kind="stable")[:count] for centre in centres])


def along(groups: np.ndarray) -> np.ndarray:
    """(g, k, 3 or more) with each group's points in the order of a k-d tree (Bentley 1975): halved by x, then by y, by z, by x, ...

    So each slot has its own corner of the group, in all three coordinates.
    """
    count = groups.shape[1]
    for level in range(math.ceil(math.log2(count))):
        part = np.broadcast_to(np.arange(count) * 2**level // count, groups.shape[:2])
        order = np.lexsort((groups[..., level % 3], part), axis=-1)
        groups = np.take_along_axis(groups, order[..., None], 1)
    return groups


def vertices(content: bytes) -> np.ndarray:
    """The vertices of a .ply file, (n, 3 or more): x, y, z, then the other properties as they come, bytes divided by 255."""
    form, count, kinds = ply_header(content)
    body = content[content.index(b"\n", content.index(b"end_header")) + 1 :]
    if form == "ascii":
        table = np.loadtxt(io.BytesIO(body), max_rows=count, ndmin=2)
    else:
        dtype = np.dtype([(name, ORDER[form] + PLY[kind]) for name, kind in kinds.items()])
        table = structured_to_unstructured(np.frombuffer(body, dtype, min(count, len(body) // dtype.itemsize)))
    if len(table) < count:
        raise ValueError(f"the .ply is cut off: found {len(table)} of {count} vertices")
    columns = {name: column / (255 if PLY[kind] == "u1" else 1) for (name, kind), column in zip(kinds.items(), table.T)}
    place = [columns.pop(name) for name in "xyz"]
    return np.stack([*place, *columns.values()], 1)


def ply_header(content: bytes) -> tuple[str, int, dict[str, str]]:
    """Format, number of vertices, and their properties with their types, of a .ply file that begins with its vertices."""
    head, end, _ = content.partition(b"end_header")
    lines = [line.split() for line in head.decode("ascii", "replace").splitlines() if line.strip()]
    first, *others = [i for i, line in enumerate(lines) if line[0] == "element"] or [0]
    kinds = {line[-1]: line[1] for line in lines[first : min(others, default=None)] if line[0] == "property"}
    form = next((line[1] for line in lines if line[0] == "format"), "")
    if not end or lines[0] != ["ply"] or form not in ("ascii", *ORDER) or lines[first][1:2] != ["vertex"]:
        raise ValueError("found no header of a .ply file; expected ply, its format, vertices as the first element, and end_header")
    if not {"x", "y", "z"} <= kinds.keys() or not set(kinds.values()) <= PLY.keys():
        raise ValueError(f"found vertices of {kinds} in the .ply; expected numbers, x, y and z among them")
    return form, int(lines[first][2]), kinds
