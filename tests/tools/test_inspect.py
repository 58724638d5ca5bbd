"""`headwater inspect`: the table and the contact sheet say what the tars hold."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from headwater.datamodules.writer import ShardWriter
from headwater.tools.decode import ShardSet, describe, pick
from headwater.tools.inspect import inspect
from headwater.tools.page import page, plot


def encoded(mode: str, form: str, size: tuple[int, int] = (20, 10)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, form)
    return buffer.getvalue()


def wav(seconds: float = 0.5) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros((int(8000 * seconds), 2)), 8000, format="WAV")
    return buffer.getvalue()


def npy(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def media(form: str, codec: str, frames: int = 6) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as out:
        if form == "ipod":
            stream = out.add_stream(codec, rate=8000, layout="mono")
            for i in range(frames):
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 8000, 1024 * i
                out.mux(stream.encode(frame))
        else:
            stream = out.add_stream(codec, rate=12)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            for _ in range(frames):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 48, 3), np.uint8), format="rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue()


SAMPLES = {
    "000000": {"jpg": encoded("RGB", "JPEG"), "txt": b"<script>alert(1)</script> & more", "wav": wav()},
    "000001": {"png": encoded("LA", "PNG", (30, 40)), "txt": "שלום עולם".encode(), "npy": npy(np.arange(14.0).reshape(7, 2))},
    "000002": {"mp4": media("mp4", "mpeg4"), "json": b'{"source": "<img src=x onerror=alert(2)>"}', "txt": b"a clip"},
    "000003": {"png": b"broken", "npy": npy(np.array([{}], object), allow_pickle=True), "txt": b"\xff"},
}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    for split, samples in (("train", 2), ("validation", 9)):
        with ShardWriter(tmp_path / (split + "-{:05d}.tar"), samples=samples) as writer:
            for key, members in SAMPLES.items():
                writer.write(key, members)
    return tmp_path


class Reader(HTMLParser):
    """Collects tags and texts as a browser would see them."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(document)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def test_table_per_shard_set(out, capsys):
    inspect(str(out / "*.tar"))
    printed = capsys.readouterr().out
    assert "train-*.tar: 2 shards, 4 samples" in printed
    assert "validation-*.tar: 1 shards, 4 samples" in printed
    assert float(re.search(r"index ([\d.]+) bytes per sample", printed)[1]) > 0
    flat = re.sub(r"[\s│┃|]+", " ", printed)
    for fact in ("20x10", "30x40", "LA", "8000 Hz", "0.5 seconds", "48x32", "12 fps", "6 frames", "(7, 2)", "float64", "words"):
        assert fact in flat
    assert "000003.png does not decode" in printed
    assert "000003.npy does not decode" in printed


def test_page_holds_the_data_and_escapes_texts(out, tmp_path):
    target = tmp_path / "sheets" / "page.html"
    inspect(str(out / "train-*.tar"), html=str(target))
    document = target.read_bytes().decode("utf-8")
    seen = Reader(document)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in seen.tags}
    assert not any(name.startswith("on") for _, attributes in seen.tags for name in attributes)
    assert "<script>alert(1)</script> & more" in seen.texts
    assert "שלום עולם" in seen.texts
    assert any("<img src=x onerror=alert(2)>" in text for text in seen.texts)
    sources = [attributes["src"] for _, attributes in seen.tags if "src" in attributes]
    assert all(source.startswith("data:") for source in sources)
    contents = {source.split(",")[0]: base64.b64decode(source.split(",")[1]) for source in sources}
    assert contents["data:image/jpeg;base64"] == SAMPLES["000000"]["jpg"]
    assert contents["data:audio/wav;base64"] == SAMPLES["000000"]["wav"]
    assert contents["data:video/mp4;base64"] == SAMPLES["000002"]["mp4"]
    assert sum(tag == "polyline" for tag, _ in seen.tags) == 2
    assert {attributes.get("dir") for tag, attributes in seen.tags if tag == "p"} >= {"auto"}


def test_faults_of_a_cut_tar_are_shown(out, tmp_path, capsys):
    whole = (out / "train-00000.tar").read_bytes()
    (tmp_path / "cut-0.tar").write_bytes(whole[: len(whole) // 2])
    inspect(str(tmp_path / "cut-0.tar"), html=str(tmp_path / "cut.html"))
    assert "fault: " in capsys.readouterr().out
    assert 'class="fault"' in (tmp_path / "cut.html").read_text()


def test_samples_are_spread_over_the_shards(tmp_path):
    from headwater.datamodules.index import load_index

    with ShardWriter(tmp_path / "a-{:05d}.tar", samples=10) as writer:
        for i in range(100):
            writer.write(f"{i:06d}", {"txt": b"x"})
    picked = pick([load_index(path) for path in writer.shards], 4)
    assert [sample.key for sample in picked] == ["000000", "000025", "000050", "000075"]
    assert pick([], 4) == []


def test_nothing_found_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match=r"found no shard at.*expected a tar"):
        inspect(str(tmp_path / "none-*.tar"))


def test_large_images_become_thumbnails(tmp_path):
    from headwater.datamodules.index import load_index

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 900, 3), np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "TIFF")
    with ShardWriter(tmp_path / "a-{:05d}.tar") as writer:
        writer.write("0", {"tiff": buffer.getvalue()})
    index = load_index(writer.shards[0])
    document = page([ShardSet("a", [index], pick([index], 1))])
    source = re.search(r'src="data:image/jpeg;base64,([^"]+)"', document)[1]
    assert Image.open(io.BytesIO(base64.b64decode(source))).size == (480, 320)


def test_describe_reads_aac_and_refuses_pickle():
    facts = describe("m4a", media("ipod", "aac"))
    assert (facts["Hz"], facts["channels"]) == (8000, 1)
    assert facts["seconds"] > 0.5
    with pytest.raises(ValueError, match="allow_pickle"):
        describe("npy", SAMPLES["000003"]["npy"])
    assert describe("pkl", b"\x80\x04.") == {}


@pytest.mark.parametrize(
    "array", [np.array([1.0, np.nan, np.inf]), np.zeros((900, 3, 4)), np.array([True]), np.zeros((3, 0)), np.array("a")]
)
def test_plot_takes_any_array(array):
    drawn = plot(array)
    assert "nan" not in drawn
    assert "inf" not in drawn.replace("<title>", "")
    assert drawn.count("<polyline") <= 8
