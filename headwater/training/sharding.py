"""FSDP2: every rank keeps a share of each parameter, its gradient and its optimizer state.

Blocks are gathered one by one while they run. What is left, stems, heads, teachers and decoders' own parameters, is gathered
for the length of a forward pass together with the LightningModule: sharding blocks alone would let the rest drift apart.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from headwater.layers import Block
from headwater.training.checkpoints import check_tensors

WHOLE = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
ENTRIES = ("prepare", "call", "hide", "ask", "predict_step")  # the methods of a Pretrainer that run the model


class Sharded(ModelParallelStrategy):
    """`trainer.strategy: fsdp2`. All ranks share one replica; checkpoints are gathered into one file, as other strategies have."""

    def __init__(self, **options: Any) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False, **options)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Checkpoints of one device, of DDP and of this strategy alike: all keep the parameters' state group by group.

        Parameters that no objective has used yet have no optimizer state, and need none.
        """
        model = self.lightning_module
        assert model is not None
        checkpoint = torch.load(checkpoint_path, mmap=True, map_location="cpu", weights_only=weights_only)
        check_tensors(checkpoint["state_dict"], model)
        set_model_state_dict(model, checkpoint.pop("state_dict"), options=WHOLE)
        names = {p: n for n, p in model.named_parameters()}
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            ours = [names[p] for group in optimizer.param_groups for p in group["params"]]
            name = dict(zip((i for group in saved["param_groups"] for i in group["params"]), ours, strict=True))
            share_state(model, optimizer, {name[i]: value for i, value in saved["state"].items()})
            for group, before in zip(optimizer.param_groups, saved["param_groups"], strict=True):
                group |= {key: value for key, value in before.items() if key != "params"}
        return checkpoint


def share_state(model: nn.Module, optimizer: torch.optim.Optimizer, states: dict[str, dict[str, Any]]) -> None:
    """State by the name of the parameter, in whole tensors, into an optimizer of shares; the others have none, settings stay."""
    names = {p: n for n, p in model.named_parameters()}
    kept = [dict(group) for group in optimizer.param_groups]
    groups = [{**group, "params": [names[p] for p in group["params"]]} for group in kept]
    whole: dict[str, Any] = {"state": states, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, whole, options=replace(WHOLE, strict=False))
    for group, before in zip(optimizer.param_groups, kept, strict=True):
        group |= before  # the way through makes lists of tuples
        for p in group["params"]:
            if names[p] not in states:
                optimizer.state.pop(p, None)  # else its steps would count from here on


StrategyRegistry.register("fsdp2", Sharded, description="FSDP2: parameters, gradients and optimizer state shared by all ranks")


def shard(pretrainer: nn.Module, mesh: DeviceMesh) -> None:
    """Split the parameters of a Pretrainer over a one-dimensional mesh, in place; once."""
    if hasattr(pretrainer, "unshard"):
        return
    for module in list(pretrainer.modules()):
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    fully_shard(pretrainer, mesh=mesh)
    for entry in ENTRIES:
        register_fsdp_forward_method(pretrainer, entry)
