"""How long or large a member is, read from its header rather than decoded: what the index notes so that batches can be planned."""

from __future__ import annotations

import io

import numpy as np

from headwater.tools.decode import KIND, array_of

FACTS = {
    "image": ("width", "height"),
    "audio": ("seconds",),
    "video": ("frames", "seconds", "fps"),
    "array": ("steps",),
    "text": ("words",),
}


def promised(extension: str) -> tuple[str, ...]:
    """Names of the hints that `measure` gives for a member: "left.png" -> ("left.png.width", "left.png.height")."""
    return tuple(f"{extension}.{fact}" for fact in FACTS.get(_kind(extension), ()))


def measure(extension: str, content: bytes) -> dict[str, float]:
    """The hints of one member, by name, as in `promised`; raises when its header cannot be read.

    Sound and films are opened by the classes that the readers use, so both find the same lengths: a film is a walk through its
    packets, and of what libsndfile does not know (AAC) the first packet is decoded. Texts are split at white space.
    """
    facts = _facts(_kind(extension), content)
    return {f"{extension}.{fact}": float(value) for fact, value in facts.items()}


def _kind(extension: str) -> str:
    return KIND.get(extension.rpartition(".")[2], "")


def _facts(kind: str, content: bytes) -> dict[str, float]:
    if kind == "image":
        from PIL import Image

        with Image.open(io.BytesIO(content)) as image:
            return {"width": image.width, "height": image.height}
    if kind == "audio":
        return {"seconds": _seconds(content)}
    if kind == "video":
        from headwater.modalities.films import PyavFilm

        film = PyavFilm(content)
        return {"frames": film.frames, "seconds": film.seconds, "fps": film.fps}
    if kind == "array":
        shape = _shape(content)
        return {"steps": shape[0] if shape else 1}
    return {"words": len(content.decode().split())} if kind == "text" else {}


def _seconds(content: bytes) -> float:
    import soundfile

    from headwater.modalities.sounds import LibsndfileSound, PyavSound, Sound

    try:
        sound: Sound = LibsndfileSound(content)
    except soundfile.LibsndfileError:
        sound = PyavSound(content)
    if not sound.count:
        raise ValueError("the sound has no samples")
    return sound.count / sound.rate


def _shape(content: bytes) -> tuple[int, ...]:
    """Of an .npy file, by its header."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:  # version 3.0 is for field names beyond Latin-1
        return array_of(content).shape
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("an array of Python objects: a pickle, which is never read; save numbers")
    return shape
