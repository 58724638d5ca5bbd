"""Cut videos into short clips that a reader can enter anywhere: `headwater shard FILMS out/ --clip 5 --size 256`.

Every frame of a film is in exactly one clip, at its own time. Clips are H.264 with a keyframe every few frames; the sound, where
a film has any, is a .flac member cut at the same moments.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from headwater.tools.decode import KIND, bounded, extension_of
from headwater.tools.ingest.sources import Found, Sample, Skip, show

BESIDE = ("text", "json")  # kinds that go with a film to all its clips


class Film(NamedTuple):
    """A video file. start: time of its first frame, in units; unit: in seconds; aspect: width by height of a pixel."""

    path: str
    start: int
    unit: Fraction
    aspect: Fraction


class Span(NamedTuple):
    """A clip's place in its film, in units. first, last: its frames; end: when the next clip begins; frames: how many."""

    first: int
    last: int
    end: int
    frames: int


def cut_films(found: Found, clip: float, size: int | None, gop: int) -> Found:
    """The same source with each video cut into clips; caption, class and facts of a film go to all its clips.

    clip: seconds; size: pixels of the longer side, never enlarged; gop: frames from keyframe to keyframe.
    """
    if clip <= 0 or gop < 1:
        raise SystemExit(f"found --clip {clip} --gop {gop}; expected seconds above 0 and frames from 1 up")
    samples: list[Sample] = []
    skipped = [*found.skipped]
    films = 0
    with ThreadPoolExecutor() as pool:
        for sample, parts in zip(found.samples, pool.map(partial(_parts, clip=Fraction(str(clip))), found.samples)):
            if isinstance(parts, Skip):
                skipped.append(parts)
            elif parts is None:
                samples.append(sample)
            else:
                films += 1
                skipped += _left(sample)
                makes = [partial(clip_members, *part, size, gop) for part in parts]
                samples += [_clip_sample(sample, number, make) for number, make in enumerate(makes)]
    if not films:
        reasons = "".join(f"; {skip.source}: {skip.reason}" for skip in skipped[:5])
        raise SystemExit(f"found --clip {clip:g} and no video that opens among {len(found.samples)} samples{reasons}")
    return found._replace(kind=f"{found.kind}, {films} films in clips of {clip:g} s", samples=samples, skipped=skipped)


def _kind(path: Path) -> str | None:
    return KIND.get(extension_of(path.name))


def _parts(sample: Sample, clip: Fraction) -> list[tuple[Film, Span]] | Skip | None:
    """The clips of a sample's film; None when it has no film."""
    films = [path for path in sample.files.values() if _kind(path) == "video" and sample.make is None]
    if len(films) != 1:
        return Skip(sample.name, f"{len(films)} videos in one sample; --clip cuts one") if films else None
    try:
        return cuts(str(films[0]), clip)
    except Exception as error:  # demuxers raise nearly anything on bad bytes
        return Skip(sample.name, str(error) or type(error).__name__)


def _left(sample: Sample) -> list[Skip]:
    """The files beside a film that would belong to all of it, and so to no clip."""
    paths = [path for path in sample.files.values() if _kind(path) not in ("video", *BESIDE)]
    reason = "lies beside a film; with --clip only .txt, .cls and .json do"
    return [Skip(show(Path(sample.name).with_name(path.name)), reason) for path in paths]


def _clip_sample(sample: Sample, number: int, make: partial[dict[str, bytes]]) -> Sample:
    files = {extension: path for extension, path in sample.files.items() if _kind(path) in BESIDE}
    facts, group = {**sample.facts, "film": sample.name}, sample.group or sample.name
    return sample._replace(name=f"{sample.name}#{number:05d}", files=files, facts=facts, make=make, group=group)


def cuts(path: str, clip: Fraction) -> list[tuple[Film, Span]]:
    """Clips of `clip` seconds, by the times of all frames as the file lists them; nothing is decoded."""
    import av

    with av.open(path) as media:
        if not media.streams.video:
            raise ValueError("no video stream in the file")
        stream = media.streams.video[0]
        bounded(stream.width, stream.height)
        unit, rate = stream.time_base or Fraction(1), stream.average_rate or Fraction(25)
        times = sorted({p.pts for p in media.demux(stream) if p.pts is not None and not p.is_discard})
        aspect = stream.sample_aspect_ratio or Fraction(1)
    if not times:
        raise ValueError("the video has no frames")
    parts: dict[int, list[int]] = {}
    for time in times:
        parts.setdefault(int((time - times[0]) * unit / clip), []).append(time)
    ends = [*[part[0] for part in parts.values()][1:], times[-1] + max(1, round(1 / (rate * unit)))]
    film = Film(path, times[0], unit, aspect)
    return [(film, Span(part[0], part[-1], end, len(part))) for part, end in zip(parts.values(), ends)]


def clip_members(film: Film, span: Span, size: int | None, gop: int) -> dict[str, bytes]:
    """One clip as .mp4, .flac (where there is sound) and .json: fps, frames, seconds, start in the film, keyframes."""
    content, keyframes = _picture(film, span, size, gop)
    seconds = (span.end - span.first) * film.unit
    facts: dict[str, Any] = {"start": round(float((span.first - film.start) * film.unit), 6), "seconds": round(float(seconds), 6)}
    facts |= {"frames": span.frames, "fps": round(float(span.frames / seconds), 3), "keyframes": keyframes}
    sound = _sound(film.path, span.first * film.unit, seconds)
    return {"mp4": content, **({"flac": sound} if sound else {}), "json": json.dumps(facts).encode()}


