"""A small share of all weights learns, those that the first gradients single out; the others stay as they were drawn.

FreezeNet (Wimmer et al. 2020, arXiv:2011.14087) with the saliency |g * theta| of SNIP (Lee et al. 2018, arXiv:1810.02340). What is
stored of such a network are the values that learned, where they stand, and the seed of the others.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from headwater.init import Normal, initialise
from headwater.training.freezing import matches
from headwater.training.sharding import Sharded


def salient(values: list[Tensor], gradients: list[Tensor], share: float) -> list[Tensor]:
    """Masks of the `share` of all numbers, over all tensors, with the largest |g * theta|; of equal ones the first."""
    scores = torch.cat([(g * p).detach().abs().flatten().float() for p, g in zip(values, gradients, strict=True)])
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[scores.argsort(descending=True, stable=True)[: max(1, round(share * len(scores)))]] = True
    return [mask.view_as(p) for mask, p in zip(kept.split([p.numel() for p in values]), values, strict=True)]


class Salient(pl.Callback):
    """Chooses at the first step, from its whole batch's gradient, which numbers of the matrices learn; vectors and tables all do.

    The others stay bit for bit what they were, and have no momentum. Under DDP every rank has the same gradient and makes
    the same choice; under FSDP2 no rank could compare all numbers, and the run is refused.

    Args:
        share: of the numbers that learn, 1 - q of the paper.
        names: regular expressions, of which the names of the matrices match one; None = those in blocks.
    """

    def __init__(self, share: float = 0.01, names: list[str] | None = None) -> None:
        if not 0 < share < 1:
            raise ValueError(f"found share {share}; expected the part of the weights that learns, above 0 and below 1")
        self.share, self.names = share, names or [r"\.blocks\.\d+\."]
        self.masks: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit" and isinstance(trainer.strategy, Sharded):
            raise ValueError("found Salient under fsdp2, where no rank can compare all weights; use one device or ddp")

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.masks = {name: mask.to(pl_module.device) for name, mask in self.masks.items()}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        chosen = {n: p for n, p in pl_module.named_parameters() if p.grad is not None and p.ndim > 1 and matches(n, self.names)}
        if not self.masks:
            if not chosen:
                raise ValueError(f"found no matrix with a gradient that matches {self.names}; give other names")
            if not all(p.grad.isfinite().all() for p in chosen.values()):  # type: ignore[union-attr]
                return  # the step is left out, and the next one chooses
            found = salient(list(chosen.values()), [p.grad for p in chosen.values()], self.share)  # type: ignore[misc]
            self.masks = dict(zip(chosen, found, strict=True))
        for name, p in chosen.items():
            if name in self.masks:
                p.grad *= self.masks[name]  # type: ignore[operator]
                self._kept[name] = p.detach().clone()

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Weight decay moves what has no gradient; it goes back."""
        for name, before in self._kept.items():
            p = pl_module.get_parameter(name)
            p.copy_(torch.where(self.masks[name], p, before))
        self._kept = {}

    def state_dict(self) -> dict[str, Any]:
        return {"masks": {name: mask.cpu() for name, mask in self.masks.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.masks = dict(state_dict["masks"])


def compact(module: nn.Module, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """What has to be stored, for `safetensors`: of masked tensors "values/NAME" and "places/NAME" (int32), all others "whole/NAME".

    masks: as `Salient.masks`, by the names of `module`.
    """
    stored = {}
    for name, x in module.state_dict().items():
        if name in masks:
            stored[f"values/{name}"] = x[masks[name]]
            stored[f"places/{name}"] = masks[name].flatten().nonzero()[:, 0].int()
        else:
            stored[f"whole/{name}"] = x
    return stored


@torch.no_grad()
def unfold(module: nn.Module, stored: dict[str, Tensor], seed: int, scheme: Normal | None = None) -> None:
    """The whole network again, in place: drawn from the seed as training did (`headwater.init`), with what was stored put in."""
    initialise(module, seed, scheme)
    own = module.state_dict()
    for key, x in stored.items():
        kind, _, name = key.partition("/")
        if name not in own:
            raise ValueError(f"found {name} among what was stored, which the module does not have; expected one made alike")
        if kind == "whole":
            own[name].copy_(x)
        elif kind == "values":
            own[name].view(-1)[stored[f"places/{name}"].long()] = x.to(own[name].dtype)
