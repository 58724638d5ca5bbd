import numpy as np
import pytest
import torch
from contracts import cases
from torch.nn import functional as F
from torch.testing import assert_close

from headwater import random
from headwater.datamodules.collate import collate
from headwater.modalities import Series
from headwater.model import Model
from headwater.objectives import Segments
from headwater.trunk import Trunk


def made(modality="text", **options):
    model = cases.model()
    torch.manual_seed(0)
    return model, Segments(model, modality, **options).double(), cases.examples(model.readers)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("modality", "length"), [("text", 4), ("audio", 2), ("video", 1)])
def test_both_pieces_are_neighbours_of_equal_length_that_begin_at_zero(modality, length, packed):
    model, o, samples = made(modality, length=length)
    batch = cases.batch(model.readers, samples, packed=packed)
    task, raw = o.task(batch), batch[modality]
    first, second = task[f"{modality}@first"], task[f"{modality}@second"]
    long = []
    for sample in raw.samples().tolist():
        mine = raw.real() & (raw.sample() == sample)
        times = raw.position[mine][:, 0].unique().tolist()
        if len(times) < 2 * length:
            continue
        long.append(sample)
        own = [t.real() & (t.sample() == sample) for t in (first, second)]
        u, v = (t.map(lambda f, own=own: f[own]) for t, own in zip((first, second), own, strict=True))
        assert torch.equal(u.position, v.position)
        assert u.position[:, 0].min() == 0
        assert u.position[:, 0].max() == length - 1
        whole, inside = torch.cat([u.x, v.x]), raw.x[mine]
        starts = [k for k in range(len(inside) - len(whole) + 1) if torch.equal(inside[k : k + len(whole)], whole)]
        assert starts, "the two pieces are one run of the sample"
    assert first.samples().tolist() == second.samples().tolist() == long
    assert o.numbers(task) == {"segments": 3 * len(long)}


def test_a_piece_may_begin_anywhere():
    encoder = Series(cases.trunk(), channels=1, steps=1)
    o = Segments(Model({"series": encoder}), "series", 2)
    t = collate([{"it": encoder.reader.tokens(np.arange(7, dtype=np.float32)[:, None])}] * 400, ["it"])["it"]
    task = o.task({"series": t, "seed": torch.arange(400)})
    starts = (task["series@first"].x[:, 0, :1] == t.x[0, :, 0]).int().argmax(1).bincount(minlength=7)
    assert starts[4:].tolist() == [0, 0, 0]
    assert (starts[:4] > 60).all()


@pytest.mark.parametrize("scorer", ["features", "bilinear"])
@pytest.mark.parametrize("negatives", ["random", "hard"])
def test_the_loss_is_that_of_all_relations_typed_anew(scorer, negatives):
    model, o, samples = made(scorer=scorer, negatives=negatives, length=3)
    batch = cases.batch(model.readers, samples)
    task = o.task(batch)
    (term,) = o(model, task).values()
    u, v = (model.represent({key: task[key]})[key] for key in ("text@first", "text@second"))
    seed = batch["seed"][u.sample]
    unit = F.normalize(v.x.float(), dim=-1)
    score = unit @ unit.T / 0.07 if negatives == "hard" else torch.zeros(len(seed), len(seed))
    noise = random.gumbel(random.fold(seed[:, None], seed[None]), (), "segments/other")
    other = (score + noise).fill_diagonal_(-torch.inf).argmax(1).tolist()
    total = 0
    for k in range(len(seed)):
        for kind, (a, b) in enumerate([(u.x[k], v.x[k]), (v.x[k], u.x[k]), (u.x[k], v.x[other[k]])]):
            if scorer == "bilinear":
                logits = torch.stack([a @ w @ b for w in o.scorer.weight]) + o.scorer.bias
            else:
                logits = o.scorer(torch.cat([a, b, (a - b).abs(), a * b]))
            total = total - logits.log_softmax(-1)[kind]
    assert_close(term.total, total, rtol=1e-5, atol=1e-5)
    for got, wanted in zip(*(torch.autograd.grad(x, o.parameters(), retain_graph=True) for x in (term.total, total)), strict=True):
        assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_one_sample_alone_has_no_other():
    model, o, samples = made(length=2)
    (term,) = cases.terms(o, model, cases.batch(model.readers, samples[:1]))[0].values()
    assert term.number == 2
    assert term.total.isfinite()


def test_pieces_of_a_batch_give_the_whole_loss():
    found = []
    for chunks in (1, 2):
        model, o, samples = made(length=2)
        model.chunks = chunks
        (term,) = cases.terms(o, model, cases.batch(model.readers, samples))[0].values()
        term.total.backward()
        found.append((term.total, [p.grad for p in [*model.parameters(), *o.parameters()]]))
    assert_close(*found)


def learned(signal, steps=60):
    torch.manual_seed(0)
    model = Model({"it": Series(Trunk(32, 1), channels=1, steps=1, scale=1.0)})
    o = Segments(model, "it", 4)
    step = torch.optim.Adam([*model.parameters(), *o.parameters()], 5e-3)
    right = []
    for number in range(steps + 5):
        generator = np.random.default_rng(number)
        lengths = generator.integers(8, 14, 48)
        tokens = [model.readers["it"].tokens(signal(generator, n)[:, None].astype(np.float32)) for n in lengths]
        t = collate([{"it": t} for t in tokens], ["it"])["it"]
        (term,) = o(model, o.task({"it": t, "seed": torch.arange(len(t.x)) + 1000 * number})).values()
        if number < steps:
            step.zero_grad()
            (term.total / term.number).backward()
            step.step()
        else:
            right.append(term.metrics["accuracy"].item())
    return np.mean(right)


def test_it_learns_where_pieces_belong_together_and_stays_at_chance_in_noise():
    """Samples of many lengths: neither these nor places may tell. A sample of its own level rises; chance is a third."""
    rising = learned(lambda g, n: 3 * g.normal() + np.arange(n) / 2 + 0.1 * g.normal(size=n))
    noise = learned(lambda g, n: g.normal(size=n))
    assert rising > 0.7
    assert abs(noise - 1 / 3) < 0.07


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="two or three relations"):
        made(relations=["next"])
