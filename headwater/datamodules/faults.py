"""What may be wrong with data: words for errors, and kinds of files that are never read."""

from __future__ import annotations

import re

PICKLES = frozenset({"joblib", "pickle", "pkl", "pt", "pth", "pyd"})  # they run code when they are read, or are code


def said(error: BaseException) -> str:
    """The class and the words of an error, the same each time: without the addresses of objects."""
    words = re.sub(r" at 0x[0-9a-f]+", "", str(error))
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
