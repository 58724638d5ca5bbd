import re
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from training.continued import ADAM, language_model, parameters, run, write

from headwater.training.freezing import Bottom, Freezing, Named, Settled, levels
from headwater.training.schedules import Linear, Step

HEAVY = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)
RULES = {
    "named": partial(Named, ["blocks"], ["norm"]),
    "bottom": partial(Bottom, blocks=1),
    "rising": partial(Bottom, Linear(0.0, 1.0)),
    "falling": partial(Bottom, Linear(1.0, 0.0)),
    "settled": partial(Settled, tau=2.0, grace=0.3),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write(tmp_path_factory.mktemp("texts"))


def freezing(*rules):
    return Freezing([RULES[name]() for name in rules])


class Diary(pl.Callback):
    """Every parameter after every step, and the L1 norm of its gradient as backward left it."""

    def __init__(self):
        self.values, self.norms = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.norms.append({n: float(p.grad.abs().sum()) for n, p in pl_module.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.values.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})


def same(a, b):
    return all(torch.equal(p, b[n]) for n, p in a.items())


@pytest.mark.parametrize("optimizer", [ADAM, HEAVY], ids=["adam", "momentum"])
@pytest.mark.parametrize("rule", RULES)
def test_what_is_frozen_stays_bit_for_bit_and_the_rest_learns(texts, rule, optimizer):
    done = run(texts, [Diary, partial(freezing, rule)], steps=8, optimizer=optimizer)
    diary, callback = done.callbacks
    assert callback.events
    frozen, before = set(), {f"backbone.{n}": p for n, p in language_model().named_parameters()}
    for step, after in enumerate(diary.values):
        for when, name, froze in callback.events:
            if when == step:
                (frozen.add if froze else frozen.discard)(name)
        still = {n for n in after if n in before and torch.equal(after[n], before[n])}
        assert frozen <= still
        assert len(still - frozen) < len(after) / 4  # but for what gets no gradient, the others move
        before = after
    names = {p: n for n, p in done.pretrainer.named_parameters()}
    assert not frozen & {names[p] for p in done.trainer.optimizers[0].state}
    if rule in ("named", "bottom"):
        assert not frozen & {names[p] for group in done.trainer.optimizers[0].param_groups for p in group["params"]}


def test_names_and_exceptions(texts):
    callback = run(texts, [partial(freezing, "named")], steps=1).callbacks[0]
    frozen = {name for _, name, _ in callback.events}
    assert frozen == {f"backbone.{n}" for n, _ in language_model().named_parameters() if "blocks" in n and "norm" not in n}


def test_levels_count_from_the_stem():
    found = levels(language_model())
    assert {level for n, (level, _) in found.items() if ".stem." in n} == {0}
    for block in (0, 1):
        assert {level for n, (level, _) in found.items() if f"blocks.{block}." in n} == {block + 1}
    assert {level for n, (level, _) in found.items() if ".head." in n} == {3}
    assert {of for _, of in found.values()} == {3}


@pytest.mark.parametrize("falls", [False, True])
def test_levels_freeze_and_thaw_when_the_schedule_says(texts, falls):
    steps, schedule = 12, Linear(1.0, 0.0) if falls else Linear(0.0, 1.0)
    callback = run(texts, [lambda: Freezing([Bottom(schedule)])], steps=steps).callbacks[0]
    found = levels(run(texts, steps=1).pretrainer)
    for name, (level, of) in found.items():
        expected = [level < round(schedule(step / steps) * of, 6) for step in range(steps)]
        changes = [(k, name, now) for k, (was, now) in enumerate(zip([False, *expected], expected)) if was != now]
        assert [event for event in callback.events if event[1] == name] == changes


@pytest.mark.parametrize("patience", [1, 2])
def test_matrices_settle_exactly_when_the_norm_crosses_the_rule(texts, patience):
    steps, tau, grace = 10, 3.0, 0.3
    make = partial(lambda: Freezing([Settled(tau, grace, patience)]))
    diary, callback = run(texts, [Diary, make], steps=steps, optimizer=partial(torch.optim.SGD, lr=0.3)).callbacks
    watched = [n for n in diary.norms[0] if ".blocks." in n and n.endswith("weight") and "norm" not in n]
    expected = []
    for name in watched:
        row = 0
        for step, norms in enumerate(diary.norms):
            row = row + 1 if step / steps >= grace and norms[name] < tau else 0
            if row == patience:
                expected.append((step, name, True))
                break
    assert sorted(callback.events) == sorted(expected)
    assert 0 < len(expected) < len(watched) or len(diary.norms) < steps
    for when, name, _ in expected:
        assert all(name not in norms for norms in diary.norms[when + 1 :])  # no gradient is even found


def test_the_run_ends_when_all_have_settled(texts):
    done = run(texts, [lambda: Freezing([Settled(1e9, 0.5)])], steps=10)
    assert done.trainer.global_step == 6


class Products(TorchDispatchMode):
    """Counts the operations of matrix products; torch's own counter does not get through backward passes inside of forward ones."""

    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        count = flop_registry.get(function.overloadpacket)
        self.flops += count(*args, **(kwargs or {}), out_val=out) if count else 0
        return out


def test_backward_gets_cheaper(texts):
    def flops(callbacks):
        with Products() as counter:
            run(texts, callbacks, steps=2)
        return counter.flops

    full, half, settled = (flops(c) for c in ([], [partial(freezing, "bottom")], [lambda: Freezing([Settled(1e9, 0.0)])]))
    assert half < 0.85 * full
    assert settled < full


@pytest.mark.parametrize("rule", ["rising", "falling", "settled"])
def test_a_resumed_run_equals_one_that_went_through(texts, tmp_path, rule):
    make = [partial(freezing, rule)]
    through = run(texts, make, steps=8)
    run(texts, make, steps=8, limit=4, save=tmp_path / "half.ckpt")
    resumed = run(texts, make, steps=8, resume=tmp_path / "half.ckpt")
    assert same(through.parameters, resumed.parameters)
    assert through.callbacks[0].events == resumed.callbacks[0].events
    assert len(through.callbacks[0].events) > 3


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("rule", RULES)
def test_two_ranks_freeze_like_one_process(ranks, texts, rule, strategy):
    plain = run(texts, [partial(freezing, rule)], steps=6, optimizer=HEAVY)
    assert plain.callbacks[0].events
    (a, events_a), (b, events_b) = ranks(both, texts, rule, strategy)
    assert same(a, b)
    assert_close(a, plain.parameters, rtol=1e-4, atol=1e-5)
    assert events_a == events_b == plain.callbacks[0].events


def both(folder, rule, strategy):
    done = run(folder, [partial(freezing, rule)], steps=6, optimizer=HEAVY, strategy=strategy)
    return done.parameters, done.callbacks[0].events


@pytest.mark.parametrize("rule", ["rising", "falling"])
def test_pieces_of_a_batch_freeze_alike(ranks, texts, rule):
    plain = run(texts, [partial(freezing, rule)], steps=6, optimizer=HEAVY).parameters
    pieces = partial(parameters, callbacks=[partial(freezing, rule)], steps=6, optimizer=HEAVY, micro=2)
    assert_close(pieces(texts), plain, rtol=1e-4, atol=1e-5)
    a, b = ranks(pieces, texts)
    assert same(a, b)
    assert_close(a, plain, rtol=1e-4, atol=1e-5)


def test_rules_add_up(texts):
    make = partial(Freezing, [Named(["stem"]), Bottom(Step(0.0, 1.0, 0.5), names=["blocks"])])
    callback = run(texts, [make], steps=4).callbacks[0]
    assert {(step, ".stem." in name) for step, name, _ in callback.events} == {(0, True), (2, False)}


@pytest.mark.parametrize(
    ("error", "make"),
    [
        ("found no rules", lambda: Freezing([])),
        ("no regular expression", lambda: Named(["("])),
        ("fits none", lambda: Freezing([Named(["nothing"])])),
        ("freeze every parameter", lambda: Freezing([Named(["."])])),
        ("a share from 0 to 1", lambda: Bottom(1.5)),
        ("no parameter of an encoder", lambda: Freezing([Bottom(0.5, names=["nothing"])])),
        ("above 0", lambda: Settled(0.0)),
        ("no matrix", lambda: Freezing([Settled(1.0, names=["nothing"])])),
    ],
)
def test_mistakes_are_explained(texts, error, make):
    with pytest.raises(ValueError, match=re.escape(error)):
        run(texts, [make])


def test_a_recipe_names_rules_without_a_path():
    parser = ArgumentParser()
    parser.add_argument("--it", type=Freezing)
    share = {"class_path": "Linear", "init_args": {"start": 1.0, "end": 0.0}}
    rules = [
        {"class_path": "Named", "init_args": {"names": ["stem"]}},
        {"class_path": "Bottom", "init_args": {"share": share}},
        {"class_path": "Settled", "init_args": {"tau": 0.5}},
    ]
    given = {"it": {"class_path": "headwater.training.Freezing", "init_args": {"rules": rules}}}
    made = parser.instantiate_classes(parser.parse_object(given)).it
    assert [type(rule) for rule in made.rules] == [Named, Bottom, Settled]
    assert made.rules[1].share(0.25) == 0.75
