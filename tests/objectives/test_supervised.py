import math
from functools import partial

import pytest
import torch
from contracts import cases
from scipy import stats
from torch.testing import assert_close

from headwater.modalities import Categories, Category, Image, Numbers, Text, Video
from headwater.model import Model
from headwater.objectives import Supervised, Weighted
from headwater.objectives.label_losses import (
    Binary,
    CrossEntropy,
    Ordinal,
    Regression,
    Votes,
    binary,
    dirichlet_multinomial,
    huber,
    ordinal,
    smoothed_cross_entropy,
)
from headwater.tokens import Tokens
from headwater.trunk import Trunk

NAN = math.nan


def same(value, naive, *leaves):
    """Values and gradients of the formula and of its naive form, a list over targets, are equal."""
    expected = torch.stack(naive)
    assert_close(value, expected)
    for got, wanted in zip(*(torch.autograd.grad(v.sum(), leaves) for v in (value, expected)), strict=True):
        assert_close(got, wanted)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def sigmoid(x):
    return 1 / (1 + (-x).exp())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_that_of_the_smoothed_target(smoothing):
    z, y = draw(4, 5), [3, 0, 4, 4]
    naive = []
    for k, target in enumerate(y):
        p = z[k].exp() / z[k].exp().sum()
        naive.append(-sum((smoothing / 5 + (1 - smoothing) * (c == target)) * p[c].log() for c in range(5)))
    same(smoothed_cross_entropy(z, torch.tensor(y), smoothing), naive, z)


def test_binary_is_the_mean_over_known_classes():
    z, y = draw(3, 3), [[1, 0, NAN], [NAN, NAN, 0.3], [0, 1, 1]]
    naive = []
    for k, row in enumerate(y):
        each = [-(t * sigmoid(z[k, c]).log() + (1 - t) * (1 - sigmoid(z[k, c])).log()) for c, t in enumerate(row) if t == t]
        naive.append(sum(each) / len(each))
    same(binary(z, torch.tensor(y, dtype=torch.float64)), naive, z)


@pytest.mark.parametrize("delta", [None, 0.7])
def test_huber_is_square_near_and_linear_far(delta):
    z, y = draw(4, 2), [[0.1, NAN], [3.0, -2.0], [NAN, 0.0], [0.5, 0.5]]
    naive = []
    for k, row in enumerate(y):
        errors = [z[k, c] - t for c, t in enumerate(row) if t == t]
        each = [e * e / 2 if delta is None or abs(e) <= delta else delta * (abs(e) - delta / 2) for e in errors]
        naive.append(sum(each) / len(each))
    same(huber(z, torch.tensor(y, dtype=torch.float64), delta), naive, z)


def test_ordinal_is_a_difference_of_sigmoids_and_its_probabilities_sum_to_one():
    s, cuts = draw(8), torch.tensor([-1.0, 0.2, 0.3], dtype=torch.float64, requires_grad=True)
    y = [0, 1, 2, 3, 3, 2, 1, 0]
    below = [lambda x: 0 * x, *(lambda x, c=c: sigmoid(c - x) for c in cuts), lambda x: 0 * x + 1]
    naive = [-(below[k + 1](s[i]) - below[k](s[i])).log() for i, k in enumerate(y)]
    same(ordinal(s, torch.tensor(y), cuts), naive, s, cuts)
    whole = sum((-ordinal(s, torch.full((8,), k), cuts)).exp() for k in range(4))
    assert_close(whole, torch.ones_like(whole))
    far = ordinal(torch.tensor([80.0]), torch.tensor([1]), torch.tensor([-1.0, 0.0]))  # a plain difference would be log 0
    assert far.isfinite().all()


def test_ordinal_starts_with_all_classes_alike_and_cuts_stay_in_order():
    loss = Ordinal(Category(5)).double()
    assert_close(loss(torch.zeros(5, 1).double(), torch.arange(5)), torch.full((5,), math.log(5)).double())
    with torch.no_grad():
        loss.shift.normal_(0, 3)
    assert (loss.cuts().diff() > 0).all()


