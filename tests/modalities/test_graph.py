import itertools
import json

import numpy as np
import pytest
import torch

from headwater.modalities.graph import Graph, GraphReader, canonical, identifiers
from headwater.trunk import Trunk
from headwater.view import View

networkx = pytest.importorskip("networkx")


@pytest.fixture(scope="module")
def club():
    """Zachary's karate club: 34 people with the club they joined, 78 ties with their strength."""
    graph = networkx.karate_club_graph()
    nodes = [[float(graph.nodes[k]["club"] == "Officer")] for k in graph]
    return {"nodes": nodes, "edges": [[i, j, graph.edges[i, j]["weight"]] for i, j in graph.edges]}


def row(t):
    return t.map(lambda field: field[None])


def shuffled(graph, seed, directed=False):
    """The same graph with other numbers, other orders and, if it has no direction, some edges turned."""
    generator = np.random.default_rng(seed)
    number = generator.permutation(len(graph["nodes"])).tolist()
    nodes = [graph["nodes"][k] for k in np.argsort(number)]
    edges = [[number[i], number[j], *values] for i, j, *values in graph["edges"]]
    edges = [[e[1], e[0], *e[2:]] if not directed and generator.random() < 0.5 else e for e in edges]
    return {"nodes": nodes, "edges": [edges[k] for k in generator.permutation(len(edges))]}


def plain(graph, directed=False):
    """A networkx graph as JSON, with a feature that says nothing."""
    graph = networkx.convert_node_labels_to_integers(graph)
    return {"nodes": [[1.0]] * len(graph), "edges": [list(e) for e in graph.edges()]}


def test_nodes_come_first_and_edges_name_their_ends(club):
    reader = GraphReader(edge_features=1)
    t = reader.tokens(reader.decode({"graph.json": json.dumps(club).encode()}))
    assert t.x.shape == (34 + 78, 2)
    assert t.position[:34].tolist() == [[0, k, 0] for k in range(1, 35)]
    assert t.x[:34, 1].isnan().all()
    assert t.x[34:, 0].isnan().all()
    one, other = t.position[34:, 1:].T
    assert (one < other).all()
    assert sorted(t.x[34:, 1].tolist()) == sorted(e[2] for e in club["edges"])
    degrees = torch.bincount(torch.cat([one, other]), minlength=35)[1:].tolist()
    assert sorted(degrees) == sorted(d for _, d in networkx.karate_club_graph().degree())


def test_the_restored_graph_is_the_same_graph(club):
    reader = GraphReader(edge_features=1)
    again = reader.restore(row(reader.prepare(reader.tokens(club))))
    graphs = []
    for made in (club, again):
        graph = networkx.Graph()
        graph.add_nodes_from((k, {"club": features[0]}) for k, features in enumerate(made["nodes"]))
        graph.add_weighted_edges_from(made["edges"])
        graphs.append(graph)
    assert networkx.is_isomorphic(*graphs, node_match=dict.__eq__, edge_match=dict.__eq__)


def test_the_numbering_in_the_file_changes_nothing(club):
    torch.manual_seed(0)
    encoder = Graph(Trunk(32, 2, heads=2), edge_features=1)

    def pooled(graph):
        return encoder.pool(encoder(encoder.embed(row(encoder.reader.tokens(graph))))).x

    for seed in range(5):
        torch.testing.assert_close(pooled(shuffled(club, seed)), pooled(club), rtol=0, atol=0)


SYMMETRIC = {  # without any feature; all but the last two look the same from every node, or from many
    "cycle": networkx.cycle_graph(12),
    "star": networkx.star_graph(30),
    "petersen": networkx.petersen_graph(),
    "dodecahedron": networkx.dodecahedral_graph(),
    "grid": networkx.grid_2d_graph(4, 5),
    "two triangles": networkx.disjoint_union(networkx.cycle_graph(3), networkx.cycle_graph(3)),
    "no edge": networkx.empty_graph(5),
    "tree": networkx.balanced_tree(2, 4),
    "karate": networkx.karate_club_graph(),
}


@pytest.mark.parametrize("name", SYMMETRIC)
def test_symmetric_graphs_have_one_numbering_too(name):
    graph, reader = plain(SYMMETRIC[name]), GraphReader()
    a = reader.tokens(graph)
    for seed in range(4):
        assert torch.equal(reader.tokens(shuffled(graph, seed)).position, a.position)


