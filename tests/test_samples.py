"""Panels of generated samples in the folder of a run."""

from functools import partial

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image as Pictures

from headwater.datamodules.datamodule import ShardDataModule, Source
from headwater.evaluation.samples import Samples
from headwater.fusion import JointTokens
from headwater.generation import Settings
from headwater.modalities import Image, Text
from headwater.model import Model
from headwater.objectives import Causal
from headwater.pretrainer import Pretrainer
from headwater.trunk import Trunk


def fit(folder, callbacks, held_out=True, **data):
    torch.manual_seed(0)
    encoders = {"text": Text(Trunk(16, 1, 2), length=12), "image": Image(Trunk(16, 1, 2), 16, 8)}
    model = Model(encoders, lambda widths: JointTokens(widths, Trunk(16, 1, 2)))
    pretrainer = Pretrainer(model, partial(Causal, prefix=["image"]))
    held = {"unseen": Source("embedded:things-unseen-*.tar")} if held_out else None
    module = ShardDataModule({"things": Source("embedded:things-train-*.tar")}, held, batch_size=8, workers=0, **data)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    pl.Trainer(max_steps=3, accelerator="cpu", default_root_dir=folder, callbacks=callbacks, **quiet).fit(pretrainer, module)
    return model


def test_panels_are_written_every_few_steps_and_at_the_end(tmp_path):
    told = Samples(given=["image"], count=5, every=2, settings=Settings(temperature=0, length=6))
    painted = Samples("image", given=["text"], count=5, settings=Settings(way="causal"))
    fit(tmp_path, [told, painted])
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["given-image.png", "given-text.txt", "image-000003.png", "text-000002.txt", "text-000003.txt"]
    assert len((tmp_path / "samples" / "text-000002.txt").read_text().rstrip("\n").split("\n")) == 5
    assert np.asarray(Pictures.open(tmp_path / "samples" / "image-000003.png")).shape == (16, 88, 3)
    assert (tmp_path / "samples" / "given-text.txt").read_text().split("\n")[0].isascii()


def test_packed_batches_give_the_same_samples(tmp_path):
    for name, data in (("rows", {}), ("packed", {"pack": {"text": 48, "image": 16}})):
        told = Samples("image", given=["text"], count=3, settings=Settings(way="causal"))
        fit(tmp_path / name, [told], **data)
    given = [(tmp_path / name / "samples" / "given-text.txt").read_text() for name in ("rows", "packed")]
    assert given[0] == given[1]


def test_training_is_the_same_with_and_without(tmp_path):
    a, b = (fit(tmp_path, callbacks) for callbacks in ([], [Samples(every=1, count=2)]))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_what_cannot_be_written_stops_the_run_at_its_start(tmp_path):
    with pytest.raises(ValueError, match="no held-out source gives image"):
        fit(tmp_path, [Samples(given=["image"])], held_out=False)
    with pytest.raises(ValueError, match="samples 2"):
        Samples(settings=Settings(samples=2))
