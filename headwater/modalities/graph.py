"""Graphs as one token per node and one per edge, so that a plain transformer suffices.

TokenGT (Kim et al. 2022, arXiv:2207.02505; https://github.com/jw9730/tokengt) with orthonormal node identifiers: every node has
a vector of its own, a node's token carries it twice, an edge's token those of both its ends.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwater import random
from headwater.init import Rule
from headwater.modalities.series import Slots
from headwater.model import Encoder, Reader
from headwater.pooling import Pooling
from headwater.random import mix
from headwater.tokens import Tokens
from headwater.trunk import Trunk
from headwater.view import View


class GraphReader(Reader):
    """JSON {"nodes": [[feature, ...], ...], "edges": [[i, j, feature, ...], ...]} -> tokens of the nodes, then of the edges.

    A node's position is (0, number, 0), an edge's (0, number of i, number of j), numbers from 1. A token's vector holds the
    features of nodes and of edges; those of the other kind are absent (NaN), as is a null.

    Which number a node gets does not depend on how the file numbers them, but on the graph: see `canonical`. So neither do the
    tokens. There are no eigenvectors and none of their ambiguities. What is left: of nodes that `canonical` cannot tell apart
    the file's first comes first. That changes nothing where they are symmetric, as they nearly always are.
    A random view deals the numbers out at random, so that a model learns that they only tell who is who.

    Args:
        node_features: numbers per node.
        edge_features: numbers per edge.
        nodes: the most nodes.
        directed: edges have a direction; else [i, j] is [j, i].
    """

    extensions = ("graph.json",)

    def __init__(self, node_features: int = 1, edge_features: int = 0, nodes: int = 64, directed: bool = False) -> None:
        if node_features < 0 or edge_features < 0 or not node_features + edge_features or nodes < 1:
            raise ValueError(
                f"found node_features={node_features}, edge_features={edge_features}, nodes={nodes}; expected at least "
                "one node, and a feature of nodes or edges (1.0 everywhere where they have none)"
            )
        self.node_features, self.edge_features, self.nodes, self.directed = node_features, edge_features, nodes, directed
        self.features = node_features + edge_features

    def decode(self, members: dict[str, bytes]) -> dict[str, Any]:
        return json.loads(members[str(self.member(members))])

    def tokens(self, signal: Mapping[str, Any], view: View | None = None) -> Tokens:
        if not isinstance(signal, Mapping) or not {"nodes", "edges"} <= signal.keys():
            raise ValueError('found no graph; expected {"nodes": [[feature, ...], ...], "edges": [[i, j, feature, ...], ...]}')
        nodes = numbers(signal["nodes"], self.node_features, "nodes")
        edges = numbers(signal["edges"], 2 + self.edge_features, "edges")
        if not 0 < len(nodes) <= self.nodes:
            raise ValueError(f"found a graph of {len(nodes)} nodes; expected 1 to {self.nodes}, or set `nodes` higher")
        if not np.isin(edges[:, :2], np.arange(len(nodes))).all():
            raise ValueError(f"an edge has an end that is no node; expected whole numbers from 0 to {len(nodes) - 1}")
        ends, values = edges[:, :2].astype(np.int64), edges[:, 2:]
        number = canonical(nodes, ends, values, self.directed)
        if view is not None:
            number = view.uniform((len(nodes),), "numbers").argsort().numpy()[number]
        ends = number[ends] if self.directed else np.sort(number[ends], 1)
        row = np.lexsort((*values.T[::-1], ends[:, 1], ends[:, 0]))
        return self._joined(nodes[number.argsort()], ends[row], values[row])

    def _joined(self, nodes: np.ndarray, ends: np.ndarray, values: np.ndarray) -> Tokens:
        """Tokens of numbered nodes and sorted edges."""
        x = np.full((len(nodes) + len(ends), self.features), np.nan, np.float32)
        x[: len(nodes), : self.node_features], x[len(nodes) :, self.node_features :] = nodes, values
        position = np.zeros((len(x), 3), np.int32)
        position[: len(nodes), 1], position[len(nodes) :, 1:] = np.arange(len(nodes)) + 1, ends + 1
        return Tokens(torch.from_numpy(x), torch.from_numpy(position))

    def prepare(self, t: Tokens) -> Tokens:
        return t._replace(x=t.x.to(torch.float32))

    def restore(self, t: Tokens) -> dict[str, Any]:
        """The graph with the numbers of its tokens, from 0; NaN where a feature is absent."""
        real = t.real()[0]
        x, (one, other) = t.x[0][real].tolist(), (t.position[0][real][:, 1:3] - 1).T.tolist()
        split = self.node_features
        nodes = sorted((i, slots[:split]) for slots, i, j in zip(x, one, other) if j < 0)
        edges = [[i, j, *slots[split:]] for slots, i, j in zip(x, one, other) if j >= 0]
        return {"nodes": [slots for _, slots in nodes], "edges": edges}

    def example(self, n: int, seed: int) -> list[Tokens]:
        draws = random.uniform(torch.tensor(seed), (n, 6, 2 + self.features), "graph").tolist()
        return [self.tokens(self._graph(rows[: 4 + k % 3])) for k, rows in enumerate(draws)]

    def _graph(self, rows: list[list[float]]) -> dict[str, Any]:
        """A tree and one more edge, from random numbers."""
        split = 2 + self.node_features
        ends = [(i, int(row[0] * i)) for i, row in enumerate(rows[1:], 1)] + [(0, len(rows) - 1)]
        edges = [[i, j, *row[split:]] for (i, j), row in zip(ends, rows, strict=True)]
        return {"nodes": [row[2:split] for row in rows], "edges": edges}


class Graph(Encoder):
    """A transformer over nodes and edges.

    Args:
        trunk: the transformer.
        node_features: numbers per node.
        edge_features: numbers per edge.
        nodes: the most nodes.
        directed: edges have a direction.
        pooling: how tokens become one vector; see Encoder.
    """

    names: Tensor

    def __init__(
        self,
        trunk: Trunk,
        node_features: int = 1,
        edge_features: int = 0,
        nodes: int = 64,
        directed: bool = False,
        pooling: Pooling = "mean",
    ) -> None:
        super().__init__(GraphReader(node_features, edge_features, nodes, directed), trunk, pooling)
        self.stem = Slots(self.features, trunk.width)
        self.kind = nn.Embedding(2, trunk.width)
        self.ends = nn.Linear(2 * trunk.width, trunk.width, bias=False)
        self.register_buffer("names", identifiers(nodes, trunk.width))

    def init_rules(self) -> dict[str, Rule]:
        return super().init_rules() | {"names": Rule("fixed", lambda: identifiers(len(self.names) - 1, self.width))}

    def embed(self, raw: Tokens) -> Tokens:
        one, other = raw.position[..., 1].long(), raw.position[..., 2].long()
        edge = other > 0
        both = self.names[torch.stack([one, torch.where(edge, other, one)], -1)].flatten(-2)
        return raw._replace(x=self.stem(raw.x) + self.kind(edge.long()) + self.ends(both))


def identifiers(nodes: int, size: int) -> Tensor:
    """(1 + nodes, size): for each number a unit vector, orthogonal to those of its run of `size` numbers; zeros for 0."""
    square = random.normal(torch.tensor(0), (math.ceil(nodes / size), size, size), "node").double()
    q, r = torch.linalg.qr(square)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]  # one of the signs, whatever the library's habit
    return torch.cat([q.new_zeros(1, size), q.mT.reshape(-1, size)[:nodes]]).float()


def numbers(rows: Any, width: int, what: str) -> np.ndarray:
    """Lists of numbers and nulls as float32 (rows, width)."""
    try:
        table = np.array(rows, np.float32).reshape(len(rows), -1 if len(rows) else width)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the {what} are not lists of equally many numbers: {error}") from error
    if table.shape[1] != width or np.isinf(table).any():
        raise ValueError(
            f"found {what} of {table.shape[1]} numbers, {np.isinf(table).sum()} of all infinite; expected {width}, finite"
        )
    return table


def canonical(nodes: np.ndarray, ends: np.ndarray, values: np.ndarray, directed: bool) -> np.ndarray:
    """(n,) a number from 0 for each node that follows from the graph and its features, not from the order they came in.

    Nodes have colours, at first their features, which are refined by the colours of their neighbours until no more can be told
    apart (Weisfeiler and Leman 1968). While some still share one, one of them gets a colour of its own: of the first such
    colour, the node after which the refined colours have the smallest hash. That is the search tree of graph canonisation
    (McKay 1981), of which one branch is followed with a look one step ahead. Numbers follow the colours.

    nodes: (n, node_features); ends: (m, 2); values: (m, edge_features).
    """
    link = prints(values)
    colour = refined(prints(nodes)[None], ends, link, directed)[0]
    while True:
        every, number, count = np.unique(colour, return_inverse=True, return_counts=True)
        if len(every) == len(nodes):
            return number
        tied = np.flatnonzero(number == (count > 1).argmax())
        trials = np.tile(colour, (len(tied), 1))
        trials[np.arange(len(tied)), tied] = mix(colour[tied] + np.uint64(1))
        trials = refined(trials, ends, link, directed)
        colour = trials[mix(trials).sum(1).argmin()]


def refined(colour: np.ndarray, ends: np.ndarray, link: np.ndarray, directed: bool) -> np.ndarray:
    """Colours (K, n) uint64 that tell apart all that is seen from the neighbours, theirs, and so on; link: (m,) of the edges."""
    found, there, back = np.zeros(len(colour)), mix(link), mix(link + np.uint64(directed))
    while (found < (found := kinds(colour))).any():
        seen = np.zeros_like(colour.T)
        np.add.at(seen, ends[:, 0], mix(colour[:, ends[:, 1]] ^ there).T)
        np.add.at(seen, ends[:, 1], mix(colour[:, ends[:, 0]] ^ back).T)
        colour = mix(colour + mix(seen.T))  # not as the neighbours are hashed, or a node could stand for one of them
    return colour


def kinds(colour: np.ndarray) -> np.ndarray:
    """(K,) how many colours each of the K colourings (K, n) has."""
    return 1 + (np.diff(np.sort(colour, 1)) != 0).sum(1)


def prints(rows: np.ndarray) -> np.ndarray:
    """One uint64 hash per row of (n, F) numbers."""
    words = np.where(np.isnan(rows), np.nan, rows + 0.0).astype(np.float64)  # one NaN, one zero
    taken = np.ones(len(rows), np.uint64)
    for column in words.T:
        taken = mix(taken + mix(np.ascontiguousarray(column).view(np.uint64) + np.uint64(1)))
    return taken
