import io

import numpy as np
import pytest
import torch
from learning import learned
from matplotlib.cbook import get_sample_data

from headwater.modalities.points import GroupStem, Points, PointsReader, along, farthest, nearest, unit, vertices
from headwater.trunk import Trunk
from headwater.view import View


@pytest.fixture(scope="module")
def ground():
    """Heights in m of 344 x 403 places around Jacksboro, Tennessee, about 90 m apart, from the samples of matplotlib."""
    return np.load(get_sample_data("jacksboro_fault_dem.npz", asfileobj=False))["elevation"].astype(float)


def hill(ground, top, left, side=16):
    y, x = np.mgrid[:side, :side]
    return np.stack([x, y, ground[top : top + side, left : left + side] / 8], -1).reshape(-1, 3)


def row(t):
    return t.map(lambda field: field[None])


def test_centres_are_far_apart_and_groups_are_the_nearest_points(ground):
    points = unit(hill(ground, 40, 60))[:, :3]
    centres = points[farthest(points, 12)]
    apart = np.linalg.norm(points[:, None] - points, axis=-1)
    first = int(np.linalg.norm(points, axis=1).argmax())
    chosen = [first]
    for _ in range(11):  # by the definition, with all distances
        chosen.append(int(apart[:, chosen].min(1).argmax()))
    assert np.array_equal(centres, points[chosen])
    found = nearest(centres, points, 9)
    np.testing.assert_allclose(np.sort(apart[chosen], 1)[:, :9], np.linalg.norm(points[found] - centres[:, None], axis=-1))


def test_groups_are_where_their_positions_say(ground):
    reader = PointsReader(groups=20, neighbours=16, cells=32)
    cloud = hill(ground, 100, 50)
    groups = reader.restore(row(reader.prepare(reader.tokens(cloud))))
    apart = np.linalg.norm(groups[:, :, None] - unit(cloud)[None, None], axis=-1).min(-1)
    assert apart.max() < np.sqrt(3) / 32  # half a cell's diagonal from a point of the cloud
    assert np.abs(groups.mean(1)).max() <= 1
    t = reader.tokens(cloud)
    assert (t.position[:, 0] == 0).all()
    torch.testing.assert_close(t.x.unflatten(1, (16, 3)).mean(1), torch.zeros(20, 3), atol=1e-6, rtol=0)


def test_the_numbering_the_size_and_the_place_of_a_cloud_do_not_matter(ground):
    generator = np.random.default_rng(0)
    cloud = hill(ground, 10, 200) + generator.normal(size=(256, 3)) * 0.01  # a grid has ties
    reader = PointsReader(groups=10, neighbours=8)
    a, b = reader.tokens(cloud), reader.tokens(generator.permutation(cloud) * 7 + [1, 2, 3])
    torch.testing.assert_close(a.x, b.x, atol=1e-5, rtol=0)
    assert torch.equal(a.position, b.position)