def _picture(film: Film, span: Span, size: int | None, gop: int) -> tuple[bytes, list[int]]:
    """The frames of a span as MP4, each at its own time, and the numbers of the keyframes."""
    import av
    from av.video.frame import PictureType

    buffer, count = io.BytesIO(), 0
    packets: list[Any] = []
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as out:
        stream = out.add_stream("libx264", rate=1 / film.unit)
        stream.pix_fmt, stream.time_base, stream.codec_context.time_base = "yuv420p", film.unit, film.unit
        stream.gop_size, stream.codec_context.thread_count = gop, 1  # samples run side by side already
        # No B-frames: frames lie in the order in which they are shown. No further keyframes at cuts.
        # x264 reads beyond the lookahead tables of small frames when it builds the macroblock tree: bytes would differ by run.
        options = {"preset": "veryfast", "crf": "18", "bf": "0", "sc_threshold": "0", "keyint_min": str(gop)}
        stream.options = {**options, "x264-params": "mbtree=0"}
        until = takewhile(lambda frame: frame.pts <= span.last, _decoded(film.path, "video", span.first * film.unit))
        for count, frame in enumerate((frame for frame in until if frame.pts >= span.first), 1):
            if frame.is_corrupt:
                raise ValueError(f"frame {count} of {span.frames} is damaged")
            picture = _upright(frame)
            if count == 1:
                aspect = 1 / film.aspect if frame.rotation % 180 else film.aspect
                stream.width, stream.height = shape = _shape(picture, aspect, size)
            picture = picture.reformat(*shape, format="yuv420p")
            picture.pts, picture.time_base, picture.pict_type = frame.pts - span.first, film.unit, PictureType.NONE
            packets += stream.encode(picture)
        if count != span.frames:
            raise ValueError(f"{count} of {span.frames} frames decode; the film is damaged here")
        packets += stream.encode(None)
        for packet, after in zip(packets, [*(packet.pts for packet in packets[1:]), span.end - span.first]):
            packet.duration = after - packet.pts
            out.mux(packet)
    return buffer.getvalue(), [number for number, packet in enumerate(packets) if packet.is_keyframe]


def _decoded(path: str, kind: str, start: Fraction, early: int = 0) -> Iterator[Any]:
    """Frames of the first stream of a kind, from one at or before `start` (seconds) on.

    Entered `early` seconds before, at the keyframe that the file's index gives; from the beginning where that leads astray.
    """
    import av

    for seek in (True, False):
        entered = False
        try:
            with av.open(path) as media:
                if seek:
                    film = media.streams.video[0]
                    media.seek(int((start - early) / (film.time_base or 1)), stream=film)
                for frame in media.decode(getattr(media.streams, kind)[0]):
                    if frame.pts is None or frame.time_base is None:
                        continue
                    if seek and not entered and frame.pts * frame.time_base > start:
                        break
                    entered = True
                    yield frame
        except av.FFmpegError:  # AVI refuses to seek before its beginning, a stream entered in the middle may not decode
            if entered or not seek:
                raise
        if entered:
            return


def _shape(frame: Any, aspect: Fraction, size: int | None) -> tuple[int, int]:
    """Width and height with square pixels, the longer side at most `size`, both even."""
    width, height = float(frame.width * aspect), float(frame.height)
    scale = min(1.0, size / max(width, height)) if size else 1.0
    return max(2, 2 * round(width * scale / 2)), max(2, 2 * round(height * scale / 2))


def _upright(frame: Any) -> Any:
    """Turned as the film's display matrix says; telephones store every film lying on its side."""
    import av
    import numpy as np

    turns = round(frame.rotation / 90) % 4
    if not turns:
        return frame
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns)), format="rgb24")


def _sound(path: str, start: Fraction, seconds: Fraction) -> bytes | None:
    """The sound from `start` on as FLAC, its first sample at the first frame; silence where it begins late or ends early."""
    import av
    import numpy as np
    import soundfile

    with av.open(path) as media:
        if not media.streams.audio:
            return None
        rate, layout = media.streams.audio[0].rate, media.streams.audio[0].layout
    heard = np.zeros((round(seconds * rate), layout.nb_channels), np.int16)
    found = False
    after: int | None = None
    resampler = av.AudioResampler(format="s16", layout=layout, rate=rate)
    for frame in _decoded(path, "audio", start, early=1):  # decoders of lossy sound need a run-up to be exact
        place = round((frame.pts * frame.time_base - start) * rate)
        if (
            after is not None and abs(place - after) < rate // 50
        ):  # Matroska counts milliseconds: taken literally, each frame would click
            place = after
        if place >= len(heard):
            break
        part = np.concatenate([r.to_ndarray().reshape(-1, layout.nb_channels) for r in resampler.resample(frame)])
        low, high = max(place, 0), min(place + len(part), len(heard))
        if low < high:
            heard[low:high] = part[low - place : high - place]
            found = True
        after = place + len(part)
    buffer = io.BytesIO()
    soundfile.write(buffer, heard, rate, format="FLAC")
    return buffer.getvalue() if found else None
