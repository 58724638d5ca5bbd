import io
import tarfile
from fractions import Fraction

import numpy as np
import pytest
import torch

from headwater.datamodules.collate import collate
from headwater.embedded import place
from headwater.modalities import decoding
from headwater.modalities.films import BACKENDS, PyavFilm
from headwater.modalities.video import VideoReader
from headwater.view import View

av = pytest.importorskip("av")

# container, codec, options: keyframes every few frames, frames that are stored in another order than shown, MPEG-4 in AVI
KINDS = {
    "short gop": ("mp4", "libx264", {"g": "4", "bf": "0", "x264-params": "scenecut=0"}),
    "b-frames": ("mp4", "libx264", {"g": "12", "bf": "3"}),
    "open gop": ("mov", "libx264", {"g": "8", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}),
    "matroska": ("matroska", "libx264", {"g": "8", "bf": "3"}),
    "webm": ("webm", "libvpx-vp9", {"g": "8", "lag-in-frames": "16", "auto-alt-ref": "1", "cpu-used": "8"}),
    "avi": ("avi", "mpeg4", {"g": "6", "bf": "2"}),
    "pictures": ("avi", "mjpeg", {}),
}


def film(frames=6, side=16):
    """Frame k is a flat grey of 40 k: compression keeps it to within a few levels."""
    return np.repeat(40 * np.arange(frames, dtype=np.uint8), side * side * 3).reshape(frames, side, side, 3)


def ramp(frames=40, side=32):
    """Frame k is a flat grey of 6 k."""
    return np.repeat(6 * np.arange(frames, dtype=np.uint8), side * side * 3).reshape(frames, side, side, 3)


def encoded(frames, container="mp4", codec="mpeg4", options=None, rate=10, times=None, target=None):
    """The bytes of a video. times: of each frame in ms. target: a path, where the index shall come first."""
    file = target or io.BytesIO()
    first = {"movflags": "faststart"} if target else {}
    with av.open(file, "w", format=container, options=first) as made:
        stream = made.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            made.mux(stream.encode(frame))
        made.mux(stream.encode())
    return target.read_bytes() if target else file.getvalue()


