"""The cross-fitted probe: its value and gradient by hand, on several ranks, and where there is little to fit."""

from functools import partial

import numpy as np
import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater import distributed
from headwater.modalities import Categories, Category, Image, Numbers
from headwater.modalities.pixel_label import PatchClasses
from headwater.model import Model
from headwater.objectives.objective import weighted_sum
from headwater.objectives.probed import Probed, deal, fit
from headwater.tokens import Tokens
from headwater.trunk import Trunk

NAN = float("nan")


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def model(dtype=torch.float64):
    torch.manual_seed(0)
    return Model({"image": Image(Trunk(16, 1, 2), size=32, patch=16)}).to(dtype)


def batch_of(labels, numbers=None, seed=1, prepared=True):
    """Prepared pictures, drawn by the numbers of their samples, with labels: (S, ...) one each, or Tokens."""
    size = labels.x.shape[0] if isinstance(labels, Tokens) else len(labels)
    number = torch.arange(size) if numbers is None else torch.tensor(numbers)
    pictures = torch.stack([draw(4, 768, seed=100 + int(k)) for k in number]) if size else torch.zeros(0, 4, 768).double()
    grid = torch.tensor([[0, row, column] for row in (0, 1) for column in (0, 1)])
    image = Tokens(pictures, grid.expand(size, 4, 3), torch.ones(size, 4, dtype=torch.bool))
    if not isinstance(labels, Tokens):
        labels = Tokens(labels[:, None], torch.zeros(size, 1, 1, dtype=torch.int32), torch.ones(size, 1, dtype=torch.bool))
    return {"image": image, "label": labels, "sample": number, "seed": number * 7 + seed}


def ask(objective, model, batch):
    task = objective.task(batch)
    return objective(model, task)["probed"], task


def naive(x, y, fold, ridge, weight=None, classes=False, through=True):
    """The definition, fold by fold, on standardised features; x (K, D) with gradient, y (K, C), fold (K,)."""
    weight = torch.ones(len(x)).double() if weight is None else weight
    fitted, known, y = x if through else x.detach(), ~y.isnan(), y.double()
    share = weight[:, None] * known
    average = (share * y.nan_to_num()).sum(0) / share.sum(0)
    variance = (share * (y - average).nan_to_num() ** 2).sum(0) / share.sum(0)
    variance = variance.mean().expand(len(variance)) if classes else variance
    w = weight[:, None] / weight.sum()
    std = (w * (fitted - (w * fitted).sum(0)) ** 2).sum(0).sqrt()
    total, count = 0, 0
    for asked in fold.unique():
        a, b = fold != asked, fold == asked
        w, mine = weight[a][:, None] / weight[a].sum(), share[a]
        mean = (w * fitted[a]).sum(0)
        offset = (mine * y[a].nan_to_num()).sum(0) / mine.sum(0)
        z, target = (fitted[a] - mean) / std, torch.where(known[a], y[a], offset) - offset
        slope = torch.inverse(z.T @ (w * z) + ridge * torch.eye(z.shape[1]).double()) @ z.T @ (w * target)
        answer = (x[b] - mean) / std @ slope + offset
        for k, row in enumerate(b.nonzero()[:, 0]):
            terms = [(answer[k, c] - y[row, c]) ** 2 / variance[c] for c in range(y.shape[1]) if known[row, c]]
            total = total + weight[row] * sum(terms) / len(terms)
            count += 1
    return total, count


def same(term, expected, parameters):
    total, count = expected
    assert_close(term.total, total, rtol=1e-9, atol=1e-9)
    assert int(term.number) == count
    got, wanted = (torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True) for value in (term.total, total))
    assert any(g is not None and g.abs().max() > 1e-8 for g in got)
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("folds", "through"), [(2, True), (4, False), (20, True)])
def test_classes_as_by_hand(folds, through):
    trained = model()
    objective = Probed(trained, Category(3), ridge=0.3, folds=folds, through=through).double()
    label = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 2, 1, 0, 1])
    term, task = ask(objective, trained, batch_of(label))
    x = trained.represent({"image": task["image"]})["image"].x
    expected = naive(x, torch.eye(3)[label], task["fold"], 0.3, classes=True, through=through)
    same(term, expected, [p for p in trained.parameters() if p.requires_grad])
    assert 0 <= term.metrics["accuracy"] <= 1


