"""Which library decodes what. Each process finds out for itself, at first use, by decoding a tiny file and looking at it.

A library that imports but does not work (torchcodec without a fitting FFmpeg, a libsndfile without Vorbis) is passed over with
its reason. HEADWATER_JPEG, HEADWATER_AUDIO and HEADWATER_VIDEO name one that must be taken. The files are
headwater/embedded/probe.*, made by `make_probes` in tests/modalities/test_decoding.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from headwater.embedded import place
from headwater.modalities import films, jpegs, sounds

LIMIT = 178_956_970  # pixels of a picture, Pillow's own: above it a few kilobytes could fill the memory


class Choice(NamedTuple):
    """kind: "jpeg", "audio" or "video"; backend: a library; state: "active", or why another one is."""

    kind: str
    backend: str
    state: str


def chosen() -> list[Choice]:
    """Every backend of every kind and what became of it, after trying them all."""
    table = []
    for kind in KINDS:
        active = next((name for name, _ in working(kind)), None)
        for name in KINDS[kind][0]:
            state = "active" if name == active else fault(kind, name) or f"works, but {active} comes first"
            table.append(Choice(kind, name, state))
    return table


@cache
def backend(kind: str) -> Any:
    """The active backend: the class that opens a `jpegs.Jpeg`, a `sounds.Sound` or a `films.Film` from bytes."""
    for _, found in working(kind):
        return found
    reasons = "; ".join(f"{name}: {fault(kind, name)}" for name in order(kind))
    raise RuntimeError(f"nothing here decodes {kind}. {reasons}. Install headwater's requirements again, or unset {variable(kind)}")


def open_sound(content: bytes) -> sounds.Sound:
    """A sound file by the first backend that knows its format: libsndfile knows no AAC. ValueError when none does."""
    reasons = []
    for name, opens in working("audio"):
        try:
            return opens(content)
        except Exception as error:  # each library has errors of its own
            reasons.append(f"{name}: {said(error)}")
    raise ValueError(f"the sound cannot be opened. {'; '.join(reasons)}")


def within(height: int, width: int) -> None:
    """ValueError when a picture declares more pixels than LIMIT; asked before it is decoded."""
    if height * width > LIMIT:
        raise ValueError(f"the picture declares {width} x {height} pixels; at most {LIMIT:,} are decoded; scale it down")


def working(kind: str) -> Iterator[tuple[str, Any]]:
    """Names and backends that passed their test, in order of preference, each tried only when it is asked for."""
    for name in order(kind):
        if not fault(kind, name):
            yield name, KINDS[kind][0][name]


def order(kind: str) -> list[str]:
    """The backends that may be taken: all, or the one that the environment names."""
    names, forced = list(KINDS[kind][0]), os.environ.get(variable(kind))
    if forced and forced not in names:
        raise ValueError(f"{variable(kind)}={forced}; expected one of {', '.join(names)}")
    return [forced] if forced else names


def variable(kind: str) -> str:
    """The environment variable that forces a backend."""
    return f"HEADWATER_{kind.upper()}"


@cache
def fault(kind: str, name: str) -> str:
    """Why a backend must not be used, "" when it may."""
    backends, test = KINDS[kind]
    try:
        test(backends[name])
    except Exception as error:  # whatever a broken library raises
        return said(error)
    return ""


def said(error: Exception) -> str:
    """The first line of what an error says, with its class."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def check_jpeg(opens: Callable[[bytes], jpegs.Jpeg]) -> None:
    """The probe is 24 x 16, left half red, right half blue."""
    opened = opens(probe("probe.jpg"))
    picture = opened.pixels(16, 24)
    expect("sizes", np.array([opened.height, opened.width, *picture.shape]), [16, 24, 16, 24, 3], 0)
    expect("colours", picture.reshape(16, 2, 12, 3).mean((0, 2)), [[254, 0, 0], [0, 0, 254]], 4)


def check_sound(opens: Callable[[bytes], sounds.Sound]) -> None:
    """The probe is 0.2 s of silence, then 0.2 s of a tone of amplitude 0.5, at 8000 Hz."""
    sound = opens(probe("probe.ogg"))
    expect("rate", np.array(sound.rate), 8000, 0)
    expect("samples", np.array(sound.count), 3200, 256)  # a Vorbis block; not every library trims the last one
    loudness = [np.sqrt(np.square(sound.read(start, 1000)).mean()) for start in (2000, 300)]  # backwards: it must seek
    expect("loudness", np.array(loudness), [0.5**1.5, 0], 0.03)


def check_film(opens: Callable[[bytes], films.Film]) -> None:
    """The probe is 10 frames at 10 per second, number k of grey 20 k + 30, with keyframes between."""
    film = opens(probe("probe.mp4"))
    expect("frames, fps, seconds", np.array([film.frames, film.fps, film.seconds]), [10, 10, 1], 1e-3)
    frames = film.take([8, 3]) + film.at([0.55])
    expect("shapes", np.array([f.shape for f in frames]), [[32, 32, 3]] * 3, 0)
    expect("greys", np.array([f.mean() for f in frames]), [190, 90, 130], 5)


def expect(what: str, got: np.ndarray, wanted: Any, slack: float) -> None:
    """ValueError unless got is wanted, give or take the slack."""
    if not np.allclose(got, wanted, rtol=0, atol=slack):
        raise ValueError(f"decodes the probe wrongly: {what} {got.round(2).tolist()}; expected {wanted}")


def probe(name: str) -> bytes:
    """One of the tiny files."""
    return Path(place(f"embedded:{name}")).read_bytes()


KINDS: dict[str, tuple[dict[str, Any], Callable[[Any], None]]] = {
    "jpeg": (jpegs.BACKENDS, check_jpeg),
    "audio": (sounds.BACKENDS, check_sound),
    "video": (films.BACKENDS, check_film),
}
