"""AdamW whose average takes the place of a decaying learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from headwater.training.optimizers.state import placed


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682; https://github.com/facebookresearch/schedule_free).

    Three points: z takes AdamW's steps without momentum, x is the average of all z, and gradients are taken at
    y = (1 - beta1) z + beta1 x. In training mode parameters are y; `eval` makes them x, which is what to evaluate, save and
    export, and keeps y aside until `train`: nothing is lost on the way there and back, and a checkpoint of either mode goes on
    bitwise. Take a schedule that rises and then stays; the average weighs each step by its rate squared.

    Args:
        params: groups or parameters.
        lr: several times AdamW's best is usual.
        betas: beta1 sets how far y is from z, beta2 the mean of squares.
        eps: added to the root.
        weight_decay: decoupled, of y.
        power: of the step's number in its weight in the average (r in the paper); 0 = all alike.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        power: float = 0.0,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or power < 0:
            raise ValueError(f"found lr {lr}, eps {eps}, weight_decay {weight_decay}, power {power}; expected none below 0")
        if not (0 < betas[0] < 1 and 0 <= betas[1] < 1):
            raise ValueError(f"found betas {betas}; expected the first between 0 and 1, the second from 0 to below 1")
        options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "power": power}
        super().__init__(params, {**options, "training": True, "done": 0, "weights": 0.0, "peak": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step from y. Groups without any gradient stay where they are, their averages too."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            learning = [p for p in group["params"] if p.grad is not None]
            if learning and not group["training"]:
                raise RuntimeError("found a step in evaluation mode; call `train()` of the optimizer first")
            if learning:
                self._advance(group, learning)
        return loss

    def _advance(self, group: dict[str, Any], learning: list[Tensor]) -> None:
        rate, (beta1, beta2) = group["lr"], group["betas"]
        group["done"] += 1
        group["peak"] = max(group["peak"], rate)
        weight = group["done"] ** group["power"] * group["peak"] ** 2
        group["weights"] += weight
        share = weight / group["weights"] if group["weights"] else 0.0
        for p in learning:
            state = self.state[p]
            if not state:
                state["z"], state["exp_avg_sq"] = p.clone(), torch.zeros_like(p)
            z, square = state["z"], state["exp_avg_sq"]
            square.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            direction = p.grad / (square / (1 - beta2 ** group["done"])).sqrt_().add_(group["eps"])
            direction.add_(p, alpha=group["weight_decay"])
            p.lerp_(z, share).add_(direction, alpha=rate * (beta1 * (1 - share) - 1))  # y moves with x and z, neither is needed
            z.sub_(direction, alpha=rate)

    @torch.no_grad()
    def eval(self) -> None:
        """Parameters become x, the average."""
        for group in self.param_groups:
            for p in group["params"] if group["training"] else ():
                if "z" in (state := self.state.get(p, {})):
                    state["y"] = p.clone()
                    p.lerp_(state["z"], 1 - 1 / group["betas"][0])
            group["training"] = False

    @torch.no_grad()
    def train(self) -> None:
        """Parameters become y again."""
        for group in self.param_groups:
            for p in group["params"] if not group["training"] else ():
                if "y" in (state := self.state.get(p, {})):
                    p.copy_(placed(state.pop("y"), p))
            group["training"] = True
