"""Frames of video files: when each is shown, cutting a stretch out, and writing clips in which any frame is found quickly."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import lru_cache
from itertools import chain, dropwhile, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

GOP = 8  # frames from one key frame to the next: a reader decodes at most so many to get one


def times(path: Path) -> np.ndarray:
    """When each frame is shown, in seconds from the file's zero: float64 (F,), ascending. Packets are read, not decoded."""
    stamps, base = _stamps(path, path.stat().st_mtime_ns)
    return stamps * float(base)


@lru_cache(maxsize=64)  # a file may hold many episodes
def _stamps(path: Path, changed: int) -> tuple[np.ndarray, Fraction]:
    import av

    with av.open(str(path)) as media:
        if not media.streams.video:
            raise ValueError(f"no video stream in {path.name}")
        stream = media.streams.video[0]
        stamps = [packet.pts for packet in media.demux(stream) if packet.pts is not None and not packet.is_discard]
        return np.sort(np.array(stamps, np.int64)), stream.time_base or Fraction(1)


def cut(path: Path, first: int = 0, count: int | None = None) -> Iterator[Any]:
    """`count` frames from number `first` on, in the order in which they are shown, as av.VideoFrame. None = to the end.

    Raises ValueError when the file has fewer, or one does not decode.
    """
    import av

    stamps, _ = _stamps(path, path.stat().st_mtime_ns)
    wanted = stamps[first:][:count].tolist()
    if count is not None and len(wanted) < count:
        raise ValueError(f"{path.name} has {len(stamps)} frames; expected {first + count}")
    with av.open(str(path)) as media:
        for number, (stamp, frame) in enumerate(zip_longest(wanted, islice(_from(media, stamps, first), len(wanted))), first):
            if frame is None or frame.pts != stamp:
                raise ValueError(f"frame {number} of {path.name} does not decode; is the file cut off?")
            yield frame


def _from(media: Any, stamps: np.ndarray, first: int) -> Iterator[Any]:
    """Decoded frames from number `first` on.

    Frames that are shown before a key frame may be stored after it (an open GOP), and decode only from the key frame before.
    """
    stream, back = media.streams.video[0], 0
    while True:
        media.seek(int(stamps[max(first - back, 0)]), stream=stream)
        frames = dropwhile(lambda frame: frame.pts is None or frame.pts < stamps[first], media.decode(stream))
        found = next(frames, None)
        if back >= first or (found is not None and found.pts == stamps[first]):
            return chain([] if found is None else [found], frames)
        back = 2 * back or 4


def encode(frames: Iterable[Any], rate: float) -> bytes:
    """H.264 in MP4, a key frame every 8 frames, near-lossless; the same bytes on each run.

    frames: av.VideoFrame, or uint8 (H, W, 3) or (H, W), all of one size; rate: frames per second.
    """
    import av
    from av.video.frame import PictureType

    pictures = (frame if isinstance(frame, av.VideoFrame) else _picture(frame) for frame in frames)
    first = next(pictures, None)
    if first is None:
        raise ValueError("there are no frames to encode")
    size, file = (first.width, first.height), io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as clip:
        # One thread: other samples are encoded beside this one, and the bytes must not depend on the machine. No mbtree: in
        # x264 0.165 its result depends on memory that is not set, so two runs give different bytes now and then.
        options = {"crf": "18", "preset": "medium", "g": str(GOP), "bf": "0", "threads": "1", "mbtree": "0"}
        stream = clip.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001), options=options)
        stream.width, stream.height = size
        whole = first.format.name.startswith("yuv444") or size[0] % 2 or size[1] % 2  # 4:2:0 halves both sides
        stream.pix_fmt = "yuv444p" if whole else "yuv420p"
        context = stream.codec_context
        for name in ("colorspace", "color_range", "color_primaries", "color_trc"):
            setattr(context, name, getattr(first, name))
        for number, picture in enumerate(chain([first], pictures)):
            if (picture.width, picture.height) != size:
                raise ValueError(f"frame {number} is {picture.width}x{picture.height}; expected {size[0]}x{size[1]} as the first")
            plain = picture.reformat(format=stream.pix_fmt)
            plain.pts, plain.time_base, plain.pict_type = number, 1 / stream.codec_context.framerate, PictureType.NONE
            clip.mux(stream.encode(plain))
        clip.mux(stream.encode())
    return file.getvalue()


def _picture(pixels: np.ndarray) -> Any:
    import av

    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3):
        raise ValueError(f"found a frame {pixels.dtype} {pixels.shape}; expected uint8 (H, W, 3) or (H, W)")
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="gray" if pixels.ndim == 2 else "rgb24")
