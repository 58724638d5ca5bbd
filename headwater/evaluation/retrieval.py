"""Cross-modal retrieval on held-out samples, both directions, against chance."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from headwater import random
from headwater.evaluation.results import Result, by_sample, interval
from headwater.model import Reader
from headwater.tokens import Tokens


class Retrieval(pl.Callback):
    """Recall at k of each pair, on every held-out source that has both modalities, with unfused pooled vectors.

    A sample counts as found when one with exactly the same tokens is among the k nearest (captions may recur). Each sample
    counts once, whatever the number of ranks.

    Args:
        pairs: the two modalities of each pair.
        k: how many answers are looked at.
        show: rows of the contact sheet of the first pair that holds pictures; 0 = none.
    """

    def __init__(self, pairs: list[list[str]], k: int = 5, show: int = 10) -> None:
        self.pairs, self.k, self.show = pairs, k, show
        self.results: list[Result] = []
        self.sheet: dict[str, Any] | None = None

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.results, self.sheet = [], None
        self._kept: dict[int, dict[str, list[tuple[Tensor, ...]]]] = {}
        self._signals: dict[int, dict[str, dict[int, Any]]] = {}

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: dict, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        model = pl_module.backbone
        for name in {n for pair in self.pairs for n in pair if n in batch}:
            pooled = model.represent({name: batch[name]})[name]
            sample = batch["sample"][pooled.sample]
            row = (sample, F.normalize(pooled.x.float(), dim=-1), fingerprint(batch[name])[pooled.sample])
            self._kept.setdefault(dataloader_idx, {}).setdefault(name, []).append(row)
            if self.show and type(model.encoder(name).reader).restore is not Reader.restore:
                seen = self._signals.setdefault(dataloader_idx, {}).setdefault(name, {})
                for number, place in zip(sample.tolist(), pooled.sample.tolist()):
                    seen[number] = model.encoder(name).restore(batch[name].map(lambda f, i=place: f[i : i + 1]))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        for number, kept in sorted(self._kept.items()):
            source = trainer.datamodule.validation[number].name
            whole = {name: by_sample(*(torch.cat(column) for column in zip(*rows))) for name, rows in sorted(kept.items())}
            for pair in self.pairs:
                for query, gallery in (pair, pair[::-1]):
                    if query in whole and gallery in whole:
                        ranked = self._direction(source, (query, whole[query]), (gallery, whole[gallery]))
                        self._show(source, query, gallery, whole, ranked, self._signals.get(number, {}))

    on_test_epoch_start, on_test_batch_end, on_test_epoch_end = (
        on_validation_epoch_start,
        on_validation_batch_end,
        on_validation_epoch_end,
    )

    def _direction(self, source: str, query: tuple[str, list[Tensor]], gallery: tuple[str, list[Tensor]]) -> Tensor:
        """Score one direction; returns the sample ids (queries, k) of the nearest. Each side: name, [ids, vectors, prints]."""
        (ids_q, q, _), (ids_g, g, prints) = query[1], gallery[1]
        q, inside = q[torch.isin(ids_q, ids_g)], torch.isin(ids_g, ids_q)
        g, prints, ids = g[inside], prints[inside], ids_g[inside]
        ranked = (q @ g.T).argsort(dim=1, descending=True)[:, : self.k]
        hits = (prints[ranked] == prints[:, None]).any(1).numpy().astype(float)
        low, high = interval(hits)
        name = f"{query[0]}->{gallery[0]} R@{self.k}"
        self.results.append(Result(source, name, float(hits.mean()), low, high, {"chance": chance(prints, self.k)}, len(hits)))
        return ids[ranked]

    def _show(self, source: str, query: str, gallery: str, whole: dict, ranked: Tensor, signals: dict) -> None:
        """Keep a contact sheet of the first direction from captions to pictures."""
        asked, found = signals.get(query, {}), signals.get(gallery, {})
        if self.sheet or not asked or not found or not isinstance(next(iter(asked.values())), str):
            return
        if getattr(next(iter(found.values())), "dtype", None) != np.uint8:
            return
        ids = whole[query][0][torch.isin(whole[query][0], whole[gallery][0])].tolist()
        rows = [ids.index(i) for i in sorted(set(ids) & set(asked))]
        rows = [rows[i] for i in np.linspace(0, len(rows) - 1, min(self.show, len(rows))).astype(int)]
        self.sheet = {
            "title": f"{source}: the {self.k} pictures nearest to each caption",
            "rows": [(asked[ids[r]], found.get(ids[r]), [(found.get(i), i == ids[r]) for i in ranked[r].tolist()]) for r in rows],
        }


def chance(prints: Tensor, k: int) -> float:
    """Expected recall at k of a random ranking, when entries with the same fingerprint all count. prints: (n,)."""
    n = len(prints)
    copies = (prints[:, None] == prints).sum(1).double()
    miss = torch.ones(n, dtype=torch.float64)
    for draw in range(min(k, n)):
        miss *= ((n - copies - draw) / (n - draw)).clamp(min=0)
    return float(1 - miss.mean())


def fingerprint(t: Tokens) -> Tensor:
    """(B,) a number per row that is the same for rows of the same real tokens. Unpacked rows only."""
    values = t.x if t.x.ndim == 2 else (t.x.nan_to_num() * 1024).round().long().sum(-1)
    hashed = random.fold(values.long(), t.place())
    return (hashed * t.real()).sum(1)
