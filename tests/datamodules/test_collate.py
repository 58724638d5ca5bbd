import pytest
import torch

from headwater.datamodules.collate import collate
from headwater.tokens import Tokens, split_rows


def tokens(n, first=0, order=False):
    index = torch.arange(n)
    return Tokens(index + first, index[:, None].int(), order=index // 2 if order else None)


SAMPLES = [
    {"a": tokens(3, 10), "b": tokens(2, 100, True)},
    {"b": tokens(4, 200, True)},
    {"a": tokens(1, 20), "b": tokens(1, 300, True)},
]
PACKED = [[0, 2], [1]]


def test_rows_are_padded_to_the_longest():
    batch = collate(SAMPLES, ["a", "b"])
    assert batch["a"].x.tolist() == [[10, 11, 12], [0, 0, 0], [20, 0, 0]]
    assert batch["a"].valid.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    assert batch["b"].order.tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]
    assert batch["a"].document is None
    assert batch["a"].order is None
    assert batch["a"].position.dtype == torch.int32


def test_only_named_modalities_are_in_the_batch():
    assert collate(SAMPLES, ["b"]).keys() == {"b"}
    with pytest.raises(ValueError, match="no sample of this batch has c"):
        collate(SAMPLES, ["c"])


def test_packed_samples_share_rows_alike_in_every_modality():
    batch = collate(SAMPLES, ["a", "b"], PACKED)
    a, b = batch["a"], batch["b"]
    assert a.x.tolist() == [[10, 11, 12, 20], [0, 0, 0, 0]]
    assert a.document[0].tolist() == [0, 0, 0, 2]
    assert a.samples().tolist() == [0, 2]
    assert b.x[b.valid].tolist() == [100, 101, 300, 200, 201, 202, 203]
    assert b.document[b.valid].tolist() == [0, 0, 2, 1, 1, 1, 1]
    assert b.place()[b.valid].tolist() == [0, 1, 0, 0, 1, 2, 3]


def test_padding_of_a_packed_row_makes_no_new_run():
    b = collate(SAMPLES, ["a", "b"], PACKED)["b"]
    for row in b.document.tolist():
        assert len([i for i, d in enumerate(row) if i == 0 or d != row[i - 1]]) == len(set(row))


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_pieces_hold_every_row_once(micro):
    batch = {**collate(SAMPLES, ["a", "b"]), "seed": torch.tensor([7, 8, 9])}
    pieces = split_rows(batch, micro)
    assert len(pieces) == micro
    assert torch.cat([p["b"].x for p in pieces]).tolist() == batch["b"].x.tolist()
    assert torch.cat([p["seed"] for p in pieces]).tolist() == [7, 8, 9]


def test_packed_pieces_keep_the_numbers_of_the_batch():
    batch = {**collate(SAMPLES, ["a", "b"], PACKED), "seed": torch.tensor([7, 8, 9])}
    first, second = split_rows(batch, 2)
    assert (first["b"].samples().tolist(), second["b"].samples().tolist()) == ([0, 2], [1])
    assert first["seed"].tolist() == second["seed"].tolist() == [7, 8, 9]


def test_more_pieces_than_rows_are_refused():
    with pytest.raises(ValueError, match="micro"):
        split_rows(collate(SAMPLES, ["b"]), 4)


def test_buckets_are_filled_up_with_places_that_are_not_valid():
    def sample(n):
        return {"a": Tokens(torch.arange(n).float()[:, None] + 1, torch.arange(n)[:, None])}

    for rows in (None, [[0, 1], [2]]):
        plain = collate([sample(n) for n in (3, 5, 2)], ["a"], rows)["a"]
        filled = collate([sample(n) for n in (3, 5, 2)], ["a"], rows, {"a": 8})["a"]
        count = plain.position.shape[1]
        assert filled.position.shape[1] == 8 * -(-count // 8)
        assert not filled.valid[:, count:].any()
        for a, b in zip(filled, plain, strict=True):
            assert a is b is None or torch.equal(a[:, :count], b)
