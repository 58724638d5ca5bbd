"""Label-free meters of every tower, on by default: do its vectors still tell samples apart, and do modalities meet?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from headwater import distributed
from headwater.model import Model
from headwater.tokens import Tokens
from headwater.training.sharding import Sharded

ALARMS = {  # meter -> bound, True = it should stay above, what else it would mean
    "rank": (1.5, True, "the vectors lie on a line"),
    "std": (0.02, True, "all samples have nearly the same vector"),
    "cosine": (0.999, False, "all samples have nearly the same direction"),
}
LEAST = 8  # different samples below which meters say little, and no alarm goes off


def effective_rank(x: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values: (S, D) -> (), from 1 to min(S, D).

    Roy and Vetterli 2007; as a measure of representations RankMe (Garrido et al. 2022, arXiv:2210.02885).
    """
    values = torch.linalg.svdvals(x)
    share = values / values.sum().clamp(min=1e-12)
    return torch.special.entr(share).sum().exp()


def spread(unit: Tensor) -> Tensor:
    """Mean over dimensions of the deviation over samples, times sqrt(D): 1 = evenly spread over the sphere, 0 = collapsed.

    unit: (S, D) of length 1 -> (). The measure of SimSiam (Chen and He 2020, arXiv:2011.10566, section 4.1).
    """
    return unit.std(0, unbiased=False).mean() * unit.shape[1] ** 0.5


def mean_cosine(unit: Tensor) -> Tensor:
    """Mean cosine of two different samples: (S, D) of length 1 -> ()."""
    count = len(unit)
    return (unit.sum(0).square().sum() - unit.square().sum()) / (count * (count - 1))


def uniformity(unit: Tensor, t: float = 2.0) -> Tensor:
    """log of the mean of exp(-t * squared distance) over pairs of samples: (S, D) of length 1 -> (), lower = more even.

    Wang and Isola 2020, arXiv:2005.10242; https://github.com/ssnl/align_uniform.
    """
    return torch.pdist(unit).square().mul(-t).exp().mean().log()


