from itertools import product

import pytest
import torch
from torch.testing import assert_close

from headwater.tokens import Tokens, attention_mask, cat, concat, mean_pool, split

X = torch.arange(10).reshape(2, 5)
POSITION = torch.arange(10).reshape(2, 5, 1)
VALID = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
DOCUMENT = torch.tensor([[0, 0, 2, 2, 2], [1, 1, 1, 4, 4]])
ORDER = torch.tensor([[0, 0, 1, 5, 5], [3, 3, 0, 1, 2]])
PLAIN = Tokens(X, POSITION)
FULL = Tokens(X, POSITION, VALID, DOCUMENT, ORDER)


def test_none_fields_mean_all_real_one_sample_per_row_in_order():
    assert PLAIN.real().all()
    assert PLAIN.sample().tolist() == [[0] * 5, [1] * 5]
    assert PLAIN.place().tolist() == [[0, 1, 2, 3, 4]] * 2


def test_place_counts_within_each_document():
    assert FULL.place().tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]]


def test_samples_are_those_with_a_real_token():
    assert PLAIN.samples().tolist() == [0, 1]
    assert FULL.samples().tolist() == [0, 1, 2, 4]
    assert FULL._replace(valid=VALID & (DOCUMENT != 2)).samples().tolist() == [0, 1, 4]
    assert PLAIN._replace(valid=torch.tensor([[0] * 5, [0, 0, 1, 0, 0]]).bool()).samples().tolist() == [1]


def test_take_moves_every_field_and_remembers_the_order():
    index = torch.tensor([[4, 0], [1, 3]])
    taken = FULL.take(index)
    for field, whole in zip(taken, FULL, strict=True):
        assert torch.equal(field, torch.stack([whole[b, index[b]] for b in range(2)]))
    assert PLAIN.take(index).order.tolist() == [[4, 0], [1, 3]]


def test_take_marks_padding_and_keeps_what_was_padding():
    taken = FULL.take(torch.tensor([[4, 0], [1, 3]]), torch.tensor([[True, True], [True, False]]))
    assert taken.valid.tolist() == [[False, True], [True, False]]


def test_cat_fills_none_fields_and_pads_coordinates():
    other = Tokens(X[:, :2], torch.ones(2, 2, 3, dtype=torch.int64))
    joined = cat([FULL, other])
    assert joined.position.shape == (2, 7, 3)
    assert not joined.position[:, :5, 1:].any()
    assert joined.valid.tolist() == [[*VALID[b].tolist(), True, True] for b in range(2)]
    assert joined.document.tolist() == [[*DOCUMENT[b].tolist(), b, b] for b in range(2)]
    assert joined.order.tolist() == [[*ORDER[b].tolist(), 0, 1] for b in range(2)]
    both = cat([PLAIN, other])
    assert both.valid is None  # no mask where nothing is to be hidden
    assert both.document is None
    assert both.order.tolist() == [[0, 1, 2, 3, 4, 0, 1]] * 2


def test_split_undoes_cat():
    parts = [FULL, FULL.map(lambda f: f[:, :2]), FULL.map(lambda f: f[:, 3:])]
    for a, b in zip(split(cat(parts), [5, 2, 2]), parts, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("valid", [None, VALID])
@pytest.mark.parametrize("document", [None, DOCUMENT])
@pytest.mark.parametrize("order", [None, ORDER])
def test_attention_mask_equals_a_triple_loop(valid, document, order, causal):
    t = Tokens(X, POSITION, valid, document, order)
    q = t.take(torch.tensor([[0, 4, 2], [3, 1, 0]]))
    for query in (t, q):
        mask = attention_mask(query, t, causal)
        seen = torch.zeros(2, query.x.shape[1], 5, dtype=torch.bool)
        orders = [(s.place() if s.order is None else s.order) for s in (query, t)]
        for b, i, j in product(range(2), range(query.x.shape[1]), range(5)):
            same = query.sample()[b, i] == t.sample()[b, j]
            seen[b, i, j] = t.real()[b, j] and same and (not causal or orders[1][b, j] <= orders[0][b, i])
        got = torch.ones(5, 5).tril().bool() if mask.causal else torch.ones(()).bool() if mask.dense is None else mask.dense[:, 0]
        assert torch.equal(got.expand_as(seen), seen)


def test_fused_attention_stays_on_where_nothing_is_hidden():
    for causal, kind in ((False, "full"), (True, "causal")):
        mask = attention_mask(PLAIN, PLAIN, causal)
        assert (mask.kind, mask.dense, mask.causal) == (kind, None, causal)


@pytest.mark.parametrize("t", [PLAIN, FULL, FULL._replace(document=None), FULL._replace(valid=None)])
def test_mean_pool_is_the_mean_of_real_tokens_of_each_sample(t):
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    pooled = mean_pool(t._replace(x=x))
    assert pooled.sample.tolist() == t.samples().tolist()
    for vector, sample in zip(pooled.x, pooled.sample, strict=True):
        assert_close(vector, x[(t.sample() == sample) & t.real()].mean(0))


def test_mean_pool_leaves_absent_samples_out():
    t = Tokens(torch.ones(3, 2, 4), torch.zeros(3, 2, 1), torch.tensor([[1, 1], [0, 0], [1, 0]]).bool())
    assert mean_pool(t).sample.tolist() == [0, 2]
    assert mean_pool(t._replace(valid=torch.zeros(3, 2).bool())).x.shape == (0, 4)


def test_concat_joins_per_document():
    a = Tokens(torch.tensor([[1, 2, 3, 4]]), torch.arange(4)[None, :, None], None, torch.tensor([[5, 5, 7, 7]]))
    b = Tokens(
        torch.tensor([[60, 80, 81, 0]]),
        torch.arange(4)[None, :, None],
        torch.tensor([[True, True, True, False]]),
        torch.tensor([[5, 7, 7, 7]]),
        torch.tensor([[9, 9, 9, 9]]),
    )
    joined = concat([a, b])
    assert joined.x.tolist() == [[1, 2, 60, 3, 4, 80, 81]]
    assert joined.sample().tolist() == [[5, 5, 5, 7, 7, 7, 7]]
    assert joined.real().all()
    assert joined.order.tolist() == [[0, 1, 9, 0, 1, 9, 9]]


def test_concat_of_nothing_has_one_padded_column():
    nothing = FULL._replace(valid=torch.zeros_like(VALID))
    for t in (nothing, nothing._replace(document=None)):
        assert concat([t, t]).real().tolist() == [[False], [False]]


def test_concat_of_rows_pads_behind():
    a = Tokens(torch.tensor([[1, 2], [3, 0]]), torch.zeros(2, 2, 1), torch.tensor([[True, True], [True, False]]))
    b = Tokens(torch.tensor([[7], [8]]), torch.ones(2, 1, 2))
    joined = concat([a, b])
    assert joined.x.tolist() == [[1, 2, 7], [3, 8, 0]]
    assert joined.real().tolist() == [[True, True, True], [True, True, False]]
    assert joined.document is joined.order is None
    assert joined.position.shape == (2, 3, 2)
