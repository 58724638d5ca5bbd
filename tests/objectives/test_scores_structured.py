import math
from itertools import product

import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater.objectives import Contrastive
from headwater.objectives.contrast.consistency import Consistent
from headwater.objectives.contrast.gaussian import Gaussian, divergence, inclusion
from headwater.objectives.contrast.scores import Cosine
from headwater.objectives.contrast.token_sets import LateInteraction, Transport, plan
from headwater.tokens import Pooled, Tokens, unpack

NAMES = ("image", "text")
MODEL = cases.model()


def ragged(*lengths, seed=0):
    """Vectors of as many samples as there are lengths."""
    torch.manual_seed(seed)
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return Pooled(torch.randn(len(sample), 4, dtype=torch.float64, requires_grad=True), sample)


def units(vectors, i):
    return [x / x.square().sum().sqrt() for x in vectors.x[vectors.sample == i]]


def same(ours, theirs, given):
    assert_close(ours, theirs)
    seed = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((x * seed).sum(), given, retain_graph=True) for x in (ours, theirs)), strict=True):
        assert_close(a, b)


def matrix(score, rows, columns):
    return torch.stack([torch.stack([score(i, j) for j in range(columns)]) for i in range(rows)])


@pytest.mark.parametrize(("top", "reduce"), [(1, "mean"), (1, "sum"), (2, "mean"), (9, "mean")])
def test_late_interaction_equals_three_loops(top, reduce):
    a, b = ragged(2, 1, 4), ragged(3, 1, seed=1)
    score = LateInteraction(MODEL, NAMES, reduce=reduce, top=top)

    def naive(i, j, asking=a, answering=b):
        total = 0
        for q in units(asking, i):
            cosines = torch.stack([sum(q * d) for d in units(answering, j)]).sort(descending=True).values
            total = total + cosines[:top].mean()
        return total / len(units(asking, i)) if reduce == "mean" else total

    items = score.items("image", a), score.items("text", b)
    same(score(*items), matrix(naive, 3, 2), (a.x, b.x))
    same(score(*items[::-1]), matrix(lambda j, i: naive(j, i, b, a), 2, 3), (a.x, b.x))
    asks = LateInteraction(MODEL, NAMES, query="text", reduce=reduce, top=top)
    items = asks.items("image", a), asks.items("text", b)
    assert asks.symmetric
    same(asks(*items), matrix(lambda i, j: naive(j, i, b, a), 3, 2), (a.x, b.x))
    assert_close(asks(*items), asks(*items[::-1]).T)


def test_padding_from_another_rank_is_invisible():
    a, b = ragged(2, 1), ragged(3, 2, seed=1)
    for score in (LateInteraction(MODEL, NAMES, top=2), LateInteraction(MODEL, NAMES, query="image"), Transport(MODEL, NAMES)):
        x, y = score.items("image", a), score.items("text", b)
        wide = (torch.nn.functional.pad(y[0], (0, 0, 0, 3)), torch.nn.functional.pad(y[1], (0, 3)), *y[2:])
        assert_close(score(x, wide), score(x, y))
        assert_close(score(wide, x), score(y, x))


def sinkhorn(cosine, entropy, steps):
    """The plan with loops: both sides are scaled half way towards their masses at a time."""
    rows, columns = cosine.shape
    u, v = [0.0] * rows, [0.0] * columns
    for _ in range(steps):
        new_u = [
            -math.log(rows) - math.log(sum(math.exp(cosine[i, j] / entropy + v[j]) for j in range(columns))) for i in range(rows)
        ]
        new_v = [
            -math.log(columns) - math.log(sum(math.exp(cosine[i, j] / entropy + u[i]) for i in range(rows))) for j in range(columns)
        ]
        u, v = ([(x + y) / 2 for x, y in zip(old, new, strict=True)] for old, new in ((u, new_u), (v, new_v)))
    mass = torch.tensor([[math.exp(cosine[i, j] / entropy + u[i] + v[j]) for j in range(columns)] for i in range(rows)]).double()
    return mass / mass.sum()


