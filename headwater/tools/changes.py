"""What is otherwise in a run that goes on than it was when its checkpoint was written."""

from __future__ import annotations

import sys
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

HOUSEKEEPING = ("ckpt_path", "weights_only", "config", "resume", "runs", "out", "trainer.default_root_dir", "trainer.strategy")


def tell_changes(checkpoint: str, recipe: str, now: str) -> None:
    """Print the settings that differ between the run that is resumed and what it goes on with; the command line wins."""
    before, file, after = (dict(flat(yaml.safe_load(text))) for text in (checkpoint, recipe, now))
    changed = [k for k in sorted(before.keys() | after.keys()) if before.get(k) != after.get(k) and not k.startswith(HOUSEKEEPING)]
    if not changed:
        return
    table = Table("setting", "checkpoint", "recipe", "command line", "goes on with", title="Settings that changed")
    for key in changed:
        line = after.get(key) if after.get(key) != file.get(key) else ""
        table.add_row(key, *(str(value) for value in (before.get(key, ""), file.get(key, ""), line, after.get(key, ""))))
    Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False).print(table)


def flat(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as (dotted name, value)."""
    if not isinstance(config, dict) or not config:
        return [(prefix, config)]
    return [pair for key, value in config.items() for pair in flat(value, f"{prefix}.{key}" if prefix else str(key))]
