"""Narrow floats: only numbers that exist, unbiased rounding, what the rotation is for, and the three products of a layer."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from headwater import random
from headwater.forms import FP8, NVFP4
from headwater.forms.formats import e2m1, e4m3, e5m2, nvfp4, rotated, rotation, scaled8
from headwater.forms.low_precision import FourBits

FOUR = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def nearest(x):
    """E2M1 by search: the nearest, and of two that are as near the one with an even last bit."""
    sign, x = (-1 if x < 0 else 1), abs(x)
    return sign * min(FOUR, key=lambda v: (abs(v - x), FOUR.index(v) % 2))


def eight(exponents, mantissa, bias, top):
    """All positive numbers of an 8-bit float up to its largest."""
    found = [m / 2**mantissa * 2.0 ** (1 - bias) for m in range(2**mantissa)]
    found += [(1 + m / 2**mantissa) * 2.0 ** (e - bias) for e in range(1, 2**exponents) for m in range(2**mantissa)]
    return torch.tensor([v for v in found if v <= top], dtype=torch.float64)


def test_e2m1_by_search():
    x = torch.cat([torch.linspace(-8, 8, 4001, dtype=torch.float64), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])])
    assert_close(e2m1(x), torch.tensor([nearest(float(v)) for v in x], dtype=torch.float64), rtol=0, atol=0)


@pytest.mark.parametrize(("rounds", "every"), [(e4m3, eight(4, 3, 7, 448)), (e5m2, eight(5, 2, 15, 57344))], ids=["E4M3", "E5M2"])
def test_eight_bits_by_search(rounds, every):
    x = torch.randn(2000, dtype=torch.float64).exp() * torch.logspace(-6, 5, 2000, dtype=torch.float64)
    x = x.float().double()
    got = rounds(x)
    assert torch.isin(got, every).all()
    assert_close((got - x).abs(), (every[None] - x[:, None]).abs().min(1).values, rtol=0, atol=0)


def by_loops(x, tall):
    """NVFP4 block by block; sizes are multiples of the block."""
    out = torch.zeros_like(x)
    whole = float(x.abs().max()) / (6 * 448)
    for r in range(0, x.shape[0], tall):
        for c in range(0, x.shape[1], 16):
            block = x[r : r + tall, c : c + 16]
            scale = float(e4m3(block.abs().max() / 6 / whole)) * whole
            for i in range(block.shape[0]):
                for j in range(16):
                    out[r + i, c + j] = nearest(float(block[i, j]) / scale) * scale
    return out


@pytest.mark.parametrize("tall", [1, 16])
def test_nvfp4_by_loops(tall):
    x = torch.randn(32, 48, dtype=torch.float64) * torch.randn(32, 48, dtype=torch.float64).exp()
    assert_close(nvfp4(x, tall), by_loops(x, tall), rtol=1e-12, atol=1e-12)
    if tall == 16:
        assert torch.equal(nvfp4(x, 16).T, nvfp4(x.T, 16))
    y = torch.randn(5, 21, dtype=torch.float64)  # sizes that fill no block
    assert_close(nvfp4(y), by_loops(torch.nn.functional.pad(y, (0, 11)), 1)[:, :21], rtol=1e-12, atol=1e-12)
    assert not nvfp4(torch.zeros(3, 5)).any()


def test_values_are_those_that_exist():
    x = torch.randn(64, 64)
    noise = random.uniform(torch.tensor(0), (64, 64), "n")
    for given in (None, noise):
        got = nvfp4(x, noise=given).view(64, 4, 16)
        whole = x.abs().max() / (6 * 448)
        scale = e4m3(x.view(64, 4, 16).abs().amax(2, keepdim=True) / 6 / whole) * whole
        share = (got / scale).abs()
        assert (share[..., None] - torch.tensor(FOUR)).abs().min(-1).values.max() < 1e-5


def test_stochastic_rounding_is_unbiased():
    x = torch.linspace(-6, 6, 97, dtype=torch.float64)
    draws = torch.stack([e2m1(x, random.uniform(torch.tensor(s), (97,), "n").double()) for s in range(4000)])
    error = (draws.mean(0) - x).abs()
    assert (error <= 3.9 * draws.std(0) / 4000**0.5 + 1e-9).all()  # the largest of 97 draws
    z = (draws.mean(0) - x)[draws.std(0) > 0] / (draws.std(0)[draws.std(0) > 0] / 4000**0.5)
    assert abs(float(z.mean())) < 3 / len(z) ** 0.5
    biased = e2m1(x)
    assert (biased - x).abs().max() > 0.4


def test_the_rotation_is_orthogonal_and_cuts_what_is_flushed_to_zero():
    signs = 2.0 * torch.randint(0, 2, (16,), generator=torch.Generator().manual_seed(0)).double() - 1
    turn = rotation(signs)
    assert_close(turn @ turn.T, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(turn.abs(), torch.full((16, 16), 0.25, dtype=torch.float64))
    x = torch.randn(1600, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[::16] = 10 * x[::16].sign()  # an outlier of ten deviations in every block
    before = (nvfp4(x.T.contiguous()) == 0).double().mean()
    after = (nvfp4(rotated(x, turn).T.contiguous()) == 0).double().mean()
    assert before > 5 * after
    y = torch.randn(21, 3, dtype=torch.float64)
    padded = torch.nn.functional.pad(y, (0, 0, 0, 11))
    assert_close(rotated(y, turn), torch.cat([turn @ padded[:16], turn @ padded[16:]]))


def layer(form):
    torch.manual_seed(0)
    made = nn.ModuleDict({"blocks": nn.ModuleDict({"0": nn.ModuleDict({"fc1": nn.Linear(40, 24)})})}).double()
    form(made)
    return made, made.get_submodule("blocks.0.fc1")


def products(ours, x, weight):
    x = x.clone().requires_grad_()
    y = ours(x)
    return y.detach(), *torch.autograd.grad((y * weight).sum(), [x, ours.full, ours.bias])


@pytest.mark.parametrize("options", [{}, {"rotate": False, "stochastic": False, "square": False}], ids=["paper", "naive"])
def test_the_products_of_a_layer_in_four_bits(options):
    _made, ours = layer(NVFP4(high=0.0, **options))
    x, weight = torch.randn(4, 8, 40, dtype=torch.float64), torch.randn(4, 8, 24, dtype=torch.float64)
    y, back, change, bias = products(ours, x, weight)
    flat, gradient, full = x.flatten(0, 1), weight.flatten(0, 1), ours.full.detach()
    tall = 1 if options else 16
    assert_close(y.flatten(0, 1), nvfp4(flat) @ nvfp4(full, tall).T + ours.bias, rtol=0, atol=1e-10)
    assert_close(bias, gradient.sum(0))
    if options:
        assert_close(back.flatten(0, 1), nvfp4(gradient) @ nvfp4(full.T.contiguous()).T, rtol=0, atol=1e-10)
        assert_close(change, nvfp4(gradient.T.contiguous()) @ nvfp4(flat.T.contiguous()).T, rtol=0, atol=1e-10)
    else:
        seed = random.fold(ours.step, 0)
        noise = random.uniform(seed, gradient.shape, "input").double()
        assert_close(back.flatten(0, 1), nvfp4(gradient, noise=noise) @ nvfp4(full, 16), rtol=0, atol=1e-10)
        turn = rotation(FourBits().signs.double())
        a, b = rotated(gradient, turn).T.contiguous(), rotated(flat, turn).T.contiguous()
        noise = random.uniform(seed, a.shape, "weight").double()
        assert_close(change, nvfp4(a, noise=noise) @ nvfp4(b).T, rtol=0, atol=1e-10)


def cut(x):
    """What lies beyond 6 scales of its block, where the scale was rounded down, is lost: sizes are filled up with zeros."""
    rows, columns = x.shape
    blocks = torch.nn.functional.pad(x, (0, -columns % 16)).view(rows, -1, 16)
    whole = x.abs().max() / (6 * 448)
    most = 6 * whole * e4m3(blocks.abs().amax(2, keepdim=True) / 6 / whole)
    return blocks.clamp(-most, most).flatten(1)[:, :columns]


def test_the_gradient_in_four_bits_is_unbiased_over_steps():
    """But for what the format cuts off."""
    form = NVFP4(high=0.0)
    made, ours = layer(form)
    x, weight = torch.randn(32, 40, dtype=torch.float64), torch.randn(32, 24, dtype=torch.float64)
    backs, changes = [], []
    for step in range(300):
        form.at(made, step / 300)
        _, back, change, _ = products(ours, x, weight)
        backs.append(back), changes.append(change)
    turn = rotation(form.arithmetic.signs.double())
    expected = {
        "back": (torch.stack(backs), cut(weight) @ nvfp4(ours.full.detach(), 16)),
        "change": (torch.stack(changes), cut(rotated(weight, turn).T) @ nvfp4(rotated(x, turn).T.contiguous()).T),
    }
    for name, (draws, mean) in expected.items():
        z = (draws.mean(0) - mean) / (draws.std(0) / 300**0.5)
        assert z.square().mean() < 1.3, name


def test_the_products_of_a_layer_in_eight_bits():
    _, ours = layer(FP8())
    x, weight = torch.randn(6, 40, dtype=torch.float64), torch.randn(6, 24, dtype=torch.float64)
    y, back, change, _ = products(ours, x, weight)
    gradient, full = scaled8(weight, e5=True), ours.full.detach()
    assert_close(y, scaled8(x) @ scaled8(full).T + ours.bias, rtol=0, atol=1e-10)
    assert_close((back, change), (gradient @ scaled8(full), gradient.T @ scaled8(x)), rtol=0, atol=1e-10)
    assert float((scaled8(x) - x).abs().max() / x.abs().max()) < 2**-4


def test_the_last_layers_stay_as_they_are():
    blocks = {str(i): nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)}) for i in range(5)}
    made = nn.ModuleDict({"blocks": nn.ModuleDict(blocks)})
    NVFP4(high=0.2)(made)
    kinds = [type(m).__name__ for n, m in made.named_modules() if n.endswith(("fc1", "fc2"))]
    assert kinds == ["Narrow"] * 8 + ["Linear"] * 2


def test_second_derivatives_are_refused():
    _, ours = layer(NVFP4(high=0.0))
    x = torch.randn(6, 40, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
