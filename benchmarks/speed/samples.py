"""What is loaded: samples made from the real shards of the package and from Python's manual, written once as tars.

Every sample has a text that no other has, so that what a loader delivers can be compared with what was written.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image as Pictures

from headwater.datamodules.files import expand
from headwater.datamodules.writer import ShardWriter
from headwater.modalities.image import rgb

VERSION = 2  # of what is written; folders of other versions are left alone
SIDE, SHARDS = 64, 20


class Sample(NamedTuple):
    """key: of the tar. members: extension -> content; "txt" is there and differs in every sample."""

    key: str
    members: dict[str, bytes]

    @property
    def text(self) -> str:
        return self.members["txt"].decode()


class Corpus(NamedTuple):
    """The samples of a case, in `SHARDS` tars of equal size, and what peers make of them beside these."""

    folder: Path

    @property
    def shards(self) -> str:
        """The folder of the tars."""
        return str(self.folder / "tars")

    @property
    def tars(self) -> list[str]:
        return sorted(str(path) for path in Path(self.shards).glob("*.tar"))

    def samples(self) -> Iterator[Sample]:
        """In the order of the tars, read with Python's own tar reader."""
        for path in self.tars:
            with tarfile.open(path) as archive:
                key = ""
                members: dict[str, bytes] = {}
                for member in archive:
                    stem, _, extension = member.name.partition(".")
                    if stem != key and members:
                        yield Sample(key, members)
                        members = {}
                    key = stem
                    members[extension] = _content(archive, member)
                yield Sample(key, members)

    def beside(self, name: str, make: Callable[[Path], None]) -> Path:
        """The folder `name` of this corpus, filled by `make` when it is not there: a peer's own format."""
        return made(self.folder / name, make)


def made(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` if need be, whole or not at all."""
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        make(partial)
        os.replace(partial, folder)
    return folder


def corpus(kind: str, count: int) -> Corpus:
    """`count` samples of a kind (jpeg, large, video, audio, action, text), from the cache or written now."""
    folder = Path(tempfile.gettempdir()) / f"headwater-bench-{VERSION}" / f"{kind}-{count}"

    def write(into: Path) -> None:
        with ShardWriter(into / f"{kind}-{{:03d}}.tar", samples=-(-count // SHARDS)) as writer:
            for number in range(count):
                writer.write(f"{number:06d}", KINDS[kind](number))

    made(folder / "tars", write)
    return Corpus(folder)


def jpeg(number: int) -> dict[str, bytes]:
    """A view of a picture, 64 x 64, with its title and a small record."""
    pictures = _members("things-*.tar", "png")
    title = _members("things-*.tar", "txt")[number % len(pictures)].decode()
    facts = {"picture": number % len(pictures), "view": number // len(pictures)}
    return {"jpg": _encoded(_view(number)), "txt": f"{title} {number:05d}".encode(), "json": json.dumps(facts).encode()}


def large(number: int) -> dict[str, bytes]:
    """Sixteen views in one picture, 384 x 384."""
    sheet, cell = Pictures.new("RGB", (384, 384)), 96
    for place in range(16):
        one = Pictures.fromarray(_view(16 * number + place)).resize((cell, cell), Pictures.Resampling.BICUBIC)
        sheet.paste(one, (place % 4 * cell, place // 4 * cell))
    return {"jpg": _encoded(np.asarray(sheet)), "txt": f"sheet {number:05d}".encode()}


def text(number: int) -> dict[str, bytes]:
    """A paragraph of Python's manual."""
    all_of_them = paragraphs()
    return {"txt": f"{number:05d} {all_of_them[number % len(all_of_them)]}".encode()}


def _embedded(pattern: str, extension: str) -> Callable[[int], dict[str, bytes]]:
    """Samples of embedded shards over and over, each time with another number in the text."""

    def one(number: int) -> dict[str, bytes]:
        signals, texts = _members(pattern, extension), _members(pattern, "txt")
        place = number % len(signals)
        return {extension: signals[place], "txt": f"{texts[place].decode()} {number:05d}".encode()}

    return one


KINDS: dict[str, Callable[[int], dict[str, bytes]]] = {
    "jpeg": jpeg,
    "large": large,
    "text": text,
    "video": _embedded("episodes-*.tar", "mp4"),
    "action": _embedded("episodes-*.tar", "npy"),
    "audio": _embedded("sounds-*.tar", "ogg"),
}


@cache
def paragraphs() -> list[str]:
    """Of Python's manual, 30 to 1,000 bytes, some 2,000 of them."""
    from pydoc_data.topics import topics

    pieces = (re.sub(r"\s+", " ", piece).strip() for topic in topics.values() for piece in re.split(r"\n\s*\n", topic))
    return [piece for piece in pieces if 30 <= len(piece.encode()) <= 1000]


@cache
def _members(pattern: str, extension: str) -> list[bytes]:
    """One member of every sample of embedded shards."""
    found = []
    for path in expand(f"embedded:{pattern}"):
        with tarfile.open(path) as archive:
            found += [_content(archive, member) for member in archive if member.name.endswith(f".{extension}")]
    return found


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # that is how a folder would come, and there is none
    return file.read()


@cache
def _pictures() -> list[np.ndarray]:
    return [rgb(io.BytesIO(content)) for content in _members("things-*.tar", "png")]


def _view(number: int) -> np.ndarray:
    """(64, 64, 3): a picture in one of many crops, half of them mirrored, so that no two samples hold the same."""
    pictures = _pictures()
    picture, view = pictures[number % len(pictures)], number // len(pictures)
    side = SIDE - 2 * (view % 8)
    left, top = view * 3 % (SIDE - side + 1), view * 5 % (SIDE - side + 1)
    cut = picture[top : top + side, left : left + side]
    if view // 8 % 2:
        cut = cut[:, ::-1]
    return np.asarray(Pictures.fromarray(cut).resize((SIDE, SIDE), Pictures.Resampling.BICUBIC))


def _encoded(picture: np.ndarray) -> bytes:
    out = io.BytesIO()
    Pictures.fromarray(picture).save(out, "JPEG", quality=90)
    return out.getvalue()
