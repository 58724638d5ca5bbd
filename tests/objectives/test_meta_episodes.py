"""Episodes: the gradient behind a few steps, followed from where they began."""

import copy
from functools import partial

import pytest
import torch
from contracts import cases
from runs import UNCOUPLED, make, pairs, trainer, whole, write_pairs
from torch.distributed.device_mesh import init_device_mesh
from torch.testing import assert_close

from headwater import distributed, random
from headwater.objectives import Causal, Episodes, Masked, Weighted
from headwater.objectives.divided import Groups
from headwater.objectives.objective import count, weighted_sum
from headwater.objectives.probe import Probe
from headwater.pretrainer import Pretrainer
from headwater.training.schedules import constant
from headwater.training.sharding import shard

HIDE, NEXT = partial(Masked, modality="text", mode="substitute"), partial(Causal, modality="text")
PARTS = partial(Weighted, parts={"mask": HIDE, "next": NEXT})


def made(rows, inner=PARTS, fuse=None, **options):
    torch.manual_seed(0)
    model = cases.model(fuse=fuse)
    pretrainer = Pretrainer(model, partial(Episodes, inner=inner, **{"share": 1.0, "steps": 2, "rate": 0.05, **options})).double()
    readers = cases.readers(model, pretrainer.objective)
    batch = cases.batch(readers, cases.examples(readers, 9), rows)
    return pretrainer, {**batch, "origin": torch.tensor(rows) % 2, "progress": 0.5, "step": 4}


def handed(rows, split=False, **options):
    """What the optimizer gets, by name."""
    pretrainer, batch = made(rows[distributed.rank()], **options)
    if split and distributed.world() > 1:
        shard(pretrainer, init_device_mesh("cpu", (distributed.world(),)))
    before = [whole(p) for p in pretrainer.parameters()]
    probe = Probe(pretrainer, pretrainer.backbone, pretrainer.call, 3)
    batch = pretrainer.objective.before_step(probe, batch)
    assert all(torch.equal(a, whole(b)) for a, b in zip(before, pretrainer.parameters(), strict=True))
    task = pretrainer.hide(batch)
    weighted_sum(pretrainer.ask(task), count([pretrainer.objective.numbers(task)]), 1).backward()
    probe.give(apart=False)
    return {n: whole(p.grad) for n, p in pretrainer.named_parameters() if p.grad is not None and whole(p.grad).any()}


def typed_out(rows, inner=NEXT, steps=2, rate=0.05):
    """The same with a copy of everything and torch's own SGD."""
    pretrainer, whole_batch = made(rows, inner)
    pretrainer = copy.deepcopy(pretrainer)
    support = random.uniform(whole_batch["seed"], (), "support") < 0.5
    readers = cases.readers(pretrainer.backbone, pretrainer.objective)
    samples = cases.examples(readers, 9)
    halves = [cases.batch(readers, samples, [r for r, s in zip(rows, support, strict=True) if s == k]) for k in (True, False)]
    assert all(0 < len(h["seed"]) < len(rows) for h in halves)
    optimizer = torch.optim.SGD(pretrainer.parameters(), lr=rate)
    for half in [halves[0]] * steps + [halves[1]]:
        optimizer.zero_grad()
        terms = pretrainer.objective.inner(pretrainer.backbone, pretrainer.objective.inner.task(half))
        weighted_sum(terms, {n: t.number for n, t in terms.items()}, 1).backward()
        if half is halves[0]:
            optimizer.step()
    return {n: p.grad for n, p in pretrainer.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("inner", [NEXT, PARTS], ids=["one", "parts"])
def test_an_episode_is_the_papers(inner):
    rows = list(range(9))
    found = handed([rows], inner=inner)
    assert_close(found, typed_out(rows, inner), rtol=1e-7, atol=1e-10)


def test_groups_are_tasks_of_their_own():
    found = handed([list(range(9))], inner=NEXT, groups=Groups(2))
    tasks = [typed_out(rows) for rows in ([0, 2, 4, 6, 8], [1, 3, 5, 7])]
    expected = {n: sum(task.get(n, torch.zeros(())) for task in tasks) / 2 for n in {**tasks[0], **tasks[1]}}
    assert_close(found, expected, rtol=1e-7, atol=1e-10)


def test_episodes_and_ordinary_steps_share_the_run():
    """By their number; with a part, the one are about it and the others about the rest."""
    pretrainer, batch = made(list(range(9)), share=0.3, part="next")
    kinds = []
    for step in range(100):
        probe = Probe(pretrainer, pretrainer.backbone, pretrainer.call, 3)
        pretrainer.objective.steps = 1
        if step >= 6:  # the draw alone
            kinds.append(random.seed_of(0, step) / (1 << 63) < 0.3)
            continue
        left = pretrainer.objective.before_step(probe, {**batch, "step": step})
        kinds.append(bool(probe.handed))
        assert left["parts"] == (["next"] if kinds[-1] else ["mask"])
        assert probe.told["episode"] == kinds[-1]
        assert pretrainer.hide(left).keys() & {"mask", "next"} == set(left["parts"])
    assert 20 < sum(kinds) < 40


SHARES = [[0, 2, 3, 5, 6, 8], [1, 4, 7]]


@pytest.mark.parametrize("split", [False, True], ids=["ddp", "fsdp2"])
def test_two_ranks_adapt_as_one_process_does(ranks, split):
    alone = handed([sorted(SHARES[0] + SHARES[1])], fuse="JointTokens", groups=Groups(2))
    for found in ranks(partial(handed, fuse="JointTokens", groups=Groups(2)), SHARES, split):
        assert_close(found, alone, rtol=1e-5, atol=1e-9)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def fit(shards, steps=6, resume=None, save=None, micro=1):
    objective = partial(Episodes, inner=partial(Weighted, parts=UNCOUPLED), share=0.5, part="next")
    pretrainer = Pretrainer(make().backbone, objective, partial(torch.optim.AdamW, lr=1e-3), constant, micro=micro)
    run = trainer(steps)
    run.fit(pretrainer, pairs(shards, batch_size=6), ckpt_path=resume, weights_only=resume and True)
    if save:
        run.save_checkpoint(save)
    return {n: whole(p) for n, p in pretrainer.named_parameters()}


def test_a_run_that_was_cut_ends_like_the_uninterrupted_one(shards, tmp_path):
    once = fit(shards)
    fit(shards, 3, save=tmp_path / "three.ckpt")
    again = fit(shards, resume=tmp_path / "three.ckpt")
    assert all(torch.equal(once[n], again[n]) for n in once)
    assert_close(fit(shards, micro=2), once, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"share": 1.5}, "share of 0 to 1"),
        ({"steps": 0}, "a step or more"),
        ({"part": "tag"}, "which are mask, next"),
        ({"inner": NEXT, "part": "objective"}, "one of several parts"),
    ],
)
def test_what_cannot_work_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Episodes(cases.model(), **{"inner": PARTS, **options})