def test_transport_equals_loops_and_its_plan_has_the_right_masses():
    a, b = ragged(2, 4), ragged(3, 1, 2, seed=1)
    score = Transport(MODEL, NAMES, entropy=0.2, steps=8)

    def naive(i, j):
        x, y = units(a, i), units(b, j)
        cosine = torch.stack([torch.stack([sum(p * q) for q in y]) for p in x])
        return (sinkhorn(cosine.detach(), 0.2, 8) * cosine).sum()

    items = score.items("image", a), score.items("text", b)
    same(score(*items), matrix(naive, 2, 3), (a.x, b.x))
    assert_close(score(*items), score(*items[::-1]).T)
    x = torch.rand(1, 1, 3, 5).double()
    mass = plan(x, torch.ones(1, 3).bool(), torch.ones(1, 5).bool(), 0.1, 300)[0, 0]
    assert_close(mass.sum(1), torch.full((3,), 1 / 3).double(), rtol=1e-4, atol=1e-4)
    assert_close(mass.sum(0), torch.full((5,), 1 / 5).double(), rtol=1e-4, atol=1e-4)


def test_transport_of_a_set_to_its_own_shuffle_is_one():
    a = ragged(5)
    score = Transport(MODEL, NAMES, entropy=0.01, steps=200)
    other = Pooled(a.x[[3, 1, 4, 0, 2]], a.sample)
    assert_close(score(score.items("image", a), score.items("text", other)), torch.ones(1, 1).double(), rtol=1e-3, atol=1e-3)


