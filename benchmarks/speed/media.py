"""Video, sound, actions and packed text: headwater beside stock webdataset with the decoding written by hand.

webdataset brings no decoder that makes these tensors, so each case has the code that a user would write: PyAV, soundfile
with torch.stft, numpy, and a loop that fills rows. Both sides deliver equal tensors for equal samples.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.speed import ours
from benchmarks.speed.samples import Corpus
from benchmarks.speed.stopwatch import Row
from headwater.modalities.action import ActionReader
from headwater.modalities.audio import AudioReader, mel_bank
from headwater.modalities.text import TextReader
from headwater.modalities.video import VideoReader
from headwater.model import Reader

BATCH, BUFFER = 64, 1000
FRAME, FRAMES = 56, 16
RATE, BANDS, SECONDS = 16_000, 64, 4
TEXTS, ROW, END = 128, 1024, 256


def frames(content: bytes) -> Tensor:
    """A clip -> uint8 (T, 56 * 56 * 3), its first 16 frames."""
    import av

    found = []
    with av.open(io.BytesIO(content)) as clip:
        for frame in clip.decode(video=0):
            found.append(frame.to_ndarray(format="rgb24"))
            if len(found) == FRAMES:
                break
    return torch.from_numpy(np.stack(found)).flatten(1)


def mel(content: bytes) -> Tensor:
    """A sound -> float16 (N, 8 * 64): log-mel frames of 10 ms, eight to a patch."""
    import soundfile

    wave, _ = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    wave = torch.from_numpy(wave.mean(1))[: SECONDS * RATE]
    wave = torch.nn.functional.pad(wave, (0, max(0, 512 - len(wave))))
    window = torch.hann_window(400)
    power = torch.stft(wave, 512, 160, 400, window, pad_mode="constant", return_complex=True).abs().square()
    bands = (power.T @ mel_bank(RATE, 512, BANDS)).clamp(min=1e-5).log()
    bands = torch.nn.functional.pad(bands, (0, 0, 0, -len(bands) % 8), value=float(np.log(1e-5)))
    return bands.reshape(-1, 8 * BANDS).half()


def choices(content: bytes) -> Tensor:
    """An array of actions -> int64 (T,)."""
    return torch.from_numpy(np.load(io.BytesIO(content)).astype(np.int64))


class Case(NamedTuple):
    """extension: of the member. decode: by hand. reader: headwater's, to the same values."""

    extension: str
    decode: Callable[[bytes], Tensor]
    reader: Reader


CASES = {
    "video": Case("mp4", frames, VideoReader(FRAME, FRAME, FRAMES)),
    "audio": Case("ogg", mel, AudioReader(RATE, BANDS, 8, SECONDS)),
    "action": Case("npy", choices, ActionReader(choices=7)),
}


def rows(kind: str, corpus: Corpus, workers: int, truth: dict[str, bytes]) -> list[Row]:
    """headwater and webdataset on one kind of signal. truth: text -> the member's content."""
    case = CASES[kind]
    readers = {kind: case.reader, "text": TextReader()}

    def load() -> Iterator[Any]:
        return webdataset(corpus, workers, {case.extension: case.decode, "txt": bytes.decode}, padded, BATCH)

    def check(stream: Iterator[Any]) -> str:
        signals, valid, texts = next(stream)
        return compare({t: x[v] for t, x, v in zip(texts, signals, valid, strict=True)}, truth, case.decode)

    def check_ours(stream: Iterator[Any]) -> str:
        batch = next(stream)
        return check(iter([(batch[kind].x, batch[kind].real(), ours.texts(batch["text"]))]))

    us = Row("headwater", lambda: ours.load(corpus.shards, readers, workers, BATCH), ours.size, check_ours)
    return [us, Row("webdataset", load, lambda batch: len(batch[2]), check)]


def webdataset(
    corpus: Corpus, workers: int, decode: dict[str, Callable], collate: Callable[[list[tuple]], Any], size: int
) -> Iterator[Any]:
    """Stock webdataset: shards and a buffer shuffled, members decoded by the given functions."""
    import webdataset as wds

    data = wds.WebDataset(corpus.tars, shardshuffle=len(corpus.tars)).repeat().shuffle(BUFFER)
    data = data.to_tuple(*decode).map_tuple(*decode.values()).batched(size, collation_fn=collate)
    yield from wds.WebLoader(data, batch_size=None, num_workers=workers)


def padded(samples: list[tuple[Tensor, str]]) -> tuple[Tensor, Tensor, list[str]]:
    """(T, ...) of each -> (B, longest, ...), True where real, texts."""
    signals, texts = [signal for signal, _ in samples], [text for _, text in samples]
    lengths = torch.tensor([len(signal) for signal in signals])
    x = pad_sequence(signals, batch_first=True)
    return x, torch.arange(x.shape[1]) < lengths[:, None], texts


def compare(found: dict[str, Tensor], truth: dict[str, bytes], decode: Callable[[bytes], Tensor]) -> str:
    """Signals of a batch against the hand-written decoding of what was written; raises where they differ."""
    for text, signal in found.items():
        expected = decode(truth[text])
        if signal.shape != expected.shape or not torch.allclose(signal.float(), expected.float(), atol=0.01):
            raise ValueError(f"{text!r} came as {tuple(signal.shape)}, other values than {tuple(expected.shape)} that were written")
    return f"{len(found)} samples equal to what was written"


def text_rows(corpus: Corpus, workers: int) -> list[Row]:
    """Texts as bytes, several in a row of 1,024, with the number of the text beside each byte."""
    written = {sample.text for sample in corpus.samples()}

    def encode(content: bytes) -> Tensor:
        return torch.tensor([*content, END])

    def load() -> Iterator[Any]:
        return webdataset(corpus, workers, {"txt": encode}, packed, TEXTS)

    def check(stream: Iterator[Any]) -> str:
        used, space = 0, 0
        for ids, document, valid in islice(stream, 8):
            numbers = document[valid].unique().tolist()
            texts = [bytes(ids[valid & (document == number)][:-1].tolist()).decode() for number in numbers]
            if not written.issuperset(texts):
                raise ValueError(f"{len(written.intersection(texts))} of {len(texts)} texts came as they were written")
            used, space = used + int(valid.sum()), space + len(ids) * ROW
        return f"texts equal to what was written; they fill {used / space:.1%} of the rows"

    def check_ours(stream: Iterator[Any]) -> str:
        return check((t.x, t.sample(), t.real()) for t in (batch["text"] for batch in stream))

    def load_ours() -> Iterator[Any]:
        return ours.load(corpus.shards, {"text": TextReader(length=ROW)}, workers, TEXTS, {"text": ROW})

    return [
        Row("headwater", load_ours, ours.size, check_ours),
        Row("webdataset", load, lambda batch: int(batch[1].max()) + 1, check),
    ]


def packed(samples: list[tuple[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Texts into rows of 1,024 in their order, a new row when one does not fit: (rows, 1024) ids, text number, True = real."""
    rows: list[list[tuple[int, Tensor]]] = [[]]
    used = 0
    for number, (ids,) in enumerate(samples):
        if used + len(ids) > ROW:
            rows.append([])
            used = 0
        rows[-1].append((number, ids))
        used += len(ids)
    x, document = torch.zeros(len(rows), ROW, dtype=torch.int64), torch.full((len(rows), ROW), -1)
    for row, pieces in enumerate(rows):
        start = 0
        for number, ids in pieces:
            x[row, start : start + len(ids)], document[row, start : start + len(ids)] = ids, number
            start += len(ids)
    return x, document, document >= 0
