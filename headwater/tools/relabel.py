"""Self-training: `headwater relabel 'new-*.tar' round-1/ --by Head --by.runs runs/few/000 --keep.score 0.9`."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from headwater.datamodules.files import expand
from headwater.tools.copying import Copied, local, report, staged
from headwater.tools.parts import survey, with_prefixes
from headwater.tools.relabelling.annotator import Annotator
from headwater.tools.relabelling.choosing import Keep
from headwater.tools.relabelling.heads import Head
from headwater.tools.relabelling.round import Round
from headwater.tools.relabelling.similar import Names, Neighbours
from headwater.tools.relabelling.texts import Texts
from headwater.tools.relabelling.thoughts import Thoughts

__all__ = ["Head", "Keep", "Names", "Neighbours", "Texts", "Thoughts", "relabel"]
BY = (Head, Names, Neighbours, Texts, Thoughts)
SUMMARY = "relabel.json"


def relabel(
    shards: str,
    out: str,
    by: Annotator | None = None,
    keep: Keep | None = None,
    number: int = 1,
    known: bool = False,
    seed: int = 0,
    rows: int = 32,
    device: str = "cpu",
    samples: int = 10_000,
    overwrite: bool = False,
) -> None:
    """Write shards with what models say of samples: labels or texts, chosen by confidence, vote and rule.

    Members are copied; the answer joins them, with its score as a weight and a record of round, parent and models. What
    people have labelled stays out; what models said in an earlier round is said anew. Train on these shards as a source beside
    the labelled one, then call it again with the new run: docs/continual.md.

    Args:
        shards: a tar, a folder, a glob, a brace range or a URL.
        out: folder for the new shards; it appears, or they appear in it, when all are written.
        by: who answers: Head, Names or Neighbours give labels, Texts and Thoughts texts.
        keep: which answers are kept; none = all.
        number: of the round, for the record.
        known: answer for samples that people have labelled, too; what they said is replaced.
        seed: of random views and of what is drawn.
        rows: samples that are read, and go through the models, at a time.
        device: of the models.
        samples: samples per shard.
        overwrite: replace the shards that `out` holds.
    """
    if by is None or rows < 1:
        raise ValueError(
            f"found by {by} and rows {rows}; expected --by Head, Names, Neighbours, Texts or Thoughts, and 1 row or more"
        )
    paths, target = expand(shards), local(out)
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    now = Round(by.to(torch.device(device)).eval(), keep or Keep(), number, known, seed, rows)
    copied = Copied(Counter(), Counter(), Counter(), now.skipped)
    with staged(target, paths, overwrite) as folder:
        kept = now.kept(with_prefixes([survey(path) for path in paths]))
        if not kept:
            raise ValueError(f"no answer for {shards} was kept: {told(now.left_out)}; ask for less, or ask other models")
        now.write(kept, folder, target.name, samples, copied)
        summary = now.summary(kept)
        (folder / SUMMARY).write_text(json.dumps(summary, indent=2, ensure_ascii=False), encoding="utf-8")
        report(copied, folder, target, console)
    show(summary, console)


def told(left_out: dict[str, int]) -> str:
    """How many were left out by which condition, in words."""
    return ", ".join(f"{count:,} by {name}" for name, count in left_out.items() if count) or "none"


def show(summary: dict[str, Any], console: Console) -> None:
    """Print the round."""
    if summary["classes"]:
        table = Table("class", "samples", title=f"round {summary['round']}")
        for name, count in summary["classes"].items():
            table.add_row(name, f"{count:,}")
        console.print(table)
    score = summary["score"]
    console.print(
        f"{summary['kept']:,} answers kept, score {score['mean']:.3f} on average and {score['least']:.3f} at least; left out: "
        + told(summary["left out"])
    )
