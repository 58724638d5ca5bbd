import re
from functools import partial

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from runs import trainer
from torch.testing import assert_close
from training.continued import Stop, language_model, run, write

from headwater.controllers import UCB, Controller, Exp3, Progress, floored
from headwater.datamodules.datamodule import ShardDataModule, Source
from headwater.objectives import Causal
from headwater.objectives.wrapped import Wrapped
from headwater.pretrainer import Pretrainer
from headwater.training.mixing import Mixing
from headwater.training.schedules import constant

PLAIN = partial(torch.optim.SGD, lr=0.1)
BOTH = {"new": 2.0, "old": 1.0}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write(tmp_path_factory.mktemp("texts"))


class Told(Mixing):
    """Keeps what steps and updates tell it."""

    def __init__(self, *given, **options):
        super().__init__(*given, **options)
        self.steps, self.updates = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        source = trainer.datamodule.source()
        self.steps.append((trainer.global_step, source, float(sum(pl_module.step.values.values()))))

    def on_train_batch_start(self, trainer, *given):
        super().on_train_batch_start(trainer, *given)
        self.updates.append((trainer.global_step, self.tally.share.tolist()))


def mixed(folder, make=Exp3, steps=24, **options):
    """The ledger of a run, its parameters, and the callback."""
    own = {name: options.pop(name) for name in ("reward", "every", "floor", "losses", "part") if name in options}
    callback = partial(Told, make(), **{"every": 4, **own})
    done = run(folder, [callback], train=BOTH, steps=steps, optimizer=PLAIN, **options)
    return done.trainer.datamodule.ledger.entries, done.parameters, done.callbacks[0]


def of_this_rank(*given, **options):
    return mixed(*given, **options)[:2]


def test_the_weights_follow_the_losses_of_the_sources(texts):
    """Done anew by hand: mean losses of each source's own steps between updates, their fall below the lowest, per step."""
    entries, _, told = mixed(texts, partial(Progress, window=2), reward="progress", floor=0.1)
    before, rows, expected = {}, [], [(0, (2.0, 1.0))]
    for end in range(4, 24, 4):
        window = [(source, loss) for step, source, loss in told.steps if end - 4 <= step < end]
        now = {name: np.mean([x for source, x in window if source == name] or [np.nan]) for name in BOTH}
        turns = {name: max(1, sum(source == name for source, _ in window)) for name in BOTH}
        row = [np.clip(before.get(name, np.nan) - now[name], 0, None) / turns[name] for name in BOTH]
        before |= {name: np.fmin(before.get(name, np.nan), loss) for name, loss in now.items()}
        if np.isfinite(row).any():
            rows.append((row, [turns[name] for name in BOTH]))
            paid, weight = (np.array(x, float) for x in zip(*rows[-2:]))
            weight = weight * np.isfinite(paid)
            mean = np.nansum(paid * weight, 0) / weight.sum(0)
            share = np.clip(np.where(np.isnan(mean), np.nanmax(mean), mean), 0, None)
            share = share / share.sum() if share.sum() else np.full(2, 0.5)
            expected.append((end + 2, tuple(0.1 + 0.8 * share)))
    assert [step for step, _ in entries] == [step for step, _ in expected]
    assert_close([w for _, w in entries], [w for _, w in expected], rtol=1e-5, atol=1e-7)
    assert len({w for _, w in entries}) > 2


def test_what_was_planned_is_what_the_ledger_says(texts):
    entries, _, told = mixed(texts, steps=13)
    told.settle()
    planned = np.array([weights for step, weights in entries if step <= 12][-1])
    assert len(entries) > 2
    assert_close(told.tally.chance.numpy(), planned / planned.sum())
    assert told.tally.turns.sum() == told.tally.asked.sum() == 1


@pytest.mark.parametrize("make", [Exp3, partial(UCB, temperature=0.5), Progress])
def test_a_resumed_run_draws_the_same(texts, tmp_path, make):
    entries, through, _ = mixed(texts, make, steps=18)
    for limit in (10, 12):  # within a window, and at its end
        mixed(texts, make, steps=18, limit=limit, save=tmp_path / "half.ckpt")
        again, resumed, _ = mixed(texts, make, steps=18, resume=tmp_path / "half.ckpt")
        assert again == entries
        assert all(torch.equal(p, resumed[n]) for n, p in through.items())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_all_ranks_change_the_same(ranks, texts, strategy):
    entries, parameters, _ = mixed(texts, steps=14)
    a, b = ranks(partial(of_this_rank, texts, steps=14, strategy=strategy))
    assert a[0] == b[0]
    assert [step for step, _ in a[0]] == [step for step, _ in entries]
    assert_close([w for _, w in a[0]], [w for _, w in entries], rtol=1e-3, atol=1e-4)
    assert_close(a[1], parameters, rtol=1e-3, atol=1e-4)


