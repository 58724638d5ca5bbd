from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from contracts import cases

from headwater.datamodules.collate import collate
from headwater.modalities import Series, Text
from headwater.model import Model
from headwater.objectives import Shuffled
from headwater.objectives.shuffled import exchanged, ranks
from headwater.trunk import Trunk


def test_chosen_moments_of_a_sample_change_among_themselves():
    sample, chosen = torch.tensor([0, 0, 0, 0, 1, 1, 1]), torch.tensor([1, 0, 1, 1, 1, 1, 0]).bool()
    draw = torch.tensor([0.9, 0.0, 0.1, 0.5, 0.8, 0.2, 0.3])
    assert ranks(sample, draw).tolist() == [3, 0, 1, 2, 2, 0, 1]
    assert exchanged(sample, chosen, draw).tolist() == [3, 1, 0, 2, 5, 4, 6]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("modality", ["video", "audio", "text"])
def test_contents_change_places_and_the_truth_is_where_they_were(modality, packed):
    model = cases.model()
    o = Shuffled(model, modality, (0.3, 0.9), length=24)
    batch = cases.batch(model.readers, cases.examples(model.readers), packed=packed)
    task = o.task(batch)
    before, after, moment = batch[modality], task[modality], task["moment"].tolist()
    assert all(a is b for a, b in zip(before[1:], after[1:], strict=True))
    for sample in before.samples().tolist():
        mine = (before.sample() == sample) & before.real()
        times = before.position[mine][:, 0].unique(sorted=True).tolist()
        asked, moment = moment[: len(times)], moment[len(times) :]
        old, new = ([t.x[mine & (t.position[..., 0] == time)] for time in times] for t in (before, after))
        assert all(torch.equal(new[k], old[k if was < 0 else was]) for k, was in enumerate(asked))
        number = sum(was >= 0 for was in asked)
        assert number == 0 if len(times) < 2 else 2 <= number <= max(2, round(0.9 * len(times)))
    assert moment == []


def test_all_orders_are_equally_likely():
    encoder = Series(cases.trunk(), channels=1, steps=1)
    o = Shuffled(Model({"series": encoder}), "series", (1.0, 1.0), length=3)
    t = collate([{"it": encoder.reader.tokens(np.arange(3, dtype=np.float32)[:, None])}] * 1200, ["it"])["it"]
    found = Counter(map(tuple, o.task({"series": t, "seed": torch.arange(1200)})["moment"].view(-1, 3).tolist()))
    assert len(found) == 6
    assert all(abs(n - 200) < 4 * 200**0.5 for n in found.values())


def learned(signals, steps=100):
    torch.manual_seed(0)
    model = Model({"it": Series(Trunk(32, 2), channels=1, steps=1)})
    o = Shuffled(model, "it", (0.3, 0.4), length=10)
    step = torch.optim.Adam([*model.parameters(), *o.parameters()], 5e-3)
    right = []
    for number in range(steps + 5):
        t = collate([{"it": t} for t in signals(model.readers["it"], number)], ["it"])["it"]
        (term,) = o(model, o.task({"it": t, "seed": torch.arange(len(t.x)) + 1000 * number})).values()
        if number < steps:
            step.zero_grad()
            (term.total / term.number).backward()
            step.step()
        else:
            right.append([term.metrics[k].item() for k in ("accuracy", "in_order")])
    return np.mean(right, 0)


def walk(rise, reader, number, rows=48):
    """Ten numbers that rise, with noise."""
    generator = np.random.default_rng(number)
    return [reader.tokens((rise * np.arange(10) / 3 + generator.normal(size=10))[:, None].astype(np.float32)) for _ in range(rows)]


def test_it_learns_where_there_is_an_order_and_not_in_noise():
    """Guessing among the exchanged ones is what noise allows: with three or four of ten exchanged a bit more than a quarter."""
    order, noise = learned(partial(walk, 5.0)), learned(partial(walk, 0.0))
    assert order[0] > 0.6
    assert order[1] > 0.85
    assert noise[0] < 0.35


def test_what_has_no_order_counts_nothing():
    model = Model({"text": Text(cases.trunk(), length=8, end="")}).double()
    o = Shuffled(model, "text").double()
    batch = cases.batch(model.readers, [{"text": model.readers["text"].tokens("a")}])
    (term,) = cases.terms(o, model, batch)[0].values()
    assert term.number == 0
    assert term.total == 0


def test_wrong_arguments_are_refused():
    model = cases.model()
    with pytest.raises(ValueError, match=r"found ratio \(0.5, 0.2\)"):
        Shuffled(model, ratio=(0.5, 0.2))
    with pytest.raises(ValueError, match="the model has no fusion"):
        Shuffled(cases.model(fuse=None), context=["text"])