def test_numbers_that_are_partly_missing_and_weights_as_by_hand():
    trained = model()
    objective = Probed(trained, Numbers(["a", "b"]), ridge=0.5, weight=Numbers(["sure"])).double()
    y = draw(12, 2, seed=3) * torch.tensor([1.0, 100.0]) + 5
    y[3, 0] = y[7, 1] = y[8, 1] = NAN
    batch = batch_of(y)
    sure = draw(12, seed=4).abs()
    batch["label_weight"] = batch["label"]._replace(x=sure[:, None, None])
    term, task = ask(objective, trained, batch)
    x = trained.represent({"image": task["image"]})["image"].x
    same(term, naive(x, y, task["fold"], 0.5, sure), list(trained.parameters()))


def test_tags_are_scored_each_by_its_own_variance():
    trained = model()
    objective = Probed(trained, Categories(["a", "b", "c"])).double()
    y = (draw(10, 3, seed=5) > torch.tensor([0.0, 1.0, -0.5])).double()
    term, task = ask(objective, trained, batch_of(y))
    x = trained.represent({"image": task["image"]})["image"].x
    same(term, naive(x, y, task["fold"], 1.0), list(trained.parameters()))


def test_labels_of_patches_as_by_hand():
    trained = model()
    objective = Probed(trained, PatchClasses(3, size=32, patch=16), unit="token", ridge=0.2).double()
    label = torch.tensor(np.random.default_rng(0).integers(0, 3, (7, 4)))
    valid = torch.rand(7, 4, generator=torch.Generator().manual_seed(0)) > 0.2
    grid = torch.tensor([[0, row, column] for row in (0, 1) for column in (0, 1)])
    batch = batch_of(Tokens(label, grid.expand(7, 4, 3), valid))
    term, task = ask(objective, trained, batch)
    x = trained.encode(trained.embed({"image": batch["image"]}))["image"].x[valid]
    fold = task["fold"][:, None].expand(7, 4)[valid]
    same(term, naive(x, torch.eye(3)[label[valid]], fold, 0.2, classes=True), list(trained.parameters()))


def test_it_tells_features_that_hold_the_label_from_noise_also_when_they_outnumber_samples():
    y = torch.arange(40) % 2
    fold = deal(torch.arange(40), y.double(), torch.linspace(0, 1, 40), 4)
    errors = {}
    for name, strength in (("told", 3.0), ("noise", 0.0)):
        x = draw(40, 100, seed=9)
        x[:, :20] += strength * (2 * y[:, None] - 1)
        found = fit(x, torch.nn.functional.one_hot(y).double(), torch.ones(40).double(), fold, 4, 0.1)
        answer = torch.stack([x[k] @ found.weight[fold[k]] + found.bias[fold[k]] for k in range(40)])
        errors[name] = float(((answer[:, 1] - y) ** 2).mean() / found.variance[1])
    assert errors["told"] < 0.2
    assert 0.7 < errors["noise"] < 2.5  # scored on what it was fitted to it would be near 0


def test_what_does_not_vary_is_left_out():
    x, y, one = draw(12, 3), draw(12, 1, seed=1), torch.ones(12).double()
    fold = torch.arange(12) % 2
    plain = fit(x, y, one, fold, 2, 0.1)
    padded = fit(torch.cat([x, 7.7 * one[:, None], 0 * one[:, None]], 1), y, one, fold, 2, 0.1)
    assert_close(padded.weight[:, :3], plain.weight)
    assert not padded.weight[:, 3:].any()
    assert not fit(x, 0.1 * one[:, None], one, fold, 2, 0.1).variance.any()


def test_folds_have_their_share_of_every_class_and_copies_stay_together():
    number = torch.tensor([5, 9, 2, 5, 7, 1, 3, 9, 8, 4, 6])
    key = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1, NAN, 1, 0]).double()
    seen = set()
    for seed in range(6):
        uniform = torch.rand(11, generator=torch.Generator().manual_seed(seed))
        fold = deal(number, key, uniform, 2)
        assert (fold[0], fold[1]) == (fold[3], fold[7])
        assert fold[8] == -1
        for c in (0, 1):
            ones = {int(n): int(h) for n, h, k in zip(number, fold, key, strict=True) if k == c}
            assert abs(2 * sum(ones.values()) - len(ones)) <= 1
        order = torch.randperm(11, generator=torch.Generator().manual_seed(seed))
        assert_close(deal(number[order], key[order], uniform[order], 2), fold[order])
        seen.add(tuple(fold.tolist()))
    assert len(seen) > 2


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("labels", [[1], [1, 1], [0] * 6, [0] * 5 + [1]])
def test_too_few_labels_or_one_class_give_finite_losses_with_a_gradient(labels, through):
    trained = model()
    term, _ = ask(Probed(trained, Category(3), through=through).double(), trained, batch_of(torch.tensor(labels)))
    assert term.total.isfinite() and term.total.requires_grad  # noqa: PT018
    assert int(term.number) == (len(labels) if len(labels) > 1 else 0)
    term.total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in trained.parameters())
    if len(set(labels)) == 1:
        assert not term.total.any()


