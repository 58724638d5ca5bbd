"""Small runs of a Trainer in this process, or on every rank of the `ranks` fixture."""

import io
import tempfile
from functools import partial

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from PIL import Image as Pictures
from torch.distributed.tensor import DTensor

from headwater import distributed
from headwater.datamodules.datamodule import ShardDataModule, Source
from headwater.datamodules.writer import ShardWriter
from headwater.fusion import JointTokens
from headwater.modalities import Image, Text
from headwater.model import Model
from headwater.objectives import Causal, Contrastive, Masked, Weighted
from headwater.pretrainer import Pretrainer
from headwater.training.schedules import constant
from headwater.training.sharding import Sharded
from headwater.trunk import Trunk

UNCOUPLED = {"mask": partial(Masked, ratio=0.5, width=16), "next": partial(Causal, prefix=["image"])}
COUPLED = {**UNCOUPLED, "pair": Contrastive}
QUIET = {
    "num_sanity_val_steps": 0,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def write_pairs(folder):
    """20 pictures of noise with texts, in three shards."""
    with ShardWriter(folder / "{:03d}.tar", samples=7) as writer:
        for k in range(20):
            file = io.BytesIO()
            Pictures.fromarray(np.random.default_rng(k).integers(0, 255, (16, 16, 3), np.uint8)).save(file, "png")
            writer.write(f"{k:03d}", {"png": file.getvalue(), "txt": ("word " * (1 + k % 3) + str(k)).encode()})
    return str(folder)


def make(parts=None, **options):
    """A Pretrainer of two small encoders and a fusion."""
    torch.manual_seed(0)
    small = partial(Trunk, 16, depth=1, heads=2, mlp_ratio=2.0)
    model = Model({"image": Image(small(), size=16), "text": Text(small(), length=24)}, lambda w: JointTokens(w, small()), space=8)
    return Pretrainer(model, partial(Weighted, parts=parts or UNCOUPLED), **{"schedule": constant, **options})


class OneOfSeveral(LightningEnvironment):
    """The group exists already: `ranks` made it."""

    creates_processes_externally = True

    def world_size(self):
        return distributed.world()

    def global_rank(self):
        return distributed.rank()

    local_rank = global_rank

    def node_rank(self):
        return 0


def trainer(steps=4, sharded=False, **options):
    """On one process, or by DDP, or by FSDP2, on all ranks that there are."""
    strategy = "auto"
    if distributed.world() > 1:
        strategy = Sharded() if sharded else DDPStrategy(find_unused_parameters=True)
        strategy.cluster_environment = OneOfSeveral()
    own = {
        "accelerator": "cpu",
        "default_root_dir": tempfile.gettempdir(),
        "devices": distributed.world(),
        "strategy": strategy,
        "use_distributed_sampler": False,
    }
    return pl.Trainer(max_steps=steps, **{**own, **QUIET, **options})


def pairs(shards, batch_size=5, **options):
    """The data of `write_pairs`."""
    return ShardDataModule(train={"pairs": Source(shards)}, batch_size=batch_size, workers=0, **options)


def whole(x):
    """A shared tensor from all ranks."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()
