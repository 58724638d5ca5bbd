import io
import tarfile

import numpy as np
import pytest
import torch

from headwater.datamodules.collate import collate
from headwater.embedded import place
from headwater.modalities.action import Action, ActionReader, array
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
        ({"slots": 2}, np.float32(1)),
        ({"choices": 3}, np.array(["a"])),
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


ARRAYS = [
    np.arange(5),
    np.arange(6, dtype=">i2"),
    np.zeros(0, int),
    np.float64(3),
    np.asfortranarray(np.random.default_rng(0).normal(size=(4, 3))),
    np.random.default_rng(0).normal(size=(300, 7)).astype(np.float32),
]


@pytest.mark.parametrize("saved", ARRAYS, ids=lambda a: f"{a.dtype}{a.shape}")
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_arrays_are_read_as_numpy_reads_them(saved, version):
    content = io.BytesIO()
    np.lib.format.write_array(content, np.asarray(saved), version)
    got = array(content.getvalue())
    assert got.dtype == saved.dtype
    assert got.shape == saved.shape
    assert np.array_equal(got, saved)


@pytest.mark.parametrize("damage", [lambda c: c[:-1], lambda c: c[:20], lambda c: c[:4], lambda c: b"", lambda c: b"P" + c])
def test_damaged_files_raise_a_value_error(damage):
    with pytest.raises(ValueError, match=r"cut off|magic|header"):
        ActionReader(choices=9).decode({"npy": damage(file(np.arange(5))["npy"])})


def test_a_header_that_promises_too_much_is_refused():
    content = file(np.arange(5))["npy"].replace(b"(5,)", b"(5" + b"0" * 9 + b",)")
    with pytest.raises(ValueError, match="cut off"):
        ActionReader(choices=9).decode({"npy": content})


def test_objects_are_refused_by_name():
    with pytest.raises(ValueError, match=r"Python objects \(object\).*save numbers"):
        ActionReader(slots=2).decode(file(np.array([[1.0], None], object), allow_pickle=True))


@pytest.mark.parametrize("options", [{"choices": 9}, {"slots": 3}])
def test_the_length_is_the_number_of_steps(options):
    reader = ActionReader(steps=4, **options)
    for steps in (1, 3, 4, 9):
        made = np.zeros(steps, int) if reader.vocab else np.zeros((steps, 2))
        assert reader.length({"size": 1, "steps": float(steps)}) == len(reader.tokens(made).x)
    assert reader.length({"size": 1}) is None


def test_positions_are_int32_and_values_compact():
    ids, vectors = ActionReader(choices=3).tokens(np.zeros(4, np.uint8)), ActionReader(slots=3).tokens(np.zeros((4, 2)))
    assert ids.position.dtype == vectors.position.dtype == torch.int32
    assert (ids.x.dtype, vectors.x.dtype) == (torch.int64, torch.float32)


def test_embedded_actions_are_read_as_numpy_reads_them():
    reader = ActionReader(choices=7)
    with tarfile.open(place("embedded:episodes-test-000.tar")) as tar:
        for content in (tar.extractfile(m).read() for m in tar if m.name.endswith(".npy")):
            expected = np.load(io.BytesIO(content))
            t = reader.tokens(reader.decode({"npy": content}))
            assert t.x.tolist() == expected.tolist()
            assert reader.length({"size": len(content), "steps": len(expected)}) == len(t.x)
