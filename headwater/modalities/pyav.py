"""PyAV, whichever version is installed: its arguments come and go."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np


def opened(content: bytes) -> Any:
    """A container to read from. It refers to itself: whoever opens it must close it, or wait for the garbage collector."""
    import av

    # tags in other encodings are common and never read; from 19 on that is no error
    options: dict[str, Any] = {"metadata_errors": "replace"} if version() < 19 else {}
    return av.open(io.BytesIO(content), "r", **options)


def converter() -> Callable[[Any], np.ndarray]:
    """A function of video frame -> uint8 RGB (H, W, 3). One for many frames: each converter sets up its own tables."""
    from av.video.reformatter import VideoReformatter

    shared = VideoReformatter()
    options = {"threads": 1} if version() >= 17 else {}  # before, it had one thread and no such argument
    return lambda frame: shared.reformat(frame, format="rgb24", **options).to_ndarray()


def version() -> int:
    """The first number of PyAV's version."""
    import av

    return int(av.__version__.partition(".")[0])
