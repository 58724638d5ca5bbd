"""Replaced tokens: which labels come out, formulas typed anew with loops, what each generator proposes."""

import math

import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater import modalities, random
from headwater.model import Model
from headwater.objectives.masks.policies import Spans
from headwater.objectives.masks.salient import Salient
from headwater.objectives.replaced import AnyId, Elsewhere, Generator, Proposed, Replaced, SmallModel, Unigram, area, pick
from headwater.tokens import Tokens
from headwater.training.schedules import Step
from headwater.trunk import Trunk


def words(depth=1, **options):
    torch.manual_seed(0)
    return Model({"text": modalities.Text(Trunk(16, depth, heads=2), length=24, **options)}).double()


def batch_of(model, packed=False):
    return cases.batch(model.readers, cases.examples(model.readers), packed=packed)


def made(model, **options):
    torch.manual_seed(1)
    return Replaced(model, **options).double()


class Given(Generator):
    """Proposes the same id everywhere, so that labels can be told by hand."""

    learns = False

    def forward(self, raw, embedded, hidden, seed):
        return Proposed(torch.full_like(raw.x, 101))


def test_picking_follows_the_weights():
    weight = torch.tensor([0.0, 3.0, 0.0, 1.0, 4.0, 0.0])
    draw = random.uniform(torch.arange(40_000), (), "draw")
    share = pick(weight, draw).bincount(minlength=6) / 40_000
    assert (share - weight / 8).abs().max() < 0.01
    assert share[[0, 2, 5]].sum() == 0
    torch.manual_seed(0)
    several, draws = torch.rand(3, 4, 7), torch.rand(3, 4)
    found = pick(several, draws)
    for b in range(3):
        for k in range(4):
            goal, reached, expected = float(draws[b, k]) * float(several[b, k].double().sum()), 0.0, 0
            while (reached := reached + float(several[b, k, expected])) <= goal:
                expected += 1
            assert int(found[b, k]) == expected
    assert pick(torch.ones(5), torch.tensor([0.0, 1 - 2**-24])).tolist() == [0, 4]


def test_area_against_pairs():
    torch.manual_seed(0)
    score, positive, real = torch.randn(40), torch.rand(40) < 0.3, torch.rand(40) < 0.8
    pairs = [
        float(score[i] > score[j]) for i in range(40) for j in range(40) if positive[i] and not positive[j] and real[i] and real[j]
    ]
    assert float(area(score, positive, real)) == pytest.approx(sum(pairs) / len(pairs))
    assert float(area(score, torch.zeros(40, dtype=torch.bool), real)) == 0.5
    assert float(area(score[:0], positive[:0], real[:0])) == 0.5


@pytest.mark.parametrize("over", ["all", "hidden"])
@pytest.mark.parametrize("packed", [False, True])
def test_labels_are_whether_the_id_changed_and_the_loss_is_electras(over, packed):
    """Clark et al. 2020: -sum_t [x' = x] log D(x', t) + [x' != x] log(1 - D(x', t)), D = the probability of "original"."""
    model = words()
    objective = made(model, generator=Given, ratio=0.5, over=over)
    batch = batch_of(model, packed)
    x, real = batch["text"].x, batch["text"].real()
    x[real] = torch.where(random.uniform(torch.arange(int(real.sum())), (), "lucky") < 0.5, 101, x[real])
    task = objective.task(batch)
    seen = []
    hook = model.encoder("text").stem.register_forward_hook(lambda module, given, y: seen.append(given[0]))
    (term,) = objective(model, task).values()
    hook.remove()
    assert torch.equal(seen[0], x)  # what a generator is shown is not yet replaced
    assert torch.equal(seen[1], torch.where(task["hidden"], 101, x))
    logit = objective.head(model.encoder("text")(model.encoder("text").embed(batch["text"]._replace(x=seen[1]))).x)[..., 0]
    total, number, lucky = 0.0, 0, 0
    for row in range(len(x)):
        for n in range(x.shape[1]):
            if real[row, n] and (over == "all" or task["hidden"][row, n]):
                p = 1 / (1 + math.exp(-logit[row, n].item()))
                replaced = bool(task["hidden"][row, n]) and int(x[row, n]) != 101
                lucky += bool(task["hidden"][row, n]) and not replaced
                total -= math.log(p if replaced else 1 - p)
                number += 1
    assert lucky > 3
    assert term.total.item() == pytest.approx(total, rel=1e-5)
    assert int(term.number) == number
    assert term.weight == 50


