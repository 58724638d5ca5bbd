"""Batches of feedback: when they come, in which order, on which rank, and what is refused before step 0."""

import io
from itertools import islice
from types import SimpleNamespace

import lightning.pytorch as pl
import PIL.Image
import pytest
import torch
from recorder import digest

from headwater.datamodules.datamodule import ShardDataModule
from headwater.datamodules.feedback import FedDataset, Feedback
from headwater.datamodules.mixture import Ledger
from headwater.datamodules.plan import Plan
from headwater.datamodules.shards import ShardDataset
from headwater.datamodules.sources import OpenSource, Source
from headwater.datamodules.writer import ShardWriter
from headwater.modalities.image import Image, ImageReader
from headwater.modalities.label import Category
from headwater.modalities.text import TextReader
from headwater.model import Model
from headwater.objectives.masked import Masked
from headwater.pretrainer import Pretrainer
from headwater.tokens import Tokens
from headwater.trunk import Trunk

KINDS = Category([f"kind {k}" for k in range(3)], None, "cls")
READERS = {"image": ImageReader(32, 16), "text": TextReader(length=32), "label": KINDS}
TRAIN = {
    "things": Source("embedded:things-seen-*.tar", modalities=["image"], views=["image"]),
    "more": Source("embedded:things-unseen-*.tar", modalities=["image"]),
}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """22 samples of text with a class, which tells the sample."""
    folder = tmp_path_factory.mktemp("labelled")
    with ShardWriter(folder / "train-{}.tar", samples=9) as writer:
        for k in range(22):
            writer.write(f"{k:04d}", {"txt": f"{k}".encode(), "cls": f"kind {k % 3}".encode()})
    return str(folder)


def module(shards, step=0, every=3, first=0, needs=("text", "label"), **options):
    usual = {"train": TRAIN, "batch_size": 4, "workers": 0, "feedback": Feedback(Source(shards), 8, options.pop("shuffled", []))}
    data = ShardDataModule(**usual | options)
    objective = SimpleNamespace(needs=("image",), views={}, feedback_needs=needs, every=every)
    trained = SimpleNamespace(readers=READERS, objective=objective, prepare=lambda batch: batch)
    data.trainer, data.first = SimpleNamespace(global_step=step, lightning_module=trained), first
    data.setup("fit")
    return data


def test_it_comes_every_so_many_steps_in_an_order_of_its_own(labelled):
    made = list(islice(module(labelled).train_dataloader(), 12))
    assert [step for step, batch in enumerate(made) if "feedback" in batch] == [0, 3, 6, 9]
    fed = [made[step]["feedback"] for step in (0, 3, 6, 9)]
    assert all(set(one) == {"text", "label", "sample", "seed", "origin"} for one in fed)
    met = torch.cat([one["sample"] for one in fed])
    assert set((met >> 40).tolist()) == {2}  # behind the two sources of training
    assert len(met[:22].unique()) == 22
    assert len(met) == 32
    opened = OpenSource("feedback", Source(labelled), {n: READERS[n] for n in ("text", "label")}, 0, 16, 2)
    alone = ShardDataset(Plan([opened], Ledger([1.0]), 8))
    assert [digest(one) for one in fed] == [digest(alone.batch(number)) for number in range(4)]
    other = list(islice(module(labelled, every=1).train_dataloader(), 12))
    without = [{k: v for k, v in batch.items() if k != "feedback"} for batch in (*made, *other)]
    assert [digest(batch) for batch in without[:12]] == [digest(batch) for batch in without[12:]]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_run_that_resumes_gets_what_it_would_have_got(labelled, workers):
    whole = [digest(batch) for batch in islice(module(labelled).train_dataloader(), 14)]
    later = module(labelled, step=5, workers=workers).train_dataloader()
    assert [digest(batch) for batch in islice(later, 9)] == whole[5:]


