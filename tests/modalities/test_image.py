import io

import numpy as np
import pytest
import torch
from PIL import Image as Pictures

from headwater.datamodules.collate import collate
from headwater.modalities.image import ImageReader


def picture(height=16, width=16, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def encoded(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {kind: file.getvalue()}


def seen(reader, signal, view=None):
    """What the encoder is shown, as a picture (size, size, 3)."""
    return reader.restore(reader.prepare(collate([{"i": reader.tokens(signal, view)}], ["i"])["i"])).astype(int)


def test_grey_is_the_same_in_all_channels():
    grey = picture(channels=1)
    for signal in (grey, Pictures.fromarray(grey), ImageReader(16).decode(encoded(Pictures.fromarray(grey)))):
        assert np.array_equal(seen(ImageReader(16), signal), np.repeat(grey[..., None], 3, -1))


def test_a_palette_is_looked_up():
    colours = Pictures.fromarray(picture()).quantize(8)
    assert np.array_equal(ImageReader(16).decode(encoded(colours)), np.asarray(colours.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_transparency_becomes_white(mode):
    """Left half opaque black, right half transparent black."""
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[:, :8, 3] = 255
    image = Pictures.fromarray(rgba)
    if mode == "P":
        image = Pictures.fromarray((rgba[..., 3] == 0).astype(np.uint8))
        image.putpalette([0] * 768)
        members = encoded(image, transparency=1)
    else:
        members = encoded(image.convert(mode) if mode != "PA" else image.quantize(4), "png")
    shown = seen(ImageReader(16), ImageReader(16).decode(members))
    assert (shown[:, :8] == 0).all()
    assert (shown[:, 8:] == 255).all()


def test_half_transparency_is_half_white():
    rgba = np.full((16, 16, 4), 128, np.uint8)
    assert abs(seen(ImageReader(16), Pictures.fromarray(rgba)) - (128 * 128 + 255 * 127) / 255).max() <= 1


def test_sixteen_bits_are_scaled_not_clipped():
    deep = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    shown = ImageReader(16).decode(encoded(Pictures.fromarray(deep)))
    assert abs(shown.astype(int) - (deep / 257)[..., None]).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("sides", [(40, 56), (16, 16), (9, 130)])
def test_fast_jpeg_decoding_equals_pillow(mode, sides):
    """Smooth content: the two decoders may differ by a few levels, not in place, size or colour."""
    y, x = np.mgrid[: sides[0], : sides[1]]
    smooth = np.stack([255 * x / sides[1], 255 * y / sides[0], 128 + 0 * x], -1).astype(np.uint8)
    members = encoded(Pictures.fromarray(smooth).convert(mode), "jpeg", quality=95)
    reader = ImageReader(16)
    slow = np.asarray(Pictures.open(io.BytesIO(members["jpeg"])).convert("RGB"))
    assert abs(seen(reader, reader.decode(members)) - seen(reader, slow)).max() <= 8


def test_large_jpegs_are_decoded_small_but_never_below_the_size():
    for height, width in ((700, 500), (500, 70), (64, 64)):
        decoded = ImageReader(32).decode(encoded(Pictures.fromarray(picture(height, width)), "jpeg"))
        assert max(decoded.shape[:2]) >= 32
        assert abs(decoded.shape[1] / decoded.shape[0] / (width / height) - 1) < 0.05


def test_nothing_is_cut_off_and_the_rest_is_white():
    shown = seen(ImageReader(16), np.zeros((8, 32, 3), np.uint8))
    assert (shown[6:10] == 0).all()
    assert (shown[:6] == 255).all()
    assert (shown[10:] == 255).all()


@pytest.mark.parametrize("sides", [(1, 1), (1, 300), (300, 1), (17, 15)])
def test_any_shape_of_picture_fits(sides):
    for shape in ("pad", "crop"):
        assert ImageReader(16, shape=shape).tokens(picture(*sides)).x.shape == (4, 192)


@pytest.mark.parametrize("size", [16, 24, 64, 224])
def test_the_centre_crop_is_filled_for_every_size_of_picture(size):
    reader = ImageReader(size, shape="crop")
    for side in [*range(1, 300, 7), 49, 98, 107]:
        for sides in ((side, side + 3), (side + 3, side)):
            shown = seen(reader, np.full((*sides, 3), 200, np.uint8))
            assert (shown == 200).all(), sides  # black where the scaled picture is too small


def test_the_centre_crop_equals_that_of_torchvision():
    transforms = pytest.importorskip("torchvision.transforms.v2")
    image = Pictures.fromarray(picture(50, 71))
    for zoom, resized in ((1.0, 32), (0.875, 36)):
        theirs = transforms.CenterCrop(32)(transforms.Resize(resized, transforms.InterpolationMode.BICUBIC)(image))
        assert np.array_equal(seen(ImageReader(32, shape="crop", zoom=zoom), image), np.asarray(theirs))


def test_patches_lie_in_rows_and_columns():
    t = ImageReader(16, patch=4).tokens(picture())
    assert t.x.dtype == torch.uint8
    for x, (time, row, column) in zip(t.x, t.position.tolist(), strict=True):
        assert time == 0
        assert np.array_equal(x.reshape(4, 4, 3), picture()[4 * row : 4 * row + 4, 4 * column : 4 * column + 4])


def test_prepared_values_are_normalised_per_channel():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
    reader = ImageReader(16, mean=mean, std=std)
    x = reader.prepare(reader.tokens(picture())._replace(valid=None)).x.reshape(4, 64, 3)
    raw = reader.tokens(picture()).x.reshape(4, 64, 3) / 255
    torch.testing.assert_close(x, (raw - torch.tensor(mean)) / torch.tensor(std))


def test_a_view_is_a_crop_that_follows_its_seed():
    """On a ramp, a crop shows where it was taken: its range is 60 to 100 % of the area."""
    y, x = np.mgrid[:64, :64]
    ramp = np.stack([4 * x, 4 * y, 0 * x], -1).astype(np.uint8)
    reader, areas = ImageReader(64), []
    for s in range(40):
        shown = seen(reader, ramp, torch.tensor(s))
        assert np.array_equal(shown, seen(reader, ramp, torch.tensor(s)))
        areas.append(np.ptp(shown[..., 0]) / 252 * np.ptp(shown[..., 1]) / 252)
    assert 0.55 < min(areas) < 0.7
    assert 0.9 < max(areas) <= 1


def test_strange_arrays_are_refused():
    for wrong in (np.zeros((4, 4, 3)), np.zeros(4, np.uint8), np.zeros((4, 4, 7), np.uint8)):
        with pytest.raises((ValueError, TypeError)):
            ImageReader(16).tokens(wrong)
    with pytest.raises(ValueError, match="multiple"):
        ImageReader(16, patch=5)
