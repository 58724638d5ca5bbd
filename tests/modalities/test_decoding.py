import io
import multiprocessing
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image as Pictures
from PIL import ImageFile

from headwater.embedded import place
from headwater.modalities import decoding
from headwater.modalities.image import ImageReader


def make_probes(folder):
    """Write the three files with which `decoding` tests its backends."""
    import av
    import soundfile

    halves = np.zeros((16, 24, 3), np.uint8)
    halves[:, :12, 0] = halves[:, 12:, 2] = 254
    Pictures.fromarray(halves).save(folder / "probe.jpg", quality=95, subsampling=0)
    time = np.arange(1600) / 8000
    wave = np.concatenate([0 * time, 0.5 * np.sin(2 * np.pi * 500 * time)])
    soundfile.write(folder / "probe.ogg", wave, 8000, format="OGG", subtype="VORBIS")
    with av.open(str(folder / "probe.mp4"), "w", options={"fflags": "+bitexact"}) as film:
        stream = film.add_stream("libx264", rate=10, options={"g": "4", "bf": "1", "crf": "30", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        greys = [av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * k + 30, np.uint8), "rgb24") for k in range(10)]
        for grey in [*greys, None]:
            film.mux(stream.encode(grey))


@pytest.fixture
def fresh(monkeypatch):
    """No choice has been made yet, none is forced, and none made here outlives the test."""

    def forget():
        decoding.backend.cache_clear()
        decoding.fault.cache_clear()

    for kind in decoding.KINDS:
        monkeypatch.delenv(decoding.variable(kind), raising=False)
    forget()
    yield monkeypatch
    forget()


def replaced(monkeypatch, kind, **backends):
    """The backends of a kind, with some in front of them."""
    own, test = decoding.KINDS[kind]
    monkeypatch.setitem(decoding.KINDS, kind, (backends | own, test))


def test_the_probes_are_small_and_can_be_made_again(tmp_path, fresh):
    make_probes(tmp_path)
    shipped = [place(f"embedded:{path.name}") for path in tmp_path.iterdir()]
    assert len(shipped) == 3
    assert sum(os.path.getsize(path) for path in shipped) < 10_000
    fresh.setattr(decoding, "probe", lambda name: (tmp_path / name).read_bytes())
    assert [c.backend for c in decoding.chosen() if c.state == "active"] == ["simplejpeg", "soundfile", "pyav"]


def test_one_backend_of_each_kind_is_active_and_the_others_say_why_not(fresh):
    table = decoding.chosen()
    assert [c.kind for c in table if c.state == "active"] == ["jpeg", "audio", "video"]
    assert len({(c.kind, c.backend) for c in table}) == len(table) == 8
    assert all("comes first" in c.state or "Error" in c.state for c in table if c.state != "active")
    for kind in decoding.KINDS:
        assert decoding.backend(kind) is decoding.KINDS[kind][0][next(c.backend for c in table if c[::2] == (kind, "active"))]


def test_a_library_that_is_there_but_broken_is_passed_over(fresh):
    def unloadable(content):
        raise OSError("libavutil.so.99: cannot open shared object file\nsecond line")

    class Swapped(decoding.backend("jpeg")):
        def pixels(self, height, width):
            return super().pixels(height, width)[..., ::-1]

    replaced(fresh, "jpeg", unloadable=unloadable, swapped=Swapped)
    decoding.backend.cache_clear()
    assert decoding.backend("jpeg") is decoding.jpegs.BACKENDS["simplejpeg"]
    states = {c.backend: c.state for c in decoding.chosen()}
    assert states["unloadable"] == "OSError: libavutil.so.99: cannot open shared object file"
    assert "decodes the probe wrongly: colours" in states["swapped"]


def test_the_choice_is_made_once(fresh):
    asked = []

    class Counting(decoding.jpegs.SimplejpegJpeg):
        def __init__(self, content):
            asked.append(len(content))
            super().__init__(content)

    replaced(fresh, "jpeg", counting=Counting)
    assert all(decoding.backend("jpeg") is Counting for _ in range(5))
    assert len(asked) == 1