def test_graphs_that_differ_have_tokens_that_differ():
    reader, graph = GraphReader(directed=True), plain(networkx.path_graph(4))
    turned = {**graph, "edges": [graph["edges"][0][::-1], *graph["edges"][1:]]}
    assert not torch.equal(reader.tokens(graph).position, reader.tokens(turned).position)
    assert torch.equal(GraphReader().tokens(graph).position, GraphReader().tokens(turned).position)
    for seed in range(4):
        assert torch.equal(reader.tokens(shuffled(turned, seed, directed=True)).position, reader.tokens(turned).position)
    triangles, ring = (plain(g) for g in (SYMMETRIC["two triangles"], networkx.cycle_graph(6)))  # equal colours, unequal graphs
    assert not torch.equal(reader.tokens(triangles).position, reader.tokens(ring).position)


def test_all_graphs_of_five_nodes_are_told_apart():
    pairs = list(itertools.combinations(range(5), 2))
    forms = set()
    for bits in range(1 << len(pairs)):
        ends = np.array([pair for k, pair in enumerate(pairs) if bits >> k & 1], int).reshape(-1, 2)
        number = canonical(np.ones((5, 1)), ends, np.zeros((len(ends), 0)), False)
        forms.add(tuple(sorted(map(tuple, np.sort(number[ends], 1).tolist()))))
    assert len(forms) == 34  # unlabelled graphs of five nodes (OEIS A000088)


def test_a_view_deals_the_numbers_out(club):
    reader = GraphReader(edge_features=1)
    a, again, b = (reader.tokens(club, View(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(a.position, again.position)
    assert not torch.equal(a.position, b.position)
    canonical_again = reader.tokens(reader.restore(row(a)))
    assert torch.equal(canonical_again.position, reader.tokens(club).position)


@pytest.mark.parametrize(("nodes", "size"), [(5, 8), (20, 8), (8, 8)])
def test_identifiers_are_orthonormal(nodes, size):
    names = identifiers(nodes, size)
    assert names.shape == (nodes + 1, size)
    assert not names[0].any()
    for run in names[1:].split(size):
        torch.testing.assert_close(run @ run.T, torch.eye(len(run)))


def test_a_node_carries_its_name_twice_and_an_edge_those_of_its_ends():
    torch.manual_seed(0)
    encoder = Graph(Trunk(16, 1, heads=2), edge_features=1)
    t = row(encoder.reader.tokens({"nodes": [[0.5], [2.0]], "edges": [[0, 1, 3.0]]}))
    names, (first, second) = encoder.names[1:3], encoder.ends.weight.chunk(2, 1)
    x = encoder.embed(t).x[0] - encoder.stem(t.x)[0]
    node = names @ first.T + names @ second.T + encoder.kind.weight[0]
    edge = names[0] @ first.T + names[1] @ second.T + encoder.kind.weight[1]
    torch.testing.assert_close(x, torch.cat([node, edge[None]]))


def test_a_null_is_an_absent_feature():
    t = GraphReader(node_features=2).tokens({"nodes": [[None, 1.0], [2.0, 3.0]], "edges": []})
    assert t.x.isnan().sum() == 1
    assert len(t.x) == 2


@pytest.mark.parametrize(
    ("signal", "message"),
    [
        ({"nodes": [[1.0]]}, "no graph"),
        ({"nodes": [], "edges": []}, "0 nodes"),
        ({"nodes": [[1.0]] * 65, "edges": []}, "65 nodes"),
        ({"nodes": [[1.0]], "edges": [[0, 1]]}, "no node"),
        ({"nodes": [[1.0]], "edges": [[0, 0.5]]}, "no node"),
        ({"nodes": [[1.0]], "edges": [[0, None]]}, "no node"),
        ({"nodes": [[1.0]], "edges": [[0, 0, 7.0]]}, "3 numbers"),
        ({"nodes": [[1.0, 2.0]], "edges": []}, "2 numbers"),
        ({"nodes": [[1.0], []], "edges": []}, "equally many"),
        ({"nodes": [["a"]], "edges": []}, "numbers"),
        ({"nodes": [[float("inf")]], "edges": []}, "infinite"),
    ],
)
def test_wrong_graphs_are_refused(signal, message):
    with pytest.raises(ValueError, match=message):
        GraphReader().tokens(signal)


def test_a_graph_needs_a_feature():
    with pytest.raises(ValueError, match="feature"):
        GraphReader(node_features=0)
