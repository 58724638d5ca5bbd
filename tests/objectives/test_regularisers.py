import math

import pytest
import torch
from ranks import Ranks
from torch.testing import assert_close

from headwater import distributed
from headwater.objectives import regularisers as r
from headwater.objectives.heads import moments

N, D = 7, 3
DIRECTION = torch.eye(D, 2 * D, dtype=torch.float64).roll(1, 1) + 0.5


def rows(seed=0, n=N):
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 1.3 + 0.2


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def column(x, j, correction=0):
    """Mean and variance of a feature, with loops."""
    m = mean(x[:, j])
    return m, sum((v - m) ** 2 for v in x[:, j]) / (len(x) - correction)


def covariance_of(a, b, i, j, correction):
    return sum((p - column(a, i)[0]) * (q - column(b, j)[0]) for p, q in zip(a[:, i], b[:, j], strict=True)) / (len(a) - correction)


def vicreg_invariance(a, b):
    return mean(mean((p - q) ** 2 for p, q in zip(x, y, strict=True)) for x, y in zip(a, b, strict=True))


def byol_alignment(a, b):
    return mean(((x / x.norm() - y / y.norm()) ** 2).sum() for x, y in zip(a, b, strict=True))


def vicreg_variance(x):
    return mean((1 - (column(x, j, 1)[1] + 1e-4).sqrt()).clamp(min=0) for j in range(D))


def vicreg_covariance(x):
    return sum(covariance_of(x, x, i, j, 1) ** 2 for i in range(D) for j in range(D) if i != j) / D


def correlation(a, b, i, j):
    return covariance_of(a, b, i, j, 0) / ((column(a, i)[1] + 1e-5) * (column(b, j)[1] + 1e-5)).sqrt()


def barlow_twins(a, b, weight=0.0051):
    on = sum((1 - correlation(a, b, i, i)) ** 2 for i in range(D))
    return on + weight * sum(correlation(a, b, i, j) ** 2 for i in range(D) for j in range(D) if i != j)


def koleo(x):
    unit = [v / v.norm() for v in x]
    return -mean(torch.stack([(p - q).norm() for j, q in enumerate(unit) if j != i]).min().log() for i, p in enumerate(unit))


def kullback_leibler(x):
    """Of normal distributions with the mean and variance of each feature from N(0, 1), mean over features."""
    found = []
    for j in range(D):
        m, v = column(x, j)
        p, q = torch.distributions.Normal(m, v.sqrt()), torch.distributions.Normal(0.0, 1.0)
        found.append(torch.distributions.kl_divergence(p, q))
    return mean(found)


def epps_pulley(x):
    """Equation of section 4 of arXiv:2511.08544 with complex numbers and torch's trapezoids over the whole axis."""
    t = torch.linspace(-3, 3, 33, dtype=torch.float64)
    found = []
    for a in DIRECTION.T:
        empirical = mean(torch.exp(1j * t * (x[k] @ a)) for k in range(len(x)))
        gap = (empirical - torch.exp(-(t**2) / 2)).abs() ** 2 * torch.exp(-(t**2) / 2)
        found.append(len(x) * torch.trapezoid(gap, t))
    return mean(found)


TERMS = {
    "invariance": (r.invariance, vicreg_invariance, 2),
    "alignment": (r.alignment, byol_alignment, 2),
    "variance": (r.variance, vicreg_variance, 1),
    "covariance": (r.covariance, vicreg_covariance, 1),
    "barlow": (lambda a, b: r.identity_error(r.cross_correlation(a, b), 0.0051), barlow_twins, 2),
    "orthogonality": (lambda x: r.identity_error(r.cross_correlation(x, x)), lambda x: barlow_twins(x, x, 1.0), 1),
    "spread": (r.spread, koleo, 1),
    "unit": (lambda x: r.unit_gaussian(*moments(x)), kullback_leibler, 1),
    "gaussian": (lambda x: r.gaussianity(x, DIRECTION), epps_pulley, 1),
}
every = pytest.mark.parametrize("name", TERMS)


@every
def test_term_and_gradient_equal_the_loops_of_its_paper(name):
    ours, theirs, views = TERMS[name]
    given = [rows(seed).requires_grad_() for seed in range(views)]
    a, b = ours(*given), theirs(*given)
    assert_close(a, b)
    assert_close(torch.autograd.grad(a, given), torch.autograd.grad(b, given))


def shared(name, sizes):
    """What a rank with its share of the rows does in a step: (value, sum over ranks of gradient * share)."""
    ours, _, views = TERMS[name]
    first = sum(sizes[: distributed.rank()])
    own = sizes[distributed.rank()]
    given = [rows(seed, sum(sizes))[first : first + own].clone().requires_grad_() for seed in range(views)]
    value = ours(*given)
    (value * own / sum(sizes)).backward()
    return value.detach(), [x.grad for x in given]


@pytest.fixture(scope="module")
def three():
    pool = Ranks(3)
    yield pool
    pool.stop()


@pytest.mark.parametrize("sizes", [[3, 2, 2], [5, 0, 2], [1, 1, 1]])
@every
def test_three_ranks_equal_one_process(three, name, sizes):
    ours, _, views = TERMS[name]
    given = [rows(seed, sum(sizes)).requires_grad_() for seed in range(views)]
    value = ours(*given)
    value.backward()
    results = three(shared, name, sizes)
    for got, _ in results:
        assert_close(got, value.detach(), rtol=1e-9, atol=1e-9)
    for view, x in enumerate(given):
        assert_close(torch.cat([grads[view] for _, grads in results]), x.grad, rtol=1e-9, atol=1e-9)


def test_terms_name_what_is_wrong_with_a_batch():
    good = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    turned = good @ torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    direction = r.directions(torch.tensor([0]), 8, 64)
    assert r.variance(good) < 0.02 < r.variance(0.1 * good)
    assert r.covariance(good) < 0.02 < r.covariance(turned)
    assert r.identity_error(r.cross_correlation(good, good)) < 0.1 < r.identity_error(r.cross_correlation(turned, turned))
    assert r.spread(good[:50]) < r.spread(good[:50] + 9)
    assert r.unit_gaussian(*moments(good)) < 0.01 < r.unit_gaussian(*moments(good + 1))
    uniform = 3**0.5 * (2 * torch.rand(4000, 8, generator=torch.Generator().manual_seed(2)) - 1)
    assert r.gaussianity(good, direction) < 2 < r.gaussianity(uniform, torch.eye(8))


@every
@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_or_equal_rows_are_finite(name, n):
    ours, _, views = TERMS[name]
    given = [torch.ones(n, D, dtype=torch.float64, requires_grad=True) for _ in range(views)]
    value = ours(*given)
    value.backward()
    assert value.isfinite()
    assert all(x.grad.isfinite().all() for x in given)


def directed(seeds):
    return r.directions(torch.tensor(seeds[distributed.rank()], dtype=torch.int64), 4, 5)


def test_directions_are_units_that_all_ranks_share(ranks):
    a, b = ranks(directed, [[2**62, 2**62, 7], [2**62, 3]])
    whole = r.directions(torch.tensor([3, 7, 2**62, 2**62, 2**62]), 4, 5)
    assert torch.equal(a, b)
    assert torch.equal(a, whole)
    assert not torch.equal(a, r.directions(torch.tensor([4]), 4, 5))
    assert_close(whole.norm(dim=0), torch.ones(5))
    assert math.isclose(float(r.directions(torch.tensor([1]), 2, 4000).mean(1).norm()), 0, abs_tol=0.05)