def test_a_backend_can_be_forced_and_a_misspelt_or_broken_one_is_an_error(fresh):
    fresh.setenv("HEADWATER_JPEG", "pillow")
    assert decoding.backend("jpeg") is decoding.jpegs.PillowJpeg
    decoding.backend.cache_clear()
    fresh.setenv("HEADWATER_JPEG", "pilow")
    with pytest.raises(ValueError, match="expected one of simplejpeg, torchvision, pillow"):
        decoding.backend("jpeg")
    replaced(fresh, "video", none=lambda content: 1 / 0)
    fresh.setenv("HEADWATER_VIDEO", "none")
    with pytest.raises(RuntimeError, match=r"none: ZeroDivisionError.*HEADWATER_VIDEO"):
        decoding.backend("video")


def decoded(members):
    return ImageReader(16).decode(members)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_another_process_decodes_the_same(start):
    members = {"jpg": decoding.probe("probe.jpg")}
    with multiprocessing.get_context(start).Pool(1) as pool:
        assert np.array_equal(pool.apply(decoded, (members,)), decoded(members))


def saved(kind, side=8, **options):
    file = io.BytesIO()
    Pictures.fromarray(np.zeros((side, side, 3), np.uint8)).save(file, kind, **options)
    return bytearray(file.getvalue())


def bombs():
    """Small files that declare a picture of billions of pixels."""
    jpg, png, gif, webp = (saved(kind) for kind in ("jpeg", "png", "gif", "webp"))
    place = jpg.index(b"\xff\xc0") + 5
    jpg[place : place + 4] = struct.pack(">HH", 65000, 65000)
    png[16:24] = struct.pack(">II", 60000, 60000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    gif[6:10] = struct.pack("<HH", 65000, 65000)
    place = gif.index(b"\x2c", 13)
    gif[place + 5 : place + 9] = struct.pack("<HH", 65000, 65000)
    place = webp.index(b"\x9d\x01\x2a") + 3
    webp[place : place + 4] = struct.pack("<HH", 16383, 16383)
    return {"jpg": jpg, "png": png, "gif": gif, "webp": webp}


@pytest.mark.parametrize("forced", list(decoding.jpegs.BACKENDS))
@pytest.mark.parametrize("kind", ["jpg", "png", "gif", "webp"])
def test_a_picture_that_declares_too_many_pixels_is_refused_before_it_is_decoded(fresh, kind, forced):
    content = bytes(bombs()[kind])
    fresh.setenv("HEADWATER_JPEG", forced)
    opens = decoding.backend("jpeg")
    fresh.setattr(opens, "pixels", lambda *_: pytest.fail("decoded"))
    fresh.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="pixels"):
        ImageReader(16).decode({kind: content})


def test_the_limit_itself_is_allowed():
    decoding.within(1, decoding.LIMIT)
    with pytest.raises(ValueError, match="at most"):
        decoding.within(1, decoding.LIMIT + 1)


@pytest.mark.parametrize("forced", list(decoding.jpegs.BACKENDS))
def test_native_grids_do_not_depend_on_the_backend(fresh, forced):
    fresh.setenv("HEADWATER_JPEG", forced)
    reader = ImageReader(64, 8, "native")
    for height, width in np.random.default_rng(0).integers(1, 900, (40, 2)).tolist():
        file = io.BytesIO()
        Pictures.new("RGB", (width, height)).save(file, "jpeg")
        t = reader.tokens(reader.decode({"jpg": file.getvalue()}))
        assert len(t.x) == reader.length({"size": 1, "height": height, "width": width})


@pytest.mark.parametrize("forced", list(decoding.jpegs.BACKENDS))
def test_all_jpeg_backends_show_the_same(fresh, forced):
    fresh.setenv("HEADWATER_JPEG", forced)
    y, x = np.mgrid[:60, :80]
    smooth = np.stack([3 * x, 4 * y, 128 + 0 * x], -1).astype(np.uint8)
    for mode in ("RGB", "L"):
        file = io.BytesIO()
        Pictures.fromarray(smooth).convert(mode).save(file, "jpeg", quality=95)
        expected = np.asarray(Pictures.open(file).convert("RGB")).astype(int)
        got = ImageReader(16).tokens(ImageReader(16).decode({"jpg": file.getvalue()}))
        assert abs(got.x.int() - ImageReader(16).tokens(expected.astype(np.uint8)).x.int()).max() <= 8
