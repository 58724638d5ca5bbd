"""Sparse experts: tokens of all modalities share attention, and each goes through few of many feed-forward layers.

Learned routing of Switch (Fedus et al. 2021, arXiv:2101.03961) for one expert per token and of Mixtral (Jiang et al. 2024,
arXiv:2401.04088) for more; no token is dropped. Fixed skills as in SkillNet (Zhang et al. 2022, arXiv:2203.03312).
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headwater.fusion.joint import JointTokens, check_names
from headwater.fusion.mixture import Separate, by_column, walk
from headwater.init import OUTPUT, Rule, initialise
from headwater.tokens import Tokens
from headwater.trunk import Trunk


class Routing(NamedTuple):
    """What one router did with T real tokens. logits: (T, E) over the experts; chosen: (T, K) the numbers of those taken."""

    logits: Tensor
    chosen: Tensor


def fresh(mlp: nn.Module) -> nn.Module:
    """Another layer of this kind with weights of its own; equal experts would leave a router without gradient."""
    other = copy.deepcopy(mlp)
    initialise(other)
    return other


class Experts(nn.Module):
    """E feed-forward layers of which each token takes the K with the largest router scores. x: (B, N, D) -> (B, N, D).

    The answers are weighted by the softmax of the scores: over the K if K > 1; over all E if K = 1, where else the router
    would have no gradient. Tokens are sorted by expert, so each expert sees only its own, and all others cost nothing.

    Args:
        mlp: what the experts are like. width: D. experts: E. top: K. shared: one more that every token takes.
    """

    def __init__(self, mlp: nn.Module, width: int, experts: int, top: int, shared: bool) -> None:
        super().__init__()
        if not 0 < top <= experts:
            raise ValueError(f"found top {top} of {experts} experts; expected a number between 1 and that of the experts")
        self.top = top
        self.router = nn.Linear(width, experts, bias=False)
        nn.init.trunc_normal_(self.router.weight, std=0.02)
        self.experts = nn.ModuleList(fresh(mlp) for _ in range(experts))
        self.shared = fresh(mlp) if shared else None
        self.log: list[Routing] | None = None  # opened by who wants to know; recomputation in backward finds it closed

    def init_rules(self) -> dict[str, Rule]:
        return {"router.weight": OUTPUT}

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        logits = self.router(flat)
        gates, chosen = logits.softmax(-1).topk(self.top, -1)
        if self.top > 1:
            gates = gates / gates.sum(-1, keepdim=True)
        by_expert = chosen.flatten().argsort(stable=True)
        count = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        runs = flat[by_expert // self.top].split(count)
        answers = torch.cat([expert(run) for expert, run in zip(self.experts, runs, strict=True)])  # empty runs too: a gradient
        answers = torch.empty_like(answers).index_copy(0, by_expert, answers).unflatten(0, (-1, self.top))
        y = (answers * gates[..., None]).sum(1).to(x.dtype)
        if self.log is not None:
            self.log.append(Routing(logits.view(*x.shape[:2], -1), chosen.view(*x.shape[:2], -1)))
        return (y if self.shared is None else y + self.shared(flat)).view_as(x)


class Skills(Separate):
    """One feed-forward layer per skill; a modality takes the mean of those that are switched on for it."""

    def __init__(self, mlp: nn.Module, skills: dict[str, list[str]]) -> None:
        nn.Module.__init__(self)
        self.skills = skills
        self.update({name: fresh(mlp) for name in dict.fromkeys(s for names in skills.values() for s in names)})

    def of(self, name: str, x: Tensor) -> Tensor:
        return torch.stack([self[skill](x) for skill in self.skills[name]]).mean(0)


class Routed(JointTokens):
    """Joint tokens under a trunk in which every second feed-forward layer is a set of experts.

    load: (layers, E) share of the real tokens' choices that each expert got in the last forward pass. The objective `Balanced`
    keeps it even, through `routing`.

    Args:
        widths: modality -> D of its encoder.
        trunk: gives attention and the kind of the feed-forward layers. None = two blocks of the widest encoder's width.
        experts: E, per layer.
        top: K, how many of them a token takes.
        shared: one more expert that every token takes (DeepSeekMoE, arXiv:2401.06066).
        every: 2 = the second, fourth, ... block has experts; 1 = each block has.
        skills: modality -> names of experts that are always on for it, in place of learned routing; `experts`, `top` and
            `shared` are then without effect.
    """

    load: Tensor | None = None

    def __init__(
        self,
        widths: dict[str, int],
        trunk: Trunk | None = None,
        experts: int = 4,
        top: int = 2,
        shared: bool = False,
        every: int = 2,
        skills: dict[str, list[str]] | None = None,
    ) -> None:
        super().__init__(widths, trunk)
        chosen: list[Any] = [*self.trunk.blocks][every - 1 :: every]
        if not chosen:
            raise ValueError(f"found {len(self.trunk.blocks)} blocks and every={every}: none has experts; lower `every`")
        if skills is not None:
            check_names([*skills], widths, "skills")
            if without := [name for name in widths if not skills.get(name)]:
                raise ValueError(f"skills switches on none for {', '.join(without)}; name at least one for each modality")
        for block in chosen:
            width = self.trunk.width
            block.mlp = Experts(block.mlp, width, experts, top, shared) if skills is None else Skills(block.mlp, skills)
        self.cacheable = skills is None
        if skills is None:
            self.routing: list[Routing] | None = None  # opened by an objective; each forward pass adds one per router
        else:
            by_column(self.trunk)

    def mix(self, joined: Tokens, causal: bool, lengths: dict[str, int]) -> Tokens:
        routers = [module for module in self.trunk.modules() if isinstance(module, Experts)]
        if not routers:
            return walk(self.trunk, joined, causal, lengths)
        for router in routers:
            router.log = []
        mixed = super().mix(joined, causal, lengths)
        real, found = joined.real(), []
        for router in routers:
            found += [Routing(*(field[:, : real.shape[1]][real] for field in seen)) for seen in router.log or ()]
            router.log = None
        size = len(routers[0].experts)
        self.load = torch.stack([r.chosen.flatten().bincount(minlength=size) / max(1, r.chosen.numel()) for r in found])
        if self.routing is not None:
            self.routing += found
        return mixed
