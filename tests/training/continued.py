"""A small language model that goes on from old texts to new ones, on one rank or on two: what tests of callbacks run."""

from functools import partial

import lightning.pytorch as pl
import torch
from runs import trainer, whole

from headwater.datamodules.datamodule import ShardDataModule, Source
from headwater.datamodules.writer import ShardWriter
from headwater.modalities import Text
from headwater.model import Model
from headwater.objectives import Causal, Weighted
from headwater.pretrainer import Pretrainer
from headwater.training.schedules import constant
from headwater.trunk import Trunk

NEXT = {"next": Causal}
ADAM = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)


def write(folder):
    """Shards of old and of new texts."""
    for name, words in (("old", "abc"), ("new", "xyz")):
        with ShardWriter(folder / f"{name}-{{:03d}}.tar", samples=8) as writer:
            for k in range(24):
                writer.write(f"{k:03d}", {"txt": (words * (1 + k % 4) + str(k)).encode()})
    return str(folder)


def language_model(depth=2):
    torch.manual_seed(0)
    return Model({"text": Text(Trunk(16, depth=depth, heads=2, mlp_ratio=2.0), length=16)})


class Run:
    """What became of a run. trainer, pretrainer, callbacks; parameters: whole, by name."""

    def __init__(self, trainer, pretrainer, callbacks):
        self.trainer, self.pretrainer, self.callbacks = trainer, pretrainer, callbacks
        self.parameters = {n: whole(p) for n, p in pretrainer.named_parameters()}


def run(
    folder,
    callbacks=(),
    parts=None,
    weights=None,
    steps=4,
    strategy=None,
    optimizer=ADAM,
    resume=None,
    save=None,
    train=None,
    clip=0.0,
    micro=1,
    notice=2,
    schedule=constant,
    limit=None,
):
    """Fit. callbacks: functions that make them; train: name -> weight, of "old" and "new"; limit: steps after which it stops."""
    pretrainer = Pretrainer(
        language_model(),
        partial(Weighted, parts=parts or NEXT, weights=weights),
        optimizer=optimizer,
        clip=clip,
        micro=micro,
        schedule=schedule,
    )
    data = ShardDataModule(
        train={name: Source(f"{folder}/{name}-*.tar", weight=w) for name, w in (train or {"new": 1.0}).items()},
        held_out={"old": Source(f"{folder}/old-*.tar")},
        batch_size=4,
        workers=0,
        notice=notice,
    )
    made = [make() for make in callbacks]
    options = {"callbacks": [*made, *([Stop(limit)] if limit else [])], "num_sanity_val_steps": 0, "limit_val_batches": 0}
    fitting = trainer(steps, strategy == "fsdp2", **options)
    fitting.fit(pretrainer, data, ckpt_path=resume, weights_only=True)
    if save:
        fitting.save_checkpoint(save)
    return Run(fitting, pretrainer, made)


class Stop(pl.Callback):
    """Ends a run early, as a job does whose time is up."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.steps


def parameters(*args, **options):
    """What a rank answers to a test."""
    return run(*args, **options).parameters
