import json
import math
import re
from collections import deque
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from runs import COUPLED, make, pairs, trainer, whole, write_pairs

from headwater import distributed
from headwater.datamodules.datamodule import ShardDataModule, Source
from headwater.objectives import Contrastive
from headwater.training.guard import FILE, Guard, limit

ADAM = partial(torch.optim.AdamW, lr=1e-2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


class Poison(pl.Callback):
    """Puts a value into pictures of one rank at one step, and keeps all parameters and optimizer state before each step."""

    def __init__(self, at, value, rank=0, save=()):
        self.at, self.value, self.rank, self.save, self.before = at, value, rank, save, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        step = trainer.global_step
        self.before[step] = state(pl_module)
        if step in self.save:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/{step}.ckpt")
        if step in self.at and distributed.rank() == self.rank:
            batch["image"].x[0] = self.value


def state(pretrainer):
    """All that training moves: weights, buffers, and moments of the optimizer."""
    states = pretrainer.optimizers(use_pl_optimizer=False).state.values()
    moments = {f"{number} {k}": whole(v) for number, kept in enumerate(states) for k, v in kept.items()}
    return {n: whole(x) for n, x in pretrainer.state_dict().items()} | moments


def run(shards, folder, poison, guard, steps=6, sharded=False, parts=None):
    guard.folder = folder
    pretrainer = make(parts, guard=guard, optimizer=ADAM)
    one = trainer(steps, sharded, callbacks=[poison], default_root_dir=folder)
    one.fit(pretrainer, pairs(shards))
    return {**poison.before, steps: state(pretrainer)}, [list(e) for e in guard.events]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_told(shards, tmp_path, value):
    queue = {**COUPLED, "far": partial(Contrastive, queue=8, momentum=0.9)}
    states, events = run(shards, tmp_path, Poison([3], value), Guard(), parts=queue)
    changed = [step for step in range(6) if not same(states[step], states[step + 1])]
    assert changed == [0, 1, 2, 4, 5]
    assert all(x.isfinite().all() for x in states[6].values())
    told = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [event["step"] for event in told] == [e[0] for e in events] == [3]
    assert len(told[0]["samples"]) == 5
    assert told[0]["action"] == "left out"
    assert "image of the samples" in told[0]["why"] if value == math.inf else "backbone.encoders.image.stem" in told[0]["why"]


def ranked(shards, folder, sharded):
    return run(shards, folder, Poison([2], math.nan, rank=1), Guard(), 4, sharded)


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_poison_on_one_rank_is_left_out_on_all(ranks, shards, tmp_path, sharded):
    (a, events), (b, others) = ranks(ranked, shards, tmp_path, sharded)
    assert events == others
    assert [len(samples) for _, _, _, samples in events] == [5]
    assert "backbone.encoders.image.stem" in events[0][1]
    for step in range(5):
        assert same(a[step], b[step])
    assert [step for step in range(4) if not same(a[step], a[step + 1])] == [0, 1, 3]


@pytest.mark.parametrize(("action", "left_out"), [("warn", False), ("skip", True), ("slow", True)])
def test_a_spike_is_answered_as_asked(shards, tmp_path, action, left_out):
    class Surprise(Poison):
        """Lets a guard think, for one step, that the loss used to be 1."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            guard.seen = {"next/causal": deque([1.0] * 20)} if trainer.global_step == 3 else {}

    guard = Guard(spike=5, action=action, rest=2, window=20)
    states, events = run(shards, tmp_path, Surprise([], 0.0), guard)
    assert [e[0] for e in events] == [3]
    assert re.match(r"next/causal [\d.]+, expected below 1.05$", events[0][1])
    assert same(states[3], states[4]) == left_out
    assert [guard.factor(step) for step in (4, 5, 6)] == ([0.1, 0.1, 1.0] if action == "slow" else [1.0] * 3)


def test_back_returns_to_the_last_checkpoint_and_the_data_goes_on(shards, tmp_path):
    seen = []

    class Samples(Poison):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            seen.append(batch["sample"].tolist())

    states, events = run(shards, tmp_path, Samples([4], math.nan, save=[2]), Guard(action="back"))
    assert events[0][2].endswith("back to the weights of step 2")
    assert same(states[5], states[2])
    assert not same(states[4], states[2])
    assert len({tuple(s) for s in seen}) == len(seen)  # nothing comes twice


def test_a_run_that_only_leaves_out_ends_with_the_reason(shards, tmp_path):
    with pytest.raises(RuntimeError, match=r"3 steps in a row were left out.*image of the samples"):
        run(shards, tmp_path, Poison(range(1, 6), math.inf), Guard(patience=3))


def test_what_was_seen_travels_with_the_checkpoint(shards, tmp_path):
    guard = Guard()
    run(shards, tmp_path, Poison([2], math.nan, save=[4]), guard)
    kept = torch.load(tmp_path / "4.ckpt", weights_only=True)["guard"]
    other = Guard()
    other.load_state_dict(kept)
    assert [e.step for e in other.events] == [2]
    assert {n: len(v) for n, v in other.seen.items()} == {"gradient norm": 3, "mask/masked": 3, "next/causal": 3}


def test_the_limit_is_robust_and_waits_for_enough_steps():
    values = [1.0, 2.0, 3.0, 4.0, 5.0] * 4
    assert limit(values[:19], 3.0) == math.inf
    assert limit([*values, 1e6], 3.0) == pytest.approx(3 + 3 * 1.4826 * 1.0)
    assert limit([7.0] * 30, 2.0) == pytest.approx(7 + 2 * 0.07)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="patience=0"):
        Guard(patience=0)


def test_sources_that_take_turns_have_their_own_past(shards, tmp_path):
    guard = Guard(spike=20)
    data = ShardDataModule(train={"a": Source(shards), "b": Source(shards)}, batch_size=5, workers=0)
    trainer(6, default_root_dir=tmp_path).fit(make(guard=guard, optimizer=ADAM), data)
    assert {name.rpartition(" of ")[2] for name in guard.seen} == {"a", "b"}
    assert sum(len(past) for name, past in guard.seen.items() if name.startswith("gradient norm")) == 6
