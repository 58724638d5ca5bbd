"""Steps on one part after the other: their sum is its second-order expansion, and runs of it work."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from contracts import cases
from runs import COUPLED, make, pairs, trainer, whole, write_pairs
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing import assert_close

from headwater import distributed
from headwater.objectives import Causal, Contrastive, Masked, Objective, Term, Weighted
from headwater.objectives.common_minima import CommonMinima, displacement
from headwater.objectives.divided import Groups, divided
from headwater.objectives.objective import count, weighted_sum
from headwater.objectives.probe import Probe
from headwater.pretrainer import Pretrainer
from headwater.training.schedules import constant
from headwater.training.sharding import shard


class Bowl(Objective):
    """(theta - c) A (theta - c) / 2."""

    def __init__(self, model, a, c):
        super().__init__()
        self.a, self.c = a, c

    def numbers(self, batch):
        return {"bowl": torch.ones((), dtype=torch.int64)}

    def forward(self, model, batch):
        away = model.theta - self.c
        return {"bowl": Term(away @ self.a @ away / 2, self.numbers(batch)["bowl"])}


class Point(nn.Module):
    """A learner that is a point."""

    def __init__(self, d):
        super().__init__()
        self.theta = nn.Parameter(torch.randn(d, dtype=torch.float64, generator=torch.Generator().manual_seed(9)))


def bowl(seed, d=5):
    drawn = torch.Generator().manual_seed(seed)
    root = torch.randn(d, d, dtype=torch.float64, generator=drawn)
    return root @ root.T / d + torch.eye(d, dtype=torch.float64), torch.randn(d, dtype=torch.float64, generator=drawn)


BATCH = {"seed": torch.zeros(1, dtype=torch.int64), "step": 0, "progress": 0.0}


def bowls(number=3):
    """A learner, several quadratics, and what is asked of them one by one."""
    model = Point(5)
    shapes = {f"part{k}": bowl(k) for k in range(number)}
    inner = Weighted(model, {name: partial(Bowl, a=a, c=c) for name, (a, c) in shapes.items()})
    probe = Probe(model, model, lambda ask: ask())
    return probe, divided(probe, inner, model, BATCH), shapes


def expansion(theta, shapes, order, length):
    """sum_k u_k - length sum_k sum_(j < k) (I - u_k u_k^T) H_k u_j / |g_k|, with everything at the start."""
    slopes = [shapes[name][0] @ (theta - shapes[name][1]) for name in order]
    u = [g / g.norm() for g in slopes]
    total = torch.stack(u).sum(0)
    for k, name in enumerate(order):
        for j in range(k):
            bent = shapes[name][0] @ u[j]
            total = total - length * (bent - u[k] * (u[k] @ bent)) / slopes[k].norm()
    return total


def test_the_displacement_is_its_second_order_expansion():
    """The error falls with the square of the length; leaving the second order out, only with the length."""
    probe, parts, shapes = bowls()
    theta = probe.theta[0].detach().clone()
    order = ["part2", "part0", "part1", "part0"]
    errors, first = [], []
    for length in (4e-3, 2e-3, 1e-3):
        (moved,), norms = displacement(probe, parts, order, length)
        errors.append(float((moved - expansion(theta, shapes, order, length)).norm()))
        first.append(float((moved - expansion(theta, shapes, order, 0.0)).norm()))
        assert len(norms) == 4
        assert torch.equal(probe.theta[0], theta)
    assert errors[-1] < 1e-5
    assert all(3.8 < a / b < 4.2 for a, b in pairwise(errors))
    assert all(1.9 < a / b < 2.1 for a, b in pairwise(first))


def test_turns_are_plain_steps_of_one_length():
    probe, parts, shapes = bowls()
    theta, total = probe.theta[0].detach().clone(), 0
    start = theta.clone()
    order = ["part1", "part2"]
    for name in order:
        a, c = shapes[name]
        slope = a @ (theta - c)
        total = total + slope / slope.norm()
        theta = theta - 0.3 * slope / slope.norm()
    (moved,), norms = displacement(probe, parts, order, 0.3)
    assert_close(moved, total)
    assert_close(start - theta, 0.3 * moved)
    assert_close(norms[0], float((shapes["part1"][0] @ (start - shapes["part1"][1])).norm()))


def test_over_both_orders_it_follows_the_inner_product_of_gradients():
    """With plain steps: mean over orders of the second-order term = -length / 2 * grad <u_1, u_2>, by autograd."""
    probe, parts, shapes = bowls(2)
    theta = probe.theta[0].detach().clone().requires_grad_()
    u = [shapes[n][0] @ (theta - shapes[n][1]) for n in ("part0", "part1")]
    u = [g / g.norm() for g in u]
    (agree,) = torch.autograd.grad(u[0] @ u[1], theta)
    length = 1e-4
    both = [displacement(probe, parts, order, length)[0][0] for order in (["part0", "part1"], ["part1", "part0"])]
    second = (torch.stack(both).mean(0) - (u[0] + u[1]).detach()) / length
    # J_k = d u_k / d theta is (I - u u^T) H / |g|; grad <u_1, u_2> = J_1^T u_2 + J_2^T u_1, and the steps see J_k u_j
    jacobians = torch.autograd.functional.jacobian(
        lambda t: torch.stack([(g := shapes[n][0] @ (t - shapes[n][1])) / g.norm() for n in ("part0", "part1")]), theta.detach()
    )
    assert_close(second, -(jacobians[0] @ u[1] + jacobians[1] @ u[0]).detach() / 2, rtol=1e-3, atol=1e-5)
    assert_close(agree, (jacobians[0].T @ u[1] + jacobians[1].T @ u[0]).detach())
    assert second @ agree < 0  # the optimizer goes against `moved`, towards gradients that agree


PARTS = partial(
    Weighted,
    parts={"mask": partial(Masked, modality="text", mode="substitute"), "next": partial(Causal, modality="text")},
)
INNER = {
    "parts": PARTS,
    "terms": partial(Contrastive, pairs=[("image", "text", 1.0), ("image", "audio", 0.5)]),
    "one term": partial(Causal, modality="text"),
}


def stepped(rows, name, split=False, fuse=None, prepare=True, **options):
    """The gradient that the optimizer gets, by name."""
    torch.manual_seed(0)
    model = cases.model(fuse=fuse)
    pretrainer = Pretrainer(model, partial(CommonMinima, inner=INNER[name], **options)).double()
    readers = cases.readers(model, pretrainer.objective)
    rows = rows[distributed.rank()]
    batch = cases.batch(readers, cases.examples(readers, 7), rows) | {"origin": torch.tensor(rows) % 2, "progress": 0.5, "step": 4}
    if split and distributed.world() > 1:
        shard(pretrainer, init_device_mesh("cpu", (distributed.world(),)))
    probe = Probe(pretrainer, pretrainer.backbone, pretrainer.call, 3)
    before = [whole(p) for p in pretrainer.parameters()]
    batch = pretrainer.objective.before_step(probe, batch) if prepare else batch
    assert all(torch.equal(a, whole(b)) for a, b in zip(before, pretrainer.parameters(), strict=True))
    task = pretrainer.hide(batch)
    weighted_sum(pretrainer.ask(task), count([pretrainer.objective.numbers(task)]), 1).backward()
    probe.give(apart=False)
    return {n: whole(p.grad) for n, p in pretrainer.named_parameters() if p.grad is not None and whole(p.grad).any()}


def test_short_turns_are_the_plain_gradient():
    """One part: up to the curvature along its own step. Several: a sum of the same length."""
    plain = stepped([list(range(7))], "one term", prepare=False)
    found = stepped([list(range(7))], "one term", stride=0.0)
    assert_close(found, plain, rtol=1e-7, atol=1e-12)
    twice = stepped([list(range(7))], "one term", stride=0.0, rounds=2)
    assert_close(twice, plain, rtol=1e-7, atol=1e-12)
    a, b = (stepped([list(range(7))], "parts", stride=s) for s in (0.0, 0.01))
    assert a.keys() == b.keys()
    assert any((a[n] - b[n]).norm() > 1e-3 * a[n].norm() for n in a)


SHARES = [[0, 2, 3, 5, 6], [1, 4]]


def on_ranks(shares, name, split, groups):
    return stepped(shares, name, split, "JointTokens", stride=0.01, rounds=2, groups=groups)


@pytest.mark.parametrize("split", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize(("name", "groups"), [("parts", None), ("terms", None), ("one term", Groups(2))])
def test_two_ranks_take_turns_as_one_process_does(ranks, name, groups, split):
    alone = on_ranks([sorted(SHARES[0] + SHARES[1])], name, split, groups)
    for found in ranks(on_ranks, SHARES, name, split, groups):
        assert_close(found, alone, rtol=1e-5, atol=1e-9)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def fit(shards, steps=5, sharded=False, resume=None, save=None):
    """Parameters after some steps, and what was logged in the last one."""
    objective = partial(CommonMinima, inner=partial(Weighted, parts=COUPLED), stride=0.01)
    pretrainer = Pretrainer(make().backbone, objective, partial(torch.optim.AdamW, lr=1e-3), constant, clip=0.1)
    run = trainer(steps, sharded)
    run.fit(pretrainer, pairs(shards, batch_size=6), ckpt_path=resume, weights_only=resume and True)
    if save:
        run.save_checkpoint(save)
    return {n: whole(p) for n, p in pretrainer.named_parameters()}, {n: x.clone() for n, x in run.callback_metrics.items()}


def test_a_run_that_was_cut_ends_like_the_uninterrupted_one(shards, tmp_path):
    once, told = fit(shards)
    assert 0 < told["train/moved"] <= 1
    fit(shards, 3, save=tmp_path / "three.ckpt")
    again, _ = fit(shards, resume=tmp_path / "three.ckpt")
    assert all(torch.equal(once[n], again[n]) for n in once)


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_ranks_learn_what_one_process_learns(ranks, shards, sharded):
    alone, _ = fit(shards, 3)
    (a, _), (b, _) = ranks(fit, shards, 3, sharded)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert_close(a, alone, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("options", [{"stride": -1.0}, {"rounds": 0}])
def test_what_cannot_work_is_refused(options):
    with pytest.raises(ValueError, match="expected a stride of 0 or more"):
        CommonMinima(cases.model(), PARTS, **options)