def test_token_vectors_are_those_of_the_signal_packed_or_not():
    model = cases.model()
    readers = {name: model.readers[name] for name in NAMES}
    samples = cases.examples(readers)
    for merge in (1, 3):
        score = LateInteraction(model, NAMES, merge=merge)
        made = []
        for packed in (False, True):
            batch = cases.batch(readers, samples, packed=packed)
            given = {name: batch[name] for name in NAMES}
            made.append({n: score.vectors(model, n, t) for n, t in model.encode(model.embed(given)).items()})
        for name in NAMES:
            assert_close(made[0][name], made[1][name])
            lengths = [-(-len(s[name].position) // merge) for s in samples if name in s]
            assert made[0][name].sample.bincount()[made[0][name].sample.unique()].tolist() == lengths


def test_merged_tokens_are_means_of_neighbours():
    model, x = cases.model(), torch.randn(1, 5, 24, dtype=torch.float64)
    found = LateInteraction(model, NAMES, merge=2).vectors(model, "text", Tokens(x, torch.zeros(1, 5, 1)))
    means = torch.stack([x[0, :2].mean(0), x[0, 2:4].mean(0), x[0, 4]])
    assert_close(found.x, model.projections["text"](means))
    assert unpack(Tokens(x, torch.zeros(1, 5, 1))).x.shape == x.shape


def gaussians(n, seed):
    torch.manual_seed(seed)
    mean = torch.nn.functional.normalize(torch.randn(n, 3, dtype=torch.float64), dim=-1).requires_grad_()
    return mean, (torch.randn(n, 3, dtype=torch.float64) - 1).requires_grad_(), torch.zeros(n).double()


def gaussian(**options):
    model = cases.model()
    model.space = 8
    return Gaussian(model, NAMES, **options).double()


def test_distance_of_gaussians_equals_loops_and_sampling():
    a, b = gaussians(3, 0), gaussians(2, 1)

    def naive(i, j):
        return -sum((a[0][i, d] - b[0][j, d]) ** 2 + a[1][i, d].exp() + b[1][j, d].exp() for d in range(3))

    ours = gaussian()(a, b)
    same(ours, matrix(naive, 3, 2), (a[0], a[1], b[0], b[1]))
    torch.manual_seed(0)
    draws = [m + (v / 2).exp() * torch.randn(200_000, *m.shape).double() for m, v, _ in (a, b)]
    for i, j in product(range(3), range(2)):  # the expected squared distance of two draws
        assert_close(-(draws[0][:, i] - draws[1][:, j]).square().sum(-1).mean(), ours[i, j], rtol=0.02, atol=0.02)


def density(x, mean, log_variance):
    return (-(x - mean).square() / (2 * log_variance.exp())).exp() / (2 * math.pi * log_variance.exp()).sqrt()


def test_inclusion_equals_the_integrals():
    a, b = gaussians(4, 0), gaussians(4, 1)
    x = torch.linspace(-30, 30, 60_001).double()
    theirs = []
    for i in range(4):
        total = 0
        for d in range(3):
            p, q = (density(x, m[i, d], v[i, d]) for m, v, _ in (a, b))
            total = total + torch.trapezoid(p * p * q, x).log() - torch.trapezoid(p * q * q, x).log()
        theirs.append(total)
    same(inclusion(a[:2], b[:2]), torch.stack(theirs), (a[0], a[1], b[0], b[1]))
    narrow, wide = torch.full((1, 3), -3.0), torch.full((1, 3), 1.0)
    assert inclusion((a[0][:1], narrow), (a[0][:1] + 0.1, wide)) > 0


def test_divergence_equals_that_of_torch():
    mean, log_variance, _ = gaussians(3, 0)
    other = torch.distributions.Normal(mean, (log_variance / 2).exp())
    theirs = torch.distributions.kl_divergence(other, torch.distributions.Normal(0.0, 1.0)).sum(-1)
    same(divergence(mean, log_variance), theirs, (mean, log_variance))


def test_extra_terms_of_gaussians():
    score = gaussian(wide="text", include=0.2, slope=0.5)
    a, b = gaussians(3, 0), gaussians(3, 1)
    b = (*b[:2], torch.ones(3).double())
    found = score.terms(a, b, a, b)
    assert tuple(found) == score.extra
    kl = sum(divergence(*x[:2]).sum() for x in (a, b))
    assert_close(found["kl"], (kl, score.kl))
    into = -torch.nn.functional.logsigmoid(0.5 * inclusion(a[:2], b[:2])).sum()
    assert_close(found["inclusion"], (into, 0.2))
    assert_close(score.terms(b, a, b, a)["inclusion"], (into, 0.2))  # whichever side comes first


@pytest.mark.parametrize("tile", [2, 100])
def test_consistency_equals_loops(tile):
    torch.manual_seed(0)
    a, b = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in "ab")
    score = Consistent(cases.model(), NAMES, tile=tile)
    found = score.terms((a,), (b,), (a,), (b,))
    assert tuple(found) == score.extra
    within = sum((sum(a[i] * a[j]) - sum(b[i] * b[j])) ** 2 for i in range(5) for j in range(5))
    across = sum((sum(a[i] * b[j]) - sum(a[j] * b[i])) ** 2 for i in range(5) for j in range(5))
    same(found["within"][0], within, (a, b))
    same(found["across"][0], across, (a, b))


def test_consistency_scores_as_the_score_inside():
    model = cases.model()
    inside, outside = Cosine(model, NAMES), Consistent(model, NAMES)
    vectors = Pooled(torch.randn(4, 8), torch.arange(4))
    items = outside.items("image", vectors)
    assert_close(items, inside.items("image", vectors))
    assert_close(outside(items, items), inside(items, items))


@pytest.mark.parametrize(
    "make",
    [
        lambda model: LateInteraction(model, NAMES, query="audio"),
        lambda model: LateInteraction(model, NAMES, top=0),
        lambda model: LateInteraction(model, NAMES, merge=0),
        lambda model: Transport(model, NAMES, entropy=0),
        lambda model: Gaussian(model, NAMES, wide="audio"),
    ],
)
def test_bad_arguments_are_refused(make):
    with pytest.raises(ValueError, match="found"):
        make(cases.model())


def test_without_a_shared_space_tokens_cannot_be_compared():
    model = cases.model()
    model.space = None
    with pytest.raises(ValueError, match="space: 128"):
        LateInteraction(model, NAMES)
    with pytest.raises(ValueError, match="space: 128"):
        Gaussian(model, NAMES)


def test_tiles_of_token_sets_hold_fewer_scores(monkeypatch):
    """As many cosines of tokens exist at once as `tile` allows, or those of one row."""
    model = cases.model()
    objective = Contrastive(model, "image", "text", score=LateInteraction, tile=500).double()
    batch = cases.batch(model.readers, cases.examples(model.readers))
    made = []
    plain = LateInteraction.forward

    def forward(self, a, b):
        made.append((len(a[0]), len(a[0]) * a[0].shape[1] * len(b[0]) * b[0].shape[1]))
        return plain(self, a, b)

    monkeypatch.setattr(LateInteraction, "forward", forward)
    tiled = objective(model, batch)["contrastive"].total
    assert all(rows == 1 or numbers <= 500 for rows, numbers in made)
    objective.tile = 1 << 23
    torch.testing.assert_close(objective(model, batch)["contrastive"].total, tiled)
