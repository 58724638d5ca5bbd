"""Every fusion in a model of five kinds of signals, its parameters shared out by FSDP2: two ranks learn what one process learns."""

from functools import partial

import pytest
import torch
from contracts import cases
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
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


def step(shares, fuse="JointTokens", make=objective):
    """Loss and gradients of one training step, and parameters and buffers after four, in float64."""
    torch.manual_seed(0)
    model = cases.model(fuse=fuse)
    pretrainer = Pretrainer(model, cases.OBJECTIVES[make] if isinstance(make, str) else make).double()
    pretrainer.objective.start(model)
    batch = cases.batch(pretrainer.readers, cases.examples(pretrainer.readers), shares[distributed.rank()])
    if distributed.world() > 1:
        shard(pretrainer, init_device_mesh("cpu", (distributed.world(),)))
        assert all(isinstance(p, DTensor) for p in pretrainer.parameters())
    optimizer = torch.optim.SGD(pretrainer.parameters(), lr=0.01)
    first = {}
    for number in range(4):
        task = pretrainer.hide(batch)
        numbers = count([pretrainer.objective.numbers(task)])
        optimizer.zero_grad()
        weighted_sum(pretrainer.ask(task), numbers, distributed.world()).backward()
        first = first or {n: whole(p.grad) for n, p in pretrainer.named_parameters() if p.grad is not None}
        optimizer.step()
        pretrainer.objective.after_step(model, number / 4)
    return first, {n: whole(p) for n, p in pretrainer.state_dict().items()}


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
