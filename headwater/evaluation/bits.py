"""How many bits per byte a causal model needs for held-out texts: comparable between tokenizers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from headwater.evaluation.likelihood import causal_log_p, interleaved_log_p, sizes
from headwater.evaluation.results import Result, by_sample, ratio_interval
from headwater.tokens import Tokens


class Bits(pl.Callback):
    """Bits per byte of texts, or per token of any ids, on every held-out source that has the modalities; each sample once.

    The end mark is paid for too, so that a whole text is predicted. Against the same length in ids of which each is as likely.

    Args:
        modality: what is predicted.
        prefix, context: as in Causal.
        turns: modalities that take turns, for a model that learned them with Interleaved; instead of prefix and context.
        per: bytes are those of the texts that the reader restores.
        rows: that are scored at a time.
    """

    def __init__(
        self,
        modality: str = "text",
        prefix: Sequence[str] = (),
        context: Sequence[str] = (),
        turns: Sequence[str] = (),
        per: Literal["byte", "token"] = "byte",
        rows: int = 32,
    ) -> None:
        if turns and (prefix or context or modality not in turns):
            raise ValueError(
                f"found turns {list(turns)} with prefix {list(prefix)} and context {list(context)}; expected turns alone, "
                f"with {modality} among them, or the others"
            )
        self.modality, self.per, self.needs = modality, per, {modality, *prefix, *context, *turns}
        self.score = (
            partial(interleaved_log_p, modality=modality, modalities=tuple(turns), rows=rows)
            if turns
            else partial(causal_log_p, modality=modality, prefix=tuple(prefix), context=tuple(context), rows=rows)
        )
        self.results: list[Result] = []

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.results = []
        self._kept: dict[int, list[tuple[Tensor, ...]]] = {}

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: dict, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not self.needs <= batch.keys():
            return
        model, t = pl_module.backbone, batch[self.modality]
        sample = t.samples()
        log_p = summed(self.score(model, batch).double(), t, len(batch["sample"]))[sample]
        count = summed(t.real().long(), t, len(batch["sample"]))[sample]
        size = sizes(model.encoder(self.modality), t) if self.per == "byte" else count
        self._kept.setdefault(dataloader_idx, []).append((batch["sample"][sample], log_p, count, size))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        vocab = pl_module.backbone.encoder(self.modality).vocab
        for number, rows in sorted(self._kept.items()):
            _, log_p, count, size = by_sample(*(torch.cat(column) for column in zip(*rows)))
            name = trainer.datamodule.validation[number].name
            self.results.append(needed(name, f"{self.modality} bits per {self.per}", log_p, count, size, vocab))

    on_test_epoch_start, on_test_batch_end, on_test_epoch_end = (
        on_validation_epoch_start,
        on_validation_batch_end,
        on_validation_epoch_end,
    )


def summed(x: Tensor, t: Tokens, samples: int) -> Tensor:
    """(B, N), 0 at padding -> (S,) sums over the tokens of each sample."""
    return x.new_zeros(samples).index_add(0, t.sample().clamp(min=0).flatten(), x.flatten())


def needed(source: str, metric: str, log_p: Tensor, count: Tensor, size: Tensor, vocab: int) -> Result:
    """Bits over units of samples: log p in nats, tokens, and units, each (S,). Whole samples are resampled."""
    bits, units = (-log_p / math.log(2)).numpy(), size.double().numpy()
    low, high = ratio_interval(bits, units)
    uniform = float(count.sum() * math.log2(vocab) / units.sum())
    return Result(source, metric, float(bits.sum() / units.sum()), low, high, {"uniform": uniform}, len(bits))
