import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image as Pictures

from headwater.datamodules.collate import collate
from headwater.embedded import place
from headwater.modalities import Image
from headwater.modalities.image import ImageReader, rgb
from headwater.modalities.scaling import resize
from headwater.position import Learned
from headwater.spec import build
from headwater.trunk import Trunk
from headwater.view import View


def picture(height=16, width=16, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def encoded(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {kind: file.getvalue()}


def members(shard, extension):
    """The bytes of every member of that kind in an embedded shard."""
    with tarfile.open(place(f"embedded:{shard}-000.tar")) as tar:
        return [tar.extractfile(m).read() for m in tar if m.name.endswith(f".{extension}")]


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
    for shape in ("pad", "crop", "squash", "border"):
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
        shown = seen(reader, ramp, View(seed=s))
        assert np.array_equal(shown, seen(reader, ramp, View(seed=s)))
        areas.append(np.ptp(shown[..., 0]) / 252 * np.ptp(shown[..., 1]) / 252)
    assert 0.55 < min(areas) < 0.7
    assert 0.9 < max(areas) <= 1


def test_strange_arrays_are_refused():
    wrong_shapes = [(4,), (4, 4, 7), (0, 4, 3), (2, 4, 4, 3)]
    for wrong in (np.zeros((4, 4, 3)), *(np.zeros(shape, np.uint8) for shape in wrong_shapes)):
        with pytest.raises((ValueError, TypeError)):
            ImageReader(16).tokens(wrong)
    with pytest.raises(ValueError, match="multiple"):
        ImageReader(16, patch=5)


def native(size=64, patch=8):
    return ImageReader(size, patch, "native")


@pytest.mark.parametrize("sides", [(300, 300), (480, 640), (640, 480), (37, 90), (100, 1000), (9, 3000), (3000, 1), (64, 64)])
def test_native_keeps_the_shape_and_at_most_so_many_patches(sides):
    t = native().tokens(picture(*sides))
    rows, columns = (t.position[:, 1:].amax(0) + 1).tolist()
    assert rows * columns == len(t.x) <= 64
    scale = min(1, (64 / (sides[0] / 8 * sides[1] / 8)) ** 0.5)
    exact = [n / 8 * scale for n in sides]
    assert any(  # some scale, not above the exact one, rounds to this grid
        all(abs(max(0.5, n * s) - k) <= 0.5 or k == 64 for n, k in zip(exact, (rows, columns))) for s in np.linspace(0.7, 1, 301)
    )


def test_native_pictures_are_filled_up_to_the_limit_where_they_are_large():
    for height in range(90, 400, 17):
        for width in range(90, 400, 23):
            assert 44 <= native().length({"height": height, "width": width}) <= 64


@pytest.mark.parametrize(
    ("sides", "grid"), [((16, 24), (2, 3)), ((17, 27), (2, 3)), ((1, 1), (1, 1)), ((3, 30), (1, 4)), ((512, 8), (64, 1))]
)
def test_small_native_pictures_are_only_rounded_to_whole_patches(sides, grid):
    t = native().tokens(picture(*sides))
    assert tuple((t.position[:, 1:].amax(0) + 1).tolist()) == grid
    if sides == (16, 24):
        shown = native().restore(native().prepare(t.map(lambda f: f[None])))
        assert np.array_equal(shown, picture(16, 24))


def test_native_pictures_are_restored_from_their_positions_whatever_the_padding():
    reader, signals = native(), [picture(16, 40, seed=1), picture(48, 24, seed=2), picture(64, 64, seed=3)]
    ready = reader.prepare(collate([{"i": reader.tokens(s)} for s in signals], ["i"])["i"])
    for i, signal in enumerate(signals):
        assert np.array_equal(reader.restore(ready.map(lambda f, i=i: f[i : i + 1])), signal)


@pytest.mark.parametrize("shape", ["pad", "crop", "native"])
def test_the_length_is_known_before_decoding_and_a_view_does_not_change_it(shape):
    reader = ImageReader(64, 8, shape)
    generator = np.random.default_rng(0)
    for height, width in generator.integers(1, 700, (60, 2)).tolist():
        content = encoded(Pictures.new("RGB", (width, height)), "jpeg")
        signal = reader.decode(content)
        facts = {"size": 0, "height": height, "width": width}
        assert reader.length(facts) == len(reader.tokens(signal).x) == len(reader.tokens(signal, View(seed=height)).x)
    assert (reader.length({"size": 0}) is None) == (shape == "native")


def test_the_length_of_embedded_pictures_is_exact():
    for reader in (native(), native(32), ImageReader()):
        for content in members("things-seen", "png"):
            height, width = rgb(io.BytesIO(content)).shape[:2]
            t = reader.tokens(reader.decode({"png": content}))
            assert len(t.x) == reader.length({"size": len(content), "height": height, "width": width})


def test_resizing_equals_pillow_to_a_level_or_two():
    for sides, target in (((300, 225), (96, 72)), ((40, 50), (64, 80)), ((64, 64), (17, 33))):
        expected = Pictures.fromarray(picture(*sides)).resize(target[::-1], Pictures.Resampling.BILINEAR)
        assert abs(resize(picture(*sides), *target).astype(int) - np.asarray(expected)).max() <= 2


def test_reading_never_writes_into_the_signal_nor_shares_its_memory():
    for reader in (ImageReader(16), ImageReader(16, 16), native(16)):
        frozen = picture()
        frozen.flags.writeable = False
        t = reader.tokens(frozen)
        t.x.fill_(0)
        assert np.array_equal(frozen, picture())


def test_flipped_and_strided_arrays_are_read_as_they_look():
    for signal in (picture()[::-1], picture(32, 32)[::2, ::2], picture(40, 24)[:, ::-1]):
        assert torch.equal(ImageReader(16).tokens(signal).x, ImageReader(16).tokens(signal.copy()).x)


@pytest.mark.parametrize("name", ["jpg", "png"])
def test_a_jpeg_is_known_by_its_bytes_and_a_cut_one_is_refused(name):
    content = encoded(Pictures.fromarray(picture(64, 64)), "jpeg")["jpeg"]
    assert ImageReader(64).decode({name: content}).shape == (64, 64, 3)
    with pytest.raises((ValueError, OSError)):
        ImageReader(64).decode({name: content[:-200]})


def test_stray_bytes_in_a_jpeg_are_forgiven():
    content = encoded(Pictures.fromarray(picture(64, 64)), "jpeg")["jpeg"]
    assert ImageReader(64).decode({"jpg": content + b"more"}).shape == (64, 64, 3)
    scan = content.index(b"\xff\xda")
    assert ImageReader(64).decode({"jpg": content[:scan] + b"stray" + content[scan:]}).shape == (64, 64, 3)


SIZES = [  # pictures as they come: photographs, screens, scans, banners, icons; width and height
    *((4032, 3024), (3024, 4032), (6000, 4000), (1920, 1080), (1080, 1920), (1280, 720), (640, 480), (500, 375), (375, 500)),
    *((1024, 1024), (800, 600), (2480, 3508), (1200, 630), (728, 90), (160, 600), (3840, 1080), (1000, 667), (427, 640)),
    *((2048, 858), (512, 512)),
]


@pytest.mark.parametrize("zoom", [1.0, 0.9, 0.875])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("shape", "mode"), [("crop", "center"), ("squash", "squash"), ("border", "border")])
def test_published_preprocessing_equals_timm_to_the_pixel(shape, mode, interpolation, zoom):
    create = pytest.importorskip("timm.data").create_transform
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    size = 48
    reader = ImageReader(size, 16, shape, zoom, mean, std, interpolation)
    theirs = create(size, False, crop_pct=zoom, crop_mode=mode, interpolation=interpolation, mean=mean, std=std)
    real = [Pictures.fromarray(rgb(io.BytesIO(content))) for content in members("things-seen", "png")[:4]]
    for image in [*real, *(Pictures.fromarray(picture(*sides)) for sides in ((300, 200), (61, 250), (97, 33), (48, 48), (20, 20)))]:
        t = reader.prepare(reader.tokens(image))
        got = t.x.reshape(3, 3, 16, 16, 3).permute(4, 0, 2, 1, 3).reshape(3, size, size)
        torch.testing.assert_close(got, theirs(image), rtol=0, atol=1e-5)


def test_a_large_jpeg_is_prepared_as_by_timm():
    """From the file on: fast decoding would change levels by up to 40."""
    create = pytest.importorskip("timm.data").create_transform
    smooth = resize(picture(30, 40), 600, 800)
    members = encoded(Pictures.fromarray(smooth), "jpeg", quality=90)
    reader = ImageReader(48, 16, "crop", 0.9, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    theirs = create(48, False, crop_pct=0.9, interpolation="bicubic", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    expected = theirs(Pictures.open(io.BytesIO(members["jpeg"])).convert("RGB"))
    got = torch.from_numpy(seen(reader, reader.decode(members))).permute(2, 0, 1) / 255
    assert (got - expected).abs().max() <= 1 / 255


def test_an_image_keeps_how_its_pictures_are_made():
    made = {"shape": "squash", "zoom": 0.95, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"}
    reader = build(Image(Trunk(16, 1), 32, 16, **made).spec).reader
    assert (reader.shape, reader.zoom, reader.mean, reader.std) == ("squash", 0.95, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert reader.interpolation == "bilinear"
    for wrong in ({"zoom": 0.0}, {"zoom": 1.5}, {"mean": [0.5]}, {"std": [0.0, 1.0, 1.0]}):
        with pytest.raises(ValueError, match="expected"):
            ImageReader(**wrong)


@pytest.mark.parametrize("position", ["sincos", "rotary", "learned", "resampled"])
def test_native_pictures_have_the_same_vectors_alone_padded_and_packed(position):
    torch.manual_seed(0)
    where = {"learned": Learned([16, 16], factorised=True), "resampled": "none"}.get(position, position)
    encoder = Image(Trunk(16, 2, 2, position=where), 32, 8, "native", table=3 if position == "resampled" else None).double()
    reader = encoder.reader
    real = [rgb(io.BytesIO(content)) for content in members("things-seen", "png")[:5]]
    signals = [real[0], real[1][:20], real[2][:, :9], real[3][:40, 8:], real[4][5:45, :60]]
    samples = [{"image": reader.tokens(signal)} for signal in signals]
    assert len({len(s["image"].x) for s in samples}) > 3

    def run(chosen, rows=None):
        t = reader.prepare(collate(chosen, ["image"], rows)["image"])
        t = encoder(encoder.embed(t._replace(x=t.x.double())))
        return t, encoder.pool(t).x

    padded, packed = run(samples), run(samples, [[3, 0], [1, 4, 2]])
    for number, sample in enumerate(samples):
        alone, pooled = run([sample])
        for t, every in (padded, packed):
            torch.testing.assert_close(t.x[(t.sample() == number) & t.real()], alone.x[0])
            torch.testing.assert_close(every[number], pooled[0])


@pytest.mark.parametrize(("size", "patch"), [(256, 16), (384, 16), (224, 14)])
def test_native_grids_are_those_of_naflex_within_a_patch_of_rounding(size, patch):
    """timm takes the ceiling of both sides, so it stretches by less than a patch; headwater takes the nearest whole number."""
    rule = pytest.importorskip("timm.data.naflex_transforms").get_image_size_for_seq
    reader, most = ImageReader(size, patch, "native"), (size // patch) ** 2
    shares = []
    for width, height in SIZES:
        _, target = rule((height, width), patch, most, max_ratio=1.0)
        theirs, ours = [n // patch for n in target], reader._sides(height, width)
        shares.append(ours[0] * ours[1] / (theirs[0] * theirs[1]))
        assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 1 + max(theirs) // 16
        assert ours[0] * ours[1] <= most
        stretch = [abs(np.log(g[1] / g[0] * height / width)) for g in (ours, theirs)]
        assert stretch[0] <= stretch[1] + 0.5 / min(ours)
    assert 0.95 < np.mean(shares) < 1.05
    assert min(shares) > 0.85
