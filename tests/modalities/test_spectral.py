import io

import numpy as np
import pytest
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image as Pictures

from headwater.modalities.spectral import Spectral, SpectralReader, pages, whole
from headwater.trunk import Trunk
from headwater.view import View

MEAN, STD, GROUPS = [120.0, 110.0, 100.0, 30000.0], [60.0, 50.0, 40.0, 9000.0], [[0, 1, 2], [3]]


@pytest.fixture(scope="module")
def scene():
    """Red, green and blue of a photograph with a fourth band of 16 bits, its luminance: uint16 (300, 256, 4)."""
    with Pictures.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as picture:
        rgb = np.asarray(picture.convert("RGB").resize((256, 300)))
    fourth = (rgb @ np.array([0.299, 0.587, 0.114]) * 257).astype(np.uint16)
    return np.concatenate([rgb.astype(np.uint16), fourth[..., None]], -1)


def row(t):
    return t.map(lambda field: field[None])


def test_a_token_is_a_patch_of_a_group(scene):
    reader = SpectralReader(MEAN, STD, GROUPS, size=64, patch=8)
    part = scene[40:104, 90:154]
    t = reader.tokens(part)
    assert t.x.shape == (128, 192)
    assert t.position[65].tolist() == [0, 0, 1, 1]
    normal = (part - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(t.x[9].numpy(), normal[8:16, 8:16, :3].reshape(-1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(t.x[65, :64].numpy(), normal[:8, 8:16, 3].reshape(-1), rtol=1e-4, atol=1e-5)
    assert t.x[64:, 64:].isnan().all()
    assert reader.length({"size": 1}) == 128


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32, np.float64])
def test_any_depth_and_both_orders_of_axes(scene, dtype):
    reader = SpectralReader(MEAN, STD, GROUPS, size=32, patch=8)
    part = (scene[:32, :32] // 257).astype(dtype)
    content = io.BytesIO()
    np.save(content, part.transpose(2, 0, 1))
    a, b = reader.tokens(part), reader.tokens(reader.decode({"npy": content.getvalue()}))
    assert torch.equal(a.x.nan_to_num(9), b.x.nan_to_num(9))


def test_restore_gives_the_bands_back(scene):
    reader = SpectralReader(MEAN, STD, GROUPS, size=64, patch=16)
    part = scene[:64, 50:114].astype(np.float32)
    part[:20, :, 3], part[5, 7] = np.nan, np.nan
    again = reader.restore(row(reader.prepare(reader.tokens(part))))
    np.testing.assert_allclose(again, part, rtol=1e-4, atol=1e-2)


def test_what_is_absent_has_no_token(scene):
    reader = SpectralReader(MEAN, STD, GROUPS, size=64, patch=8, nodata=0)
    part = scene[40:104, 90:154].clip(1)
    every = len(reader.tokens(part).x)
    part[..., 3] = 0
    t = reader.tokens(part)
    assert (len(t.x), every) == (64, 128)
    assert (t.position[:, 3] == 0).all()
    wide = reader.tokens(scene[40:72, 90:154].clip(1))  # the lower half of the square is margin
    assert wide.position[:, 1].max() == 3


def test_the_longer_side_is_scaled_and_nothing_is_cut_off(scene):
    picture = whole(scene.astype(np.float32), 64)
    wide = round(256 * 64 / 300)
    assert np.isnan(picture[:, wide:]).all()
    assert not np.isnan(picture[:, :wide]).any()
    np.testing.assert_allclose(picture[:, :wide].mean((0, 1)), scene.mean((0, 1)), rtol=0.01)
    same = scene[:64, :64].astype(np.float32)
    assert np.array_equal(whole(same, 64), same)


def test_a_view_is_a_crop_as_its_seed_says(scene):
    reader = SpectralReader(MEAN, STD, GROUPS, size=64, patch=8)
    a, again, b = (reader.tokens(scene, View(seed=seed)).x.nan_to_num(9) for seed in (1, 1, 2))
    assert torch.equal(a, again)
    assert a.shape != b.shape or not torch.equal(a, b)


def test_each_group_has_weights_of_its_own():
    torch.manual_seed(0)
    encoder = Spectral(Trunk(16, 1, heads=2), MEAN, STD, GROUPS, size=16, patch=8)
    x = torch.randn(1, 8, 192)
    x[:, 4:, 64:] = torch.nan
    t = encoder.reader.tokens(np.random.default_rng(0).normal(size=(16, 16, 4)))
    y = encoder.embed(row(t)._replace(x=x)).x[0]
    flags = torch.cat([x.nan_to_num(), (~x.isnan()).float()], -1)[0]
    for group, own in enumerate((slice(4), slice(4, 8))):
        weight, bias = encoder.stem.weight[16 * group : 16 * group + 16], encoder.stem.bias[16 * group : 16 * group + 16]
        torch.testing.assert_close(y[own], flags[own] @ weight.T + bias)


def test_tiffs_that_pillow_reads(scene):
    for bands, mode in ((scene[..., :3].astype(np.uint8), "rgb"), (scene, "pages")):
        content = io.BytesIO()
        layers = [Pictures.fromarray(bands)] if mode == "rgb" else [Pictures.fromarray(band) for band in scene.transpose(2, 0, 1)]
        layers[0].save(content, "TIFF", save_all=True, append_images=layers[1:])
        assert np.array_equal(pages(content.getvalue()), bands)
    reader = SpectralReader(MEAN, STD, GROUPS)
    assert torch.equal(
        reader.tokens(reader.decode({"tif": content.getvalue()})).x.nan_to_num(), reader.tokens(scene).x.nan_to_num()
    )


def test_tiffs_that_pillow_does_not_read_are_named():
    tifffile = pytest.importorskip("tifffile")
    content = io.BytesIO()
    tifffile.imwrite(content, np.zeros((8, 8, 7), np.uint16), photometric="minisblack", planarconfig="contig")
    with pytest.raises(ValueError, match="npy"):
        pages(content.getvalue())
    content = io.BytesIO()
    one, other = (Pictures.new("L", (n, n)) for n in (8, 4))
    one.save(content, "TIFF", save_all=True, append_images=[other])
    with pytest.raises(ValueError, match="one size"):
        pages(content.getvalue())


@pytest.mark.parametrize(
    "signal",
    [
        np.zeros((5, 6, 3)),
        np.zeros((4, 4)),
        np.zeros((0, 4, 4)),
        np.full((8, 8, 4), np.nan),
        np.full((8, 8, 4), np.inf),
        np.array("a"),
    ],
    ids=lambda a: f"{a.dtype}{a.shape}",
)
def test_wrong_pictures_are_refused(signal):
    with pytest.raises(ValueError, match="picture"):
        SpectralReader(MEAN, STD).tokens(signal)


@pytest.mark.parametrize(
    "options",
    [{"std": [1.0]}, {"std": [1.0, 1.0, 1.0, 0.0]}, {"groups": [[0], [0]]}, {"groups": [[4]]}, {"groups": [[0], []]}, {"size": 20}],
)
def test_wrong_settings_are_refused(options):
    with pytest.raises(ValueError, match=r"bands|multiple|per band"):
        SpectralReader(**{"mean": MEAN, "std": STD} | options)
