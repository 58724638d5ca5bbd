"""Every bottleneck against its paper's formula typed anew, and what it averages over training."""

import math

import pytest
import torch
from torch import distributions
from torch.testing import assert_close

from headwater import distributed
from headwater.init import initialise
from headwater.modalities.bottlenecks import FSQ, KL, VQ, Gumbel, Plain

MADE = {
    "vq": lambda: VQ(7, 3),
    "plain vq": lambda: VQ(7, 3, normalise=False),
    "moving": lambda: VQ(7, 3, decay=0.9),
    "residual": lambda: VQ(5, 3, levels=3, normalise=False, decay=0.9),
    "fsq": lambda: FSQ((4, 3, 2)),
    "gumbel": lambda: Gumbel(6, 3),
    "as it is": lambda: Plain(3),
    "kl": lambda: KL(3),
}
every = pytest.mark.parametrize("name", MADE)


def made(name, rows=4, length=5):
    torch.manual_seed(0)
    bottleneck = MADE[name]().double()
    if isinstance(bottleneck, VQ) and not bottleneck.normalise:
        bottleneck.codebook.data.normal_()
    return bottleneck, torch.randn(rows, length, bottleneck.inputs, dtype=torch.float64)


@every
def test_codes_stand_for_what_came_through(name):
    bottleneck, z = made(name)
    coded, codes = bottleneck(z), bottleneck.code(z)
    assert coded.x.shape == (4, 5, bottleneck.features)
    assert_close(bottleneck.vectors(codes), coded.x, check_dtype=False)
    if bottleneck.vocab is None:
        assert coded.ids is None
    else:
        assert coded.ids.shape == (4, 5, bottleneck.books)
        assert coded.ids.min() >= 0
        assert coded.ids.max() < bottleneck.vocab // bottleneck.books
    assert (coded.loss is not None) == bottleneck.costs


@every
def test_gradient_reaches_what_came_in_and_tokens_do_not_mix(name):
    bottleneck, z = made(name)
    z.requires_grad_()
    coded = bottleneck(z, torch.arange(20).view(4, 5))
    (grad,) = torch.autograd.grad((coded.x[0, 0] * torch.tensor([1.0, 2.0, -3.0])).sum(), z)
    assert grad[0, 0].any()
    assert not grad.flatten(0, 1)[1:].any()


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("normalise", [False, True])
def test_vq_equals_the_formula_in_value_and_gradient(levels, normalise):
    if normalise and levels > 1:
        return
    torch.manual_seed(1)
    bottleneck = VQ(6, 4, levels, normalise, beta=0.3).double()
    bottleneck.codebook.data.normal_()
    z = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    coded = bottleneck(z)
    probe = torch.randn(5, 4, dtype=torch.float64)
    total, away = torch.zeros(()), []
    for n in range(5):
        x = z[0, n] / z[0, n].norm() if normalise else z[0, n]
        rest, loss, sums = x, 0.0, torch.zeros(4, dtype=torch.float64)
        for level in range(levels):
            codes = [e / e.norm() if normalise else e for e in bottleneck.codebook[level]]
            k = min(range(6), key=lambda i, r=rest, c=codes: float((r - c[i]).detach().square().sum()))
            assert coded.ids[0, n, level] == k
            loss = (
                loss
                + sum((rest[d].detach() - codes[k][d]) ** 2 + 0.3 * (rest[d] - codes[k][d].detach()) ** 2 for d in range(4)) / 4
            )
            rest = rest - codes[k].detach()
            sums = sums + codes[k].detach()
        assert_close(coded.x[0, n].detach(), sums)
        assert_close(coded.loss[0, n], loss)
        away.append(loss)
        total = total + (x * probe[n]).sum()
    inputs = (z, bottleneck.codebook)
    naive = torch.autograd.grad(total + sum(away), inputs)
    found = torch.autograd.grad((coded.x[0] * probe).sum() + coded.loss.sum(), inputs)
    assert_close(found, naive)


def noted(bottleneck, z, real=None, seed=None):
    shape = z.shape[:2]
    real = torch.ones(shape, dtype=torch.bool) if real is None else real
    seed = torch.arange(real.numel()).view(shape) if seed is None else seed
    bottleneck.observe(z, bottleneck(z), real, seed)


