import torch
from contracts import cases
from torch.testing import assert_close

from headwater.objectives.moments import about, groups, moved, steps
from headwater.tokens import Tokens


def film():
    """Row 0: two moments of two tokens, then padding. Row 1: samples 1 (one token) and 2 (moments of two and one), in one row."""
    position = torch.tensor([[[1, 0], [1, 1], [3, 0], [3, 1], [0, 0]], [[5, 0], [0, 0], [0, 1], [7, 0], [0, 0]]])
    valid = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]).bool()
    document = torch.tensor([[0, 0, 0, 0, 0], [1, 2, 2, 2, 2]])
    return Tokens(torch.arange(10.0).view(2, 5, 1), position, valid, document)


def test_tokens_with_equal_time_are_a_moment():
    found = groups(film())
    assert found.sample.tolist() == [0, 0, 1, 2, 2]
    assert found.number.tolist() == [0, 1, 0, 0, 1]
    assert found.member.tolist() == [[0, 0, 1, 1, -1], [2, 3, 3, 4, -1]]
    assert found.place().tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 0]]
    assert found.per_sample(4).tolist() == [2, 1, 2, 0]
    assert_close(found.mean(film().x)[:, 0], torch.tensor([0.5, 2.5, 5.0, 6.5, 8.0]))


def test_more_axes_are_finer_groups():
    assert groups(film(), 2).sample.tolist() == [0, 0, 0, 0, 1, 2, 2, 2]
    assert groups(film(), 0).sample.tolist() == [0, 1, 2]


def test_labels_find_the_group_with_their_coordinates():
    label = Tokens(torch.zeros(2, 3), torch.tensor([[[3], [2], [1]], [[7], [5], [0]]]), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool())
    label = label._replace(document=torch.tensor([[0, 0, 0], [2, 1, 2]]))
    assert about(label, film()).tolist() == [[1, -1, -1], [4, 2, 3]]
    empty = film()._replace(valid=torch.zeros(2, 5).bool())
    assert (about(label, empty) == -1).all()
    assert groups(empty).mean(film().x).shape == (0, 1)


def test_only_moments_of_one_size_are_regular():
    found = steps(film(), 4)
    assert found.moments.tolist() == [2, 1, 2, 0]
    assert found.size.tolist() == [2, 1, 0, 0]


def test_values_move_within_their_document():
    t = film()
    source = torch.tensor([[2, 3, 0, 1, 4], [0, 2, 1, 0, 3]])
    assert moved(t, source)[..., 0].tolist() == [[2, 3, 0, 1, 4], [5, 8, 7, 6, 9]]


def test_real_signals_are_regular():
    model = cases.model()
    for name in ("text", "audio", "video", "image"):
        t = cases.batch(model.readers, cases.examples(model.readers), packed=True)[name]
        found = steps(t, 7)
        there = torch.zeros(7, dtype=torch.bool).index_fill(0, t.samples(), True)
        assert ((found.size > 0) == there).all(), name
