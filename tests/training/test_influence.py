"""Scores of samples for a target: first-order ones, those of a real step, and those that a model of features predicts."""

import copy

import numpy as np
import pytest
import torch
from contracts import cases
from scipy.stats import spearmanr
from torch.testing import assert_close

from headwater import distributed
from headwater.modalities import Image, Text
from headwater.model import Model
from headwater.objectives import Causal, Masked, Weighted
from headwater.training.ghost import Ghost, hidden
from headwater.training.influence import Target, aligned, draw, features, oracle, rank_correlation, ridge
from headwater.trunk import Trunk


def language(objective=Causal):
    torch.manual_seed(0)
    model = Model({"text": Text(Trunk(16, depth=1, heads=2), length=12)}).double()
    return model, objective(model).double()


def batch_of(model, numbers, packed=False):
    samples = [{"text": t} for t in model.encoder("text").reader.example(9, 0)]
    return cases.batch(model.readers, samples, numbers, packed)


def masked_too(model):
    return Weighted(model, {"next": Causal, "mask": lambda m: Masked(m, "text", mode="substitute")}, weights={"mask": 0.5})


@pytest.mark.parametrize("objective", [Causal, masked_too], ids=["causal", "weighted"])
def test_a_target_is_the_mean_over_all_targets_of_all_batches(objective):
    model, made = language(objective)
    target = Target(model, made, [batch_of(model, [0, 1, 2]), batch_of(model, [3])])
    model.eval()
    terms = [made.eval()(model, hidden(model, made, batch)) for batch in (batch_of(model, [0, 1, 2]), batch_of(model, [3]))]
    weight = {name: term.weight for name, term in terms[0].items()}
    loss = sum(w * sum(t[n].total for t in terms) / sum(t[n].number for t in terms) for n, w in weight.items())
    assert target.loss() == pytest.approx(loss.item(), rel=1e-12)
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert_close(target.gradient(names), dict(zip(names, found, strict=True)))
    with pytest.raises(ValueError, match="without batches"):
        Target(model, made, [])


def target_of(shares):
    model, made = language()
    target = Target(model, made, [batch_of(model, shares[distributed.rank()])])
    return target.loss(), target.gradient(Ghost(model, made).names)


def test_ranks_have_one_target(ranks):
    loss, gradient = target_of([range(6)])
    for found, slopes in ranks(target_of, [[0, 1, 2, 3], [4, 5]]):
        assert found == pytest.approx(loss, rel=1e-12)
        assert_close(slopes, gradient)


def dropped(model, objective, target, row, optimizer):
    """A re-typing of the oracle on a copy: L(R) before and after a step on one sample's own mean loss."""
    model, objective, optimizer = copy.deepcopy((model, objective, optimizer))
    before = Target(model, objective, target).loss()
    task = hidden(model, objective, row)
    (term,) = objective(model, task).values()
    optimizer.zero_grad()
    (term.total / term.number).backward()
    optimizer.step()
    return before - Target(model, objective, target).loss()


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_the_oracle_is_the_drop_after_a_step_and_leaves_nothing_behind(kind):
    model, made = language()
    target = [batch_of(model, [0, 1, 2])]
    if kind == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    (Target(model, made, target).loss(), sum(p.square().sum() for p in model.parameters()).backward(), optimizer.step())
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    found = oracle(made, Target(model, made, target), [batch_of(model, [4, 5]), batch_of(model, [7])], optimizer)
    after = model.state_dict(), optimizer.state_dict()
    for old, new in zip(before, after, strict=True):
        flat = [torch.utils._pytree.tree_leaves(x) for x in (old, new)]
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*flat, strict=True) if a is not None)
    assert all(p.grad is None for p in model.parameters())
    wanted = [dropped(model, made, target, batch_of(model, [i]), optimizer) for i in (4, 5, 7)]
    assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert found.abs().max() > 1e-4


def test_products_are_what_a_small_step_brings():
    """The drop after a step of plain descent is the rate times the inner product, in first order."""
    model, made = language()
    target, batch = Target(model, made, [batch_of(model, [0, 1, 2])]), batch_of(model, [4])
    ghost = Ghost(model, made)
    assert len(ghost.names) == len(list(model.parameters()))
    product = aligned(ghost, target.gradient(ghost.names), [batch], "product")
    drop = oracle(made, target, [batch], torch.optim.SGD(model.parameters(), lr=1e-5))
    assert_close(drop / 1e-5, product, rtol=1e-3, atol=0)


