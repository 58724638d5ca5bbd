import lightning.pytorch as pl
import pytest
import runs
import torch
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from headwater import cli
from headwater.datamodules.datamodule import ShardDataModule, Source
from headwater.datamodules.writer import ShardWriter
from headwater.hub import load_backbone
from headwater.modalities import Text
from headwater.model import Model
from headwater.objectives import Causal
from headwater.pretrainer import Pretrainer
from headwater.training.averaging import Average, kept
from headwater.training.schedules import Linear, constant
from headwater.trunk import Trunk


class Notes(pl.Callback):
    """What the backbone was after every step, and during validation; it comes before or after the average."""

    def __init__(self):
        self.steps, self.seen = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(state(pl_module.backbone))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.seen.append(state(pl_module.backbone))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    with ShardWriter(folder / "{:03d}.tar", samples=7) as writer:
        for k in range(20):
            writer.write(f"{k:03d}", {"txt": (f"word {k} " * (1 + k % 3)).encode()})
    return str(folder)


def state(module):
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in module.state_dict().items()}
    return {n: p.detach().clone() for n, p in whole.items()}


def fit(shards, average, steps=6, sharded=False, checkpoint=None, save=None, callbacks=(), validate=False, **more):
    """Trains and returns (the trained backbone, its average, the trainer and the Pretrainer)."""
    torch.manual_seed(0)
    model = Model({"text": Text(Trunk(16, depth=1, heads=2), length=16)})
    pretrainer = Pretrainer(model, Causal, lambda groups: torch.optim.SGD(groups, lr=0.5, momentum=0.9), schedule=constant)
    held = {"held": Source(shards)} if validate else None
    data = ShardDataModule(train={"texts": Source(shards)}, held_out=held, batch_size=4, workers=0)
    trainer = runs.trainer(steps, sharded, callbacks=[average, *callbacks], **more)
    trainer.fit(pretrainer, data, ckpt_path=checkpoint, weights_only=True)
    if save:
        trainer.save_checkpoint(save)
    return state(pretrainer.backbone), state(kept(pretrainer)), trainer, pretrainer


def mean(states):
    return {n: torch.stack([s[n].double() for s in states]).mean(0).to(states[0][n].dtype) for n in states[0]}


def moving(states, momentum):
    """e = a e + (1 - a) theta from the first on, a never above count / (count + 1)."""
    average = states[0]
    for count, theta in enumerate(states[1:], 1):
        a = min(momentum(count + 1) if callable(momentum) else momentum, count / (count + 1))
        average = {n: a * average[n] + (1 - a) * theta[n] for n in theta}
    return average


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"momentum": 0.6}, lambda s: moving(s, 0.6)),
        ({"momentum": Linear(0.2, 0.8)}, lambda s: moving(s, lambda step: 0.2 + 0.6 * step / 6)),
        ({"momentum": 1.0}, mean),
        ({"momentum": 1.0, "start": 0.5}, lambda s: mean(s[2:])),
        ({"momentum": 1.0, "every": 2}, lambda s: mean(s[1::2])),
        ({"latest": 3}, lambda s: mean(s[-3:])),
        ({"latest": 2, "every": 3}, lambda s: mean(s[2::3])),
        ({"latest": 9}, mean),
    ],
)
def test_it_is_the_average_of_what_the_backbone_was(shards, options, expected):
    notes = Notes()
    trained, average, _, _ = fit(shards, Average(**options), callbacks=[notes])
    assert_close(average, expected(notes.steps), rtol=1e-5, atol=1e-6)
    assert_close(trained, notes.steps[-1], rtol=0, atol=0)
    assert any((average[n] - trained[n]).abs().max() > 1e-3 for n in trained)