def test_points_of_a_group_come_in_the_order_of_a_tree():
    corners = np.array(np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij")).reshape(3, -1).T.astype(float)
    assert np.array_equal(along(corners[None, [3, 6, 1, 0, 7, 2, 5, 4]])[0], corners)
    group = np.random.default_rng(1).normal(size=(5, 24, 4))
    ordered = along(group)
    assert (ordered[:, :12, 0].max(1) <= ordered[:, 12:, 0].min(1)).all()
    assert (ordered[:, :6, 1].max(1) <= ordered[:, 6:12, 1].min(1)).all()
    assert np.array_equal(np.sort(ordered[..., 3]), np.sort(group[..., 3]))


def test_a_view_keeps_some_of_the_points_as_its_seed_says(ground):
    reader, cloud = PointsReader(groups=6, neighbours=8), hill(ground, 0, 0)
    a, again, b = (reader.tokens(cloud, View(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(a.x, again.x)
    assert not torch.equal(a.x, b.x)
    few = PointsReader(groups=99, neighbours=1)
    counts = {len(few.tokens(cloud[:50], View(seed=seed)).x) for seed in range(20)}
    assert min(counts) >= 30
    assert len(counts) > 3


def test_small_clouds_copies_and_columns_that_lack(ground):
    t = PointsReader(groups=8, neighbours=4, extra=1).tokens(np.array([[0, 0, 0], [1, 0, 0], [1, 0, 0], [np.nan, 0, 0]]))
    assert t.x.shape == (2, 16)
    x = t.x.unflatten(1, (4, 4))
    assert x[..., :3].isnan().any(-1).sum(1).tolist() == [1, 1]  # three points in groups of four
    assert x[..., 3].isnan().all()
    assert PointsReader(groups=2, neighbours=2).tokens(np.ones((1, 5))).x.isnan().tolist() == [[False] * 3 + [True] * 3]
    assert PointsReader(groups=9).length({"steps": 5}) == 5
    assert PointsReader(groups=9).length({"size": 5}) == 9


def test_the_stem_sees_a_set():
    torch.manual_seed(0)
    stem, x = GroupStem(4, 16), torch.randn(3, 6, 4)
    y = stem(x.flatten(1))
    torch.testing.assert_close(stem(x.flip(1).flatten(1)), y)
    absent = torch.cat([x, torch.full((3, 2, 4), torch.nan)], 1)
    torch.testing.assert_close(stem(absent.flatten(1)), y)
    assert stem(torch.full((1, 12), torch.nan)).isfinite().all()


@pytest.mark.parametrize("form", ["ascii", "<", ">"])
def test_ply_files_are_read_as_plyfile_reads_them(form, ground):
    plyfile = pytest.importorskip("plyfile")
    points = hill(ground, 30, 30, side=5)
    kinds = [("red", "u1"), ("x", "f4"), ("y", "f8"), ("z", "f4"), ("curve", "i2")]
    table = np.array([(k * 10, *p, -k) for k, p in enumerate(points)], kinds)
    faces = np.array([([0, 1, 2],)], [("vertex_indices", "i4", (3,))])
    elements = [plyfile.PlyElement.describe(table, "vertex"), plyfile.PlyElement.describe(faces, "face")]
    content = io.BytesIO()
    plyfile.PlyData(elements, text=form == "ascii", byte_order="=" if form == "ascii" else form).write(content)
    read = vertices(content.getvalue())
    expected = [table[name] / (255 if name == "red" else 1) for name in ("x", "y", "z", "red", "curve")]
    np.testing.assert_allclose(read, np.stack(expected, 1), rtol=1e-6)
    reader = PointsReader(groups=3, neighbours=4, extra=2)
    assert reader.tokens(reader.decode({"ply": content.getvalue()})).x.isfinite().all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"solid\n", "header"),
        (b"ply\nformat ascii 1.0\nelement face 1\nend_header\n", "header"),
        (b"ply\nformat zip 1.0\nelement vertex 1\nproperty float x\nend_header\n", "header"),
        (b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\nend_header\n1 2\n", "x, y and z"),
        (
            b"ply\nformat binary_little_endian 1.0\nelement vertex 2\nproperty float x\nproperty float y\nproperty float z\n"
            b"end_header\n" + bytes(12),
            "1 of 2",
        ),
    ],
)
def test_broken_ply_files_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        vertices(content)


@pytest.mark.parametrize(
    "signal",
    [
        np.zeros((0, 3)),
        np.zeros((4, 2)),
        np.zeros((2, 4, 3)),
        np.full((2, 3), np.nan),
        np.full((2, 3), np.inf),
        np.array([["a"] * 3]),
    ],
    ids=lambda a: f"{a.dtype}{a.shape}",
)
def test_wrong_clouds_are_refused(signal):
    with pytest.raises(ValueError, match=r"cloud|point"):
        PointsReader(neighbours=8).tokens(signal)


def test_masked_groups_are_learned(ground):
    torch.manual_seed(0)
    train = [hill(ground, top, left) for top in range(0, 328, 12) for left in range(0, 230, 12)]
    held = [hill(ground, top, left) for top in range(0, 328, 32) for left in range(270, 387, 32)]
    error, control = learned(Points(Trunk(32, 1, heads=2), groups=16, neighbours=32, cells=16), train, held)
    assert error < 0.95 * control  # 0.112 and 0.124 when this was written