def test_aligned_takes_batches_in_order_and_packed_rows():
    model, made = language()
    ghost = Ghost(model, made)
    reference = Target(model, made, [batch_of(model, [0, 1])]).gradient(ghost.names)
    one_by_one = aligned(ghost, reference, [batch_of(model, [i]) for i in range(2, 8)])
    assert_close(aligned(ghost, reference, [batch_of(model, [2, 3, 4]), batch_of(model, [5, 6, 7])]), one_by_one)
    assert_close(aligned(ghost, reference, [batch_of(model, range(2, 8), packed=True)]), one_by_one)
    assert one_by_one.abs().max() <= 1
    descent = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="packed rows"):
        oracle(made, Target(model, made, [batch_of(model, [0])]), [batch_of(model, range(6), packed=True)], descent)


def test_features_of_what_is_not_there_are_zero():
    torch.manual_seed(0)
    model = Model(
        {"image": Image(Trunk(16, depth=1, heads=2), size=16, patch=8), "text": Text(Trunk(12, depth=1, heads=2), length=8)}
    )
    images, texts = (model.readers[name].example(3, 0) for name in ("image", "text"))
    samples = [{"image": images[0], "text": texts[0]}, {"image": images[1]}, {"text": texts[2]}]
    batch = cases.batch(model.double().readers, samples)
    found = features(model, batch)
    assert found.shape == (3, 28)
    assert not found[1, 16:].any()
    assert not found[2, :16].any()
    assert_close(found[0, :16], model.eval().represent({"image": batch["image"]})["image"].x[0])


def test_ridge_is_that_of_leaving_one_out():
    from sklearn.linear_model import RidgeCV
    from sklearn.preprocessing import StandardScaler

    draws = np.random.default_rng(0)
    x, strengths = draws.normal(size=(40, 12)) * draws.uniform(0.1, 10, 12), (0.1, 1.0, 10.0, 100.0)
    y = x @ draws.normal(size=12) + 5 * draws.normal(size=40)
    found = ridge(torch.from_numpy(x), torch.from_numpy(y), strengths)
    scaled = StandardScaler().fit_transform(x) * np.sqrt(39 / 40)  # by the deviation of a sample
    theirs = RidgeCV(strengths).fit(scaled, y)
    assert found.strength == theirs.alpha_
    assert_close(found(torch.from_numpy(x)), torch.from_numpy(theirs.predict(scaled)))
    with pytest.raises(ValueError, match="found 2 samples"):
        ridge(torch.zeros(2, 3), torch.zeros(2))


def test_ridge_stands_more_features_than_samples_and_constant_ones():
    x = torch.randn(10, 30, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 1.0
    assert ridge(x, x[:, 0])(x).isfinite().all()


def test_rank_correlation_equals_scipy():
    draws = np.random.default_rng(0)
    a, b = draws.integers(0, 6, 50), draws.normal(size=50)
    wanted = spearmanr(a, b + a).statistic
    assert rank_correlation(torch.from_numpy(a), torch.from_numpy(b + a)) == pytest.approx(wanted, rel=1e-12)


def test_draws_are_the_best_or_follow_the_softmax():
    scores = torch.tensor([0.3, torch.nan, 2.0, -1.0, 1.0])
    assert draw(scores, 2).tolist() == [2, 4]
    assert draw(scores, 4, 10.0, 1).tolist() == [0, 2, 3, 4]  # never what has no score
    assert torch.equal(draw(scores, 2, 1.0, 5), draw(scores, 2, 1.0, 5))
    known = scores[scores.isfinite()].double()
    wanted = (scores.double() / known.std(correction=0)).nan_to_num(-torch.inf).softmax(0)
    first = torch.stack([torch.bincount(draw(scores, 1, 1.0, seed), minlength=5) for seed in range(3000)]).double().mean(0)
    assert_close(first, wanted, rtol=0, atol=0.03)
    with pytest.raises(ValueError, match="keep=5 of 4 samples"):
        draw(scores, 5)


def pools(shares):
    """Scores of this rank's part of a pool for one target of all ranks."""
    model, made = language()
    ghost, mine = Ghost(model, made), shares[distributed.rank()]
    reference = Target(model, made, [batch_of(model, mine[:1])]).gradient(ghost.names)
    return aligned(ghost, reference, [batch_of(model, mine)])


def test_ranks_score_their_share_of_the_pool(ranks):
    model, made = language()
    ghost = Ghost(model, made)
    reference = Target(model, made, [batch_of(model, [0, 4])]).gradient(ghost.names)
    whole = aligned(ghost, reference, [batch_of(model, range(6))])
    first, second = ranks(pools, [[0, 1, 2, 3], [4, 5]])
    assert_close(torch.cat([first, second]), whole)
