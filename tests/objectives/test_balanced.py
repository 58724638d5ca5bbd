import math
from functools import partial

import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater.fusion import Routed
from headwater.objectives import Balanced, Causal, Contrastive, Masked, Weighted
from headwater.objectives.balanced import balance, sums

INNER = partial(Masked, modality="audio", context=["text"], width=16)


def test_the_terms_are_their_formulas():
    torch.manual_seed(0)
    logits, chosen = torch.randn(7, 3).double(), torch.randint(0, 3, (7, 2))
    f, p, z = [0.0] * 3, [0.0] * 3, 0.0
    for t in range(7):
        total = sum(math.exp(logits[t, e]) for e in range(3))
        z += math.log(total) ** 2
        for e in range(3):
            p[e] += math.exp(logits[t, e]) / total / 7
        for k in range(2):
            f[int(chosen[t, k])] += 1 / 14
    found = sums(logits, chosen)
    assert_close(float(balance(found.choices, found.probability)) / 7, 3 * sum(a * b for a, b in zip(f, p, strict=True)))
    assert_close(float(found.z), z)


def test_even_routing_costs_one():
    found = sums(torch.zeros(6, 3), torch.arange(6)[:, None] % 3)
    assert_close(balance(found.choices, found.probability) / 6, torch.tensor(1.0))


def made(inner=INNER, **options):
    model = cases.routed(cases.model())
    torch.manual_seed(0)
    return model, Balanced(model, inner, **options).double(), cases.batch(model.readers, cases.examples(model.readers))


def test_terms_are_means_over_real_tokens_and_the_inner_loss_is_left_alone():
    model, objective, batch = made()
    found, task = cases.terms(objective, model, batch)
    inner = objective.inner(model, task)
    assert torch.equal(found["masked"].total, inner["masked"].total)
    model.fusion.routing = []
    objective.inner(model, task)
    ((logits, chosen),) = model.fusion.routing
    once = sums(logits, chosen)
    term = found["balance"]
    assert_close(term.total / term.number, balance(once.choices, once.probability) / len(logits))
    parts = model.embed({"audio": task["audio"], "text": task["text"]})
    parts["audio"] = parts["audio"]._replace(valid=task["audio"].real() & ~task["hidden"]["audio"])
    assert len(logits) == sum(int(t.real().sum()) for t in model.encode(parts).values())


def test_parts_that_do_not_fuse_add_nothing():
    model, objective, batch = made(partial(Weighted, parts={"pair": partial(Contrastive, a="action", b="choice")}))
    found, _ = cases.terms(objective, model, batch)
    assert found["balance"].total == 0
    assert objective.parts.keys() == {"pair"}


def test_it_evens_the_load():
    """A router that sends all to one expert, trained by the balance term alone, and without it."""
    largest = []
    for weight in (0.0, 1.0):
        model, objective, batch = made(partial(Causal, modality="text"), weight=weight, z_weight=0.0)
        torch.manual_seed(0)
        model.fusion = Routed(model.fusion.widths, cases.trunk(), experts=4, top=1, every=1).double()
        router = model.fusion.trunk.blocks[0].mlp.router
        with torch.no_grad():
            router.weight[0] += 0.3
        step = torch.optim.Adam([router.weight, *model.fusion.trunk.blocks[0].mlp.experts.parameters()], lr=0.03)
        for _ in range(30):
            found, _ = cases.terms(objective, model, batch)
            step.zero_grad()
            cases.loss(found).backward()
            step.step()
        largest.append(float(found["balance"].metrics["largest_share"]))
    assert largest[1] < 0.45 < largest[0], largest


def test_a_model_without_routers_is_refused():
    with pytest.raises(ValueError, match="no router"):
        Balanced(cases.model(), INNER)
    with pytest.raises(ValueError, match="no router"):
        Balanced(cases.model(fuse="Routed skills"), INNER)


def test_pieces_are_those_of_the_inner_objective():
    model, objective, batch = made()
    pieces = [objective.task(piece) for piece in objective.pieces(batch, 3)]
    assert len(pieces) == 3
    whole = objective.numbers(objective.task(batch))
    assert {k: sum(int(objective.numbers(p)[k]) for p in pieces) for k in whole} == {k: int(n) for k, n in whole.items()}
    assert model.fusion.routing is None