def test_evaluation_sees_the_average_and_training_goes_on_without_it(shards):
    plain = Notes()
    fit(shards, Average(), steps=6, callbacks=[plain])
    notes, average = Notes(), Average(momentum=1.0, start=0.5)
    trained, averaged, trainer, pretrainer = fit(
        shards,
        average,
        steps=6,
        callbacks=[notes],
        validate=True,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
    )
    assert_close(notes.steps, plain.steps, rtol=0, atol=0)
    assert_close(notes.seen[0], notes.steps[1], rtol=0, atol=0)  # before its start: the weights themselves
    assert_close(notes.seen[1:], [mean(notes.steps[2:4]), mean(notes.steps[2:6])], rtol=1e-5, atol=1e-6)
    trainer.validate(pretrainer, datamodule=trainer.datamodule, verbose=False)
    assert_close(notes.seen[-1], averaged, rtol=0, atol=0)
    assert_close(state(pretrainer.backbone), trained, rtol=0, atol=0)


def test_without_a_snapshot_it_is_the_weights_themselves(shards):
    trained, average, _, _ = fit(shards, Average(every=100))
    assert_close(average, trained, rtol=0, atol=0)


class Saves(pl.Callback):
    """Writes a checkpoint after a step, in front of the average or behind it."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("options", [{"momentum": 0.6}, {"latest": 2, "every": 2}], ids=str)
def test_a_resumed_run_equals_the_uninterrupted_one(shards, tmp_path, options, before):
    path, average = tmp_path / "4.ckpt", Average(**options)
    other = pl.Callback()
    straight = fit(shards, Saves(4, path) if before else average, callbacks=[average if before else Saves(4, path), other])[:2]
    resumed = fit(shards, Average(**options), checkpoint=path)[:2]
    assert all(torch.equal(a[n], b[n]) for a, b in zip(straight, resumed) for n in a)


def test_the_backbone_in_a_checkpoint_is_the_trained_one(shards, tmp_path):
    trained, average, _, _ = fit(shards, Average(momentum=0.6), save=tmp_path / "last.ckpt")
    loaded = load_backbone(tmp_path / "last.ckpt").model.state_dict()
    assert_close(loaded, trained, rtol=0, atol=0)
    inside = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    prefix = "average.teacher.module."
    assert_close({n.removeprefix(prefix): w for n, w in inside.items() if n.startswith(prefix)}, average, rtol=0, atol=0)


def on_ranks(shards, options, sharded):
    return fit(shards, Average(**options), sharded=sharded, validate=True, limit_val_batches=1)[:2]


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
@pytest.mark.parametrize("options", [{"momentum": 0.6}, {"latest": 2, "every": 2}], ids=str)
def test_two_ranks_keep_what_one_process_keeps(ranks, shards, options, sharded):
    one = fit(shards, Average(**options))[:2]
    first, second = ranks(on_ranks, shards, options, sharded)
    assert all(torch.equal(a[n], b[n]) for a, b in zip(first, second) for n in a)
    assert_close(first, one, rtol=1e-4, atol=1e-5)


def shared_notes(shards):
    notes = Notes()
    _, average, _, _ = fit(
        shards, Average(momentum=0.6), sharded=True, callbacks=[notes], validate=True, val_check_interval=6,
        check_val_every_n_epoch=None, limit_val_batches=1,
    )  # fmt: skip
    return notes.seen[-1], average


def test_shares_are_evaluated_whole(ranks, shards):
    for seen, average in ranks(shared_notes, shards):
        assert_close(seen, average, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"momentum": 1.5}, {"latest": 0}, {"every": 0}, {"start": 1.0}], ids=str)
def test_bad_settings_are_refused(options):
    with pytest.raises(ValueError, match="found"):
        Average(**options)


@pytest.mark.slow
def test_the_average_is_exported_by_name(tmp_path, monkeypatch):
    """`headwater fit` on a recipe that keeps one: the card says so, and the checkpoint holds both."""
    monkeypatch.chdir(tmp_path)
    small = {
        "trainer.max_steps": 3,
        "trainer.accelerator": "cpu",
        "data.batch_size": 4,
        "data.workers": 0,
        "trainer.limit_val_batches": 0,
    }
    cli.main(["fit", "--config", "longer", *(word for name, value in small.items() for word in (f"--{name}", str(value)))])
    folder = tmp_path / "runs/longer/000"
    backbone = load_backbone(folder / "backbone")
    assert backbone.card["average"] is True
    inside = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(value, inside[f"average.teacher.module.{name}"])
    assert not torch.equal(backbone.model.encoder("text").stem.weight, inside["backbone.encoders.text.stem.weight"])
