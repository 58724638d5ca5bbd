"""Sound files opened by three libraries: facts from the header, and only the seconds that are asked for."""

from __future__ import annotations

import io
from contextlib import suppress
from fractions import Fraction
from typing import Any

import numpy as np

from headwater.modalities import pyav

LEAD = Fraction(1, 4)  # seconds that are decoded before the first wanted one: AAC, MP3 and Opus need what came before


class Sound:
    """An open sound file. rate: samples per second. count: samples per channel, as far as the file tells."""

    rate: int
    count: int

    def read(self, start: int, count: int) -> np.ndarray:
        """Samples from number `start` on, the mean of the channels: float32 (at most count,), in [-1, 1]."""
        raise NotImplementedError


class LibsndfileSound(Sound):
    """WAV, FLAC, OGG (Vorbis, Opus), MP3, AIFF by libsndfile."""

    def __init__(self, content: bytes) -> None:
        import soundfile

        self._file = soundfile.SoundFile(io.BytesIO(content))
        self.rate, self.count = self._file.samplerate, self._file.frames

    def read(self, start: int, count: int) -> np.ndarray:
        self._file.seek(start)
        return self._file.read(count, dtype="float32", always_2d=True).mean(1)


class PyavSound(Sound):
    """Whatever FFmpeg reads (AAC, M4A, the sound track of an MP4 ...), by PyAV; the first sound track."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        with pyav.opened(self._content) as container:
            if not container.streams.audio:
                raise ValueError("the file has no sound track")
            stream = container.streams.audio[0]
            first = next(container.decode(stream), None)
            if first is None or first.pts is None:
                raise ValueError("the sound track has no samples")
            packets = [(p.pts * p.time_base, (p.duration or 0) * p.time_base) for p in container.demux(stream) if p.pts is not None]
            ends = [begin + lasts for begin, lasts in packets if lasts < 1]  # the last one of Vorbis may say minus something
            self.rate, self._first = first.sample_rate, first.pts * first.time_base
            self.count = max(first.samples, round((max(ends, default=self._first) - self._first) * self.rate))

    def read(self, start: int, count: int) -> np.ndarray:
        from av import FFmpegError

        ahead = Fraction(start, self.rate) - LEAD
        if ahead > 0:
            with pyav.opened(self._content) as container, suppress(FFmpegError):  # no FLAC without a table of places can seek
                stream = container.streams.audio[0]
                container.seek(int((self._first + ahead) / stream.time_base), stream=stream)
                return self._decode(container, start, count)
        with pyav.opened(self._content) as container:
            return self._decode(container, start, count)

    def _decode(self, container: Any, start: int, count: int) -> np.ndarray:
        """Samples from `start` on, when the container stands somewhere before."""
        from av import AudioResampler

        planar = AudioResampler(format="fltp")
        pieces, begin, here = [np.zeros(0, np.float32)], start, None
        for frame in container.decode(audio=0):
            if here is None:
                begin = here = round((frame.pts * frame.time_base - self._first) * self.rate)
            pieces += [piece.to_ndarray().mean(0) for piece in planar.resample(frame)]
            here += frame.samples
            if here >= start + count:
                break
        wave = np.concatenate(pieces)
        return wave[max(0, start - begin) : max(0, start + count - begin)]


class TorchcodecSound(Sound):
    """Whatever the FFmpeg of this machine reads, by torchcodec; the first sound track."""

    def __init__(self, content: bytes) -> None:
        from torchcodec.decoders import AudioDecoder

        self._decoder = AudioDecoder(content)
        self.rate = self._decoder.metadata.sample_rate
        self.count = round(float(self._decoder.metadata.duration_seconds or 0) * self.rate)

    def read(self, start: int, count: int) -> np.ndarray:
        wave = self._decoder.get_samples_played_in_range(start / self.rate, (start + count) / self.rate)
        return wave.data.mean(0).numpy()[:count]


# libsndfile is the fastest. PyAV brings its FFmpeg along; torchcodec needs one that fits and, in MP3 and Matroska, starts
# some milliseconds beside the place that was asked for.
BACKENDS = {"soundfile": LibsndfileSound, "pyav": PyavSound, "torchcodec": TorchcodecSound}
