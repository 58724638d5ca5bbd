"""What stops learning, and when: by name, from the bottom up as a schedule says, or once gradients have become small.

A frozen parameter has no gradient, so that no optimizer looks at it: neither momentum nor weight decay moves it by a bit. What lies
below the lowest parameter that learns is not gone through by the backward pass any more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from headwater.objectives.objective import Schedule, at
from headwater.training.groups import depths, outermost
from headwater.training.sharding import Sharded

Parameters = Mapping[str, nn.Parameter]  # by their name in the Pretrainer: "backbone.encoders.text.stem.weight"


class Rule:
    """Which parameters are frozen at a moment of the run.

    fixed: the answer never changes; such parameters are frozen before the optimizer is made and before ranks share them out.
    """

    fixed: bool = True

    def begin(self, module: nn.Module, trainable: Parameters) -> None:
        """Look at the whole module, and at what of it could learn."""

    def frozen(self, progress: float) -> set[str]:
        """Names, at a progress from 0 to 1."""
        raise NotImplementedError(f"{type(self).__name__} must name what is frozen")

    def see(self, gradients: Mapping[str, Tensor], progress: float) -> None:
        """The gradients of a step, before they are clipped and used; the same on all ranks, or this rank's shares of them."""


class Named(Rule):
    """Parameters whose names match, the whole run.

    Universal computation by a frozen body (Lu et al. 2021, arXiv:2103.05247) is names: ["blocks"], but: ["norm"].

    Args:
        names: regular expressions that are searched for.
        but: those that match one of these learn all the same.
    """

    def __init__(self, names: list[str], but: list[str] | None = None) -> None:
        for pattern in (*names, *(but or ())):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"found {pattern!r}, which is no regular expression: {error}") from error
        self.names, self.but, self.chosen = names, but or [], set[str]()

    def begin(self, module: nn.Module, trainable: Parameters) -> None:
        for pattern in (*self.names, *self.but):
            if not any(re.search(pattern, name) for name in trainable):
                raise ValueError(f"found {pattern!r}, which fits none of {len(trainable)} parameters, like {next(iter(trainable))}")
        self.chosen = {n for n in trainable if matches(n, self.names) and not matches(n, self.but)}

    def frozen(self, progress: float) -> set[str]:
        return self.chosen


class Bottom(Rule):
    """The lower part of every encoder and fusion that consists of blocks: what stands before the first one, and blocks from there.

    A share that rises freezes from the bottom up (FreezeOut, Brock et al. 2017, arXiv:1706.04983), one that falls lets the network
    learn from its head downwards (ULMFiT, Howard and Ruder 2018, arXiv:1801.06146). What stands behind the blocks always learns.

    Args:
        share: of the levels, the stem and each block being one; 0 = nothing, 1 = the stem and all blocks. A number or a schedule.
        blocks: in place of a share, the stem and so many blocks.
        names: regular expressions, of which the names of what is frozen match one; None = all.
    """

    def __init__(self, share: float | Schedule = 0.5, blocks: int | None = None, names: list[str] | None = None) -> None:
        if (not callable(share) and not 0 <= share <= 1) or (blocks is not None and blocks < 0):
            raise ValueError(f"found share {share} and blocks {blocks}; expected a share from 0 to 1, and 0 or more blocks")
        self.share, self.blocks, self.names = share, blocks, names
        self.fixed = blocks is not None or not callable(share)
        self.level: dict[str, tuple[int, int]] = {}

    def begin(self, module: nn.Module, trainable: Parameters) -> None:
        self.level = {n: x for n, x in levels(module).items() if n in trainable and (not self.names or matches(n, self.names))}
        if not self.level:
            raise ValueError(
                f"found no parameter of an encoder or fusion with blocks that learns and matches {self.names or 'any'}"
            )

    def frozen(self, progress: float) -> set[str]:
        if self.blocks is not None:
            return {name for name, (level, _) in self.level.items() if level <= self.blocks}
        share = at(self.share, progress)
        return {name for name, (level, of) in self.level.items() if level < min(of, round(share * of, 6))}


class Settled(Rule):
    """A matrix, once the L1 norm of its gradient has become small: GradES (Wen et al. 2025, arXiv:2509.01842).

    What has settled stays as it is; when all have, the run ends.

    Args:
        tau: the norm, a sum of absolute values before clipping, below which a matrix settles; it is larger for larger matrices.
        grace: share of the run in which nothing settles.
        patience: so many steps in a row below tau, after the grace.
        names: regular expressions, of which the names of the matrices match one; None = those in blocks.
    """

    fixed = False

    def __init__(self, tau: float, grace: float = 0.3, patience: int = 1, names: list[str] | None = None) -> None:
        if tau <= 0 or not 0 <= grace <= 1 or patience < 1:
            raise ValueError(
                f"found tau={tau}, grace={grace}, patience={patience}; expected above 0, a share from 0 to 1, 1 or more"
            )
        self.tau, self.grace, self.patience, self.names = tau, grace, patience, names or [r"\.blocks\.\d+\."]
        self.low: dict[str, int] = {}  # matrix -> steps in a row that its gradient has been small

    def begin(self, module: nn.Module, trainable: Parameters) -> None:
        watched = [name for name, p in trainable.items() if p.ndim > 1 and matches(name, self.names)]
        if not watched:
            raise ValueError(f"found no matrix that learns and matches {self.names}; its like is {next(iter(trainable))}")
        self.low = {name: self.low.get(name, 0) for name in watched}

    @property
    def done(self) -> bool:
        """Every matrix has settled."""
        return all(steps >= self.patience for steps in self.low.values())

    def frozen(self, progress: float) -> set[str]:
        return {name for name, steps in self.low.items() if steps >= self.patience}

    def see(self, gradients: Mapping[str, Tensor], progress: float) -> None:
        watched = [name for name, steps in self.low.items() if steps < self.patience and name in gradients]
        if progress < self.grace or not watched:
            return
        norms = [gradients[name].abs().sum() for name in watched]
        values = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).tolist()
        for name, value in zip(watched, values, strict=True):
            self.low[name] = self.low[name] + 1 if value < self.tau else 0


