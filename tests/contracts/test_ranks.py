"""N ranks equal one process, for every objective, with uneven and even empty shares."""

import pytest
import torch
import torch.distributed as dist
from contracts import cases
from torch.testing import assert_close

from headwater import distributed
from headwater.objectives.objective import weighted_sum
from headwater.pretrainer import count

SHARES = {
    "uneven": [[0, 2, 3, 5, 6], [1, 4]],
    "three": [[0, 2], [3, 5, 6], [1, 4]],
    "one has no text": [[0, 1, 2, 4, 5, 6], [3]],
    "one has no action": [[2], [0, 1, 3, 4, 5, 6]],
}


def gradients(name, shares, optimizer_steps=0):
    """What the Pretrainer does in a step, in float64: (loss over all ranks, gradient per parameter) on this rank."""
    model = cases.model()
    objective = cases.objective(name, model)
    readers = cases.readers(model, objective)
    batch = cases.batch(readers, cases.examples(readers), shares[distributed.rank()])
    parameters = dict(torch.nn.ModuleList([model, objective]).named_parameters())
    step = torch.optim.SGD(parameters.values(), lr=0.1)
    for number in range(max(1, optimizer_steps)):
        with torch.no_grad():
            task = objective.task(batch, objective.look(model, batch))
        numbers = count([objective.numbers(task)])
        loss = weighted_sum(objective(model, task), numbers, distributed.world())
        step.zero_grad()
        loss.backward()
        for p in parameters.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if distributed.world() > 1:  # as DistributedDataParallel
                dist.all_reduce(p.grad)
                p.grad /= distributed.world()
        if optimizer_steps:
            step.step()
            objective.after_step(model, number / optimizer_steps)
    if optimizer_steps:
        return {n: p.detach() for n, p in parameters.items()}
    return distributed.total(loss) / distributed.world(), {n: p.grad for n, p in parameters.items()}


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("name", cases.OBJECTIVES)
def test_ranks_equal_one_process(pools, name, shares):
    loss, expected = gradients(name, [[number for share in SHARES[shares] for number in share]])
    assert any(g.any() for g in expected.values())
    for got_loss, got in pools[len(SHARES[shares])](gradients, name, SHARES[shares]):
        assert_close(got_loss, loss, rtol=1e-5, atol=1e-6)
        assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", cases.OBJECTIVES)
def test_all_ranks_hold_equal_parameters_after_four_steps(ranks, name):
    a, b = ranks(gradients, name, SHARES["uneven"], 4)
    assert all(torch.equal(a[n], b[n]) for n in a)
