"""Operations on trained weights from the command line: `headwater surgery grown.yaml out/`, `headwater soup a/ b/ out/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def surgery(recipe: str, out: str) -> None:
    """Write the backbone of a recipe as it starts: merged, grown, longer, with other ids.

    The recipe's encoders name the operations of headwater.surgery, one inside of the other, on `headwater.hub.pretrained`. What
    became of every tensor is printed and written into the card.

    Args:
        recipe: by path or by bare name, as `headwater fit` takes it.
        out: the backbone folder to write; it must not be there yet.
    """
    import yaml

    from headwater import hub
    from headwater.cli import recipe_path
    from headwater.tools.describe import built

    path, target = recipe_path(recipe), absent(out)
    with open(path, encoding="utf-8") as file:
        given = yaml.safe_load(file) or {}
    model = built(given, "cpu").backbone
    reports = {name: e.report.summary() for name, e in model.encoders.items() if hasattr(e, "report")}
    if not reports:
        raise ValueError(f"{recipe} operates on none of {', '.join(model.encoders)}; expected an encoder by headwater.surgery")
    config = {"encoders": given["model"]["backbone"]["encoders"]}
    hub.save_backbone(model, target, {"source": path, "operations": config, "became": reports})
    for name, summary in reports.items():
        print(f"{name}: {summary}")
    print(f"{target}: {sum(p.numel() for p in model.parameters()):,} parameters")


def soup(
    backbones: list[str],
    out: str,
    weights: list[float] | None = None,
    origin: str | None = None,
    kin: float = 0.5,
) -> None:
    """Average backbones, or add what others have learned, into one backbone.

    Args:
        backbones: folders, or checkpoints of a run, that come from one start.
        out: the backbone folder to write; it must not be there yet.
        weights: of each, which add up to 1; None = equal ones. With origin, of all but the first: factors on what they have
            learned; None = 1.
        origin: the backbone that all come from: the first one gets what the others have learned since.
        kin: least cosine between the matrices of each and the first; lower it to merge what is less alike.
    """
    from headwater import hub
    from headwater.surgery.merging import merged

    target = absent(out)
    model = merged(backbones, weights, origin, kin)
    note: dict[str, Any] = {"source": "merged", "merged": {"backbones": backbones, "weights": weights, "origin": origin}}
    hub.save_backbone(model, target, note)
    print(f"{target}: {len(backbones)} backbones as one")


def absent(out: str) -> Path:
    """The folder to write; ValueError when it is there."""
    if Path(out).exists():
        raise ValueError(f"{out} is there already; name a new folder, or remove it first")
    return Path(out)