class Freezing(pl.Callback):
    """Freezes what any of its rules names, for as long as it does.

    With one process and under DDP backward then leaves out what it can. Under FSDP2 gradients of what is frozen during the run are
    still found and thrown away; what fixed rules name is not, there either. The state that an optimizer had of a parameter is let
    go. What froze and thawed, and when, is told, kept in checkpoints and logged as frozen/share of all numbers that could learn.

    Args:
        rules: Named, Bottom, Settled.
    """

    def __init__(self, rules: list[Rule]) -> None:
        if not rules:
            raise ValueError("found no rules; expected at least one of Named, Bottom, Settled")
        self.rules = rules
        self.trainable: dict[str, nn.Parameter] = {}
        self.frozen: dict[str, int] = {}  # name -> step from which on it is frozen
        self.events: list[tuple[int, str, bool]] = []  # step, name, whether it froze

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if stage != "fit" or self.trainable:
            return
        self.trainable = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        for rule in self.rules:
            rule.begin(pl_module, self.trainable)
        fixed = set[str]().union(*(rule.frozen(0.0) for rule in self.rules if rule.fixed))
        for name in fixed:
            self.trainable[name].requires_grad_(False)
        self.trainable = {name: p for name, p in self.trainable.items() if name not in fixed}
        if not self.trainable:
            raise ValueError("found rules that freeze every parameter; leave some to learn")
        self.events += [(0, name, True) for name in sorted(fixed)]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Sharding has put other parameters in place of those that were there."""
        self.trainable = {name: p for name, p in pl_module.named_parameters() if name in self.trainable}
        self.switch(trainer, self.frozen)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.decide(trainer, pl_module.progress)
        self.switch(trainer, self.frozen)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        gradients = {n: p.grad for n, p in self.trainable.items() if p.grad is not None and n not in self.frozen}
        for rule in self.rules:
            rule.see(gradients, pl_module.progress)
        self.decide(trainer, pl_module.progress)
        for name in self.frozen:
            self.trainable[name].grad = None
            optimizer.state.pop(self.trainable[name], None)
        if any(isinstance(rule, Settled) and rule.done for rule in self.rules):
            trainer.should_stop = True

    def decide(self, trainer: pl.Trainer, progress: float) -> None:
        """Ask the rules, and note what changes."""
        wanted = set[str]().union(*(rule.frozen(progress) for rule in self.rules if not rule.fixed)) & self.trainable.keys()
        changed = [(n, True) for n in sorted(wanted - self.frozen.keys())] + [
            (n, False) for n in sorted(self.frozen.keys() - wanted)
        ]
        if not changed:
            return
        step = trainer.global_step
        self.frozen = {name: self.frozen.get(name, step) for name in self.trainable if name in wanted}
        self.events += [(step, name, froze) for name, froze in changed]
        for word, which in (("freezes", True), ("learns again", False)):
            if names := [name for name, froze in changed if froze is which]:
                rank_zero_info(
                    f"step {step}: {word}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
                )
        share = sum(self.trainable[name].numel() for name in wanted) / sum(p.numel() for p in self.trainable.values())
        for logger in trainer.loggers:
            logger.log_metrics({"frozen/share": share}, step)

    def switch(self, trainer: pl.Trainer, frozen: Mapping[str, int]) -> None:
        """No gradients where none are wanted; FSDP2's own copies of parameters would not learn of it."""
        if not isinstance(trainer.strategy, Sharded):
            for name, p in self.trainable.items():
                p.requires_grad_(name not in frozen)

    def state_dict(self) -> dict[str, Any]:
        low = [rule.low if isinstance(rule, Settled) else {} for rule in self.rules]
        return {"frozen": self.frozen, "events": [list(event) for event in self.events], "low": low}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.frozen = dict(state_dict["frozen"])
        self.events = [(int(step), name, froze) for step, name, froze in state_dict["events"]]
        for rule, low in zip(self.rules, state_dict["low"], strict=True):
            if isinstance(rule, Settled):
                rule.low |= low


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the regular expressions is found in it."""
    return any(re.search(pattern, name) for pattern in patterns)


def levels(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Parameter -> its level, 0 before the first block, 1 for it, ..., and how many levels its encoder or fusion has.

    What stands behind the blocks has the number of levels itself. Parts without blocks are left out.
    """
    found: dict[str, tuple[int, int]] = {}
    for prefix, part in outermost(module, ""):
        deep = depths(part)
        top = max(deep.values(), default=0)
        found |= {prefix + name: (top - depth, top) for name, depth in deep.items() if top}
    return found
