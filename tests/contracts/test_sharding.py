"""Every fusion in a model of five kinds of signals, its parameters shared out by FSDP2: two ranks learn what one process learns."""

from functools import partial

import pytest
import torch
from contracts import cases
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from headwater import distributed
from headwater.objectives import Causal, Contrastive, Masked, Weighted
from headwater.objectives.objective import weighted_sum
from headwater.pretrainer import Pretrainer, count
from headwater.training.sharding import shard

SHARES = [[0, 2, 3, 5, 6], [1, 4]]


def objective(model):
    """Asks every modality through the fusion, and a pair before it."""
    parts = {name: lambda m, n=name: Masked(m, n, ratio=0.5, mode="substitute") for name in ("image", "audio", "video", "action")}
    follows = Causal if model.fusion.keeps_order else partial(Masked, mode="substitute")
    parts |= {"text": lambda m: follows(m, "text"), "pair": lambda m: Contrastive(m, "image", "text")}
    return Weighted(model, parts)


def step(shares, fuse="JointTokens", make=objective, steps=4, split=True):
    """Gradients of the first of several training steps, and parameters and buffers after them, in float64.

    split: several ranks share the parameters by FSDP2; else each has all of them, by DDP.
    """
    torch.manual_seed(0)
    model = cases.model(fuse=fuse)
    pretrainer = Pretrainer(model, cases.OBJECTIVES[make] if isinstance(make, str) else make).double()
    pretrainer.objective.start(model)
    readers = cases.readers(model, pretrainer.objective)
    batch = cases.batch(readers, cases.examples(readers), shares[distributed.rank()])
    entry = pretrainer.ask
    if distributed.world() > 1 and not split:
        entry = DistributedDataParallel(Asked(pretrainer), find_unused_parameters=True)
    elif distributed.world() > 1:
        shard(pretrainer, init_device_mesh("cpu", (distributed.world(),)))
        assert all(isinstance(p, DTensor) for p in pretrainer.parameters())
    optimizer = torch.optim.SGD(pretrainer.parameters(), lr=0.01)
    first = {}
    for number in range(steps):
        task = pretrainer.hide(batch)
        numbers = count([pretrainer.objective.numbers(task)])
        optimizer.zero_grad()
        weighted_sum(entry(task), numbers, distributed.world()).backward()
        first = first or {n: whole(p.grad) for n, p in pretrainer.named_parameters() if p.grad is not None}
        optimizer.step()
        pretrainer.objective.after_step(model, number / steps)
    return first, {n: whole(p) for n, p in pretrainer.state_dict().items()}


class Asked(torch.nn.Module):
    """A Pretrainer whose `forward` is what it asks the objective, as Lightning redirects it under DDP."""

    def __init__(self, pretrainer):
        super().__init__()
        self.pretrainer = pretrainer

    def forward(self, batch):
        return self.pretrainer.ask(batch)


def whole(x):
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def check(ranks, *what):
    """Two ranks learn what one process learns."""
    gradient, after = step([[*SHARES[0], *SHARES[1]]], *what)
    (got, a), (_, b) = ranks(step, SHARES, *what)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert {n for n, g in gradient.items() if g.any()} <= got.keys()
    assert_close({n: got[n] for n in gradient if n in got}, {n: g for n, g in gradient.items() if n in got}, rtol=1e-4, atol=1e-6)
    assert_close(a, after, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fuse", cases.FUSIONS)
def test_every_fusion(ranks, fuse):
    check(ranks, fuse)


STATEFUL = {
    "Contrastive momentum",
    "Contrastive past",
    "Contrastive views",
    "Masked features",
    "Masked quantiser",
    "Reconstructed moving",
}
FIRST = {name.split()[0]: name for name in reversed(cases.OBJECTIVES)}  # one case of every class


@pytest.mark.parametrize("name", sorted({*FIRST.values(), *STATEFUL, "SelfDistillation hidden"}))
def test_every_objective_with_its_teachers_and_queues(ranks, name):
    check(ranks, "JointTokens", name)


FAMILIES = {"Contrastive sigmoid", "Masked projection", "Causal prefix", "Flow context", "SelfDistillation"}


def long(ranks, name):
    """After 20 steps in float64, DDP, FSDP2 and one process agree to 1e-8, and ranks bitwise."""
    whole_batch = [[*SHARES[0], *SHARES[1]]]
    _, alone = step(whole_batch, "JointTokens", name, 20)
    for split in (False, True):
        (_, a), (_, b) = ranks(step, SHARES, "JointTokens", name, 20, split)
        assert all(torch.equal(a[n], b[n]) for n in a)
        assert_close(a, alone, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_twenty_steps_of_every_family(ranks, name):
    long(ranks, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(cases.OBJECTIVES) - FAMILIES))
def test_twenty_steps_of_every_objective(ranks, name):
    long(ranks, name)
