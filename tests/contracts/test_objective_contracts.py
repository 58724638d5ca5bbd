"""What every exported objective keeps, whatever it hides."""

import copy

import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater import objectives

every = pytest.mark.parametrize("name", cases.OBJECTIVES)

# Why a parameter of the model may go without gradient from one objective; all objectives together must reach every one.
EXCUSES = {
    ".head.": "answers only generative objectives",
    ".modulation.": "wakes only when a condition comes in",
    "projections.": "used only where samples are pooled",
    ".registers.": "in causal attention nothing that is asked sees them",
    "fusion.": "left out where fused features would leak the pair",
}


def test_every_export_has_a_case(made):
    swept = {type(made(name)[1]).__name__ for name in cases.OBJECTIVES}
    assert set(objectives.__all__) - {"Objective", "Term"} <= swept


@pytest.fixture(scope="module")
def lacked(made):
    """name -> the parameters of the model, and of the objective, that get no gradient: found once per objective."""
    found = {}

    def ask(name):
        if name not in found:
            model, objective, readers, samples = made(name)
            model, objective = copy.deepcopy((model, objective))
            cases.loss(cases.terms(objective, model, cases.batch(readers, samples))[0]).backward()
            found[name] = lacking(model), lacking(objective)
        return found[name]

    return ask


def lacking(module):
    """Parameters that should learn and get nothing; teachers, which are frozen, should not."""
    wanted = ((n, p) for n, p in module.named_parameters() if p.requires_grad)
    return {n for n, p in wanted if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()}


@every
def test_loss_is_finite_and_numbers_need_no_model(name, made):
    model, objective, readers, samples = made(name)
    found, task = cases.terms(objective, model, cases.batch(readers, samples))
    assert cases.loss(found).isfinite()
    assert all(t.number > 0 for t in found.values())
    assert {k: int(n) for k, n in objective.numbers(task).items()} == {k: int(t.number) for k, t in found.items()}


@every
def test_every_parameter_gets_a_gradient(name, made, lacked):
    of_model, of_objective = lacked(name)
    assert not of_objective
    model, objective, *_ = made(name)
    others = set(model.encoders) - set(objective.needs)
    absent = {n for n in of_model if not others & set(n.split("."))}
    assert {n for n in absent if not any(e in f"{n}." for e in EXCUSES)} == set()


def test_all_objectives_together_reach_every_parameter_of_the_model(lacked):
    assert set.intersection(*(lacked(name)[0] for name in cases.OBJECTIVES)) == set()


@every
def test_only_needs_is_read(name, made):
    model, objective, readers, samples = made(name)
    full = cases.batch(readers, samples)
    part = {k: full[k] for k in (*objective.needs, "seed", "sample")}
    a, b = (cases.loss(cases.terms(objective, model, given)[0]) for given in (full, part))
    assert_close(a, b, rtol=0, atol=0)


@every
def test_the_task_is_a_function_of_the_seed_alone(name, made):
    model, objective, readers, samples = made(name)
    tasks = []
    for salt in (0, 0, 1):
        torch.manual_seed(len(tasks))  # nothing may come from the global generator
        tasks.append(cases.terms(objective, model, cases.batch(readers, samples, salt=salt))[1])
    a, again, other = ([x for k, x in flat(task) if k not in ("seed", "sample")] for task in tasks)
    assert all(torch.equal(x, y) for x, y in zip(a, again, strict=True))
    blind = cases.batch(readers, samples)
    blind.pop("seed")
    try:
        objective.task(blind)
    except KeyError:  # it draws, so another seed gives another task
        assert any(not torch.equal(x, y) for x, y in zip(a, other, strict=True))
    else:
        assert all(torch.equal(x, y) for x, y in zip(a, other, strict=True))


def flat(value, name=""):
    """(name, tensor) of everything in a batch; NaN is made a number so that it equals itself."""
    if isinstance(value, tuple):  # Tokens and other named ones
        value = value._asdict()
    if isinstance(value, dict):
        return [leaf for k, v in sorted(value.items()) for leaf in flat(v, k)]
    return [] if value is None else [(name, value.nan_to_num(nan=-77.0) if value.is_floating_point() else value)]


@every
def test_one_batch_is_learned_by_heart(name, made):
    model, objective, readers, samples = copy.deepcopy(made(name))
    given = cases.batch(readers, samples)
    step = torch.optim.Adam([*model.parameters(), *objective.parameters()], lr=1e-2)
    first = None
    for _ in range(40):
        value = cases.loss(cases.terms(objective, model, given)[0])
        first = value.item() if first is None else first
        step.zero_grad()
        value.backward()
        step.step()
    assert value.item() < 0.75 * first


@every
def test_state_dict_round_trip(name, made):
    model, objective, readers, samples = made(name)
    other_model = cases.model(seed=1)
    other = cases.objective(name, other_model, seed=1)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(objective.state_dict())
    given = cases.batch(readers, samples)
    a, b = (cases.loss(cases.terms(o, m, given)[0]) for o, m in ((objective, model), (other, other_model)))
    assert_close(a, b, rtol=0, atol=0)
