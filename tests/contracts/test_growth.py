"""How the suite grows: a new modality and a new objective, each a few lines in one file, and nothing else changes.

The modality is a week of weather. The objective is the arrow of time (Pickup et al. 2014, "Seeing the arrow of time"): half
of the samples run backwards, and the model is asked which. It knows nothing of weather and works on any modality.
"""

import json
from functools import partial

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from contracts import cases
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from headwater import random
from headwater.datamodules.datamodule import ShardDataModule, Source
from headwater.datamodules.writer import ShardWriter
from headwater.model import Encoder, Model, Reader
from headwater.objectives import Objective, Term, Weighted
from headwater.objectives.objective import part
from headwater.pretrainer import Pretrainer
from headwater.tokens import Tokens
from headwater.trunk import Trunk


class WeatherReader(Reader):
    """A JSON list of days, each [temperature, rain] -> one token per day."""

    extensions = ("weather.json",)
    features = 2

    def decode(self, members):
        return json.loads(members[self.member(members)])

    def tokens(self, signal, view=None):
        x = torch.tensor(signal, dtype=torch.float32)
        return Tokens(x, torch.arange(len(x))[:, None])

    def prepare(self, t):
        return t._replace(x=t.x / 10)

    def restore(self, t):
        return (t.x[0][t.real()[0]] * 10).tolist()

    def example(self, n, seed):
        return [self.tokens(week(seed + k, days=4 + k % 4)) for k in range(n)]


class Weather(Encoder):
    """A transformer over days."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__(WeatherReader(), trunk)


class Arrow(Objective):
    """Hides the direction of time of one modality."""

    def __init__(self, model: Model, modality: str = "weather") -> None:
        super().__init__()
        self.modality, self.needs = modality, (modality,)
        self.answer = nn.Linear(model.dim(modality), 1)

    def task(self, batch, hints=None):
        t = batch[self.modality]
        backwards = random.uniform(batch["seed"], (), "arrow") < 0.5  # of each sample, a pure function of its seed
        sample, here = t.sample(), torch.arange(t.x.shape[1], device=t.x.device)
        length = torch.zeros_like(batch["seed"]).index_add(0, sample.flatten(), t.real().long().flatten())
        mirrored = torch.where(t.real() & backwards[sample], here - 2 * t.place() + length[sample] - 1, here)
        return {**batch, self.modality: t._replace(x=t.take(mirrored).x), "backwards": backwards}

    def numbers(self, batch):
        return {"arrow": torch.tensor(len(batch[self.modality].samples()))}

    def forward(self, model, batch):
        encoded = model.encode(model.embed(part(batch, self.needs)))[self.modality]
        pooled = model.pool(self.modality, encoded)  # one vector per sample that is present
        logit, truth = self.answer(pooled.x)[:, 0], batch["backwards"][pooled.sample]
        right = ((logit > 0) == truth).float().mean()
        total = F.binary_cross_entropy_with_logits(logit, truth.to(logit.dtype), reduction="sum")
        return {"arrow": Term(total, torch.tensor(len(pooled.sample)), metrics={"accuracy": right})}


def week(seed, days=7):
    """It warms up slowly, rains, and cools down at once: time has a direction."""
    day = np.arange(days)
    weather = np.stack([10 + 3 * day, 2 + day % 3], 1) + np.random.default_rng(seed).normal(size=(days, 2))
    return weather.round(2).tolist()


@pytest.fixture
def shards(tmp_path):
    with ShardWriter(tmp_path / "train-{:03d}.tar", samples=64) as writer:
        for k in range(192):
            writer.write(f"{k:05d}", {"weather.json": json.dumps(week(k)).encode()})
    return str(tmp_path)


def test_a_new_modality_and_a_new_objective_learn(shards):
    torch.manual_seed(0)
    model = Model({"weather": Weather(Trunk(width=16, depth=1))})
    pretrainer = Pretrainer(model, Arrow, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    data = ShardDataModule(train={"weeks": Source(shards)}, batch_size=32, workers=0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_steps=60, accelerator="cpu", **quiet)
    trainer.fit(pretrainer, data)
    assert trainer.callback_metrics["train/arrow"] < 0.3  # chance is ln 2 = 0.69
    assert trainer.callback_metrics["train/arrow/accuracy"] > 0.85


@pytest.mark.parametrize("modality", ["weather", "text", "video"])
def test_the_new_objective_works_on_every_modality_and_does_not_see_packing(modality):
    old = cases.model(fuse=None)
    model = Model({"weather": Weather(cases.trunk()), **old.encoders}).double()
    objective = Weighted(model, {"arrow": partial(Arrow, modality=modality)}).double()
    samples = cases.examples(model.readers)
    a, b = (cases.terms(objective, model, cases.batch(model.readers, samples, packed=p))[0] for p in (False, True))
    assert a["arrow/arrow"].number == b["arrow/arrow"].number
    assert_close(a["arrow/arrow"].total, b["arrow/arrow"].total)
