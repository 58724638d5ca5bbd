"""Spoken titles and small sound files: espeak-ng, a band-limited resampler and a deterministic Opus OGG encoder.

The OGG is written by hand from libopus packets: a fixed serial number, no padding and one audio page, so that the same
samples always give the same bytes (libsndfile draws a random serial number and pads each file by 750 bytes).
"""

from __future__ import annotations

import io
import struct
import subprocess

import numpy as np

RATE = 16_000
FRAME = RATE // 50
LICENCE = "Apache-2.0 (our own espeak-ng output)"
TRAINING_VOICES = ("en-us+m3", "en-us+f4", "en-gb+f2", "en-gb-x-rp+m7", "en-gb-scotland+m1", "en-us-nyc+f5")
HELD_OUT_VOICES = ("en-us+f1", "en-gb+m5")


def speak(text: str, voice: str, speed: int = 185) -> np.ndarray:
    """(S,) float32 at 16 kHz: `text` spoken by an espeak-ng voice, silence before and after it trimmed."""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "--stdout", text]
    return trim(load(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))


def load(content: bytes) -> np.ndarray:
    """(S,) float32 mono at 16 kHz from a sound file's bytes."""
    import soundfile

    sound, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    return resample(sound.mean(axis=1), rate)


def resample(sound: np.ndarray, rate: int) -> np.ndarray:
    """Band-limited resampling of (S,) float32 to 16 kHz."""
    import av

    if not len(sound):
        return np.zeros(0, np.float32)
    resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound, np.float32)[None], format="flt", layout="mono")
    frame.sample_rate = rate
    return np.concatenate([part.to_ndarray()[0] for given in (frame, None) for part in resampler.resample(given)])


def trim(sound: np.ndarray, threshold: float = 0.004, margin: int = RATE // 50) -> np.ndarray:
    """Cut the silence at both ends, but for 20 ms; all silence gives an empty array."""
    loud = np.flatnonzero(np.abs(sound) > threshold)
    return sound[max(loud[0] - margin, 0) : loud[-1] + margin] if len(loud) else sound[:0]


def fade_cut(sound: np.ndarray, seconds: float) -> np.ndarray:
    """At most `seconds` of `sound`; a cut end fades out over 20 ms."""
    stop = int(seconds * RATE)
    if len(sound) <= stop:
        return sound
    cut = sound[:stop].copy()
    cut[-FRAME:] *= np.linspace(1, 0, FRAME, dtype=np.float32)
    return cut


def opus(sound: np.ndarray, bit_rate: int, application: str = "voip") -> bytes:
    """An Opus OGG of (S,) float32 at 16 kHz; it decodes to exactly S samples. At most 5 s fit its one audio page."""
    import av

    codec = av.CodecContext.create("libopus", "w")
    codec.sample_rate, codec.layout, codec.format, codec.bit_rate = RATE, "mono", "s16", bit_rate
    codec.options = {"application": application, "frame_duration": "20", "vbr": "on"}
    codec.open()
    head = bytes(codec.extradata or b"")
    skip = struct.unpack("<H", head[10:12])[0]
    length = -(-(len(sound) + skip // 3) // FRAME) * FRAME
    samples = np.zeros((1, length), np.int16)
    samples[0, : len(sound)] = np.rint(np.clip(sound, -1, 1) * 32767)
    packets = []
    for start in range(0, length, FRAME):
        frame = av.AudioFrame.from_ndarray(samples[:, start : start + FRAME].copy(), format="s16", layout="mono")
        frame.sample_rate, frame.pts = RATE, start
        packets += [bytes(packet) for packet in codec.encode(frame)]
    vendor = b"headwater"
    tags = b"OpusTags" + struct.pack("<I", len(vendor)) + vendor + struct.pack("<I", 0)
    return _page([head], 2, 0, 0) + _page([tags], 0, 0, 1) + _page(packets, 4, len(sound) * 3 + skip, 2)


def _page(packets: list[bytes], flag: int, position: int, number: int) -> bytes:
    """One OGG page. flag: 2 first page, 4 last page; position: the sample at 48 kHz that the page ends on."""
    lacing = b"".join(b"\xff" * (len(p) // 255) + bytes([len(p) % 255]) for p in packets)
    if len(lacing) > 255:
        raise ValueError(f"{len(lacing)} segments do not fit one OGG page of 255; give a shorter sound")
    body = lacing + b"".join(packets)

    def header(checksum: int) -> bytes:
        return struct.pack("<4sBBqIIIB", b"OggS", 0, flag, position, 1, number, checksum, len(lacing))

    return header(_checksum(header(0) + body)) + body


def _table() -> tuple[int, ...]:
    rows = []
    for value in range(256):
        row = value << 24
        for _ in range(8):
            row = ((row << 1) ^ 0x04C11DB7 if row & 0x80000000 else row << 1) & 0xFFFFFFFF
        rows.append(row)
    return tuple(rows)


_ROWS = _table()


def _checksum(content: bytes) -> int:
    """OGG's CRC-32: polynomial 04C11DB7, no reflection, start 0."""
    value = 0
    for byte in content:
        value = ((value << 8) & 0xFFFFFFFF) ^ _ROWS[(value >> 24) ^ byte]
    return value