def test_without_any_label_the_number_is_zero_and_the_loss_has_a_gradient_of_zero():
    trained = model()
    objective = Probed(trained, Category(3)).double()
    batch = batch_of(torch.zeros(4, dtype=torch.int64))
    batch["label"] = batch["label"]._replace(valid=torch.zeros(4, 1, dtype=torch.bool))
    term, task = ask(objective, trained, batch)
    term.total.backward()
    assert [int(n) for n in (term.number, objective.numbers(task)["probed"])] == [0, 0]
    assert not term.total.any()
    assert all(p.grad is None or not p.grad.any() for p in trained.parameters())


def gradients(numbers, unit):
    """Loss and gradient of a step whose samples lie on this rank by these numbers."""
    trained = model()
    mine = numbers[distributed.rank()]
    if unit == "sample":
        objective, batch = Probed(trained, Category(3)).double(), batch_of(torch.tensor([n % 3 for n in mine]), mine)
    else:
        objective = Probed(trained, PatchClasses(3, size=32, patch=16), unit="token").double()
        grid = torch.tensor([[0, row, column] for row in (0, 1) for column in (0, 1)]).expand(len(mine), 4, 3)
        label = torch.tensor([[(3 * n + k) % 3 for k in range(4)] for n in mine])
        batch = batch_of(Tokens(label, grid, label < 2), mine)
    task = objective.task(batch)
    numbers = {"probed": distributed.total(objective.numbers(task)["probed"])}
    loss = weighted_sum(objective(trained, task), numbers, 1)
    loss.backward()
    return distributed.total(loss), [distributed.total(p.grad) for p in trained.parameters() if p.grad is not None]


@pytest.mark.parametrize("unit", ["sample", "token"])
def test_two_ranks_equal_one_process(ranks, unit):
    loss, expected = gradients([list(range(11))], unit)
    assert any(g.abs().max() > 1e-6 for g in expected)
    for got, gradient in ranks(gradients, [[0, 3, 4, 9], [1, 2, 5, 6, 7, 8, 10]], unit):
        assert_close(got, loss, rtol=1e-9, atol=1e-9)
        for a, b in zip(gradient, expected, strict=True):
            assert_close(a, b, rtol=1e-7, atol=1e-10)


def test_pieces_change_nothing():
    found = []
    for chunks in (1, 3):
        trained = model()
        trained.chunks = chunks
        term, _ = ask(Probed(trained, Category(3)).double(), trained, batch_of(torch.arange(9) % 3))
        found.append([term.total, *torch.autograd.grad(term.total, trained.encoders["image"].trunk.parameters())])
    assert_close(found[0], found[1])


def test_half_precision_features_and_bad_arguments():
    trained = model(torch.bfloat16)
    batch = batch_of(torch.arange(8) % 2)
    batch["image"] = batch["image"]._replace(x=batch["image"].x.bfloat16())
    term, _ = ask(Probed(trained, Category(2)), trained, batch)
    assert term.total.dtype == torch.float32
    trained = model(torch.float32)
    batch["image"] = batch["image"]._replace(x=batch["image"].x.float())
    plain, _ = ask(Probed(trained, Category(2)), trained, batch)
    with torch.autocast("cpu", torch.bfloat16):  # what is fitted is not rounded
        mixed, _ = ask(Probed(trained, Category(2)), trained, batch)
    assert_close(mixed.total, plain.total, rtol=0.05, atol=0)
    for wrong in ({"ridge": 0.0}, {"folds": 1}):
        with pytest.raises(ValueError, match="expected 2 folds or more"):
            Probed(trained, Category(2), **wrong)


def test_context_is_asked_through_the_fusion():
    trained = cases.model()
    objective = partial(Probed, label=Category(3), context=["text"])(trained).double()
    readers = cases.readers(trained, objective)
    batch = cases.batch(readers, cases.examples(readers))
    term, _ = ask(objective, trained, batch)
    term.total.backward()
    assert any(p.grad is not None and p.grad.any() for p in trained.fusion.parameters())
