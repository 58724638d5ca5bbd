import math

import torch
from torch.testing import assert_close

from headwater.objectives.objective import Term, cross_entropy, squared_error, weighted_sum, wide


def test_squared_error_is_the_mean_over_present_slots():
    target = torch.tensor([[1.0, float("nan"), 3.0], [float("nan")] * 3, [0.0, 0.0, 0.0]], dtype=torch.float64)
    guess = torch.tensor([[2.0, 9.0, 5.0], [7.0, 7.0, 7.0], [1.0, -2.0, 4.0]], dtype=torch.float64, requires_grad=True)
    error = squared_error(guess, target)
    assert error.tolist() == [(1 + 4) / 2, 0.0, (1 + 4 + 16) / 3]
    error.sum().backward()
    expected = [[2 * 1 / 2, 0.0, 2 * 2 / 2], [0.0] * 3, [2 / 3, -4 / 3, 8 / 3]]
    assert_close(guess.grad, torch.tensor(expected, dtype=torch.float64))


def test_cross_entropy_is_minus_the_log_of_the_softmax():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 5, requires_grad=True), torch.randint(5, (2, 3))
    expected = [[-math.log(x.exp()[t] / x.exp().sum()) for x, t in zip(*row, strict=True)] for row in zip(logits.detach(), target)]
    loss = cross_entropy(logits, target)
    assert_close(loss.detach(), torch.tensor(expected))
    loss.sum().backward()
    assert_close(logits.grad, logits.detach().softmax(-1) - torch.eye(5)[target])


def test_weighted_sum_divides_each_term_by_its_own_number():
    terms = {"a": Term(torch.tensor(6.0), torch.tensor(2)), "b": Term(torch.tensor(5.0), torch.tensor(5), weight=0.5)}
    numbers = {"a": torch.tensor(4.0), "b": torch.tensor(10.0)}
    assert weighted_sum(terms, numbers, world=2) == 2 * (6 / 4 + 0.5 * 5 / 10)


def test_a_term_without_targets_is_zero_not_nan():
    assert weighted_sum({"a": Term(torch.tensor(0.0), torch.tensor(0))}, {"a": torch.tensor(0.0)}, world=1) == 0


def test_half_precision_is_widened():
    assert [wide(torch.zeros(1, dtype=d)).dtype for d in (torch.bfloat16, torch.float16, torch.float64)] == [
        torch.float32,
        torch.float32,
        torch.float64,
    ]
