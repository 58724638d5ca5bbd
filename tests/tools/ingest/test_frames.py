"""Cutting and encoding clips: the frames that were asked for, whatever the film's codec does between key frames."""

import io
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from headwater.tools.ingest.frames import GOP, cut, encode, times


def moving(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Eight bars, black or white: the bits of the frame's number."""
    bits = np.unpackbits(np.arange(count, dtype=np.uint8)[:, None], axis=1) * 255
    bars = np.repeat(bits, -(-width // 8), axis=1)[:, None, :width, None]
    return np.ascontiguousarray(np.broadcast_to(bars, (count, height, width, 3)))


def number_of(frame: av.VideoFrame) -> int:
    bars = frame.to_ndarray(format="rgb24").mean((0, 2)).reshape(8, -1).mean(1) > 127
    return int(np.packbits(bars)[0])


def decoded(content: bytes | Path) -> list[av.VideoFrame]:
    with av.open(io.BytesIO(content) if isinstance(content, bytes) else str(content)) as media:
        return [*media.decode(video=0)]


@pytest.fixture(params=["closed", "open"])
def film(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """One hundred frames of H.264 with B-frames and a key frame every fifty; in an open GOP, frames reach over key frames."""
    path = tmp_path / "film.mp4"
    groups = f"keyint=50:bframes=3:b-adapt=0:scenecut=0:open-gop={int(request.param == 'open')}"
    with av.open(str(path), "w") as media:
        stream = media.add_stream("libx264", rate=25, options={"x264-params": groups, "crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in moving(100):
            media.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        media.mux(stream.encode())
    with av.open(str(path)) as media:
        stamps = [packet.pts for packet in media.demux(video=0) if packet.pts is not None]
    assert any(late < early for early, late in pairwise(stamps)), "the film was meant to have B-frames"
    return path


def test_times_are_in_the_order_of_showing(film: Path):
    np.testing.assert_allclose(times(film), np.arange(100) / 25)


@pytest.mark.parametrize(("first", "count"), [(0, 3), (37, 20), (48, 2), (49, 2), (50, 50), (99, 1), (60, None)])
def test_cut_gives_exactly_the_frames_that_were_asked_for(film: Path, first: int, count: int | None):
    clip = decoded(encode(cut(film, first, count), 25))
    assert [number_of(frame) for frame in clip] == [*range(first, first + (count or 40))]
    assert [float(frame.time) for frame in clip] == pytest.approx([i / 25 for i in range(len(clip))])
    keys = [i for i, frame in enumerate(clip) if frame.key_frame]
    assert keys[0] == 0
    assert max(np.diff([*keys, len(clip)])) <= GOP


def test_a_film_that_ends_early_is_an_error(film: Path):
    with pytest.raises(ValueError, match="has 100 frames; expected 110"):
        encode(cut(film, 90, 20), 25)


@pytest.mark.parametrize("size", [(48, 64), (33, 47)])
def test_encode_keeps_count_size_rate_and_looks(size: tuple[int, int]):
    frames = moving(30, *size)
    clip = decoded(encode(iter(frames), 29.97))
    assert [(frame.height, frame.width) for frame in clip] == [size] * 30
    back = np.stack([frame.to_ndarray(format="rgb24") for frame in clip])
    assert np.abs(back.astype(int) - frames).mean() < 3
    assert float(clip[29].time) == pytest.approx(29 / 29.97, rel=1e-4)


@pytest.mark.parametrize("form", ["yuv420p", "yuvj420p", "yuv444p"])
def test_colours_of_a_film_stay_what_they_were(form: str):
    stripes = np.repeat(np.array([[250, 10, 10], [10, 250, 10], [10, 10, 250], [255, 255, 255]], np.uint8), 16, 0)
    picture = av.VideoFrame.from_ndarray(np.repeat(stripes[None], 64, 0), format="rgb24").reformat(format=form)
    clip = decoded(encode([picture] * 3, 10))
    assert np.abs(clip[1].to_ndarray(format="rgb24").astype(int) - picture.to_ndarray(format="rgb24")).mean() < 1.5


def test_the_same_frames_give_the_same_bytes():
    frames, draw, used = moving(30, 240, 320), np.random.default_rng(0), []

    def among_used_memory() -> Iterator[np.ndarray]:
        for frame in frames:
            used.append(draw.integers(0, 255, draw.integers(1000, 200_000), np.uint8))
            del used[: len(used) - int(draw.integers(12))]
            yield frame

    assert len({encode(among_used_memory(), 10) for _ in range(12)}) == 1


def test_frames_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="no frames"):
        encode([], 10)
    with pytest.raises(ValueError, match="frame 1 is 32x48; expected 64x48"):
        encode([*moving(1), *moving(1, width=32)], 10)
    with pytest.raises(ValueError, match="float64"):
        encode(np.zeros((2, 8, 8, 3)), 10)