def test_votes_are_scored_as_scipy_does():
    a = torch.tensor([[0.5, 2.0, 1.0], [3.0, 0.1, 0.7]], dtype=torch.float64, requires_grad=True)
    votes = torch.tensor([[3.0, 0.0, 4.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    naive = []
    for alpha, c in zip(a, votes, strict=True):
        n, whole = c.sum(), alpha.sum()
        product = torch.ones((), dtype=torch.float64)
        for k in range(3):
            for j in range(int(c[k])):
                product = product * (alpha[k] + j)
        for j in range(int(n)):
            product = product / (whole + j)
        naive.append(-product.log())
    same(dirichlet_multinomial(a, votes), naive, a)
    for value, alpha, c in zip(dirichlet_multinomial(a, votes), a.detach().numpy(), votes.int().numpy(), strict=True):
        orders = math.lgamma(c.sum() + 1) - sum(math.lgamma(k + 1) for k in c)
        assert value.item() == pytest.approx(orders - stats.dirichlet_multinomial.logpmf(c, alpha, c.sum()))


@pytest.mark.parametrize("loss", [Votes, Binary, Regression])
def test_what_is_not_answered_costs_nothing_and_has_no_gradient(loss):
    z = draw(2, 3)
    target = torch.tensor([[NAN] * 3, [0.0 if loss is Votes else NAN] * 3], dtype=torch.float64)
    value = loss(Categories(["a", "b", "c"]))(z, target)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert not value.any()
    assert not gradient.any()


def model(**encoders):
    torch.manual_seed(0)
    return Model(encoders or {"image": Image(cases.trunk(), 16, 8)}).double()


def labelled(numbers, readers, columns):
    """A batch of the samples with these numbers; columns: name -> tokens per sample, None where it has none."""
    samples = [{name: t for name, column in columns.items() if (t := column[k]) is not None} for k in range(len(numbers))]
    return cases.batch(readers, samples)


def test_samples_without_a_label_have_no_gradient():
    m = model()
    o = Supervised(m, Category(3)).double()
    readers, labels = cases.readers(m, o), Category(3).example(4, 0)
    pictures = readers["image"].example(4, 0)
    batch = cases.batch(
        readers, [{"image": p, **({"label": y} if k % 2 else {})} for k, (p, y) in enumerate(zip(pictures, labels, strict=True))]
    )
    x = batch["image"].x.requires_grad_()
    terms, _ = cases.terms(o, m, {**batch, "image": batch["image"]._replace(x=x)})
    (gradient,) = torch.autograd.grad(terms["supervised"].total, x)
    assert terms["supervised"].number == 2
    assert not gradient[[0, 2]].any()
    assert gradient[[1, 3]].flatten(1).any(1).all()


def test_weights_multiply_the_loss_of_a_sample():
    m = model()
    plain, weighed = Supervised(m, Category(3)).double(), Supervised(m, Category(3), weight=Numbers(["sure"])).double()
    weighed.load_state_dict(plain.state_dict())
    readers = cases.readers(m, weighed)
    columns = {"image": readers["image"].example(3, 0), "label": Category(3).example(3, 0)}
    sure = [Numbers(["sure"]).tokens([w]) if w is not None else None for w in (0.0, 0.25, None)]
    each = [
        cases.terms(plain, m, labelled([0], readers, {k: [v[i]] for k, v in columns.items()} | {"label_weight": [sure[1]]}))[0]
        for i in range(3)
    ]
    (term,) = cases.terms(weighed, m, labelled([0, 1, 2], readers, {**columns, "label_weight": sure}))[0].values()
    assert_close(term.total, sum(w * t["supervised"].total for w, t in zip((0, 0.25, 1), each, strict=True)))
    assert term.number == 3


def test_a_label_with_coordinates_asks_the_tokens_at_them():
    """A film's move after each frame: the mean of that frame's answers; a patch's class: that patch's answer."""
    m = model(video=Video(cases.trunk(), 16, 8, frames=3))
    film = m.readers["video"].tokens([*torch.randint(0, 255, (3, 16, 16, 3), dtype=torch.uint8).numpy()])
    moves = Category(4, "taken").tokens([2, None, 1, 3])  # the fourth is about no frame that is there
    o = Supervised(m, Category(4), "video", unit="token").double()
    batch = cases.batch(cases.readers(m, o), [{"video": film, "label": moves}])
    (term,) = cases.terms(o, m, batch)[0].values()
    x = m.encode(m.embed({"video": batch["video"]}))["video"].x[0]
    answers = o.head(torch.stack([x[film.position[:, 0] == k].mean(0) for k in (0, 2)]))
    assert term.number == 2
    assert_close(term.total, torch.nn.functional.cross_entropy(answers, torch.tensor([2, 1]), reduction="sum"))
    patch = Tokens(torch.tensor([3]), torch.tensor([[1, 0, 1]]))
    (term,) = cases.terms(o, m, cases.batch(cases.readers(m, o), [{"video": film, "label": patch}]))[0].values()
    here = (film.position == torch.tensor([1, 0, 1])).all(1)
    assert_close(term.total, torch.nn.functional.cross_entropy(o.head(x[here]), torch.tensor([3])))


@pytest.mark.parametrize("loss", [CrossEntropy, Ordinal])
@pytest.mark.parametrize("classes", [2, 10, 300])
def test_scaled_by_its_number_of_classes_every_loss_starts_near_one(loss, classes):
    m = model()
    o = Weighted(m, {"it": partial(Supervised, label=Category(classes), loss=loss)}, per_class=True).double()
    (term,) = cases.terms(o, m, cases.batch(cases.readers(m, o), cases.examples(cases.readers(m, o))))[0].values()
    assert 0.7 < term.weight * term.total / term.number < 1.4


def test_the_task_vector_tells_the_encoder_what_is_asked():
    m = model(text=Text(cases.trunk(), length=24))
    o = Supervised(m, Category(2), "text", told=True).double()
    batch = cases.batch(cases.readers(m, o), cases.examples(cases.readers(m, o)))
    with torch.no_grad():
        before = cases.loss(cases.terms(o, m, batch)[0])
        o.task_vector.normal_()
        assert cases.loss(cases.terms(o, m, batch)[0]) != before


def test_wrong_arguments_are_refused():
    m = model()
    with pytest.raises(ValueError, match="CrossEntropy got labels of Numbers, which are vectors; take Category"):
        Supervised(m, Numbers(["a"]))
    with pytest.raises(ValueError, match="Binary got labels of Category, which are ids"):
        Supervised(m, Category(2), loss=Binary)
    with pytest.raises(ValueError, match="expected one number per sample"):
        Supervised(m, Category(2), weight=Category(2))
    with pytest.raises(ValueError, match="the model has no fusion"):
        Supervised(m, Category(2), context=["text"])
    with pytest.raises(ValueError, match="delta 0"):
        Supervised(m, Numbers(["a"]), loss=partial(Regression, delta=0))
    with pytest.raises(ValueError, match="1 classes in an order"):
        Supervised(m, Category(1), loss=Ordinal)


def test_it_learns_what_a_few_labels_tell():
    """Bright or dark pictures: with a label on every tenth, the others are told right."""
    torch.manual_seed(0)
    m = Model({"image": Image(Trunk(16, 1), 16, 8)})
    o = Supervised(m, Category(2))
    reader = m.readers["image"]
    bright = torch.arange(64) % 2
    pictures = [(torch.rand(16, 16, 3) * 100 + 120 * k).to(torch.uint8).numpy() for k in bright.tolist()]
    samples = [
        {"image": reader.tokens(p), "label": Category(2).tokens(str(int(k)) if i % 10 < 2 else None)}
        for i, (p, k) in enumerate(zip(pictures, bright, strict=True))
    ]
    batch = {
        k: t if isinstance(t, torch.Tensor) else t._replace(x=t.x.float() if t.x.is_floating_point() else t.x)
        for k, t in cases.batch(cases.readers(m, o), samples).items()
    }
    step = torch.optim.Adam([*m.parameters(), *o.parameters()], 1e-2)
    for _ in range(20):
        (term,) = cases.terms(o, m, batch)[0].values()
        step.zero_grad()
        (term.total / term.number).backward()
        step.step()
    guess = o.head(m.represent({"image": batch["image"]})["image"].x).argmax(-1)
    assert term.number == 14
    assert (guess == bright).float().mean() > 0.95