def sampled(folder, mixing, unit="sample", held=("new", "old"), steps=9, strategy=None):
    """A run whose steps mix both sources, which are held out too."""
    data = ShardDataModule(
        train={name: Source(f"{folder}/{name}-*.tar") for name in ("new", "old")},
        held_out={name: Source(f"{folder}/{name}-*.tar") for name in held},
        batch_size=4,
        unit=unit,
        workers=0,
        notice=2,
    )
    fitting = trainer(steps, strategy == "fsdp2", callbacks=[mixing, Stop(steps)], limit_val_batches=0)
    fitting.fit(Pretrainer(language_model(), Causal, optimizer=PLAIN, schedule=constant), data)
    return data.ledger.entries, mixing.tally.before.tolist()


def held_out_losses(folder, strategy=None):
    return sampled(folder, Mixing(Exp3(), "drop", "held_out", every=3, batches=2), strategy=strategy)


def test_held_out_losses_serve_steps_that_mix(ranks, texts):
    entries, losses = held_out_losses(texts)
    assert [step for step, _ in entries] == [0, 5, 8]  # the look before the first step is what the next one is compared with
    assert losses[0] != losses[1]
    a, b = ranks(held_out_losses, texts, "fsdp2")
    assert a == b
    assert_close(a[1], losses, rtol=1e-4, atol=1e-4)


class Watched(Wrapped):
    """Tells in every second step what it is worth for itself, as V-Pretraining does for feedback."""

    def before_step(self, probe, batch):
        if batch["step"] % 2:
            probe.watch(probe.gradient(lambda: self.inner(probe.learner, self.inner.task(batch)), probe.theta)[1])
        return batch


def valued(folder, steps=9, resume=None, save=None):
    """The tally of a run, and (step, source, squared norm of the gradient) of each step that tells its value."""
    norms = []

    class Norms(pl.Callback):
        def on_train_batch_end(self, trainer, *given):
            if trainer.global_step % 2 == 0:
                at = trainer.global_step - 1
                name = list(trainer.datamodule.train)[trainer.datamodule.plan.mixture.step(at).source[0]]
                norms.append((at, name, float(trainer.callback_metrics["train/gradient_norm"]) ** 2))

    data = ShardDataModule(
        train={name: Source(f"{folder}/{name}-*.tar") for name in ("new", "old")}, batch_size=4, workers=0, notice=2
    )
    mixing = Mixing(Exp3(), "value", every=4)
    module = Pretrainer(language_model(), partial(Watched, inner=Causal), optimizer=PLAIN, schedule=constant, clip=0.0)
    fitting = trainer(steps, callbacks=[Norms(), mixing], limit_val_batches=0)
    fitting.fit(module, data, ckpt_path=resume, weights_only=True)
    if save:
        fitting.save_checkpoint(save)
    mixing.settle()
    return mixing.tally, norms


def test_the_value_of_a_step_is_that_of_its_source(texts, tmp_path):
    tally, norms = valued(texts)
    for k, name in enumerate(("new", "old")):
        worth = [value for at, source, value in norms if source == name and 4 <= at < 8]
        assert_close(
            tally.record[0, -1, k],
            torch.tensor(np.mean(worth) if worth else np.nan, dtype=torch.float64),
            equal_nan=True,
            rtol=1e-4,
            atol=0,
        )
    assert tally.share.tolist() != [0.5, 0.5]
    valued(texts, 6, save=tmp_path / "half.ckpt")
    for name, x in valued(texts, resume=tmp_path / "half.ckpt")[0].state_dict().items():
        assert torch.equal(x.nan_to_num(99.0), tally.state_dict()[name].nan_to_num(99.0)), name


class Twice(Controller):
    """A controller of one's own."""

    def __call__(self, seen):
        return torch.tensor([0.75, 0.25], dtype=torch.float64)


def test_a_controller_of_ones_own(texts):
    entries, _, _ = mixed(texts, Twice, reward="loss", floor=0.1, steps=9, part="next")
    assert entries == [(0, (2.0, 1.0)), *((step, tuple(floored(Twice()(None), 0.1).tolist())) for step in (6, 10))]


@pytest.mark.parametrize(
    ("error", "make"),
    [
        ("every=0", lambda folder: Mixing(Exp3(), every=0)),
        ("reward: value and losses: held_out", lambda folder: Mixing(Exp3(), "value", "held_out")),
        ("data.unit: sample", lambda folder: sampled(folder, Mixing(Exp3()))),
        ("the held-out ones are old", lambda folder: sampled(folder, Mixing(Exp3(), losses="held_out"), held=["old"])),
        ("expected 3 or more", lambda folder: sampled(folder, Mixing(Exp3(), every=2), "batch", steps=10_000)),
        ("a floor of 0.5", lambda folder: mixed(folder, floor=0.5)),
    ],
)
def test_mistakes_are_explained(texts, error, make):
    with pytest.raises(ValueError, match=re.escape(error)):
        make(texts)
