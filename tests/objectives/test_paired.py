"""LLM-JEPA: what predictor tokens see, the cosine, and that lambda = 0 is the base objective bit for bit."""

from functools import partial

import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater.objectives import Causal, Paired, Weighted
from headwater.objectives.objective import weighted_sum
from headwater.tokens import LAST, Tokens, append


def made(seed=0, **options):
    model = cases.model(seed, None)
    torch.manual_seed(seed + 1)
    return model, Paired(model, **options).double()


def given(model, packed=False):
    return cases.batch(model.readers, cases.examples(model.readers), packed=packed)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_term_is_that_of_the_paper(tokens, packed):
    """Sum over pairs of 1 - cos(last predictor token behind a, pooled b), each sample alone."""
    model, objective = made(a="text", b="choice", tokens=tokens)
    total = objective(model, given(model, packed))["paired"].total
    text, choice, expected = model.encoder("text"), model.encoder("choice"), 0.0
    for sample in cases.examples(model.readers):
        if not {"text", "choice"} <= set(sample):
            continue
        words = Tokens(sample["text"].x[None], sample["text"].position[None])
        t = text.embed(words)
        n = t.x.shape[1]
        x = torch.cat([t.x, objective.questions[None]], 1)
        position = torch.cat([t.position, torch.zeros(1, tokens, 1, dtype=t.position.dtype)], 1)
        order = torch.cat([torch.arange(n), torch.full((tokens,), LAST)])[None]
        said = objective.out(text(Tokens(x, position, order=order), True).x[0, n + tokens - 1])
        steps = Tokens(*(None if field is None else field[None] for field in sample["choice"]))
        target = choice.pool(choice(choice.embed(steps), True)).x[0]
        expected = expected + 1 - (said @ target) / (said.norm() * target.norm())
    assert_close(total, expected)
    weights = [objective.questions, *text.trunk.parameters(), *choice.trunk.parameters()]
    both = (torch.autograd.grad(value, weights, allow_unused=True) for value in (total, expected))
    for a, b in zip(*both, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-12)


def test_without_lambda_it_is_next_token_prediction_bit_for_bit():
    parts = {"next": partial(Causal, modality="text"), "pair": partial(Paired, b="choice")}
    found = []
    for some, weights in ((parts, {"pair": 0.0}), ({"next": parts["next"]}, {})):
        model = cases.model()
        objective = Weighted(model, some, weights).double()
        task = objective.task(given(model))
        loss = weighted_sum(objective(model, task), objective.numbers(task), 1)
        loss.backward()
        found.append((loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}))
    (a, with_pair), (b, alone) = found
    assert torch.equal(a, b)
    assert with_pair.keys() == alone.keys()
    assert all(torch.equal(with_pair[n], alone[n]) for n in alone)


@pytest.mark.parametrize(("teacher", "flows"), [("both", True), ("same", False), ("average", False), ("start", False)])
def test_who_gets_gradient(teacher, flows):
    model, objective = made(b="choice", teacher=teacher)
    objective(model, given(model))["paired"].total.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.encoder("choice").parameters()) == flows
    assert any(p.grad is not None and p.grad.any() for p in model.encoder("text").parameters())
    if objective.teacher is not None:
        assert all(p.grad is None for p in objective.teacher.parameters())


def test_the_average_follows():
    model, objective = made(b="choice", teacher="average", momentum=0.75)
    before = [p.clone() for p in objective.teacher.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    objective.after_step(model, 0.0)
    for old, new in zip(before, objective.teacher.parameters(), strict=True):
        assert_close(new, old + 0.25)
    objective.start(model)
    for old, new in zip(before, objective.teacher.parameters(), strict=True):
        assert_close(new, old + 1)


def test_predictor_tokens_change_nothing_for_the_others():
    model, objective = made()
    t = model.encoder("text").embed(given(model)["text"])
    plain, asked = model.encoder("text")(t, True), model.encoder("text")(append(t, objective.questions), True)
    assert_close(plain.x[:, : t.x.shape[1]][t.real()], asked.x[:, : t.x.shape[1]][t.real()])


def test_what_cannot_work_is_said():
    model = cases.model()
    with pytest.raises(ValueError, match="as both views of a pair"):
        Paired(model, "text", "text")
    with pytest.raises(ValueError, match="tokens -1"):
        Paired(model, tokens=-1)
    with pytest.raises(ValueError, match="found teacher 'none'"):
        Paired(model, teacher="none")
