"""Whatever an objective remembers is in its state: teachers, queues, centres. Loaded into a new process, it goes on."""

import io

import pytest
import torch
from contracts import cases

from headwater.objectives.objective import Objective, weighted_sum
from headwater.pretrainer import Pretrainer, count

STEPS = 4


def built(name, start):
    """A Pretrainer of an objective and its optimizer, as a process makes them that has just begun."""
    torch.manual_seed(start)
    pretrainer = Pretrainer(cases.model(), cases.OBJECTIVES[name]).double()
    pretrainer.objective.start(pretrainer.backbone)
    return pretrainer, torch.optim.AdamW(pretrainer.parameters(), lr=0.01)


def go(pretrainer, optimizer, batch, steps):
    """The steps of a run of STEPS."""
    for number in steps:  # from 1 on: at 0 some refuse to begin without what a callback gives them
        torch.manual_seed(number)
        task = pretrainer.hide({**batch, "progress": (number - 1) / STEPS, "step": number})
        optimizer.zero_grad()
        weighted_sum(pretrainer.ask(task), count([pretrainer.objective.numbers(task)]), 1).backward()
        optimizer.step()
        pretrainer.objective.after_step(pretrainer.backbone, number / STEPS)


def remembers(name):
    """Objectives that are moved once per step, or hold tensors that do not train."""
    objective = built(name, 0)[0].objective
    own = type(objective).after_step is not Objective.after_step
    return own or any(True for _ in objective.buffers()) or not all(p.requires_grad for p in objective.parameters())


FIRST = {name.split()[0]: name for name in reversed(cases.OBJECTIVES)}.values()  # one case of every class
NAMES = [pytest.param(name, marks=[] if name in FIRST else [pytest.mark.slow]) for name in sorted(cases.OBJECTIVES)]


@pytest.mark.parametrize("name", NAMES)
def test_a_new_process_goes_on_with_the_state_alone(name):
    if not remembers(name):
        pytest.skip("nothing but parameters that train")
    (straight, its), (first, own) = built(name, 0), built(name, 0)
    batch = cases.batch(straight.readers, cases.examples(straight.readers))
    go(straight, its, batch, range(1, STEPS + 1))
    go(first, own, batch, range(1, 3))
    file = io.BytesIO()
    torch.save([first.state_dict(), own.state_dict()], file)
    file.seek(0)
    second, its_own = built(name, 1)
    weights, moments = torch.load(file, weights_only=True)
    second.load_state_dict(weights)
    its_own.load_state_dict(moments)
    go(second, its_own, batch, range(3, STEPS + 1))
    expected = straight.state_dict()
    differing = [n for n, x in second.state_dict().items() if not torch.equal(x.nan_to_num(), expected[n].nan_to_num())]
    assert not differing
