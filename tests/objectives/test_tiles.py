import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from headwater import distributed
from headwater.objectives.contrast.candidates import Candidates, Rows, contrast
from headwater.objectives.contrast.losses import Bound, Margin, Sigmoid, Softmax
from headwater.objectives.contrast.positives import Identity
from headwater.objectives.contrast.scores import Score
from headwater.objectives.contrast.tiles import softmax_both_ways, tiled


class Dot(Score):
    """Scores of items as they are."""

    def forward(self, a, b):
        return a[0] @ b[0].T


def vectors(n=7, width=3):
    torch.manual_seed(0)
    a, b = (F.normalize(torch.randn(n, width, dtype=torch.float64), dim=-1).requires_grad_() for _ in "ab")
    return a, b, torch.tensor(5.0, dtype=torch.float64, requires_grad=True)


def clip(a, b, scale):
    """Figure 3 of arXiv:2103.00020 with loops: sum over pairs of the mean of both directions."""
    loss = 0
    for i in range(len(a)):
        for x, others in ((a[i], b), (b[i], a)):
            scores = [scale * sum(x * y) for y in others]
            loss = loss + (torch.stack(scores).logsumexp(0) - scores[i]) / 2
    return loss


def both_ways(a, b, scale, tile, own=None, rows=None):
    own = torch.arange(len(a)) if own is None else own
    return softmax_both_ways(lambda x: scale * x @ b.T, (a if rows is None else rows,), own, len(b), tile)


@pytest.mark.parametrize("tile", [1, 14, 30, 1000])
def test_loss_and_gradient_equal_the_loops_of_clip_in_tiles_of_any_size(tile):
    given = vectors()
    ours, theirs = both_ways(*given, tile), clip(*given)
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad(ours, given), torch.autograd.grad(theirs, given))


def shared(sizes, tile):
    """This rank's share: (loss, gradients of its own rows and of the scale)."""
    a, b, scale = vectors()
    first = sum(sizes[: distributed.rank()])
    here = slice(first, first + sizes[distributed.rank()])
    a, b = (x[here].detach().requires_grad_() for x in (a, b))
    every, _ = distributed.gather(b)
    loss = both_ways(a, every, scale, tile, torch.arange(first, here.stop))
    loss.backward()
    return loss.item(), a.grad, b.grad, scale.grad


@pytest.mark.parametrize(
    ("sizes", "tile"), [([3, 4], 1000), ([3, 4], 8), ([7, 0], 8), ([0, 7], 1000), ([1, 4, 2], 8), ([0, 7, 0], 8)]
)
def test_ranks_share_the_matrix_of_one_process(pools, sizes, tile):
    given = vectors()
    loss = clip(*given)
    expected = torch.autograd.grad(loss, given)
    losses, a, b, scale = zip(*pools[len(sizes)](shared, sizes, tile), strict=True)
    assert_close(sum(losses), loss.item())
    assert_close((torch.cat(a), torch.cat(b), sum(scale)), expected)


def kept_and_value(make):
    """Bytes that are kept between the passes, each storage once, and the loss with its gradient."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(0)
    a, b = (torch.randn(512, 8, dtype=torch.float64, requires_grad=True) for _ in "ab")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = make(a, b)
    return sum(kept.values()), loss, torch.autograd.grad(loss, (a, b))


def naive(a, b):
    """As open_clip writes it."""
    image, text = a @ b.T, b @ a.T
    target = torch.arange(len(a))
    return (F.cross_entropy(image, target, reduction="sum") + F.cross_entropy(text, target, reduction="sum")) / 2


def test_tiles_keep_a_small_part_of_the_matrix():
    matrix = 512 * 512 * 8
    much, expected, gradient = kept_and_value(naive)
    little, loss, found = kept_and_value(lambda a, b: both_ways(a, b, 1.0, 64 * 512))
    assert_close(loss, expected)
    assert_close(found, gradient)
    assert much > 2 * matrix
    assert little < matrix / 16


@pytest.mark.parametrize("loss", [Softmax(), Sigmoid(), Margin(others="all"), Bound("jsd")], ids=lambda loss: type(loss).__name__)
def test_any_loss_in_tiles_equals_the_whole_and_keeps_little(loss):
    def make(tile):
        def value(a, b):
            rows, candidates = Rows((a,), (), torch.arange(len(a))), Candidates((b,), ())
            score = Dot()
            return loss.total(contrast(score, loss.double(), Identity(score), rows, candidates, tile))

        return value

    much, expected, gradient = kept_and_value(make(1 << 30))
    little, value, found = kept_and_value(make(8 * 512))
    assert_close(value, expected)
    assert_close(found, gradient)
    assert little < much / 8


def test_a_tile_holds_no_more_scores_than_asked():
    sizes = []
    tiled(lambda x: sizes.append(len(x)), (torch.zeros(10, 2),), 6, 18)
    assert sizes == [3, 3, 3, 1]
    assert tiled(lambda x: len(x), (torch.zeros(0, 2),), 6, 18) == [0]