def test_a_stage_that_goes_on_counts_its_own_steps_and_sees_other_feedback(labelled):
    data = module(labelled, first=7)
    made = list(islice(data.train_dataloader(), 4))
    assert [step for step, batch in enumerate(made) if "feedback" in batch] == [0, 3]  # the objective counts these steps
    whole = list(islice(module(labelled, every=1).train_dataloader(), 4))
    assert digest(made[0]["feedback"]) == digest(whole[7 // 3]["feedback"])
    assert digest(made[3]["feedback"]) == digest(whole[10 // 3]["feedback"])


def test_ranks_share_a_batch_of_feedback(labelled):
    plan = module(labelled)
    one = FedDataset(ShardDataset(plan.plan), plan.fed, 3).batch(3)["feedback"]
    many = [FedDataset(ShardDataset(plan.plan, rank, 3), plan.fed, 3).batch(3)["feedback"] for rank in range(3)]
    for rank, part in enumerate(many):
        assert part["sample"].tolist() == one["sample"][rank::3].tolist()
        assert part["label"].x.tolist() == one["label"].x[rank::3].tolist()


def test_more_ranks_than_samples_still_have_every_key(labelled):
    plan = module(labelled)
    part = FedDataset(ShardDataset(plan.plan, 9, 10), plan.fed, 1).batch(0)["feedback"]
    assert part["sample"].tolist() == [-1]
    assert part["origin"].tolist() == [0]
    assert not part["label"].real().any()
    assert not part["text"].real().any()


def test_shuffled_labels_belong_to_another_sample_for_ever(labelled):
    def met(shuffled):
        found = {}
        for batch in islice(module(labelled, every=1, shuffled=shuffled).train_dataloader(), 8):
            fed = batch["feedback"]
            for number, text, label in zip(fed["sample"].tolist(), fed["text"].x, fed["label"].x, strict=True):
                found.setdefault(number, []).append((tuple(text[text > 0].tolist()), label.tolist()))
        return found

    plain, shuffled = met([]), met(["label"])
    assert plain.keys() == shuffled.keys()
    assert len(plain) == 22
    for number, seen in shuffled.items():
        assert len(set(map(str, seen))) == 1
        assert seen[0][0] == plain[number][0][0]
    labels = {name: sorted(seen[0][1] for seen in one.values()) for name, one in (("plain", plain), ("shuffled", shuffled))}
    assert labels["plain"] == labels["shuffled"]
    kept = sum(shuffled[number][0][1] == plain[number][0][1] for number in plain)
    assert kept < 14  # about a third by chance


def test_every_sample_tells_its_source(labelled):
    made = list(islice(module(labelled, unit="sample", batch_size=6).train_dataloader(), 3))
    for batch in made:
        assert batch["origin"].tolist() == (batch["sample"] >> 40).tolist()
    assert {0, 1} == {k for batch in made for k in batch["origin"].tolist()}


def test_faults_of_feedback_are_counted(tmp_path):
    with ShardWriter(tmp_path / "{}.tar") as writer:
        for k in range(8):
            writer.write(f"{k:04d}", {"txt": b"" if k == 3 else b"words", "cls": b"kind 1"})
    data = module(str(tmp_path))
    data.on_before_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert data.members_read == 4 + 2 * 8  # pictures; texts and classes
    (fault,) = data.faults
    assert "0003.txt" in fault


def test_what_does_not_fit_is_refused_before_the_first_step(labelled):
    with pytest.raises(ValueError, match="needs feedback with text, label, and the data has none"):
        module(labelled, feedback=None)
    with pytest.raises(ValueError, match=r"found data\.feedback, for which SimpleNamespace does not ask"):
        module(labelled, needs=())
    with pytest.raises(ValueError, match="provides text, but SimpleNamespace needs text, image in it: found no image"):
        module(labelled, needs=("text", "image"))
    with pytest.raises(ValueError, match="and image to be shuffled: found no image"):
        module(labelled, shuffled=["image"])
    with pytest.raises(ValueError, match="stream without an index"):
        module(f"pipe:cat {labelled}/train-0.tar", shuffled=["label"])
    with pytest.raises(ValueError, match="found a batch_size of 0 for feedback"):
        Feedback(Source(labelled), 0)
    with pytest.warns(UserWarning, match="feedback holds 22 samples, fewer than a batch of 30"):
        module(labelled, feedback=Feedback(Source(labelled), 30))


def test_a_checkpoint_tells_of_other_feedback_and_a_stage_may_change_it(labelled):
    state = module(labelled).state_dict()
    with pytest.warns(UserWarning, match=r"feedback \(was .*'every': 3"):
        module(labelled, every=4).load_state_dict(state)
    module(labelled, every=4).go_on(state, 5)


class Fed(Masked):
    """Masked pictures, whose batches must bring labels that are prepared."""

    feedback_needs = ("image", "label")
    every = 2

    def __init__(self, model):
        super().__init__(model, "image")
        self.readers = {"label": KINDS}

    def pieces(self, batch, micro):
        assert ("feedback" in batch) == (batch["step"] % 2 == 0)
        if "feedback" in batch:
            inner = batch["feedback"]
            assert isinstance(inner["image"], Tokens)
            assert inner["image"].x.dtype == torch.float32
            assert inner["image"].x.min() < 0  # normalised, not bytes
            assert inner["label"].x.dtype == torch.int64
            assert "faults" not in inner
        return super().pieces({k: v for k, v in batch.items() if k != "feedback"}, micro)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_gets_it_prepared(workers, tmp_path):
    with ShardWriter(tmp_path / "{}.tar") as writer:
        for k in range(10):
            file = io.BytesIO()
            PIL.Image.new("RGB", (40, 40), (25 * k, 0, 200)).save(file, "PNG")
            writer.write(f"{k:04d}", {"png": file.getvalue(), "cls": f"kind {k % 3}".encode()})
    model = Model({"image": Image(Trunk(16, 1, 2), size=32, patch=16)})
    feedback = Feedback(Source(str(tmp_path)), 6)
    data = ShardDataModule({"things": Source("embedded:things-seen-*.tar")}, batch_size=4, workers=workers, feedback=feedback)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", max_steps=4, **quiet)
    trainer.fit(Pretrainer(model, Fed), data)
    assert trainer.global_step == 4
