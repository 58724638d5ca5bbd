"""Films cut into clips: every frame once and at its time, sound to the sample, keyframes where the facts say."""

import io
import json
import tarfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

import headwater
from headwater.tools.ingest.films import cuts
from headwater.tools.shard import shard

EMBEDDED = Path(headwater.__file__).parent / "embedded"
BITS, WIDTH, HEIGHT = 10, 160, 96


def chirp(seconds: float, rate: int) -> np.ndarray:
    """A sine that climbs, so that any shift in time shows."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * (200 * time + 40 * time * time))).astype(np.float32)


def film(path: Path, seconds: float, rate: Fraction | int, codec: str = "libx264", sound: str = "", **options: str) -> int:
    """A film whose frames show their number as black and white bars, above a red block that moves; returns the frames."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        voice = out.add_stream(sound, rate=48000 if sound == "libopus" else 22050, layout="mono") if sound else None
        count = round(seconds * rate)
        for number in range(count):
            picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
            for bit in range(BITS):
                picture[:, 16 * bit : 16 * bit + 16] = 255 * (number >> bit & 1)
            picture[-20:, 3 * number % WIDTH :][:, :10] = (255, 0, 0)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
        if voice is not None:
            wave = chirp(seconds, voice.rate)
            for start in range(0, len(wave), 1024):
                form = "flt" if sound == "libopus" else "s16" if sound == "mp2" else "fltp"
                part = wave[None, start : start + 1024]
                part = (part * 32767).astype(np.int16) if form == "s16" else part
                frame = av.AudioFrame.from_ndarray(part, format=form, layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = voice.rate, start, Fraction(1, voice.rate)
                out.mux(voice.encode(frame))
            out.mux(voice.encode(None))
    return count


def numbers(content: bytes) -> list[tuple[int, float]]:
    """The number that each frame shows, and when."""
    with av.open(io.BytesIO(content)) as media:
        frames = [(frame.to_ndarray(format="gray"), frame.time) for frame in media.decode(video=0)]
    scale = frames[0][0].shape[1] / WIDTH
    bars = [slice(int((16 * bit + 5) * scale), int((16 * bit + 11) * scale)) for bit in range(BITS)]
    return [(sum(int(picture[10:30, bar].mean() > 128) << bit for bit, bar in enumerate(bars)), time) for picture, time in frames]


def clips(out: Path) -> dict[str, list[dict]]:
    """Film -> its clips in order, members by extension, facts decoded."""
    samples: dict[str, dict] = {}
    for path in sorted(out.glob("*-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if member.isfile():
                    samples.setdefault(f"{path.name}/{key}", {"split": path.name.split("-")[0]})[extension] = tar.extractfile(
                        member
                    ).read()
    found: dict[str, list[dict]] = {}
    for sample in samples.values():
        facts = json.loads(sample["json"])
        found.setdefault(facts.get("film", ""), []).append({**sample, "facts": facts})
    return found


FILMS = {
    "b-frames.mp4": (5.3, Fraction(30000, 1001), "libx264", "aac", {"bf": "3", "g": "250", "crf": "10"}),
    "aac.mkv": (3.0, 24, "libx264", "aac", {"bf": "2", "g": "60"}),
    "divx.avi": (3.0, 25, "mpeg4", "mp3", {"g": "100"}),
    "vp9.webm": (2.5, 12, "libvpx-vp9", "libopus", {"cpu-used": "8", "deadline": "realtime"}),
    "program.mpg": (3.0, 25, "mpeg2video", "mp2", {"g": "18", "bf": "2"}),
    "silent.mov": (1.2, 10, "libx264", "", {}),
}


@pytest.fixture(scope="module")
def cut(tmp_path_factory) -> tuple[Path, dict[str, int]]:
    """Films of several containers, cut; the output and how many frames each film has."""
    root = tmp_path_factory.mktemp("films")
    (root / "in").mkdir()
    counts = {}
    for name, (seconds, rate, codec, sound, options) in FILMS.items():
        counts[name] = film(root / "in" / name, seconds, rate, codec, sound, **options)
    (root / "in/b-frames.txt").write_text("a block moves")
    (root / "in/b-frames.json").write_text('{"who": "me"}')
    (root / "in/b-frames.npy").write_bytes(b"x")
    whole = (root / "in/b-frames.mp4").read_bytes()
    (root / "in/half.mp4").write_bytes(whole[: len(whole) // 2])
    (root / "in/noise.mp4").write_bytes(bytes(1000))
    (root / "in/note.txt").write_text("no film of this name")
    shard(str(root / "in"), str(root / "out"), clip=1.0, size=128, gop=6)
    return root / "out", counts


@pytest.mark.parametrize("name", FILMS)
def test_every_frame_is_in_one_clip_at_its_time(cut, name):
    out, counts = cut
    seen, place = [], 0.0
    for clip in clips(out)[name]:
        facts, shown = clip["facts"], numbers(clip["mp4"])
        assert facts["frames"] == len(shown)
        assert facts["start"] == pytest.approx(place, abs=0.05)
        assert facts["fps"] == pytest.approx(float(FILMS[name][1]), rel=0.02) or name == "divx.avi"  # its first frame lasts long
        times = [facts["start"] + time for _, time in shown]
        gaps = np.diff([number for number, _ in shown])
        assert (gaps == 1).all()
        assert np.allclose(np.diff(times), 1 / float(FILMS[name][1]), atol=0.002) or name == "divx.avi"
        seen += [number for number, _ in shown]
        place = facts["start"] + facts["seconds"]
    assert seen == list(range(counts[name]))


def test_keyframes_are_where_the_facts_say_and_lead_to_the_right_frame(cut):
    for clip in clips(cut[0])["b-frames.mp4"]:
        with av.open(io.BytesIO(clip["mp4"])) as media:
            stream = media.streams.video[0]
            packets = [packet for packet in media.demux(stream) if packet.size]
            assert clip["facts"]["keyframes"] == [n for n, packet in enumerate(packets) if packet.is_keyframe]
            assert clip["facts"]["keyframes"] == list(range(0, len(packets), 6))
            assert (stream.width, stream.height, stream.frames) == (128, 76, len(packets))
            middle = clip["facts"]["keyframes"][len(packets) // 12]
            media.seek(packets[middle].pts, stream=stream)
            assert next(media.decode(stream)).pts == packets[middle].pts


@pytest.mark.parametrize(("name", "late"), [("b-frames.mp4", 0), ("aac.mkv", 12), ("program.mpg", 0), ("divx.avi", 1105)])
def test_sound_is_cut_with_the_frames(cut, name, late):
    """late: samples by which the container's coarse clock shifts the sound of a clip: Matroska counts milliseconds, AVI
    does not know how many samples an MP3 encoder puts first."""
    place, found = 0, clips(cut[0])[name]
    true = chirp(7, 22050)
    for clip in found:
        heard, rate = soundfile.read(io.BytesIO(clip["flac"]))
        assert len(heard) == pytest.approx(clip["facts"]["seconds"] * rate, abs=1)
        assert place == pytest.approx(clip["facts"]["start"] * rate, abs=rate / 1000 + 1)
        end = len(heard) - (3000 if clip is found[-1] else 0)
        inner = np.arange(3000 if place == 0 else 0, end)  # a codec fades in and out
        shifts = range(-late - 1, late + 2)
        errors = [np.sqrt(np.mean((heard[inner] - true[inner + place + shift]) ** 2)) for shift in shifts if len(inner)]
        assert min(errors, default=0) < 0.02
        assert not errors or abs(shifts[int(np.argmin(errors))]) <= late
        place += len(heard)


def test_captions_and_facts_go_to_every_clip_and_the_rest_is_named(cut):
    found = clips(cut[0])
    assert len(found["b-frames.mp4"]) == 6
    assert all(clip["txt"] == b"a block moves" and clip["facts"]["who"] == "me" for clip in found["b-frames.mp4"])
    assert "flac" not in found["silent.mov"][0]
    assert "txt" not in found["silent.mov"][0]
    assert found[""][0]["txt"] == b"no film of this name"
    lines = (cut[0] / "skipped.jsonl").read_text().splitlines()
    reasons = {Path(row["source"]).name: row["reason"] for row in map(json.loads, lines)}
    assert reasons.keys() == {"half.mp4", "noise.mp4", "b-frames.npy"}
    assert "with --clip only .txt, .cls and .json do" in reasons["b-frames.npy"]


def test_clips_of_a_film_stay_on_one_side_and_two_runs_are_identical(cut, tmp_path):
    source = cut[0].parent / "in"
    for out in ("one", "two"):
        shard(str(source), str(tmp_path / out), clip=0.5, size=32, train=0.5)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / out).iterdir()} for out in ("one", "two"))
    assert one == two
    frames = {name: sum(clip["facts"]["frames"] for clip in found) for name, found in clips(tmp_path / "one").items() if name}
    assert frames == cut[1]
    sides = {name: {clip["split"] for clip in found} for name, found in clips(tmp_path / "one").items()}
    assert all(len(side) == 1 for side in sides.values())
    assert {"train"} in sides.values()
    assert {"validation"} in sides.values()


def test_real_episodes_are_cut_frame_by_frame(tmp_path):
    originals = {}
    (tmp_path / "in").mkdir()
    with tarfile.open(EMBEDDED / "episodes-test-000.tar") as tar:
        for member in tar.getmembers()[:40]:
            if member.name.endswith((".mp4", ".txt")):
                content = tar.extractfile(member).read()
                (tmp_path / "in" / member.name).write_bytes(content)
                if member.name.endswith(".mp4"):
                    with av.open(io.BytesIO(content)) as media:
                        originals[member.name] = [frame.to_ndarray(format="rgb24") for frame in media.decode(video=0)]
    shard(str(tmp_path / "in"), str(tmp_path / "out"), clip=0.4)
    found = clips(tmp_path / "out")
    assert found.keys() == originals.keys()
    for name, frames in originals.items():
        again = []
        for clip in found[name]:
            assert clip["txt"] == (tmp_path / "in" / name).with_suffix(".txt").read_bytes().strip()
            with av.open(io.BytesIO(clip["mp4"])) as media:
                again += [frame.to_ndarray(format="rgb24") for frame in media.decode(video=0)]
        assert len(again) == len(frames)
        for one, two in zip(again, frames):
            assert np.abs(one.astype(int) - two).mean() < 4
    assert sum(map(len, found.values())) > len(found)


def test_damage_in_the_middle_costs_the_clips_that_it_touches(tmp_path):
    (tmp_path / "in").mkdir()
    count = film(tmp_path / "in/a.avi", 4.0, 25, "mpeg4", g="10")
    (tmp_path / "in/b.avi").write_bytes(content := bytearray((tmp_path / "in/a.avi").read_bytes()))
    with av.open(str(tmp_path / "in/a.avi")) as media:
        place = [packet.pos for packet in media.demux(video=0) if packet.size][45]
    content[place + 8 : place + 60] = bytes(52)
    (tmp_path / "in/a.avi").write_bytes(content)
    shard(str(tmp_path / "in"), str(tmp_path / "out"), clip=1.0)
    found = clips(tmp_path / "out")
    assert sum(clip["facts"]["frames"] for clip in found["b.avi"]) == count
    assert 0 < len(found["a.avi"]) < len(found["b.avi"])
    assert "a.avi#00001" in (tmp_path / "out/skipped.jsonl").read_text()


def test_films_of_telephones_are_turned_upright(tmp_path):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in/a.mp4"
    film(path, 0.5, 10)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44  # ISO/IEC 14496-12, 8.3.2: quarter turn clockwise
    content[matrix : matrix + 36] = b"".join(
        n.to_bytes(4, "big", signed=True) for n in (0, 1 << 16, 0, -1 << 16, 0, 0, HEIGHT << 16, 0, 1 << 30)
    )
    path.write_bytes(content)
    shard(str(tmp_path / "in"), str(tmp_path / "out"), clip=9.0)
    (clip,) = clips(tmp_path / "out")["a.mp4"]
    with av.open(io.BytesIO(clip["mp4"])) as media:
        last = [frame.to_ndarray(format="rgb24") for frame in media.decode(video=0)][-1]
    assert last.shape == (WIDTH, HEIGHT, 3)
    assert last[12:22, :20].max(axis=-1).mean() > 150  # the red block of the bottom edge, frame 4, is now at the left
    assert last[40:, :20].mean() < 60


def test_spans_follow_the_clock_of_the_film(tmp_path):
    film(tmp_path / "a.mp4", 2.0, Fraction(30000, 1001))
    (first, one), (_, two), *more = cuts(str(tmp_path / "a.mp4"), Fraction("0.8"))
    assert (one.frames, two.frames, [span.frames for _, span in more]) == (24, 24, [12])
    assert one.end == two.first
    assert float((two.first - first.start) * first.unit) == pytest.approx(24 * 1001 / 30000)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"clip": 0.0}, "seconds above 0"), ({"clip": 1.0, "gop": 0}, "frames from 1 up"), ({"clip": 1.0}, "no video that opens")],
)
def test_errors(tmp_path, options, message):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(SystemExit, match=message):
        shard(str(tmp_path), str(tmp_path / "out"), **options)