def alignment(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared distance of the two vectors of one sample: (S, D), (S, D) of length 1 -> () (same paper)."""
    return (a - b).square().sum(1).mean()


def gap(a: Tensor, b: Tensor) -> Tensor:
    """Distance of the centres of two modalities: (S, D), (S, D) of length 1 -> (). Liang et al. 2022, arXiv:2203.02053."""
    return (a.mean(0) - b.mean(0)).norm()


def measure(vectors: dict[str, Tensor], present: dict[str, Tensor]) -> dict[str, float]:
    """All meters, by "modality/name" and "modality-modality/name". vectors: modality -> (S, D); present: modality -> (S,) bool.

    Modalities with fewer than two samples have none; pairs need vectors of one size and two samples that have both.
    """
    found: dict[str, Tensor] = {}
    unit = {name: F.normalize(x.float(), dim=-1) for name, x in vectors.items()}
    for name, x in vectors.items():
        here, mine = present[name], unit[name][present[name]]
        if len(mine) > 1:
            told = {"rank": effective_rank(x.float()[here]), "std": spread(mine)}
            told |= {"cosine": mean_cosine(mine), "uniformity": uniformity(mine)}
            found |= {f"{name}/{meter}": value for meter, value in told.items()}
    for a, b in combinations(vectors, 2):
        both = present[a] & present[b]
        if unit[a].shape[1] == unit[b].shape[1] and both.sum() > 1:
            found[f"{a}-{b}/alignment"] = alignment(unit[a][both], unit[b][both])
            found[f"{a}-{b}/gap"] = gap(unit[a][both], unit[b][both])
    if not found:
        return {}
    return dict(zip(found, torch.stack([*found.values()]).tolist(), strict=True))  # one wait for the device


class Meters(pl.Callback):
    """Logs meters/<modality>/<name> of unfused pooled vectors of the training batch, and warns when a tower collapses.

    The Pretrainer adds it to every run that has none. The vectors are those of at most `samples` samples of all ranks, in
    evaluation mode, without gradient; what the objective hides is seen here.

    Args:
        every: steps between measurements; 0 = never.
        samples: the most that are measured, over all ranks.
        alarms: warn when a meter leaves its bounds, once until it is back.
    """

    def __init__(self, every: int = 100, samples: int = 256, alarms: bool = True) -> None:
        if every < 0 or samples < 2:
            raise ValueError(f"found every={every} and samples={samples}; expected 0 or more steps and 2 or more samples")
        self.every, self.samples, self.alarms = every, samples, alarms
        self.last: dict[str, float] = {}
        self._told: set[str] = set()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: dict, batch_idx: int) -> None:
        if not self.every or trainer.global_step % self.every:
            return
        given = some(pl_module.backbone, batch, -(-self.samples // distributed.world()))
        with torch.no_grad(), evaluated(pl_module.backbone), trainer.precision_plugin.forward_context():
            vectors = pl_module.predict_step({**given, "sample": batch["sample"]}, 0)
        if isinstance(trainer.strategy, Sharded):
            pl_module.reshard()
        self.last = measure(*gathered(vectors, given))
        for logger in trainer.loggers:
            logger.log_metrics({f"meters/{name}": value for name, value in self.last.items()}, trainer.global_step - 1)
        if self.alarms:
            self.warn(trainer.global_step, given)

    def warn(self, step: int, given: dict[str, Tokens]) -> None:
        """Say which meters left their bounds. given: what was measured here; equal signals rightly have equal vectors."""
        for name, value in self.last.items():
            modality, _, meter = name.partition("/")
            if meter not in ALARMS:
                continue
            bound, above, meaning = ALARMS[meter]
            bad = value < bound if above else value > bound
            if not bad:
                self._told.discard(name)
            elif name not in self._told and distinct(given[modality]) >= LEAST:
                self._told.add(name)
                rank_zero_warn(
                    f"step {step}: meters/{name} is {value:.4g}, expected {'above' if above else 'below'} {bound}: {meaning}. "
                    f"The encoder of {modality} may be collapsing: lower the learning rate or warm it up longer, give the term "
                    "that keeps samples apart more weight, or look whether the data differs. Meters(alarms=False) ends this warning"
                )


def some(model: Model, batch: dict[str, Any], most: int) -> dict[str, Tokens]:
    """The first rows, with about `most` samples, of every modality that has an encoder; of several views of one the first."""
    given: dict[str, Tokens] = {}
    for key in sorted(name for name, t in batch.items() if isinstance(t, Tokens)):
        name, t = key.partition("@")[0], batch[key]
        if name in model.encoders and name not in given:
            rows = -(-most * t.position.shape[0] // len(batch["sample"]))
            given[name] = t.map(lambda field, rows=rows: field[:rows])  # type: ignore[misc]
    return given


@contextmanager
def evaluated(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every part then has its own mode again."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def gathered(vectors: dict[str, Tensor], given: dict[str, Tokens]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the samples of all ranks that were given: modality -> vectors (S, D), and whether a sample has a finite one, (S,) bool."""
    here = {name: torch.zeros_like(vectors["sample"], dtype=torch.bool) for name in given}
    for name, t in given.items():
        here[name][t.samples()] = True
    seen = torch.stack([*here.values()]).any(0)
    every = {name: distributed.gather(vectors[name][seen].float())[0] for name in given}
    present = {name: distributed.gather(mask[seen].byte())[0].bool() for name, mask in here.items()}
    return every, {name: mask & every[name].isfinite().all(1) for name, mask in present.items()}


def distinct(t: Tokens) -> int:
    """How many different signals there are among the samples of this rank."""
    x = (t.x if t.x.ndim == 3 else t.x[..., None]).double().nan_to_num()
    values = (x * torch.arange(1, x.shape[-1] + 1, device=x.device)).sum(-1) * (1 + t.place()).double().sqrt()
    prints = values.new_zeros(int(t.sample().max()) + 1).index_add(0, t.sample()[t.real()], values[t.real()])
    return len(torch.unique((prints[t.samples()] * 1e6).round()))
