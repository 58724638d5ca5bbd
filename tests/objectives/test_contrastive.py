import math

import pytest
import torch
from torch.testing import assert_close

from headwater.objectives.contrastive import join, softmax_pairs
from headwater.tokens import Pooled


def clip(a, b, scale):
    """Figure 3 of arXiv:2103.00020 with loops: sum over pairs of the mean of both directions."""
    loss = 0
    for i in range(len(a)):
        for x, others in ((a[i], b), (b[i], a)):
            scores = [scale * sum(x * y) for y in others]
            loss = loss + (torch.stack(scores).logsumexp(0) - scores[i]) / 2
    return loss


def vectors(n=4):
    torch.manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(n, 3, dtype=torch.float64), dim=-1).requires_grad_() for _ in "ab")
    return a, b, torch.tensor(5.0, dtype=torch.float64, requires_grad=True)


def test_loss_and_gradient_equal_the_loops_of_clip():
    given = vectors()
    a, b, scale = given
    ours, theirs = softmax_pairs(a, b, a, b, 0, scale), clip(a, b, scale)
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad(ours, given), torch.autograd.grad(theirs, given))


def test_shares_of_two_ranks_add_up():
    a, b, scale = vectors()
    halves = [softmax_pairs(a[i:j], b[i:j], a, b, i, scale) for i, j in ((0, 1), (1, 4))]
    assert_close(sum(halves), clip(a, b, scale))


@pytest.mark.parametrize("n", [2, 7])
def test_untrained_loss_is_the_log_of_the_number_of_samples(n):
    same = torch.ones(n, 3) / math.sqrt(3)
    assert_close(softmax_pairs(same, same, same, same, 0, torch.tensor(10.0)) / n, torch.tensor(math.log(n)))


def test_only_samples_with_both_are_paired():
    a = Pooled(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1, 2, 4]))
    b = Pooled(torch.tensor([[20.0], [30.0], [40.0]]), torch.tensor([2, 3, 4]))
    assert [x.flatten().tolist() for x in join(a, b)] == [[2.0, 4.0], [20.0, 40.0]]
