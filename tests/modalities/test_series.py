import io

import numpy as np
import pytest
import torch
from learning import learned
from matplotlib.cbook import get_sample_data

from headwater.modalities.action import array
from headwater.modalities.series import Series, SeriesReader, Slots, standard
from headwater.trunk import Trunk
from headwater.view import View


@pytest.fixture(scope="module")
def eeg():
    """800 moments of four electrodes, from the samples of matplotlib."""
    return np.fromfile(get_sample_data("eeg.dat", asfileobj=False)).reshape(-1, 4)


@pytest.fixture(scope="module")
def stocks():
    """Logarithms of ten prices, monthly from 1990 on; three of them begin later or pause."""
    table = np.genfromtxt(get_sample_data("Stocks.csv", asfileobj=False), delimiter=",", skip_header=2)[:, 1:]
    return np.log(table[~np.isnan(table[:, 0])])


def row(t):
    return t.map(lambda field: field[None])


def saved(signal):
    content = io.BytesIO()
    np.save(content, signal)
    return {"series.npy": content.getvalue()}


def test_a_token_is_a_patch_of_a_channel(eeg):
    reader = SeriesReader(channels=4, steps=50, scale=2.0)
    t = reader.tokens(reader.decode(saved(eeg)))
    assert t.x.shape == (64, 50)
    assert t.position[:6].tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0], [1, 1]]
    assert torch.equal(t.order, t.position[:, 0].long())
    np.testing.assert_allclose(t.x[6].numpy(), eeg[50:100, 2] / 2, rtol=1e-6)
    joint = SeriesReader(channels=4, steps=50, scale=2.0, joint=True).tokens(eeg)
    assert joint.position.tolist() == [[k, 0] for k in range(16)]
    np.testing.assert_allclose(joint.x[1].numpy(), eeg[50:100].reshape(-1) / 2, rtol=1e-6)


def test_channels_are_normalised_over_what_is_present(eeg):
    signal = eeg * [1, 1e-6, 1e3, 5] + [0, 0, 1e5, -3]
    signal[100:120, 3] = np.nan
    t = SeriesReader(channels=4, steps=40).tokens(signal)
    channels = [t.x[t.position[:, 1] == c].flatten() for c in range(4)]
    for c, x in enumerate(channels):
        column = signal[:, c][~np.isnan(signal[:, c])]
        np.testing.assert_allclose(x[~x.isnan()].numpy(), (column - column.mean()) / column.std(), rtol=1e-4, atol=1e-5)
    assert channels[3].isnan().sum() == 20


def test_a_channel_that_never_changes_becomes_zero():
    x = standard(np.stack([np.full(7, 0.1), np.arange(7.0), np.full(7, np.nan)], 1))
    assert np.array_equal(x[:, 0], np.zeros(7))
    assert np.isnan(x[:, 2]).all()


def test_absent_channels_and_gaps_are_no_tokens(stocks):
    reader = SeriesReader(channels=12, steps=12, length=400)
    t = reader.tokens(stocks)
    counts = [int((t.position[:, 1] == c).sum()) for c in range(12)]
    patches = [{k // 12 for k in np.flatnonzero(~np.isnan(column))} for column in stocks.T]
    assert counts == [len(found) for found in patches] + [0, 0]
    assert len(t.x) <= reader.length({"steps": len(stocks)}) == 33 * 12


def test_restore_is_the_inverse_where_there_are_values(stocks):
    reader = SeriesReader(channels=10, steps=7, scale=3.0)
    again = reader.restore(row(reader.prepare(reader.tokens(stocks))))
    np.testing.assert_allclose(again, stocks, rtol=1e-6)
    late = np.full((20, 2), np.nan)
    late[15:17, 1] = 1, 2
    reader = SeriesReader(channels=2, steps=4, scale=1.0)
    assert np.array_equal(reader.restore(row(reader.tokens(late))), late[:17].astype(np.float32), equal_nan=True)


def test_a_view_is_a_window_that_its_seed_decides(eeg):
    reader = SeriesReader(channels=4, steps=10, length=200, scale=1.0)
    starts = set()
    for seed in range(20):
        t = reader.tokens(eeg, View(seed=seed))
        window = reader.restore(row(t))
        start = int(np.abs(eeg[:, 0] - window[0, 0]).argmin())
        np.testing.assert_allclose(window, eeg[start : start + len(window)], rtol=1e-6)
        assert 120 <= len(window) <= 200
        torch.testing.assert_close(t.x, reader.tokens(eeg, View(seed=seed)).x, rtol=0, atol=0, equal_nan=True)
        starts.add(start)
    assert len(starts) > 10
    assert max(starts) > 400


def test_lengths_are_known_from_the_header(eeg):
    for joint in (False, True):
        reader = SeriesReader(channels=4, steps=30, length=500, joint=joint)
        assert reader.length({"steps": len(eeg)}) == len(reader.tokens(eeg).x)
    assert reader.length({"size": 9}) is None


def test_slots_are_linear_in_values_and_flags():
    torch.manual_seed(0)
    stem = Slots(3, 5)
    x = torch.tensor([[1.0, float("nan"), -2.0], [0.0, 0.0, 0.0]])
    values, flags = stem.weight.chunk(2, 1)
    expected = torch.stack([values[:, 0] - 2 * values[:, 2] + flags[:, 0] + flags[:, 2], flags.sum(1)]) + stem.bias
    torch.testing.assert_close(stem(x), expected)


@pytest.mark.parametrize(
    "signal",
    [
        np.zeros((0, 2)),
        np.zeros((5, 3)),
        np.zeros((5, 2, 1)),
        np.full((5, 2), np.nan),
        np.array([[1.0, np.inf]]),
        np.array([["a", "b"]]),
    ],
    ids=lambda a: f"{a.dtype}{a.shape}",
)
def test_wrong_series_are_refused(signal):
    with pytest.raises(ValueError, match="series"):
        SeriesReader(channels=2).tokens(signal)


def test_wrong_settings_and_files_are_refused():
    with pytest.raises(ValueError, match="steps=0"):
        SeriesReader(steps=0)
    with pytest.raises(ValueError, match="cut off"):
        array(saved(np.zeros((9, 2)))["series.npy"][:-8])


def test_masked_prices_are_learned(stocks):
    torch.manual_seed(0)
    train, held = [stocks[k : k + 48] for k in range(0, 216, 2)], [stocks[k : k + 48] for k in range(264, 343, 8)]
    error, control = learned(Series(Trunk(32, 1, heads=2), channels=10, steps=12), train, held, steps=200)
    assert error < 0.75 * control  # 0.50 and 0.97 when this was written
