"""List recipes."""

from __future__ import annotations

from importlib.resources import files


def recipes() -> None:
    """List the recipes that ship with the package."""
    for path in sorted((files("headwater") / "configs").iterdir(), key=lambda p: p.name):
        if path.name.endswith(".yaml"):
            first = path.read_text().splitlines()[0].lstrip("# ")
            print(f"{path.name.removesuffix('.yaml'):<14}{first}")
