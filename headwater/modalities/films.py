"""Video files opened by two libraries: facts from a walk through the packets, and only the frames that are asked for."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from headwater.modalities import pyav

FIRST = {b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"}  # boxes that an MP4 or MOV may begin with
TICK = 1e-3  # seconds; Matroska and WebM round times to milliseconds, so a frame may come this much after its time


class Film:
    """An open video file. frames: their number. seconds: from the first frame to the end of the last. fps: on average."""

    frames: int
    seconds: float
    fps: float

    def take(self, numbers: Sequence[int]) -> list[np.ndarray]:
        """The frames of these numbers, from 0 in order of presentation: uint8 RGB (H, W, 3) each."""
        raise NotImplementedError

    def at(self, seconds: Sequence[float]) -> list[np.ndarray]:
        """The frames that are on screen at these times, counted from the first frame: uint8 RGB (H, W, 3) each."""
        raise NotImplementedError


class Packet(NamedTuple):
    """What is kept of a packet. pts, dts: its times of showing and decoding in units of the stream; end: in seconds."""

    shown: bool  # a frame of the film, not sound, and not outside the part that the file says to show
    key: bool
    whole: bool
    pts: int | None
    dts: int | None
    lasts: int
    end: float


class PyavFilm(Film):
    """By the FFmpeg inside PyAV's wheel. The walk finds the time of every frame, so that a seek never lands on a wrong one."""

    def __init__(self, content: bytes) -> None:
        from av import FFmpegError

        refuse_cut_boxes(content)
        try:
            self._container = pyav.opened(content)
            weakref.finalize(self, self._container.close)
            if not self._container.streams.video:
                raise ValueError("the file has no moving picture")
            self._stream = self._container.streams.video[0]
            self._stream.codec_context.thread_count = 1  # the loader's processes are the threads
            packets = [self._kept(p) for p in self._container.demux() if p.size]
        except FFmpegError as error:
            raise ValueError(f"the video cannot be opened: {error.strerror}") from error
        shown = [p for p in packets if p.shown]
        if not shown:
            raise ValueError("the video has no frame")
        self._convert = pyav.converter()
        self._number_frames(shown)
        self._refuse_cut_file(packets)

    def _kept(self, p: Any) -> Packet:
        lasts = p.duration or 0
        end = float((p.pts + lasts) * p.time_base) if p.pts is not None else 0.0
        return Packet(p.stream == self._stream and not p.is_discard, p.is_keyframe, not p.is_corrupt, p.pts, p.dts, lasts, end)

    def _number_frames(self, packets: list[Packet]) -> None:
        """Numbers and times of all frames, and where the decoder may begin."""
        self.frames, rate, form = len(packets), float(self._stream.average_rate or 0), self._container.format.name
        # AVI knows when a packet is decoded, not when it is shown: its frames are counted from the first
        self._counted = form == "avi" or len({p.pts for p in packets} - {None}) < self.frames
        shown = packets if self._counted else sorted(packets, key=lambda p: p.pts or 0)
        base, first = float(self._stream.time_base), shown[0].pts or 0
        last = shown[-1].lasts * base or (1 / rate if rate else 1.0)
        self._times = np.array([n / (rate or 1.0) if self._counted else ((p.pts or 0) - first) * base for n, p in enumerate(shown)])
        self.seconds = float(self._times[-1]) + last
        self.fps = rate or self.frames / self.seconds
        self._number = {p.pts: number for number, p in enumerate(shown)}
        self._keys = [number for number, p in enumerate(shown) if number == 0 or (p.key and not self._counted)]
        # Matroska is searched by the time of showing, the others by that of decoding
        by_pts = "matroska" in form
        self._stamps = [(p.pts if by_pts or p.dts is None else p.dts) or 0 for p in (shown[key] for key in self._keys)]

    def _refuse_cut_file(self, packets: list[Packet]) -> None:
        """ValueError where the file announces more than it holds. An MP4 tells by its boxes, more exactly than by its times."""
        if not all(p.whole for p in packets):
            raise ValueError(f"the video is cut off or damaged: {self.frames} frames are there, and a packet is not whole")
        announced, found = (self._container.duration or 0) / 1_000_000, max(p.end for p in packets)
        if "mp4" not in self._container.format.name and found + 2 / self.fps < 0.95 * announced:
            raise ValueError(f"the video is cut off: it announces {announced:.2f} s and ends after {found:.2f} s")

    def take(self, numbers: Sequence[int]) -> list[np.ndarray]:
        found: dict[int, np.ndarray] = {}
        decoder: Iterator[tuple[int, Any]] = iter(())
        here = -1
        for number in sorted(set(numbers)):
            key = bisect_right(self._keys, number) - 1
            if here < 0 or self._keys[key] > here:  # nothing before the keyframe is wanted
                decoder = self._decode(key)
            for here, frame in decoder:
                if here == number and not frame.is_corrupt:
                    found[number] = self._convert(frame)
                    break
            else:
                raise ValueError(f"frame {number} of {self.frames}, at {self._times[number]:.2f} s, does not decode")
        return [found[number] for number in numbers]

    def at(self, seconds: Sequence[float]) -> list[np.ndarray]:
        numbers = np.searchsorted(self._times, np.asarray(seconds) + TICK, side="right") - 1
        return self.take(numbers.clip(0).tolist())

    def _decode(self, key: int) -> Iterator[tuple[int, Any]]:
        """Numbers and frames from the key-th keyframe on; from the first one where the file's own index led past it."""
        for stamp in (self._stamps[key], self._stamps[0]):
            self._container.seek(stamp, stream=self._stream)
            frames = self._container.decode(self._stream)
            if self._counted:
                yield from enumerate(frames)
                return
            numbered = ((self._number.get(frame.pts, -1), frame) for frame in frames)
            first = next(numbered, (self.frames, None))
            if first[0] <= self._keys[key]:
                yield first
                yield from numbered
                return


