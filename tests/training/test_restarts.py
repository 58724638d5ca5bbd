"""Runs whose weights have a form: they resume bitwise, restart on their steps, and several ranks run as one process does."""

from functools import partial

import lightning.pytorch as pl
import pytest
import runs
import torch
from jsonargparse import ArgumentParser
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from headwater.datamodules.datamodule import ShardDataModule, Source
from headwater.datamodules.writer import ShardWriter
from headwater.forms import NVFP4, LoRA, LowRank, Masked, SparseLowRank, Ternary
from headwater.init import Normal
from headwater.modalities import Text
from headwater.model import Model
from headwater.objectives import Causal
from headwater.objectives.objective import Schedule
from headwater.pretrainer import Pretrainer
from headwater.training import Jagged, Restarts
from headwater.training.schedules import Cosine, Linear, Step, constant
from headwater.trunk import Trunk

FORMS = {
    "ReLoRA": lambda: [LoRA(rank=2)],
    "LowRank": lambda: [LowRank(rank=3)],
    "Ternary": lambda: [Ternary(strength=Linear(0.0, 1.0, 0.5))],
    "Masked": lambda: [Masked(sparsity=Step(0.5, 0.0, 0.6), by="magnitude")],
    "SparseLowRank": lambda: [SparseLowRank(rank=2, density=0.1)],
    "NVFP4": lambda: [NVFP4()],
}
RESTART = ("ReLoRA", "LowRank", "Ternary")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    with ShardWriter(folder / "{:03d}.tar", samples=16) as writer:
        for k in range(24):
            writer.write(f"{k:03d}", {"txt": ("water and " * (1 + k % 3) + str(k)).encode()})
    return str(folder)


def fit(shards, name, steps=6, until=None, checkpoint=None, sharded=False):
    """Parameters and buffers after a run of so many steps, which may end early, or go on from a checkpoint."""
    model = Model({"text": Text(Trunk(16, 2, 2, mlp_ratio=2.0), length=24)}, forms=FORMS[name]())
    pretrainer = Pretrainer(
        model, Causal, partial(torch.optim.AdamW, lr=0.003, eps=1e-5), schedule=Jagged(constant, 2), init=Normal(0.2)
    )
    data = ShardDataModule(train={"texts": Source(shards)}, batch_size=5, workers=0)
    callbacks = [*([Restarts(every=3)] if name in RESTART else []), *([Until(until)] if until else [])]
    trainer = runs.trainer(steps, sharded, callbacks=callbacks)
    resumed = checkpoint is not None and checkpoint.exists()
    trainer.fit(pretrainer, data, ckpt_path=checkpoint if resumed else None, weights_only=True)
    if checkpoint is not None:
        trainer.save_checkpoint(checkpoint)
    state = {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in pretrainer.state_dict().items()}
    return state | {f"moment {i}": s["exp_avg"] for i, s in enumerate(trainer.optimizers[0].state.values()) if not sharded}


class Until(pl.Callback):
    """Ends the run after so many steps, as a kill would."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= self.step


@pytest.mark.parametrize("until", [2, 3])
@pytest.mark.parametrize("name", FORMS)
def test_a_resumed_run_equals_the_uninterrupted_one_bitwise(shards, tmp_path, name, until):
    whole = fit(shards, name)
    fit(shards, name, until=until, checkpoint=tmp_path / "last.ckpt")
    resumed = fit(shards, name, checkpoint=tmp_path / "last.ckpt")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(p, resumed[n]) for n, p in whole.items())


def test_a_weight_moves_only_by_merges(shards):
    kept = "backbone.encoders.text.trunk.blocks.1.mlp.fc2.base.weight"
    before, early, late = (fit(shards, "ReLoRA", until=until)[kept] for until in (1, 3, 4))
    assert torch.equal(before, early)
    assert torch.linalg.matrix_rank(late - early) == 2


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
@pytest.mark.parametrize("name", ["ReLoRA", "LowRank", "Masked"])
def test_two_ranks_restart_and_prune_as_one_process_does(ranks, shards, name, sharded):
    whole = fit(shards, name)
    a, b = ranks(fit, shards, name, 6, None, None, sharded)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert_close(
        {n: p for n, p in a.items() if "moment" not in n}, {n: whole[n] for n in a if "moment" not in n}, rtol=1e-3, atol=1e-4
    )


def test_restarts_want_something_to_restart(shards):
    with pytest.raises(ValueError, match="every=0"):
        Restarts()
    model = Model({"text": Text(Trunk(16, 1, 2), length=24)})
    trainer = runs.trainer(1, callbacks=[Restarts(every=1)])
    with pytest.raises(ValueError, match="nothing to restart"):
        trainer.fit(Pretrainer(model, Causal), ShardDataModule(train={"texts": Source(shards)}, batch_size=5, workers=0))


def test_the_jagged_schedule_is_one_line_of_a_recipe():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--schedule", type=Schedule)
    parsed = parser.parse_object(
        {"schedule": {"class_path": "Jagged", "init_args": {"inner": {"class_path": "Cosine"}, "cycles": 3}}}
    )
    made = parser.instantiate_classes(parsed).schedule
    assert isinstance(made, Jagged)
    assert isinstance(made.inner, Cosine)
