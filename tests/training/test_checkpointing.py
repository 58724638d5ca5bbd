"""Blocks that are computed again: bitwise the same gradients, fewer saved bytes, under one process, DDP and FSDP2."""

import copy

import lightning.pytorch as pl
import pytest
import timm
import torch
from contracts import cases
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from headwater import distributed
from headwater.modalities import Image
from headwater.model import Model
from headwater.objectives import Masked
from headwater.objectives.objective import weighted_sum
from headwater.pretrainer import Pretrainer, count
from headwater.training.checkpointing import Checkpointed, forgetful
from headwater.training.sharding import shard
from headwater.trunk import Trunk


def make(every=0, objective=Masked):
    torch.manual_seed(0)
    trunk = Trunk(32, depth=4, heads=2, drop_path=0.5)
    pretrainer = Pretrainer(Model({"image": Image(trunk, size=16, patch=4)}), objective).double()
    pretrainer.objective.start(pretrainer.backbone)
    if every:
        forgetful(pretrainer, every)
    return pretrainer.train()


def gradients(pretrainer, rows=range(6)):
    """Of one step, the bytes that it saved, and how many places of its trunk's blocks forget."""
    batch = cases.batch(pretrainer.readers, cases.examples(pretrainer.readers, 6), list(rows))
    task = pretrainer.hide(batch)
    saved = {}

    def keep(x):
        saved[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    torch.manual_seed(3 + distributed.rank())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = weighted_sum(pretrainer.ask(task), count([pretrainer.objective.numbers(task)]), distributed.world())
    kept = sum(saved.values())
    loss.backward()
    return {n: p.grad for n, p in pretrainer.named_parameters() if p.grad is not None}, kept


def test_gradients_are_bitwise_the_same_and_less_is_kept():
    plain, most = gradients(make())
    assert any(g.abs().max() > 0 for g in plain.values())
    kept = {}
    for every in (1, 2):
        found, kept[every] = gradients(make(every))
        assert all(torch.equal(found[n], g) for n, g in plain.items())
    assert kept[1] < kept[2] < most
    assert kept[1] < 0.5 * most


def test_every_second_block_and_decoders_too():
    pretrainer = make()
    blocks = pretrainer.backbone.encoder("image").trunk.blocks
    assert forgetful(copy.deepcopy(pretrainer)) > len(blocks)
    forgetful(pretrainer, 2)
    assert [b.forgets for b in blocks] == [True, False, True, False]
    assert len({type(b) for b in blocks}) == 1
    assert forgetful(pretrainer) == forgetful(pretrainer) > len(blocks)


def test_evaluation_and_copies_are_as_before():
    pretrainer = make()
    names = set(pretrainer.state_dict())
    forgetful(pretrainer)
    other = copy.deepcopy(pretrainer)
    assert set(other.state_dict()) == names
    batch = cases.batch(pretrainer.readers, cases.examples(pretrainer.readers, 3))
    assert_close(other.eval().predict_step(batch, 0), make().eval().predict_step(batch, 0), rtol=0, atol=0)


def test_towers_of_other_libraries_and_batch_statistics():
    vit = timm.create_model("test_vit", drop_path_rate=0.2).double().train()
    other = copy.deepcopy(vit)
    assert forgetful(other) == len(vit.blocks)
    found = []
    for model in (vit, other):
        torch.manual_seed(1)
        x = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0)).double()
        model(x).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert forgetful(nn.Sequential(nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(2)))) == 0


def test_bad_arguments_and_models_without_blocks():
    with pytest.raises(ValueError, match="found every=0"):
        Checkpointed(0)
    with pytest.warns(UserWarning, match="found no blocks"):
        Checkpointed().setup(None, pl.LightningModule(), "fit")


def on_ranks(every, kind):
    """Gradients of two ranks, each with half of the samples."""
    pretrainer = make(every)
    if kind == "fsdp2":
        shard(pretrainer, init_device_mesh("cpu", (2,)))
        found = gradients(pretrainer, range(distributed.rank(), 6, 2))[0]
        return {n: g.full_tensor() for n, g in found.items()}
    wrapped = DistributedDataParallel(Asked(pretrainer), find_unused_parameters=True)
    batch = cases.batch(pretrainer.readers, cases.examples(pretrainer.readers, 6), list(range(distributed.rank(), 6, 2)))
    torch.manual_seed(3 + distributed.rank())
    wrapped(pretrainer.hide(batch)).backward()
    return {n: p.grad for n, p in pretrainer.named_parameters() if p.grad is not None}


class Asked(nn.Module):
    """The loss as one forward pass, as DDP wants it."""

    def __init__(self, pretrainer):
        super().__init__()
        self.pretrainer = pretrainer

    def forward(self, task):
        return weighted_sum(self.pretrainer.ask(task), count([self.pretrainer.objective.numbers(task)]), distributed.world())


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks(ranks, kind):
    plain, again = (ranks(on_ranks, every, kind)[0] for every in (0, 1))
    assert plain
    assert all(torch.equal(again[n], g) for n, g in plain.items())
