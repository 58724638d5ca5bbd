import pytest
import torch
from torch.testing import assert_close

from headwater import distributed

ROWS = torch.arange(15.0, dtype=torch.float64).reshape(5, 3).sin()


def share(sizes):
    """Gathers this rank's rows, scores them with rank-dependent weights: (gathered, first, loss, gradient of own rows)."""
    first = sum(sizes[: distributed.rank()])
    own = ROWS[first : first + sizes[distributed.rank()]].clone().requires_grad_()
    every, place = distributed.gather(own)
    loss = (every * weights(distributed.rank(), len(every))).sum() + every[place : place + len(own)].pow(3).sum()
    loss.backward()
    return every.detach(), place, loss.item(), own.grad


def weights(rank, n):
    return torch.arange(n, dtype=torch.float64)[:, None].cos() + rank


@pytest.mark.parametrize("sizes", [[3, 2], [5, 0], [0, 4], [1, 4]])
def test_uneven_rows_are_gathered_with_the_gradient_of_one_process(ranks, sizes):
    rows = ROWS[: sum(sizes)].clone().requires_grad_()
    loss = sum((rows * weights(rank, len(rows))).sum() for rank in range(2)) + rows.pow(3).sum()
    loss.backward()
    results = ranks(share, sizes)
    for (every, place, _, _), first in zip(results, (0, sizes[0]), strict=True):
        assert_close(every, rows.detach())
        assert place == first
    assert_close(sum(part for _, _, part, _ in results), loss.item())
    assert_close(torch.cat([grad for *_, grad in results]), rows.grad)


def sums(values):
    x = torch.tensor(values[distributed.rank()], requires_grad=True)
    return distributed.total(x), x.detach(), distributed.lengths(distributed.rank() * 3, x.device), distributed.world()


def test_total_leaves_its_argument_alone(ranks):
    for rank, (total, own, lengths, world) in enumerate(ranks(sums, [1.5, 2.0])):
        assert total == 3.5
        assert not total.requires_grad
        assert own == [1.5, 2.0][rank]
        assert lengths == [0, 3]
        assert world == 2


def test_one_process_needs_no_group():
    every, place = distributed.gather(ROWS)
    assert every is ROWS
    assert (place, distributed.world(), distributed.rank(), distributed.lengths(4, ROWS.device)) == (0, 1, 0, [4])


def fail():
    if distributed.rank() == 1:
        raise KeyError("the reason")
    distributed.total(torch.ones(()))  # waits for rank 1


def test_an_error_on_one_rank_is_shown_and_the_next_call_works(ranks):
    with pytest.raises(RuntimeError, match="the reason"):
        ranks(fail)
    assert ranks(distributed.world) == [2, 2]
