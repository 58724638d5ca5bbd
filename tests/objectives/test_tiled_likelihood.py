import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from headwater.attention import higher_order
from headwater.objectives import tiled_likelihood
from headwater.objectives.tiled_likelihood import log_probabilities


@pytest.fixture(params=[3, 1000])
def tile(request, monkeypatch):
    """Logits at once: the last tile is smaller than the others, or one holds all."""
    monkeypatch.setattr(tiled_likelihood, "TILE", request.param * 11)


def example(bias=True, rows=13):
    torch.manual_seed(0)
    head = nn.Linear(6, 11, bias=bias, dtype=torch.float64)
    return head, torch.randn(rows, 6, dtype=torch.float64, requires_grad=True), torch.randint(11, (rows,))


def gradients(total, head, x):
    return torch.autograd.grad(total, [x, *head.parameters()])


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_whole_logits(tile, alike, bias):
    head, x, answer = example(bias)
    weight = torch.full((13,), 0.7) if alike else torch.rand(13)
    found = log_probabilities(head, x, answer, alike)
    expected = torch.stack([head(x[t]).log_softmax(-1)[answer[t]] for t in range(13)])
    assert_close(found, expected)
    for a, b in zip(gradients((found * weight).sum(), head, x), gradients((expected * weight).sum(), head, x), strict=True):
        assert_close(a, b)


def test_vectors_that_come_from_a_network_get_their_gradient(tile):
    head, x, answer = example()
    enter = nn.Linear(6, 6, dtype=torch.float64)
    log_probabilities(head, enter(x).tanh(), answer, True).sum().backward()
    found = enter.weight.grad.clone()
    enter.weight.grad = None
    head(enter(x).tanh()).log_softmax(-1).gather(1, answer[:, None]).sum().backward()
    assert_close(found, enter.weight.grad)


def test_a_tied_table_and_a_frozen_head(tile):
    table = nn.Embedding(12, 6, dtype=torch.float64)
    _, x, answer = example()
    log_probabilities(lambda v: F.linear(v, table.weight[:11]), x, answer, True).sum().backward()
    assert table.weight.grad[:11].abs().sum() > 0
    assert (table.weight.grad[11] == 0).all()
    head, x, answer = example()
    head.requires_grad_(False)
    (found,) = torch.autograd.grad(log_probabilities(head, x, answer, True).sum(), x)
    (expected,) = torch.autograd.grad(-F.cross_entropy(head(x), answer, reduction="sum"), x)
    assert_close(found, expected)


def test_nothing_asked_is_nothing():
    head, x, answer = example(rows=0)
    found = log_probabilities(head, x, answer, True)
    assert found.shape == (0,)
    assert all((g == 0).all() for g in gradients(found.sum(), head, x))


def test_memory_is_that_of_a_tile(monkeypatch):
    """No tensor of the graph is as large as the logits."""
    monkeypatch.setattr(tiled_likelihood, "TILE", 22)
    head, x, answer = example(rows=64)
    sizes = []

    def pack(t):
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        log_probabilities(head, x, answer, True).sum().backward()
    assert max(sizes) <= max(x.numel(), head.weight.numel())


def test_half_precision_sums_in_single(tile):
    head, x, answer = example()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = log_probabilities(head.float(), x.float(), answer)
    assert found.dtype == torch.float32
    found.sum().backward()
    assert x.grad.isfinite().all()


def test_gradients_of_gradients_take_whole_logits():
    head, x, answer = example()
    with higher_order():
        (slope,) = torch.autograd.grad(log_probabilities(head, x, answer, True).sum(), x, create_graph=True)
        slope.square().sum().backward()
    assert head.weight.grad.abs().sum() > 0