def test_gradient_of_the_detector_against_loops():
    model = words()
    objective, batch = made(model, generator=Given, ratio=0.3), batch_of(words())
    task = objective.task(batch)
    (term,) = objective(model, task).values()
    got = torch.autograd.grad(term.total, list(objective.head.parameters()))
    ids = torch.where(task["hidden"], 101, batch["text"].x)
    encoder = model.encoder("text")
    y = encoder(encoder.embed(batch["text"]._replace(x=ids))).x
    naive = 0.0
    for row in range(len(ids)):
        for n in range(ids.shape[1]):
            if batch["text"].real()[row, n]:
                p = objective.head(y[row, n])[0].sigmoid()
                naive = naive - (p if ids[row, n] != batch["text"].x[row, n] else 1 - p).log()
    for a, b in zip(got, torch.autograd.grad(naive, list(objective.head.parameters())), strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_original_is_asked_for_without_a_mask_token():
    model = words()
    objective = made(model, generator=Given, ratio=0.4, ask="original", over="hidden", weight=1.0)
    task = objective.task(batch_of(model))
    (term,) = objective(model, task).values()
    raw, hidden, encoder = task["text"], task["hidden"], model.encoder("text")
    y = encoder(encoder.embed(raw._replace(x=torch.where(hidden, 101, raw.x)))).x
    total = 0.0
    for row, n in hidden.nonzero().tolist():
        logits = objective.head(y[row, n])
        total = total - (logits[raw.x[row, n]] - logits.exp().sum().log())
    assert_close(term.total.double(), total, rtol=1e-5, atol=1e-5)
    assert int(term.number) == int(hidden.sum())


def test_the_small_model_is_a_masked_language_model():
    model = words()
    objective = made(model, ratio=0.3, generator=lambda m, name: SmallModel(m, name, width=12, depth=1))
    task, generator = objective.task(batch_of(model)), objective.generator
    terms = objective(model, task)
    raw, hidden = task["text"], task["hidden"]
    x = torch.where(hidden[..., None], generator.mask, model.encoder("text").stem(raw.x))
    y = generator.trunk(raw._replace(x=x @ generator.enter.weight.T + generator.enter.bias)).x
    total = 0.0
    for row, n in hidden.nonzero().tolist():
        logits = generator.head(y[row, n])
        total = total - (logits[raw.x[row, n]] - logits.exp().sum().log())
    assert_close(terms["generator"].total.double(), total, rtol=1e-5, atol=1e-5)
    assert int(terms["generator"].number) == int(hidden.sum())


def test_the_small_model_draws_from_its_own_answers():
    model = words()
    generator = SmallModel(model, "text", width=12, depth=1).double()
    with torch.no_grad():
        generator.head.weight.zero_()
        generator.head.bias[:] = torch.full_like(generator.head.bias, -30.0)
        generator.head.bias[[65, 66, 67]] = torch.tensor([0.0, math.log(2), math.log(5)]).double()
    rows = 3000
    raw = Tokens(torch.zeros(rows, 4, dtype=torch.int64), torch.zeros(rows, 4, 1, dtype=torch.int32))
    hidden = torch.tensor([True, False, False, True]).expand(rows, 4)
    seed = random.token_seed(torch.arange(rows), raw)
    drawn = generator(raw, model.embed({"text": raw})["text"], hidden, seed).ids[hidden]
    share = drawn.bincount(minlength=257)[[65, 66, 67]] / len(drawn)
    assert (share - torch.tensor([1, 2, 5]) / 8).abs().max() < 0.03


def test_no_gradient_goes_through_the_draw():
    model = words()
    objective = made(model, ratio=0.3)
    terms = objective(model, objective.task(batch_of(model)))
    found = torch.autograd.grad(
        terms["replaced"].total, list(objective.generator.parameters()), allow_unused=True, retain_graph=True
    )
    assert all(g is None for g in found)
    found = torch.autograd.grad(terms["generator"].total, [model.encoder("text").stem.weight, *objective.generator.parameters()])
    assert all(g.any() for g in found)  # the embedding is shared


def test_unigrams_come_as_often_as_they_were_seen():
    model = words()
    objective = made(model, generator=Unigram, ratio=0.3)
    generator, batch = objective.generator, batch_of(model)
    ids = batch["text"].x[batch["text"].real()]
    for step in range(3):
        objective(model, objective.task(batch))
        objective(model, objective.task(batch))  # two pieces of one step
        assert torch.equal(generator.count, 2 * step * ids.bincount(minlength=generator.vocab))
        objective.after_step(model, 0.0)
    raw = Tokens(torch.zeros(4000, 1, dtype=torch.int64), torch.zeros(4000, 1, 1))
    proposed = generator(raw, raw, raw.x.bool(), torch.arange(4000)[:, None]).ids
    weight = 1.0 + 6 * ids.bincount(minlength=generator.vocab)
    share = proposed.flatten().bincount(minlength=generator.vocab) / 4000
    assert (share - weight / weight.sum()).abs().max() < 0.03


def test_any_id_reaches_the_whole_vocabulary():
    generator = AnyId(words(), "text")
    raw = Tokens(torch.zeros(30_000, 1, dtype=torch.int64), torch.zeros(30_000, 1, 1))
    count = generator(raw, raw, raw.x.bool(), torch.arange(30_000)[:, None]).ids.flatten().bincount(minlength=generator.vocab)
    assert len(count) == generator.vocab
    mean = 30_000 / generator.vocab
    assert (count - mean).abs().max() < 5 * mean**0.5


def test_elsewhere_stays_inside_the_sample():
    model = words()
    alone, packed = batch_of(model)["text"], batch_of(model, packed=True)["text"]
    generator, found = Elsewhere(model, "text"), {}
    for t in (alone, packed):
        ids = generator(t, t, t.real(), random.token_seed(batch_of(model)["seed"], t)).ids
        for sample in t.samples().tolist():
            mine = t.real() & (t.sample() == sample)
            assert set(ids[mine].tolist()) <= set(t.x[mine].tolist())
            found.setdefault(sample, []).append(ids[mine])
    assert all(torch.equal(*pair) for pair in found.values())
    raw = Tokens(torch.arange(6).expand(6000, 6), torch.zeros(6000, 6, 1))
    ids = generator(raw, raw, raw.x > 9, random.token_seed(torch.arange(6000), raw)).ids
    assert ((ids == 4).float().mean(0) - 1 / 6).abs().max() < 0.03


def test_a_schedule_switches_the_detector_off():
    model = words()
    objective = made(model, weight=Step(50.0, 0.0, when=0.5))
    weights = [
        objective(model, objective.task(batch_of(model) | {"progress": p}))["replaced"].weight for p in (0.0, 0.49, 0.5, 1.0)
    ]
    assert weights == [50, 50, 0, 0]


def test_a_policy_chooses_the_places():
    model = words()
    batch = batch_of(model)
    objective = made(model, policy=Spans(3, fixed=True), ratio=0.3, generator=AnyId)
    expected = Spans(3, fixed=True)(batch["text"], batch["seed"], 0.3, "mask/text")
    assert torch.equal(objective.task(batch)["hidden"], expected)


def test_what_cannot_work_is_refused():
    model = cases.model()
    with pytest.raises(ValueError, match="made of vectors"):
        Replaced(model, "image")
    with pytest.raises(ValueError, match=r"found ratio 1\.5"):
        Replaced(model, ratio=1.5)
    with pytest.raises(ValueError, match="no fusion"):
        Replaced(cases.model(fuse=None), context=["image"])
    with pytest.raises(ValueError, match="Salient"):
        Replaced(model, policy=Salient())


def test_it_learns_which_words_are_wrong():
    """Texts of one of four alphabets: the area is above 0.8 for unigram replacements, on texts that were not seen."""
    model = words(2).float()
    objective = made(model, generator=Unigram, ratio=0.2).float()
    optimizer = torch.optim.AdamW([*model.parameters(), *objective.parameters()], 1e-2)

    def texts(step, rows=32):
        seed = random.fold(torch.arange(rows), step)
        kind, letter = (random.uniform(seed, (1,), "kind") * 4).long(), (random.uniform(seed, (12,), "letter") * 6).long()
        return {"text": Tokens(65 + 6 * kind + letter, torch.arange(12).expand(rows, 12)[..., None]), "seed": seed}

    for step in range(100):
        terms = objective(model, objective.task(texts(step)))
        optimizer.zero_grad()
        (terms["replaced"].total / terms["replaced"].number).backward()
        optimizer.step()
        objective.after_step(model, 0.0)
    term = objective(model, objective.task(texts(-1, 200)))["replaced"]
    assert term.metrics["area"] > 0.8
    assert 0.1 < term.metrics["replaced"] < 2 / 12  # lucky hits are original
