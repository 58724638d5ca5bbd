"""Small real shards that ship inside the package; NOTICE.md says where they come from and under which licence."""

import os
from importlib.resources import files

PREFIX = "embedded:"


def place(path: str) -> str:
    """A path as the file system knows it: "embedded:NAME" is inside this folder, ~ is the home folder."""
    if path.startswith(PREFIX):
        return str(files("headwater") / "embedded" / path.removeprefix(PREFIX))
    return os.path.expanduser(path)
