"""How much each weight mattered for earlier data, found before the first step: for `Anchored` (EWC, arXiv:1612.00796)."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch.distributed.tensor import DTensor

from headwater import distributed
from headwater.objectives.anchored import Anchored, squared_gradients
from headwater.training.meters import evaluated
from headwater.training.replay import held_out


class Fisher(pl.Callback):
    """Gives the `Anchored` part of a weighted objective its Fisher information, and leaves a run that is resumed alone.

    It is the mean over samples of the squared gradient of a sample's own loss, in evaluation mode; ranks share the samples. Under
    FSDP2 no rank holds the gradient of a sample: estimate with one device or ddp, and carry the objective over (`Start`).

    Args:
        source: a held-out source of earlier data (data.held_out).
        samples: how many are asked, over all ranks; with packed rows, how many rows.
        part: of the `Weighted` objective whose loss counts; it must not compare samples. None = the only other one.
        keep: share of the information of earlier stages that remains, where the objective was carried over.
    """

    def __init__(self, source: str, samples: int = 256, part: str | None = None, keep: float = 1.0) -> None:
        if samples < 1 or not 0 <= keep <= 1:
            raise ValueError(f"found samples={samples} and keep={keep}; expected 1 or more samples, and a share from 0 to 1")
        self.source, self.samples, self.part, self.keep = source, samples, part, keep

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.global_step:
            return  # the checkpoint held it
        anchored, part = self.parts(pl_module.objective)
        if any(isinstance(p, DTensor) for p in pl_module.parameters()):
            raise ValueError(
                "found Fisher under fsdp2, where no rank holds the gradient of a sample; estimate it with one device or with ddp, "
                "and carry the objective over to this run"
            )
        share = -(-self.samples // distributed.world())
        batches = ({**b, "progress": 0.0, "step": 0} for b in held_out(trainer, self.source, share))
        with evaluated(pl_module), trainer.precision_plugin.forward_context():
            sums, count = squared_gradients(pl_module.backbone, part, batches, share)
        every = int(distributed.total(anchored.samples.new_tensor(count)))
        anchored.remember(pl_module.backbone, [distributed.total(x) / max(1, every) for x in sums], every, self.keep)

    def parts(self, objective: Any) -> tuple[Any, Any]:
        """The anchored part, and the one whose loss counts."""
        every = dict(getattr(objective, "parts", {}))
        anchored = [part for part in every.values() if isinstance(part, Anchored) and part.importance is not None]
        others = {name: part for name, part in every.items() if not isinstance(part, Anchored)}
        chosen = others.get(self.part) if self.part else next(iter(others.values())) if len(others) == 1 else None
        if len(anchored) != 1 or chosen is None:
            raise ValueError(
                f"found {len(anchored)} Anchored parts with fisher, and part {self.part!r} among {', '.join(others) or 'none'}; "
                "expected a Weighted objective with one, and the name of the part whose loss tells what mattered"
            )
        return anchored[0], chosen
