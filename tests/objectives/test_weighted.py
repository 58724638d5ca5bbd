from functools import partial

import pytest
import torch
from contracts import cases

from headwater.objectives import Causal, Masked, Weighted

PARTS = {"mask": partial(Masked, modality="text", mode="substitute"), "next": Causal, "sound": partial(Causal, modality="audio")}


def made(**options):
    model = cases.model()
    torch.manual_seed(0)
    return model, Weighted(model, PARTS, **options).double(), cases.batch(model.readers, cases.examples(model.readers))


def test_the_loss_is_the_weighted_sum_of_its_parts():
    model, objective, batch = made(weights={"mask": 0.25, "sound": 0.0})
    expected = 0
    for name, weight in {"mask": 0.25, "next": 1.0, "sound": 0.0}.items():
        expected = expected + weight * cases.loss(cases.terms(objective.parts[name], model, batch)[0])
    assert torch.equal(cases.loss(cases.terms(objective, model, batch)[0]), expected)


def test_parts_whose_modality_is_not_there_are_left_out():
    model, objective, batch = made()
    found, task = cases.terms(objective, model, {k: batch[k] for k in ("audio", "seed", "sample")})
    assert found.keys() == objective.numbers(task).keys() == {"sound/causal"}


def test_parts_hide_the_same_modality_each_in_its_own_way():
    _, objective, batch = made()
    task = objective.task(batch)
    assert torch.equal(task["mask"]["text"].x, batch["text"].x)  # masked later, after embed
    assert not torch.equal(task["next"]["text"].x, batch["text"].x)


def test_hints_reach_the_part_that_asked_and_after_step_reaches_all():
    model, objective, batch = made()
    seen, stepped = {}, []
    for name, one in objective.parts.items():
        one.look = lambda model, batch, name=name: f"hint of {name}"
        one.task = lambda batch, hints, name=name: seen.setdefault(name, hints)
        one.after_step = lambda model, step, name=name: stepped.append((name, step))
    objective.task(batch, objective.look(model, batch))
    objective.after_step(model, 3)
    assert seen == {name: f"hint of {name}" for name in PARTS}
    assert stepped == [(name, 3) for name in PARTS]


def test_weights_of_no_part_are_refused():
    with pytest.raises(ValueError, match="typo"):
        made(weights={"typo": 1.0})