def test_moving_codes_equal_the_formula():
    bottleneck, z = made("residual")
    real = torch.rand(4, 5) < 0.7
    count, sums, table = bottleneck.count.clone(), bottleneck.codebook.clone(), bottleneck.table().clone()
    ids = bottleneck(z).ids
    noted(bottleneck, z[:2], real[:2])
    noted(bottleneck, z[2:], real[2:])  # in two pieces
    bottleneck.move()
    rest = z.clone()
    for level in range(3):
        for k in range(5):
            chose = [rest[b, n] for b in range(4) for n in range(5) if real[b, n] and ids[b, n, level] == k]
            assert_close(bottleneck.count[level, k], 0.9 * count[level, k] + 0.1 * len(chose))
            assert_close(
                bottleneck.codebook[level, k], 0.9 * sums[level, k] + 0.1 * sum(chose, torch.zeros(3, dtype=torch.float64))
            )
        rest = rest - table[level][ids[..., level]]
    assert_close(bottleneck.table(), bottleneck.codebook / bottleneck.count[..., None])
    before = bottleneck.codebook.clone()
    bottleneck.move()  # nothing was noted
    assert torch.equal(bottleneck.codebook, before)


def test_a_code_that_is_never_chosen_stays_finite():
    bottleneck, z = made("moving")
    for _ in range(3000):
        noted(bottleneck, z[:1, :1])
        bottleneck.move()
    assert bottleneck.table().isfinite().all()
    assert bottleneck.count.min() > 1e-5


def test_dead_codes_become_vectors_of_the_batch_whatever_the_order():
    tables = []
    for order in (torch.arange(6), torch.tensor([4, 0, 5, 2, 3, 1])):
        torch.manual_seed(0)
        bottleneck = VQ(8, 3, normalise=False, decay=0.5, revive=0.2).double()
        z = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(1)).double() + 5
        seed = torch.tensor([[30, 10, 50, 20, 40, 60]])
        for _ in range(6):
            noted(bottleneck, z[:, order], seed=seed[:, order])
            bottleneck.move()
        table = bottleneck.table()[0]
        tables.append(table)
        assert (torch.cdist(table, z[0]).min(1).values < 1).sum() >= 6
    assert_close(tables[0], tables[1])


def shared(share):
    """The codebook after three steps, of which this rank saw its share of the rows."""
    torch.manual_seed(0)
    bottleneck = VQ(8, 3, 2, normalise=False, decay=0.5, revive=0.5).double()
    z = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(1)).double()
    rows = share[distributed.rank()]
    for step in range(3):
        noted(bottleneck, (z + step)[rows], seed=torch.arange(20).view(5, 4)[rows] * 7919 % 31)
        bottleneck.move()
    return bottleneck.table()


@pytest.mark.parametrize("shares", [[[0, 2, 3], [1, 4]], [[0, 1, 2, 3, 4], []], [[3], [0, 1], [2, 4]]])
def test_ranks_move_codes_as_one_process_does(pools, shares):
    whole = shared([[row for share in shares for row in share]])
    found = pools[len(shares)](shared, shares)
    assert all(torch.equal(found[0], other) for other in found)
    assert_close(found[0], whole)


