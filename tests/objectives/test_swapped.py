import math

import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater.objectives import Swapped
from headwater.objectives.swapped import swapped
from headwater.view import View


def assignments(scores, entropy):
    """Three rounds of Sinkhorn and Knopp with loops: columns to the same sum, rows to 1."""
    q = [[math.exp(x / entropy) for x in row] for row in scores.tolist()]
    for _ in range(3):
        columns = [sum(row[k] for row in q) for k in range(len(q[0]))]
        q = [[x / c for x, c in zip(row, columns, strict=True)] for row in q]
        q = [[x / sum(row) for x in row] for row in q]
    return torch.tensor(q, dtype=torch.float64)


def test_value_and_gradient_equal_loops():
    torch.manual_seed(0)
    a, b = ((2 * torch.rand(6, 4, dtype=torch.float64) - 1).requires_grad_() for _ in "ab")
    codes = [assignments(x.detach(), 0.3) for x in (a, b)]
    total = 0
    for i in range(6):
        for scores, code in ((a, codes[1]), (b, codes[0])):
            below = sum((scores[i, k] / 0.2).exp() for k in range(4)).log()
            total = total - sum(code[i, k] * (scores[i, k] / 0.2 - below) for k in range(4)) / 2
    ours = swapped(a, b, 0.2, 0.3)
    assert_close(ours, total)
    assert_close(torch.autograd.grad(ours, (a, b)), torch.autograd.grad(total, (a, b)))


def test_only_samples_with_both_sides_count_and_pieces_equal_the_whole():
    totals = []
    for chunks in (1, 3):
        model = cases.model()
        torch.manual_seed(0)
        objective = Swapped(model, prototypes=5).double()
        model.chunks = chunks
        given = cases.batch(model.readers, cases.examples(model.readers))
        term = objective(model, given)["swapped"]
        assert int(term.number) == 6  # sample 3 has no text
        totals.append(term.total)
    assert_close(*totals)


@pytest.mark.parametrize("arguments", [{"b": "image"}, {"prototypes": 1}, {"temperature": 0.0}, {"views": {"audio@0": View()}}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        Swapped(cases.model(), **arguments)
