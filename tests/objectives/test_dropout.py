from functools import partial

import pytest
import torch
from contracts import cases

from headwater import random
from headwater.objectives import Causal, Contrastive, Dropped, Masked, Weighted
from headwater.objectives.dropout import drops
from headwater.objectives.objective import Objective
from headwater.tokens import Tokens

INNER = partial(Masked, modality="text", mode="substitute", context=["image", "audio"])
RATES = {"text": 0.5, "image": 0.25, "audio": 0.25}


def test_the_last_modality_stays_and_rates_are_kept():
    draw = random.uniform(torch.arange(20000), (3,), "it")
    present = random.uniform(torch.arange(20000), (3,), "present") < 0.7
    rate = torch.tensor([0.5, 0.25, 0.0])
    gone = drops(present, rate, draw)
    assert not (gone & ~present).any()
    assert (present & ~gone).any(1)[present.any(1)].all()
    full = present.all(1)
    assert (gone[full].float().mean(0) - rate).abs().max() < 0.02  # the third is always left, so nothing is spared
    only = present.sum(1) == 1
    assert only.any()
    assert not gone[only].any()


def test_who_would_lose_all_keeps_the_largest_draw():
    draw, present = torch.tensor([[0.1, 0.3, 0.2], [0.1, 0.3, 0.2]]), torch.tensor([[True, True, True], [True, False, True]])
    assert drops(present, torch.full((3,), 0.9), draw).tolist() == [[True, False, True], [True, False, False]]


@pytest.mark.parametrize("packed", [False, True])
def test_whole_samples_of_a_modality_go_and_numbers_follow(packed):
    model = cases.model()
    torch.manual_seed(0)
    objective = Dropped(model, INNER, RATES).double()
    batch = cases.batch(model.readers, cases.examples(model.readers), packed=packed)
    left = objective.drop(batch)
    gone = 0
    for name, t in left.items():
        if isinstance(t, Tokens):
            kept = torch.isin(t.sample(), t.samples())
            assert torch.equal(t.real(), batch[name].real() & kept)
            gone += len(batch[name].samples()) - len(t.samples())
            assert name in RATES or t.valid is batch[name].valid
    assert gone > 0
    alone = objective.inner.task(left)
    assert objective.numbers(objective.task(batch)) == objective.inner.numbers(alone)


def test_views_of_a_modality_go_together():
    model = cases.model()
    objective = Dropped(model, INNER, RATES)
    batch = cases.batch(model.readers, cases.examples(model.readers))
    batch["image@crop0"] = batch["image@crop1"] = batch["image"]
    left = objective.drop(batch)
    assert torch.equal(left["image@crop0"].valid, left["image"].valid)
    assert torch.equal(left["image@crop1"].valid, left["image"].valid)
    assert not left["image"].valid.any(1).all()


def test_it_composes_with_a_weighted_sum_and_pieces():
    model = cases.model()
    torch.manual_seed(0)
    inner = partial(Weighted, parts={"pair": partial(Contrastive, a="action", b="choice"), "next": Causal})
    objective = Dropped(model, inner, {"text": 0.5})
    batch = cases.batch(model.readers, cases.examples(model.readers))
    assert objective.coupled
    assert objective.parts.keys() == {"pair", "next"}
    whole = objective.numbers(objective.task(batch))
    pieces = [objective.numbers(objective.task(piece)) for piece in objective.pieces(batch, 2)]
    assert {k: sum(int(p.get(k, 0)) for p in pieces) for k in whole} == {k: int(n) for k, n in whole.items()}


def test_every_hook_reaches_the_inner_objective():
    class Watched(Objective):
        needs = ("text",)
        seen = []

        def __init__(self, model):
            super().__init__()

        def start(self, model):
            self.seen.append("start")

        def look(self, model, batch):
            self.seen.append(int(batch["text"].real().sum()))
            return "hint"

        def task(self, batch, hints=None):
            self.seen.append((hints, int(batch["text"].real().sum())))
            return batch

        def after_step(self, model, progress):
            self.seen.append(progress)

    model = cases.model()
    objective = Dropped(model, Watched, {"text": 0.5})
    batch = cases.batch(model.readers, cases.examples(model.readers))
    objective.start(model)
    objective.task(batch, objective.look(model, batch))
    objective.after_step(model, 7)
    count = int(batch["text"].real().sum())  # the only modality of this objective, so nothing may go
    assert Watched.seen == ["start", count, ("hint", count), 7]


@pytest.mark.parametrize(("rates", "message"), [({"video": 0.5}, "video"), ({"text": 1.0}, "below 1")])
def test_wrong_rates_are_refused(rates, message):
    with pytest.raises(ValueError, match=message):
        Dropped(cases.model(), INNER, rates)
