"""The data module: weights that change during a run, its state, how workers start, and what it says before step 0."""

from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from recorder import digest

from headwater.datamodules.datamodule import ShardDataModule
from headwater.datamodules.mixture import Ledger
from headwater.datamodules.plan import Arrange, Plan
from headwater.datamodules.shards import ShardDataset
from headwater.datamodules.sources import OpenSource, Source
from headwater.modalities.audio import AudioReader
from headwater.modalities.image import ImageReader
from headwater.modalities.text import TextReader
from headwater.modalities.video import VideoReader

READERS = {"image": ImageReader(32, 16), "text": TextReader(length=32), "audio": AudioReader(seconds=0.3)}
TRAIN = {
    "things": Source("embedded:things-seen-*.tar", modalities=["image", "text"], views=["image"]),
    "sounds": Source("embedded:sounds-test-*.tar", modalities=["audio"]),
}


def module(step=0, **options):
    data = ShardDataModule(**{"train": TRAIN, "batch_size": 4, "workers": 0, "notice": 6, **options})
    objective = SimpleNamespace(needs=tuple(READERS), views={}, feedback_needs=())
    trained = SimpleNamespace(readers=READERS, objective=objective, device="cpu")
    data.trainer = SimpleNamespace(global_step=step, lightning_module=trained)
    data.setup("fit")
    return data


def sources(batches):
    return [int(batch["sample"][0]) >> 40 for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_change_of_weights_begins_when_it_was_announced_whatever_was_read_ahead(workers):
    data = module(workers=workers)
    loader = iter(data.train_dataloader())
    met = []
    for step in range(30):
        met.append(next(loader))
        data.trainer.global_step = step + 1
        if step == 9:
            assert data.reweigh({"things": 0, "sounds": 1}) == 16
    assert sources(met)[:16] == [0, 1] * 8
    assert sources(met)[16:] == [1] * 14
    assert data.shares() == {"things": 8 / 30, "sounds": 22 / 30}
    again = module(step=20)
    again.load_state_dict(data.state_dict())
    assert [digest(b) for b in islice(again.train_dataloader(), 10)] == [digest(b) for b in met[20:]]


def test_a_change_waits_for_the_end_of_a_window():
    data = module(unit="sample", arrange=Arrange("length", 8), step=3, train={"a": TRAIN["things"], "b": TRAIN["things"]})
    assert data.reweigh({"a": 1, "b": 3}) == 16


def test_weights_must_name_every_source():
    with pytest.raises(ValueError, match="expected one for each source"):
        module().reweigh({"things": 1})


@pytest.mark.parametrize("inference", [False, True])
def test_workers_are_let_go_at_exit_of_evaluations_too(inference, monkeypatch):
    at_exit = []
    monkeypatch.setattr("atexit.register", lambda *call: at_exit.append(call))
    data = module(workers=1)
    with torch.inference_mode(inference):
        loader = data.train_dataloader()
    (call,) = at_exit
    assert not loader.dataset.closing
    call[0](*call[1:])
    assert loader.dataset.closing


@pytest.mark.parametrize("start", ["fork", *(pytest.param(way, marks=pytest.mark.slow) for way in ("spawn", "forkserver"))])
def test_workers_may_be_started_in_any_way(start):
    plain = [digest(b) for b in islice(module().train_dataloader(), 5)]
    loaded = module(workers=2, start=start).train_dataloader()
    assert [digest(b) for b in islice(loaded, 5)] == plain


def test_a_checkpoint_of_another_setting_is_told():
    state = module().state_dict()
    with pytest.warns(UserWarning, match=r"batch_size \(was 4, is 8\)"):
        module(batch_size=8).load_state_dict(state)
    changed = {**TRAIN, "sounds": Source("embedded:sounds-train-*.tar", modalities=["audio"])}
    with pytest.warns(UserWarning, match="sounds': 33"):
        module(train=changed).load_state_dict(state)


def test_state_is_plain():
    state = module().state_dict()
    assert state["ledger"] == [[0, [1.0, 1.0]]]
    assert state["setting"]["sources"] == {"things": 160, "sounds": 33}


@pytest.mark.parametrize(("mixing", "ratio"), [("weights", 1.0), ("epoch", 33 / 160), ("size", (33 / 160) ** 0.5)])
def test_modes_of_mixing(mixing, ratio):
    data = module(mixing=mixing, unit="batch")
    (_, weights), *_ = data.ledger.entries
    assert weights[1] / weights[0] == pytest.approx(ratio)


def test_more_workers_than_notice_are_refused():
    with pytest.raises(ValueError, match="more notice than workers"):
        ShardDataModule(train=TRAIN, workers=6, notice=6)


def test_a_stream_says_what_is_lost_and_cannot_be_held_out():
    import glob

    from headwater.embedded import place

    tar = glob.glob(place("embedded:things-seen-*.tar"))[0]
    stream = {"s": Source(f"pipe:cat {tar}", modalities=["text"])}
    with pytest.warns(UserWarning, match="begins at the head of the stream again"):
        module(train=stream)
    with pytest.warns(UserWarning, match="no index"), pytest.raises(ValueError, match="held-out sources are read once"):
        module(held_out=stream)


def test_arranged_and_packed_batches_of_the_embedded_shards():
    titles = {"titles": Source("embedded:things-train-*.tar", modalities=["text"])}
    data = module(train=titles, batch_size=512, pack={"text": 256})
    filled = [b["text"].valid.float().mean().item() for b in islice(data.train_dataloader(), 8)]
    assert min(filled) > 0.9
    plain = module(train=titles, batch_size=64)
    sorted_ = module(train=titles, batch_size=64, arrange=Arrange("text", 8))

    def share(data):
        return torch.tensor([b["text"].valid.float().mean().item() for b in islice(data.train_dataloader(), 8)]).mean()

    assert share(sorted_) > 1.2 * share(plain)


@pytest.mark.parametrize(
    "options",
    [
        {"pack": {"image": 12, "text": 60, "audio": 40}},
        {"arrange": Arrange("length", 4)},
        {"arrange": Arrange("txt.words", 4, join=True), "pack": {"image": 12, "text": 60, "audio": 40}},
        {"unit": "sample", "arrange": Arrange("length", 4)},
    ],
    ids=["packed", "arranged", "joined", "mixed"],
)
def test_planned_batches_go_on_where_they_were_with_other_workers(options):
    options = {"batch_size": 12, **options}
    whole = [digest(b) for b in islice(module(**options).train_dataloader(), 14)]
    assert [digest(b) for b in islice(module(step=9, workers=2, **options).train_dataloader(), 5)] == whole[9:]


def test_packed_sounds_and_clips_are_those_of_rows_of_their_own():
    readers = {"audio": AudioReader(seconds=1.0), "video": VideoReader(56, 28, frames=6)}
    for name, source in (("audio", "embedded:sounds-test-*.tar"), ("video", "embedded:episodes-test-*.tar")):
        opened = OpenSource("s", Source(source, modalities=[name]), readers, 0, 4)
        plain, packed = (ShardDataset(Plan([opened], Ledger([1.0]), 16, pack=limits)).batch(2) for limits in (None, {name: 60}))
        place = {number: k for k, number in enumerate(packed["sample"].tolist())}
        assert packed[name].x.shape[1] <= 60
        assert len(packed[name].x) < 16
        for row, number in enumerate(plain["sample"].tolist()):
            mine = packed[name].valid & (packed[name].document == place[number])
            alone = plain[name].valid[row]
            assert torch.equal(packed[name].x[mine], plain[name].x[row][alone])
            assert torch.equal(packed[name].position[mine], plain[name].position[row][alone])
