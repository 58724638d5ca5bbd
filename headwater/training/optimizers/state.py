"""What an optimizer keeps: how large it is, of which types, and as whose share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

WHOLE = {  # what fails on shares, and what to take instead
    "torch.Adafactor": "AdamW8bit or GaLore",
    "timm.Adafactor": "AdamW8bit or GaLore",
    "timm.AdafactorBigVision": "AdamW8bit or GaLore",
    "timm.NvNovoGrad": "timm.optim.Lamb",
}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that an optimizer keeps on this rank; a checkpoint's are as many on one device."""
    held = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return sum(x.numel() * x.element_size() for x in map(mine, held))


def keep_types(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Give loaded tensors the types that they were saved with: torch has made them the parameter's, bytes too."""
    numbers = (number for group in saved["param_groups"] for number in group["params"])
    for number, p in zip(numbers, (p for group in optimizer.param_groups for p in group["params"]), strict=True):
        for name, value in saved["state"].get(number, {}).items():
            if isinstance(value, Tensor) and value.dtype != optimizer.state[p][name].dtype:
                optimizer.state[p][name] = value.to(p.device, copy=True)


def check_shares(optimizer: torch.optim.Optimizer) -> None:
    """ValueError for optimizers of libraries that cannot work on a rank's share of a parameter (FSDP2)."""
    other = WHOLE.get(f"{type(optimizer).__module__.partition('.')[0]}.{type(optimizer).__name__}")
    if other and any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"{type(optimizer).__name__} cannot work on shares of parameters; take {other}, or another trainer.strategy than fsdp2"
        )


def mine(x: Tensor) -> Tensor:
    """This rank's share of a tensor (FSDP2), or the whole one."""
    return x.to_local() if isinstance(x, DTensor) else x


def share(local: Tensor, of: Tensor, shape: torch.Size) -> Tensor:
    """The inverse: this rank's rows of a tensor of that shape, cut as `of` is."""
    if not isinstance(of, DTensor):
        return local
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, of.device_mesh, of.placements, run_check=False, shape=shape, stride=stride)


def placed(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on all ranks, cut as `like` is: what a checkpoint has and FSDP2 did not expect stays whole."""
    if isinstance(like, DTensor) and not isinstance(x, DTensor):
        return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return x
