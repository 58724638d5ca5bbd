"""Signals from files, and as files that other programs open: texts, pictures, films, sounds and arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from headwater.modalities.audio import AudioReader
from headwater.modalities.griffin_lim import griffin_lim
from headwater.modalities.text import TextReader
from headwater.modalities.wave import WaveReader
from headwater.model import Reader

FPS = 8.0  # of films whose reader takes frames by number


def load(source: str, reader: Reader) -> Any:
    """A file that the reader decodes, or for a reader of texts the text itself."""
    path = Path(source)
    if type(reader) is TextReader:
        return source
    if not path.is_file():
        raise FileNotFoundError(f"found no file {source}; expected one of {', '.join(f'.{e}' for e in reader.extensions)}")
    endings = [".".join(path.name.split(".")[k:]).lower() for k in range(1, path.name.count(".") + 1)]
    member = reader.member(endings)
    if member is None:
        raise ValueError(f"{source} cannot be read; expected one of {', '.join(f'.{e}' for e in reader.extensions)}")
    return reader.decode({member: path.read_bytes()})


def suffix(signal: Any, reader: Reader) -> str:
    """The kind of file that a restored signal becomes."""
    if isinstance(signal, str):
        return ".txt"
    if isinstance(reader, AudioReader | WaveReader):
        return ".wav"
    if getattr(signal, "dtype", None) == np.uint8 and signal.ndim in (3, 4) and signal.shape[-1] == 3:
        return ".png" if signal.ndim == 3 else ".mp4"
    if isinstance(signal, np.ndarray):
        return ".npy"
    raise ValueError(f"a signal of {type(reader).__name__} is a {type(signal).__name__}, for which there is no kind of file")


def save(signal: Any, reader: Reader, path: str | Path) -> Path:
    """Write a restored signal; a name without an ending gets that of its kind. Returns the path."""
    wanted, path = suffix(signal, reader), Path(path)
    path = path if path.suffix else path.with_suffix(wanted)
    if path.suffix != wanted:
        raise ValueError(f"found the name {path.name} for what is a {wanted} file; change its ending, or leave it out")
    path.parent.mkdir(parents=True, exist_ok=True)
    if wanted == ".txt":
        path.write_text(f"{signal}\n", encoding="utf-8")
    elif wanted == ".png":
        from PIL import Image

        Image.fromarray(signal).save(path)
    elif wanted == ".mp4":
        from headwater.tools.ingest.frames import encode

        path.write_bytes(encode(signal, getattr(reader, "rate", None) or FPS))
    elif wanted == ".wav":
        import soundfile

        wave, rate = sound(signal, reader)
        soundfile.write(path, np.clip(wave, -1, 1), rate, subtype="PCM_16")
    else:
        np.save(path, signal)
    return path


def sound(signal: np.ndarray, reader: Reader) -> tuple[np.ndarray, int]:
    """Samples and their rate, of a reader's log-mel spectrogram or of its windows of samples."""
    if isinstance(reader, AudioReader):
        return griffin_lim(torch.from_numpy(signal), reader.rate).numpy(), reader.rate
    assert isinstance(reader, WaveReader)
    return signal / max(1.0, np.abs(signal).max()), reader.rate


def sheet(pictures: list[np.ndarray], columns: int = 8, gap: int = 2) -> np.ndarray:
    """Pictures uint8 (H, W, 3) side by side on white, in rows; smaller ones at the top left of their cell."""
    rows = -(-len(pictures) // columns)
    tall, wide = (max(p.shape[axis] for p in pictures) + gap for axis in (0, 1))
    made = np.full((rows * tall - gap, min(columns, len(pictures)) * wide - gap, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = number // columns * tall, number % columns * wide
        made[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return made
