"""What kind of file some bytes are, by how they begin: names of fetched or stored media are often missing or wrong."""

from __future__ import annotations

BEGINNINGS = (  # (offset, bytes, extension); the file formats' own specifications
    (0, b"\xff\xd8\xff", "jpg"),
    (0, b"\x89PNG\r\n\x1a\n", "png"),
    (0, b"GIF8", "gif"),
    (8, b"WEBP", "webp"),
    (8, b"WAVE", "wav"),
    (8, b"AVI ", "avi"),
    (8, b"AIFF", "aiff"),
    (0, b"BM", "bmp"),
    (0, b"II*\x00", "tiff"),
    (0, b"MM\x00*", "tiff"),
    (0, b"P5", "pgm"),
    (0, b"P6", "ppm"),
    (0, b"fLaC", "flac"),
    (28, b"OpusHead", "opus"),
    (28, b"\x01vorbis", "ogg"),
    (0, b"ID3", "mp3"),
    (0, b"\xff\xf1", "aac"),
    (0, b"\xff\xf9", "aac"),
    (0, b"\xff\xfb", "mp3"),
    (0, b"\xff\xfa", "mp3"),
    (0, b"\xff\xf3", "mp3"),
    (0, b"\xff\xf2", "mp3"),
    (4, b"ftypavif", "avif"),
    (4, b"ftypM4A", "m4a"),
    (4, b"ftypqt", "mov"),
    (4, b"ftyphei", ""),  # HEIC is beyond Pillow
    (4, b"ftypmif1", ""),
    (4, b"ftyp", "mp4"),
    (0, b"\x00\x00\x01\xba", "mpg"),
    (0, b"\x93NUMPY", "npy"),
)
ALIKE = {("mp4", "m4v"), ("mp4", "m4a"), ("mp4", "mov"), ("jpg", "jpeg"), ("tiff", "tif"), ("mpg", "mpeg"), ("opus", "ogg")}
HEAD = 64  # bytes that are enough


def extension_by_content(head: bytes, name: str = "") -> str:
    """The extension that fits a file's first `HEAD` bytes, or "" when it is no picture, sound, video or array.

    name: the extension that the file claims; it is believed between formats that begin alike.
    """
    if head.startswith(b"\x1aE\xdf\xa3"):
        return "webm" if b"webm" in head else "mkv"
    found = next((e for offset, start, e in BEGINNINGS if head[offset : offset + len(start)] == start), "")
    return name if found and name != found and (found, name) in ALIKE else found