def all_frames(content):
    """Every frame, decoded from the first to the last."""
    with av.open(io.BytesIO(content)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def levels(t, tubelet=1):
    """The mean grey of each token's frames, by the time of the token."""
    steps = len(t.order.unique())
    return t.x.float().reshape(steps, -1, tubelet, t.x.shape[1] // tubelet).mean((1, 3)).flatten()


def embedded(count=30):
    with tarfile.open(place("embedded:episodes-test-000.tar")) as tar:
        return [tar.extractfile(m).read() for m in tar if m.name.endswith("mp4")][:count]


@pytest.mark.parametrize(("stride", "limit", "greys"), [(1, 16, range(0, 240, 40)), (2, 16, [0, 80, 160]), (1, 2, [0, 40])])
def test_every_strideth_frame_is_read_up_to_the_limit(stride, limit, greys):
    reader = VideoReader(16, frames=limit, stride=stride)
    t = reader.tokens(reader.decode({"mp4": encoded(film())}))
    assert len(t.x) == 4 * len(greys)
    assert (levels(t) - torch.tensor([*greys])).abs().max() < 6


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("kind", list(KINDS))
def test_any_frames_equal_those_of_decoding_everything(backend, kind):
    if fault := decoding.fault("video", backend):
        pytest.skip(fault)
    if backend == "torchcodec" and kind == "avi":
        pytest.skip("torchcodec 0.17 takes the times of AVI for those of showing, and mixes up B-frames")
    content = encoded(ramp(), *KINDS[kind])
    whole, opened = all_frames(content), BACKENDS[backend](content)
    assert opened.frames == len(whole) == 40
    assert opened.fps == pytest.approx(10, abs=0.01)
    assert opened.seconds == pytest.approx(4, abs=0.01)
    generator = np.random.default_rng(0)
    for numbers in ([0], [39], [38, 39], [*range(40)], [*range(39, -1, -5)], *generator.integers(0, 40, (12, 4)).tolist()):
        for number, frame in zip(numbers, opened.take(numbers), strict=True):
            assert np.array_equal(frame, whole[number]), number
        for number, frame in zip(numbers, opened.at([n / 10 for n in numbers]), strict=True):
            assert np.array_equal(frame, whole[number]), number


def test_packed_b_frames_are_counted_in_the_order_they_are_shown():
    """DivX and XviD put a B-frame into the packet of the frame after it and an empty one in its place; times then lie."""
    packets = []
    with av.open(io.BytesIO(encoded(ramp(20), "avi", "mpeg4", {"bf": "1", "g": "20"}))) as container:
        packets = [bytes(p) for p in container.demux(video=0) if p.size]
    kinds = ["IPB"[p[p.index(b"\0\0\1\xb6") + 4] >> 6] for p in packets] + ["P"]
    packed = [p if k != "B" else b"\0\0\1\xb6\x50\0\0" for p, k in zip(packets, kinds)]
    packed = [p + packets[i + 1] if kinds[i + 1] == "B" else p for i, p in enumerate(packed)]
    place = packed[0].index(b"\0\0\1\xb2")
    packed[0] = packed[0][:place] + b"\0\0\1\xb2DivX503b1393p" + packed[0][place:]
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as made:
        stream = made.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for number, content in enumerate(packed):
            packet = av.Packet(content)
            packet.pts = packet.dts = number
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 10), stream, number == 0
            made.mux(packet)
    whole, opened = all_frames(file.getvalue()), PyavFilm(file.getvalue())
    assert "B" in kinds
    assert [round(f.mean() / 6) for f in opened.take(range(19))] == list(range(19))
    assert all(np.array_equal(a, b) for a, b in zip(opened.take([7, 3, 12]), [whole[n] for n in (7, 3, 12)]))


def test_embedded_episodes_equal_full_decoding():
    reader = VideoReader(56, patch=56)
    for content in embedded():
        whole = np.stack(all_frames(content))
        t = reader.tokens(reader.decode({"mp4": content}))
        assert torch.equal(t.x, torch.from_numpy(whole.reshape(len(whole), -1)))


def test_only_the_frames_behind_the_keyframe_are_decoded(monkeypatch):
    decoded = []

    class Watched(PyavFilm):
        def _decode(self, key):
            for number, frame in super()._decode(key):
                decoded.append(number)
                yield number, frame

    opened = Watched(encoded(ramp(), *KINDS["short gop"]))
    for numbers, expected in (
        ([0], [0]),
        ([22], [20, 21, 22]),
        ([22, 23, 25], [20, 21, 22, 23, 24, 25]),
        ([3, 30], [0, 1, 2, 3, 28, 29, 30]),
    ):
        decoded.clear()
        opened.take(numbers)
        assert decoded == expected


@pytest.mark.parametrize("own", [10, 25, 30])
def test_a_rate_takes_what_is_on_screen_whatever_the_rate_of_the_file(own):
    content = encoded(ramp(40), *KINDS["b-frames"], rate=own)
    for rate in (5.0, 10.0, 2.5, 30.0):
        reader = VideoReader(32, patch=32, frames=64, rate=rate)
        t = reader.tokens(reader.decode({"mp4": content}))
        expected = [6 * int(k / rate * own + 1e-6) for k in range(64) if k / rate < 40 / own - 1e-6]
        assert len(t.x) == len(expected)
        assert (levels(t) - torch.tensor(expected)).abs().max() < 4


def test_a_rate_goes_by_the_times_of_the_frames_not_by_counting():
    times = [0, 40, 80, 120, 1000, 1040, 2880]  # ms: some frames stand for long
    content = encoded(film(7) // 2, "matroska", "libx264", {"bf": "2"}, rate=25, times=times)
    reader = VideoReader(16, patch=16, frames=99, rate=10)
    t = reader.tokens(reader.decode({"mkv": content}))
    shown = [max(i for i, at in enumerate(times) if at <= 100 * k) for k in range(len(t.x))]
    assert 29 <= len(t.x) <= 30
    assert (levels(t) - torch.tensor([20 * s for s in shown])).abs().max() < 6


def test_a_view_starts_at_a_random_moment_from_which_the_clip_fits():
    content = encoded(ramp(), *KINDS["short gop"])
    for options, span in (({"stride": 2}, 8), ({"rate": 5.0}, 8), ({"stride": 1}, 4)):
        reader = VideoReader(32, patch=32, frames=5, **options)
        opened = reader.decode({"mp4": content})
        starts = []
        for seed in range(60):
            shown = (levels(reader.tokens(opened, View(seed=seed))) / 6).round().int().tolist()
            again = VideoReader(32, patch=32, frames=5, **options).decode({"mp4": content})
            assert (levels(reader.tokens(again, View(seed=seed))) / 6).round().int().tolist() == shown
            assert shown == [*range(shown[0], shown[0] + span + 1, span // 4)]
            starts.append(shown[0])
        assert 0 <= min(starts) < 5
        assert 39 - span - 5 < max(starts) <= 39 - span
        assert reader.tokens(opened).x.float().mean(1)[0] < 3


def test_a_view_of_frames_in_memory_starts_at_random_too():
    reader = VideoReader(16, patch=16, frames=2)
    starts = {int(levels(reader.tokens(film(), View(seed=seed)))[0]) // 40 for seed in range(60)}
    assert starts == {0, 1, 2, 3, 4}
    assert torch.equal(reader.tokens(film()).x, reader.tokens(list(film())).x)
    short = VideoReader(16, patch=16)
    assert torch.equal(short.tokens(film(), View(seed=3)).x, short.tokens(film()).x)


@pytest.mark.parametrize("options", [{}, {"stride": 3}, {"rate": 4.0}, {"rate": 30.0}, {"tubelet": 3}, {"rate": 2.5, "tubelet": 2}])
def test_the_length_is_known_from_the_facts_and_a_view_does_not_change_it(options):
    reader = VideoReader(16, patch=8, frames=7, **options)
    for kind in ("b-frames", "matroska", "avi"):
        for frames in (1, 2, 5, 13, 40):
            opened = reader.decode({"mp4": encoded(ramp(frames), *KINDS[kind])})
            facts = {"size": 9, "frames": np.float32(frames), "fps": np.float32(10), "seconds": np.float32(frames / 10)}
            counts = {len(reader.tokens(opened, view).x) for view in (None, View(seed=1), View(seed=2))}
            assert counts == {reader.length(facts)}
            assert reader.length({k: facts[k] for k in ("frames", "fps")}) in counts
    assert reader.length({"size": 9}) is None


def test_the_length_of_embedded_episodes_is_exact():
    for options in ({}, {"stride": 2, "tubelet": 2}, {"rate": 3.0}):
        reader = VideoReader(32, frames=6, **options)
        for content in embedded():
            facts = {"frames": len(all_frames(content)), "fps": 8.0}
            assert reader.length({"size": 1, **facts}) == len(reader.tokens(reader.decode({"mp4": content})).x)


@pytest.mark.parametrize("tubelet", [1, 2, 3])
def test_tubelets_hold_their_frames_and_know_the_last_one(tubelet):
    reader = VideoReader(16, patch=8, tubelet=tubelet)
    t = reader.tokens(film(5))
    steps = -(-5 // tubelet)
    assert t.x.shape == (steps * 4, tubelet * 8 * 8 * 3)
    assert t.order.tolist() == [tubelet * (k + 1) - 1 for k in range(steps) for _ in range(4)]
    assert torch.equal(t.position[:, 0].long(), t.order)
    assert t.position[:4, 1:].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert (t.x.dtype, t.position.dtype) == (torch.uint8, torch.int32)
    assert levels(t, tubelet).tolist() == [40 * min(k, 4) for k in range(steps * tubelet)]  # the last frame is repeated


def test_restore_gives_the_frames_whatever_the_padding():
    reader = VideoReader(16, tubelet=2)
    t = reader.prepare(collate([{"v": reader.tokens(film(2))}, {"v": reader.tokens(film(6))}], ["v"])["v"])
    assert np.array_equal(reader.restore(t), film(2))


def noisy(frames=40, side=32):
    return np.random.default_rng(0).integers(0, 256, (frames, side, side, 3), np.uint8)


@pytest.mark.parametrize("kind", ["matroska", "webm", "avi"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.85])
def test_a_cut_file_is_refused_with_what_is_wrong(kind, share):
    content = encoded(noisy(), *KINDS[kind])
    with pytest.raises(ValueError, match=r"cut off|cannot be opened"):
        VideoReader(16).decode({"mp4": content[: int(share * len(content))]})


@pytest.mark.parametrize("share", [0.01, 0.4, 0.7, 0.99])
def test_a_cut_mp4_is_refused_wherever_its_index_lies(tmp_path, share):
    for target in (None, tmp_path / "film.mp4"):
        content = encoded(noisy(), *KINDS["b-frames"], target=target)
        assert VideoReader(16).decode({"mp4": content}).frames == 40
        with pytest.raises(ValueError, match=r"cut off: its box m\w+ has \d+ bytes|cut off: it has no moov"):
            VideoReader(16).decode({"mp4": content[: int(share * len(content))]})


@pytest.mark.parametrize("content", [b"", b"words", b"\0" * 4000])
def test_other_files_are_refused(content):
    with pytest.raises(ValueError, match="cannot be opened"):
        VideoReader(16).decode({"mp4": content})


def test_damage_in_the_middle_is_refused_or_conceals_at_most_pixels():
    content = bytearray(encoded(ramp(), *KINDS["short gop"]))
    whole = content.index(b"mdat") + 200
    content[whole : whole + 300] = bytes(300)
    reader = VideoReader(16, frames=40)
    try:
        t = reader.tokens(reader.decode({"mp4": bytes(content)}))
    except ValueError:
        return
    assert len(t.x) == 40 * 4


def test_unusable_options_and_arrays_are_refused():
    for options in ({"rate": 0.0}, {"rate": -1.0}, {"rate": 5.0, "stride": 2}):
        with pytest.raises(ValueError, match="rate"):
            VideoReader(16, **options)
    with pytest.raises(ValueError, match="multiple"):
        VideoReader(16, patch=5)
    for wrong in ([], np.zeros((0, 4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="video"):
            VideoReader(16).tokens(wrong)
