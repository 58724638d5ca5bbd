"""Look into shards: tables of facts and a contact sheet: `headwater inspect 'out/*.tar' --html page.html`."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console
from rich.table import Table

from headwater.datamodules.files import expand
from headwater.datamodules.index import ShardIndex, load_index
from headwater.tools.decode import ShardSet, faults, pick, rows, title
from headwater.tools.page import page


def inspect(shards: str, html: str | None = None, samples: int = 24) -> None:
    """Print what shards hold, and draw it as a page with --html.

    Args:
        shards: shards as a glob, a brace range, or a folder.
        html: file for the contact sheet, one page without outside parts.
        samples: samples to decode per shard set, spread evenly over it.
    """
    try:
        paths = expand(shards)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    sets: dict[str, list[ShardIndex]] = {}
    for path in paths:
        sets.setdefault(re.sub(r"\d+(?=\.tar$)", "*", str(path)), []).append(load_index(path))
    found = [ShardSet(name, indices, pick(indices, samples)) for name, indices in sets.items()]
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    for one in found:
        _print(one, console)
    if html is not None:
        Path(html).parent.mkdir(parents=True, exist_ok=True)
        Path(html).write_text(page(found), encoding="utf-8", errors="replace")
        console.print(f"contact sheet written to {html}")


def _print(one: ShardSet, console: Console) -> None:
    console.print(f"{one.name}: {title(one)}")
    table = Table("member", "count", "mean", "largest", f"decoded from {len(one.picked)} samples")
    for row in rows(one):
        table.add_row(*row)
    console.print(table)
    for fault in faults(one):
        console.print(f"fault: {fault}")