def refuse_cut_boxes(content: bytes) -> None:
    """ValueError when an MP4 or MOV ends inside one of its boxes, or before the one with its index (ISO 14496-12, 4.2)."""
    at, kinds = 0, {content[4:8]}
    while kinds & FIRST and at + 8 <= len(content):
        size, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        if size == 1:
            size = int.from_bytes(content[at + 8 : at + 16], "big")
        size, there = size or len(content) - at, len(content) - at
        if size > there and kind in (b"moov", b"mdat", b"moof"):
            raise ValueError(f"the video is cut off: its box {kind.decode()} has {size} bytes, and {there} are there")
        kinds.add(kind)
        at += max(8, size)
    if kinds & FIRST and b"moov" not in kinds:
        raise ValueError("the video is cut off: it has no moov box, the index of an MP4")


class TorchcodecFilm(Film):
    """By torchcodec with the FFmpeg of this machine."""

    def __init__(self, content: bytes) -> None:
        from torchcodec.decoders import VideoDecoder

        refuse_cut_boxes(content)
        try:
            self._decoder = VideoDecoder(content, dimension_order="NHWC", num_ffmpeg_threads=1)
        except RuntimeError as error:
            raise ValueError(f"the video cannot be opened: {error}") from error
        facts = self._decoder.metadata
        self.frames, self.fps = len(self._decoder), float(facts.average_fps)
        announced = facts.num_frames_from_header or 0
        if self.frames < announced:
            raise ValueError(f"the video is cut off: it announces {announced} frames and holds {self.frames}")
        self._begin, self._end = facts.begin_stream_seconds, facts.end_stream_seconds
        self.seconds = self._end - self._begin

    def take(self, numbers: Sequence[int]) -> list[np.ndarray]:
        return list(self._decoder.get_frames_at(list(numbers)).data.numpy())

    def at(self, seconds: Sequence[float]) -> list[np.ndarray]:
        times = (np.asarray(seconds) + self._begin + TICK).clip(self._begin, self._end - 1e-6)
        return list(self._decoder.get_frames_played_at(times.tolist()).data.numpy())


BACKENDS = {"pyav": PyavFilm, "torchcodec": TorchcodecFilm}  # PyAV brings its FFmpeg along; torchcodec needs one that fits
