"""Cluster centres for HuBERT-like targets: `headwater clusters 'out/*.tar' centres.safetensors --recipe hubert --size 100`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from safetensors.torch import save_file
from torch import Tensor

from headwater import fusion, modalities  # noqa: F401  importing them lets recipes name their classes barely
from headwater.cli import recipe_path
from headwater.datamodules.collate import collate
from headwater.datamodules.sources import OpenSource, Source
from headwater.hub import pretrained
from headwater.model import Encoder, Model, Reader
from headwater.objectives.targets.codes import Clusters, kmeans, nearest
from headwater.tokens import Tokens

ROWS = 32  # samples that are read, and go through the tower, at a time


def clusters(
    shards: str,
    out: str,
    recipe: str | None = None,
    tower: str | None = None,
    modality: str | None = None,
    layer: int = 0,
    size: int = 100,
    samples: int = 2000,
    seed: int = 0,
) -> None:
    """Fit clusters to the tokens of shards, or to a trained tower's features.

    They are for masked prediction with the target Clusters (HuBERT, Hsu et al. 2021, arXiv:2106.07447): k-means++ and Lloyd's
    steps. The same shards and settings give the same file.

    Args:
        shards: a tar, a folder, a glob, a brace range or a URL.
        out: the .safetensors file to write, for `file` of the target; one that exists is refused.
        recipe: whose encoder says how raw tokens are made: a recipe by path or by bare name. Or give a tower.
        tower: a backbone whose features are clustered: a folder, a checkpoint, "timm/NAME", ...
        modality: which encoder of the recipe or tower, where there are several.
        layer: of the tower, from 1; 0 = its output.
        size: number of clusters.
        samples: how many, drawn from all shards, are looked at.
        seed: of that draw and of k-means.
    """
    if Path(out).exists():
        raise FileExistsError(f"{out} exists; name another file, or remove it")
    if (recipe is None) == (tower is None):
        raise ValueError(f"found recipe {recipe} and tower {tower}; expected one of the two")
    encoder = pretrained(tower, modality) if tower else encoder_of(str(recipe), modality)
    target = Clusters(Model({"it": encoder}), "it", size, tower=encoder if tower else None, layer=layer)
    found = []
    with torch.no_grad():
        for batch in batches(shards, encoder.reader, samples, seed):
            found.append(target.vectors(batch)[batch.real()])
    x = torch.cat(found).float()
    if len(x) < size:
        raise ValueError(f"found {len(x):,} tokens for {size} clusters; expected more, give `samples` or shards")
    centres = kmeans(x, size, seed)
    save_file({"centres": centres}, out, {"source": shards, "tower": tower or "", "layer": str(layer), "samples": str(samples)})
    print(f"{out}: {summary(x, centres, nearest(x, centres))}")


def encoder_of(recipe: str, modality: str | None) -> Encoder:
    """An encoder of a recipe, untrained: only its reader is of interest. The recipe's objective is not built."""
    with open(recipe_path(recipe), encoding="utf-8") as file:
        given = yaml.safe_load(file) or {}
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Model, "backbone")
    parsed = parser.parse_object({"backbone": (given.get("model") or {}).get("backbone") or {}})
    with torch.device("meta"):
        encoders = parser.instantiate_classes(parsed)["backbone"].encoders
    if modality not in encoders and (modality or len(encoders) > 1):
        raise ValueError(f"found modality {modality!r} for {recipe}; expected one of {', '.join(encoders)}")
    return encoders[modality or next(iter(encoders))]


def batches(shards: str, reader: Reader, samples: int, seed: int) -> Iterator[Tokens]:
    """Prepared tokens of so many samples, in the shuffled order that training has; what cannot be decoded is left out."""
    source = OpenSource("clusters", Source(shards), {"it": reader}, seed, window=16)
    number = min(samples, source.total)
    for first in range(0, number, ROWS):
        found = [one.sample for one in source.read(np.arange(first, min(first + ROWS, number))) if "it" in one.sample]
        if found:
            yield reader.prepare(collate(found, ["it"])["it"])


def summary(x: Tensor, centres: Tensor, own: Tensor) -> str:
    """How many tokens, how much of their variance the centres explain, and how evenly they are used. own: (T,) of x (T, F)."""
    left = (x - centres[own]).square().sum() / (x - x.mean(0)).square().sum()
    share = own.bincount(minlength=len(centres)) / len(own)
    used = float((-share * share.clamp(min=1e-9).log()).sum().exp())
    return f"{len(centres)} clusters of {len(x):,} tokens explain {1 - left:.1%} of their variance; perplexity {used:.1f}"