@pytest.mark.parametrize("levels", [(4, 3, 2), (8, 5, 5, 5), (2, 2)])
def test_fsq_reaches_every_cell_and_nothing_else(levels):
    bottleneck = FSQ(levels)
    z = 8 * torch.randn(1, 60_000, len(levels), generator=torch.Generator().manual_seed(0))
    coded = bottleneck(z)
    for d, count in enumerate(levels):
        wanted = torch.arange(count) - count // 2
        assert torch.equal((coded.x[0, :, d] * (count // 2)).round().unique().long(), wanted)
    number = 0
    for d in reversed(range(len(levels))):  # the first number changes fastest
        number = number * levels[d] + (coded.x[0, :, d] * (levels[d] // 2)).round().long() + levels[d] // 2
    assert torch.equal(coded.ids[0, :, 0], number)
    every = torch.arange(math.prod(levels))[None, :, None]
    assert len(bottleneck.vectors(every)[0].unique(dim=0)) == math.prod(levels)
    assert coded.loss is None


def test_fsq_rounds_with_the_gradient_of_its_bound():
    z = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    levels = [4, 3, 2]
    coded = FSQ(tuple(levels))(z)
    for n in range(4):
        for d, count in enumerate(levels):
            half, offset = (count - 1) / 2 * 1.001, 0.0 if count % 2 else 0.5
            y = torch.tanh(z[0, n, d] + math.atanh(offset / half)) * half - offset
            assert_close(coded.x[0, n, d].detach(), y.detach().round() / (count // 2))
            (wanted,) = torch.autograd.grad(y / (count // 2), z, retain_graph=True)
            (found,) = torch.autograd.grad(coded.x[0, n, d], z, retain_graph=True)
            assert_close(found, wanted)
    assert_close(FSQ((5, 4))(torch.zeros(1, 1, 2)).x, torch.zeros(1, 1, 2))


def test_gumbel_draws_codes_as_often_as_their_softmax_says():
    bottleneck, _ = made("gumbel")
    z = torch.randn(1, 1, 6, dtype=torch.float64)
    coded = bottleneck(z.expand(1, 20_000, 6), torch.arange(20_000)[None])
    assert_close(coded.ids[0, :, 0].bincount(minlength=6) / 20_000, z[0, 0].softmax(-1).float(), atol=0.01, rtol=0)
    p = z[0, 0].softmax(-1)
    assert_close(coded.loss[0, 0], sum(x * (x / (1 / 6)).log() for x in p))
    assert bottleneck(z).ids.item() == z.argmax()
    cold = Gumbel(6, 3, temperature=lambda progress: 1.0 - 0.9 * progress).double()
    z.requires_grad_()
    warm, cold = (torch.autograd.grad(cold(z, torch.tensor([[3]]), p).x.sum(), z)[0].abs().sum() for p in (0.0, 1.0))
    assert warm != cold


def test_kl_equals_the_divergence_and_draws_its_distribution():
    bottleneck, z = made("kl", 1, 2)
    mean, log = z.chunk(2, -1)
    of = distributions.Normal(mean, (0.5 * log).exp())
    wanted = distributions.kl_divergence(of, distributions.Normal(0.0, 1.0)).sum(-1)
    assert_close(bottleneck(z).loss, wanted)
    assert_close(bottleneck(z).x, mean)
    drawn = bottleneck(z[:, :1].expand(1, 20_000, 6), torch.arange(20_000)[None]).x[0]
    assert_close(drawn.mean(0), mean[0, 0], atol=0.05, rtol=0)
    assert_close(drawn.std(0), of.stddev[0, 0], atol=0.05, rtol=0.02)


def test_latents_become_codes_of_mean_zero_and_deviation_one():
    bottleneck = Plain(2, decay=0.5).double()
    scale, shift = torch.tensor([0.1, 7.0]).double(), torch.tensor([3.0, -1.0]).double()
    for step in range(20):
        z = torch.randn(4, 100, 2, generator=torch.Generator().manual_seed(step)).double() * scale + shift
        real = torch.arange(100).expand(4, 100) < 80
        noted(bottleneck, z.where(real[..., None], 1e6), real)
        bottleneck.move()
    mean, deviation = bottleneck.moments()
    assert_close(mean, shift, atol=0.3, rtol=0)
    assert_close(deviation, scale, rtol=0.1, atol=0)
    assert_close(bottleneck.vectors(bottleneck.code(z)), z)


def test_noise_for_a_forgiving_decoder_is_drawn_by_seed_alone():
    bottleneck, z = Plain(3, noise=0.5), torch.zeros(1, 20_000, 3)
    noisy = bottleneck(z, torch.arange(20_000)[None]).x[0]
    assert torch.equal(bottleneck(z).x, z)
    assert torch.equal(noisy, bottleneck(z, torch.arange(20_000)[None]).x[0])
    assert_close(noisy.square().mean().sqrt(), torch.tensor(0.5), atol=0.02, rtol=0)
    ratio = noisy[:, 0].abs() / noisy[:, 1].abs()  # all numbers of a token share one deviation
    assert_close(ratio.median(), torch.tensor(1.0), atol=0.1, rtol=0)


def test_a_start_is_a_function_of_the_seed():
    for name in MADE:
        a, b = made(name)[0], MADE[name]()
        initialise(a, 5)
        initialise(b, 5)
        assert all(torch.equal(x.float(), y.float()) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: VQ(1),
        lambda: VQ(8, 1),
        lambda: VQ(8, 4, 2),
        lambda: VQ(8, 4, decay=1.0),
        lambda: VQ(8, 4, revive=0.1),
        lambda: FSQ((8, 1)),
        lambda: FSQ(()),
        lambda: Gumbel(1),
        lambda: Plain(4, noise=-1.0),
        lambda: KL(0),
    ],
)
def test_bad_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match="found"):
        wrong()
