"""Optimizers that step through all parameters in a few kernels, by apex or by torch, with one signature and one form of state.

In YAML: `optimizer: {class_path: FusedAdamW, init_args: {lr: 0.001, weight_decay: 0.05}}`. Each
call of a class makes the optimizer of a backend. Checkpoints have torch's form, so that a run may go on with another one.

apex counts steps by group and not by parameter: a parameter whose first gradient comes later than its group's has a smaller bias
correction there than in torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import timm.optim
import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import SGD, AdamW, Optimizer

from headwater import distributed
from headwater.fused import Backend, kind, load, resolve

FUSED = ("cpu", "cuda", "mps", "xpu")  # the devices on which torch has fused kernels for AdamW and SGD
OWN = ("fused", "foreach", "max_grad_norm")  # of a group: how it runs, which a loaded state does not change
Betas = tuple[float, float]


class FusedAdamW(Optimizer):
    """AdamW: Adam with decoupled weight decay (Loshchilov and Hutter 2017, arXiv:1711.05101).

    Args:
        params: groups of parameters. lr, betas, eps, weight_decay: as torch.optim.AdamW has them.
        backend: None = what the run prefers; "eager" goes from parameter to parameter, by the plain formula.
    """

    def __new__(
        cls,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        backend: Backend | None = None,
    ) -> Any:
        groups, tensors = held(params)
        chosen = resolve("adam", tensors, backend)
        if chosen == "apex":
            made = load("adam")(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, adam_w_mode=True)
            return torch_form(made, "AdamW")
        return portable(AdamW(groups, lr, betas, eps, weight_decay, **kernels(chosen, tensors)))


class DistributedAdamW(Optimizer):
    """FusedAdamW whose state is split over the ranks of DDP (ZeRO stage 1, Rajbhandari et al. 2020, arXiv:1910.02054).

    Its arguments are those of FusedAdamW, which one process has. ValueError under FSDP2, which splits the state of every optimizer.
    """

    def __new__(
        cls,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        backend: Backend | None = None,
    ) -> Any:
        groups, tensors = held(params)
        if kind(tensors)[1]:
            raise ValueError("found DistributedAdamW under FSDP2, which splits optimizer state already; take FusedAdamW instead")
        if distributed.world() == 1:
            return FusedAdamW(groups, lr, betas, eps, weight_decay, backend)
        chosen = resolve("distributed_adam", tensors, backend)
        options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        if chosen == "apex":  # DDP has averaged the gradients by the time of the step: averaging them again changes nothing
            return load("distributed_adam")(groups, adam_w_mode=True, overlap_grad_sync=False, **options)
        split: Any = ZeroRedundancyOptimizer(groups, AdamW, **options, **kernels(chosen, tensors))
        split.form = "AdamW"
        return split


class FusedLamb(Optimizer):
    """LAMB (You et al. 2019, arXiv:1904.00962), which does not clip: `model.clip` does. Weight decay is part of the update."""

    def __new__(
        cls,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        backend: Backend | None = None,
    ) -> Any:
        groups, tensors = held(params)
        chosen = resolve("lamb", tensors, backend)
        options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        if chosen == "apex":
            return torch_form(load("lamb")(groups, max_grad_norm=float("inf"), **options), "Lamb", by_group=True)
        return portable(timm.optim.Lamb(groups, max_grad_norm=None, foreach=chosen == "torch", **options))


class FusedNovograd(Optimizer):
    """NovoGrad (Ginsburg et al. 2019, arXiv:1905.11286): one second moment per matrix, weight decay inside of the first.

    apex keeps second moments by group, in a form of its own: a checkpoint goes on with the backend that wrote it.
    """

    def __new__(
        cls,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: Betas = (0.95, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        backend: Backend | None = None,
    ) -> Any:
        groups, tensors = held(params)
        options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        if resolve("novograd", tensors, backend) == "apex":
            as_timm = {"bias_correction": False, "reg_inside_moment": True, "grad_averaging": False}
            return uncounted(load("novograd")(groups, **as_timm, **options))
        return timm.optim.NvNovoGrad(groups, **options)


class FusedSgd(Optimizer):
    """Gradient descent with momentum; weight decay is part of the gradient."""

    def __new__(
        cls,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        backend: Backend | None = None,
    ) -> Any:
        groups, tensors = held(params)
        chosen = resolve("sgd", tensors, backend)
        options: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        if chosen != "apex":
            return portable(SGD(groups, **options, **kernels(chosen, tensors)))
        made = load("sgd")(groups, **options)
        for p in tensors:  # else apex takes a whole group to be in its first step when its last parameter is
            made.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return portable(made, "SGD")


def held(params: Iterable[Any]) -> tuple[list[Any], list[Tensor]]:
    """Parameters or groups of them, which optimizers may write into, and the parameters alone."""
    given = [{**one} if isinstance(one, dict) else one for one in params]
    return given, [p for one in given for p in (one["params"] if isinstance(one, dict) else [one])]


def kernels(backend: Backend, tensors: list[nn.Parameter] | list[Tensor]) -> dict[str, bool]:
    """Options of a torch optimizer: fused where it can be, else foreach; eager = neither."""
    if backend == "eager":
        return {"foreach": False, "fused": False}
    fused = all(x.device.type in FUSED and x.is_floating_point() for x in tensors)
    return {"fused": True} if fused else {"foreach": True}


def portable(optimizer: Any, form: str | None = None) -> Any:
    """Loading a state leaves alone what the saved groups do not have, and how this optimizer is to run.

    form: the optimizer of torch (or timm) whose state it has, where that is another class.
    """
    optimizer.form = form or type(optimizer).__qualname__

    def merged(made: Any, state: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(made.param_groups, state["param_groups"], strict=True)
        groups = [{**mine, **saved, **{n: mine[n] for n in OWN if n in mine}} for mine, saved in pairs]
        return {**state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(merged)
    return optimizer


def torch_form(optimizer: Any, form: str, by_group: bool = False) -> Any:
    """apex's optimizer, whose saved state says the step as that of `form` does: of every parameter, or `by_group` as a tensor."""

    def save(made: Any, state: dict[str, Any]) -> dict[str, Any]:
        groups, of = [], dict(state["state"])
        for group in state["param_groups"]:
            step = torch.tensor(float(group.get("step", 0)))
            groups.append({n: v for n, v in group.items() if n != "step"} | ({"step": step} if by_group else {}))
            of |= {i: {**of[i], "step": step.clone()} for i in group["params"] if i in of and not by_group}
        return {**state, "state": of, "param_groups": groups}

    def restore(made: Any, state: dict[str, Any]) -> dict[str, Any]:
        groups, of = [], {i: {n: v for n, v in one.items() if n != "step"} for i, one in state["state"].items()}
        for group in state["param_groups"]:
            steps = [int(state["state"][i]["step"]) for i in group["params"] if "step" in state["state"].get(i, {})]
            groups.append({**group, "step": int(group["step"]) if "step" in group else max(steps, default=0)})
        return {**state, "state": of, "param_groups": groups}

    portable(optimizer, form).register_load_state_dict_pre_hook(restore)
    optimizer.register_state_dict_post_hook(save)
    return uncounted(optimizer)


def uncounted(optimizer: Any) -> Any:
    """A step without any gradient in a group, such as a skipped one, does not count there: apex counts them all."""

    def before(made: Any, args: Any, kwargs: Any) -> None:
        for group in made.param_groups:
            if all(p.grad is None for p in group["params"]):
                group["step"] = group.get("step", 0) - 1

    optimizer.register_step_pre_hook(before)
    return optimizer
