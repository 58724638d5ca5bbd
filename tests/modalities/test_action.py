import io

import numpy as np
import pytest
import torch

from headwater.datamodules.collate import collate
from headwater.modalities.action import Action, ActionReader
from headwater.trunk import Trunk


def file(array, **options):
    content = io.BytesIO()
    np.save(content, array, **options)
    return {"npy": content.getvalue()}


def test_a_step_carries_its_number_as_time_and_order():
    t = ActionReader(choices=4, steps=3).tokens(ActionReader(choices=4).decode(file(np.array([3, 0, 1, 2]))))
    assert t.x.tolist() == [3, 0, 1]  # at most `steps`
    assert t.position[:, 0].tolist() == t.order.tolist() == [0, 1, 2]


def test_missing_columns_and_values_are_absent_slots():
    t = ActionReader(slots=3).tokens(np.array([[1.0, np.nan], [2.0, 3.0]]))
    assert t.x.isnan().tolist() == [[False, True, True], [False, False, True]]


def test_values_are_scaled_and_restored():
    reader = ActionReader(slots=2, scale=4.0)
    signal = np.array([[1.0, -2.0], [8.0, np.nan]], np.float32)
    longer = {"a": reader.tokens(np.ones((5, 2)))}
    t = reader.prepare(collate([{"a": reader.tokens(signal)}, longer], ["a"])["a"])
    assert t.x[0, 0].tolist() == [0.25, -0.5]
    assert np.array_equal(reader.restore(t), signal, equal_nan=True)


def test_an_absent_slot_differs_from_zero_and_from_nothing_else():
    torch.manual_seed(0)
    encoder = Action(Trunk(16, 1, heads=2), slots=2)

    def embed(*values):
        return encoder.embed(ActionReader(slots=2).tokens(np.array([values], np.float32)).map(lambda f: f[None])).x

    assert not torch.allclose(embed(1.0, np.nan), embed(1.0, 0.0))
    assert torch.equal(embed(1.0, np.nan), embed(1.0))
    assert embed(np.nan, np.nan).isfinite().all()


@pytest.mark.parametrize(
    ("options", "signal"),
    [
        ({"choices": 3}, np.array([0, 3])),
        ({"choices": 3}, np.array([-1])),
        ({"choices": 3}, np.array([0.5])),
        ({"choices": 3}, np.array([[1]])),
        ({"choices": 3}, np.array([], int)),
        ({"slots": 2}, np.zeros((2, 3))),
        ({"slots": 2}, np.zeros(2)),
        ({"slots": 2}, np.zeros((2, 2), int)),
    ],
)
def test_wrong_arrays_are_refused(options, signal):
    with pytest.raises(ValueError, match="action"):
        ActionReader(**options).tokens(signal)


def test_exactly_one_kind_of_action_is_asked_for():
    for options in ({}, {"choices": 2, "slots": 2}):
        with pytest.raises(ValueError, match="exactly one"):
            ActionReader(**options)


def test_pickles_are_never_decoded():
    with pytest.raises(ValueError, match=r"[Pp]ickle"):
        ActionReader(slots=2).decode(file(np.array([{"a": 1}], object), allow_pickle=True))
