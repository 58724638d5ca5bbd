"""A run that starts from another one has of it what it carries over, and nothing else."""

from copy import deepcopy
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import runs
import torch
from torch.testing import assert_close

from headwater.objectives import Contrastive
from headwater.training.averaging import Average
from headwater.training.groups import Groups, Rule
from headwater.training.optimizers import ScheduleFree
from headwater.training.start import Start

TAUGHT = {**runs.UNCOUPLED, "pair": partial(Contrastive, momentum=0.9, queue=8)}  # with a teacher and a queue
ADAM = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
FREE = partial(ScheduleFree, lr=0.01)  # which counts its steps by group
EVERYTHING = ("model", "objective", "optimizer", "data")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return runs.write_pairs(tmp_path_factory.mktemp("pairs"))


class Look(pl.Callback):
    """What a run has before its first step, and the samples of all steps."""

    def __init__(self):
        self.samples = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.samples:
            self.weights = deepcopy(pl_module.state_dict())
            names = {id(p): n for n, p in pl_module.named_parameters()}
            self.state = {names[id(p)]: deepcopy(s) for p, s in trainer.optimizers[0].state.items()}
        self.samples.append(batch["sample"].tolist())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rates = [group["lr"] for group in trainer.optimizers[0].param_groups]


def fit(shards, target, steps, sharded=False, resume=None, callbacks=(), parts=None, **options):
    """Train, leave a checkpoint, and tell what was seen."""
    look, module = Look(), runs.make(parts or TAUGHT, **{"optimizer": ADAM, **options})
    trainer = runs.trainer(steps, sharded, callbacks=[look, *callbacks])
    trainer.fit(module, runs.pairs(shards), ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(target)
    return look


def saved(path):
    return torch.load(path, weights_only=True)


def moments(ckpt, key="exp_avg"):
    """By the name of the parameter; fsdp2 numbers states in an order of its own."""
    names = [n for group in ckpt["optimizer"]["names"] for n in group]
    numbers = [i for group in ckpt["optimizer_states"][0]["param_groups"] for i in group["params"]]
    states = ckpt["optimizer_states"][0]["state"]
    return {n: states[i][key] for n, i in zip(names, numbers, strict=True) if i in states}


@pytest.mark.parametrize("optimizer", [ADAM, FREE], ids=["adamw", "schedule-free"])
def test_a_run_that_carries_everything_equals_one_that_never_stopped(shards, tmp_path, optimizer):
    whole = fit(shards, tmp_path / "whole.ckpt", 8, optimizer=optimizer)
    first = fit(shards, tmp_path / "first.ckpt", 4, optimizer=optimizer)
    start = Start(str(tmp_path / "first.ckpt"), EVERYTHING)
    second = fit(shards, tmp_path / "second.ckpt", 4, start=start, optimizer=optimizer)
    third = fit(shards, tmp_path / "third.ckpt", 2, start=Start(str(tmp_path / "second.ckpt"), ["model", "data"]))
    assert first.samples + second.samples == whole.samples
    assert third.samples[0] not in whole.samples[-2:]  # the position is carried on through several runs
    a, b = saved(tmp_path / "whole.ckpt"), saved(tmp_path / "second.ckpt")
    assert_close(b["state_dict"], a["state_dict"], rtol=0, atol=0)
    assert_close(b["optimizer_states"], a["optimizer_states"], rtol=0, atol=0)
    assert any(name.startswith("objective.") for name in a["state_dict"])


def test_what_is_not_carried_starts_anew(shards, tmp_path):
    before, path = fit(shards, tmp_path / "before.ckpt", 3), str(tmp_path / "before.ckpt")
    ckpt = saved(path)
    look = fit(shards, tmp_path / "after.ckpt", 2, start=Start(path, ["model"]))
    assert not look.state
    assert look.samples[0] == before.samples[0]
    weights, old = look.weights, ckpt["state_dict"]
    assert all(torch.equal(weights[n], old[n]) for n in old if n.startswith("backbone."))
    own = [n for n in old if n.startswith("objective.")]
    assert any(not torch.equal(weights[n], old[n]) for n in own)
    towers = [n for n in own if ".teacher." in n and n.endswith("qkv.weight")]
    for name in towers:  # teachers are copies of what was carried over
        assert any(torch.equal(weights[name], w) for n, w in old.items() if n.startswith("backbone."))
    assert towers


def resumed(shards, folder, sharded):
    """Both halves on all ranks, the second one started from the first."""
    fit(shards, folder / "first.ckpt", 3, sharded)
    look = fit(shards, folder / "second.ckpt", 3, sharded, start=Start(str(folder / "first.ckpt"), EVERYTHING))
    return look.samples


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_on_two_ranks_too(ranks, shards, tmp_path, sharded):
    a, b = ranks(resumed, shards, tmp_path, sharded)
    assert [len(one) + len(other) for one, other in zip(a, b, strict=True)] == [5, 5, 5]
    whole = fit(shards, tmp_path / "whole.ckpt", 6)
    assert [sorted(x + y) for x, y in zip(a, b, strict=True)] == [sorted(ids) for ids in whole.samples[3:]]
    a, b = saved(tmp_path / "whole.ckpt"), saved(tmp_path / "second.ckpt")
    assert_close(b["state_dict"], a["state_dict"], rtol=1e-3, atol=2e-3)
    assert_close({n: moments(b)[n] for n in moments(a)}, moments(a), rtol=1e-2, atol=1e-4)


def begin(shards, folder, path, sharded):
    """First moments, whole, that a run on all ranks starts with."""
    look = fit(shards, folder / "shared.ckpt", 1, sharded, start=Start(path))
    return {n: runs.whole(s["exp_avg"]) for n, s in look.state.items()}


def test_shares_start_from_the_checkpoint_of_one_process(ranks, shards, tmp_path):
    fit(shards, tmp_path / "one.ckpt", 3)
    theirs = moments(saved(tmp_path / "one.ckpt"))
    for sharded in (True, False):
        found, _ = ranks(begin, shards, tmp_path, str(tmp_path / "one.ckpt"), sharded)
        assert_close({n: found[n] for n in theirs}, theirs, rtol=0, atol=0)


def test_optimizer_state_goes_by_name(shards, tmp_path):
    """Other groups, frozen parts and new ones: what kept its name and shape has its state."""
    fit(shards, tmp_path / "before.ckpt", 2)
    ckpt = saved(tmp_path / "before.ckpt")
    theirs = moments(ckpt)
    groups = Groups(layer_decay=0.5, rules=[Rule("stem", factor=0.1)])
    start = Start(str(tmp_path / "before.ckpt"), ["model", "optimizer"])
    parts = {"mask": runs.UNCOUPLED["mask"]}

    class Freeze(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            pl_module.backbone.encoder("text").requires_grad_(False)

    look = fit(shards, tmp_path / "after.ckpt", 1, parts=parts, groups=groups, start=start, callbacks=[Freeze()])
    assert look.state
    assert not [n for n in look.state if n.startswith("backbone.encoders.text.")]
    for name, state in look.state.items():
        assert_close(state["exp_avg"], theirs[name], rtol=0, atol=0)
    assert len(saved(tmp_path / "after.ckpt")["optimizer_states"][0]["param_groups"]) > len(ckpt["optimizer"]["names"])


@pytest.mark.parametrize(
    ("carry", "options", "words"),
    [
        (["optimizer"], {"optimizer": partial(torch.optim.SGD, lr=0.1)}, ["AdamW", "SGD", "out of `carry`"]),
        (["objective"], {"parts": {"mask": runs.UNCOUPLED["mask"]}}, ["objective of", "unexpected", "out of `carry`"]),
        (["average"], {}, ["keeps no average", "out of `carry`"]),
    ],
)
def test_what_does_not_fit_is_named(shards, tmp_path, carry, options, words):
    fit(shards, tmp_path / "before.ckpt", 1)
    with pytest.raises(ValueError, match="(?s)" + ".*".join(words)):
        fit(shards, tmp_path / "after.ckpt", 1, start=Start(str(tmp_path / "before.ckpt"), carry), **options)


def test_bad_arguments():
    with pytest.raises(ValueError, match="carries nothing"):
        Start("x", [])
    with pytest.raises(ValueError, match="coverage 0"):
        Start("x", coverage=0)


def test_a_missing_checkpoint_and_a_folder(shards, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found no checkpoint at .*none.ckpt.*expected"):
        fit(shards, tmp_path / "x.ckpt", 1, start=Start(str(tmp_path / "none.ckpt")))
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    fit(shards, tmp_path / "run/checkpoints/last.ckpt", 1)
    assert fit(shards, tmp_path / "x.ckpt", 1, start=Start(str(tmp_path / "run"))).state


def test_the_average_goes_on(shards, tmp_path):
    first, second = Average(momentum=1.0), Average(momentum=1.0)
    fit(shards, tmp_path / "before.ckpt", 3, callbacks=[first])
    start = Start(str(tmp_path / "before.ckpt"), [*EVERYTHING, "average"])
    look = fit(shards, tmp_path / "after.ckpt", 3, callbacks=[second], start=start)
    before = saved(tmp_path / "before.ckpt")["state_dict"]
    assert all(torch.equal(look.weights[n], w) for n, w in before.items() if n.startswith("average."))
    whole = Average(momentum=1.0)
    fit(shards, tmp_path / "whole.ckpt", 6, callbacks=[whole])
    assert second.count == whole.count == 6
    a, b = (saved(tmp_path / name)["state_dict"] for name in ("whole.ckpt", "after.ckpt"))
    assert_close(b, a, rtol=0, atol=0)


def test_a_resumed_run_has_the_settings_that_are_asked_for_now(shards, tmp_path):
    path = tmp_path / "before.ckpt"
    before = fit(shards, path, 2)
    same = fit(shards, tmp_path / "same.ckpt", 4, resume=path)
    assert same.rates == before.rates == [0.01] * len(before.rates)
    changed = partial(torch.optim.AdamW, lr=0.002, weight_decay=0.1, betas=(0.5, 0.9))
    look = fit(shards, tmp_path / "after.ckpt", 4, resume=path, optimizer=changed)
    assert look.rates == [0.002] * len(before.rates)
    assert look.state  # and the moments of the checkpoint
    for group, saved_group in zip(saved(path)["optimizer"]["settings"], saved(tmp_path / "after.ckpt")["optimizer"]["settings"]):
        assert (group["lr"], saved_group["lr"]) == (0.01, 0.002)
        assert group["weight_decay"] == saved_group["weight_decay"]
    assert all(tuple(g["betas"]) == (0.5, 0.9) for g in saved(tmp_path / "after.ckpt")["optimizer_states"][0]["param_groups"])


def test_a_resumed_run_with_other_groups_is_refused(shards, tmp_path):
    fit(shards, tmp_path / "before.ckpt", 1)
    for options in ({"groups": Groups(layer_decay=0.5)}, {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)}):
        with pytest.raises(ValueError, match=r"model.start.checkpoint"):
            fit(shards, Path(tmp_path / "after.ckpt"), 2, resume=tmp_path / "before.ckpt", **options)
