from functools import partial

import numpy as np
import pytest
import torch
from contracts import cases
from runs import make, pairs, trainer, write_pairs
from torch.testing import assert_close

from headwater.controllers import UCB, Exp3, Forecast, Progress
from headwater.objectives import Causal, Masked, Weighted
from headwater.objectives.bandit import Bandit
from headwater.objectives.objective import Term
from headwater.pretrainer import Pretrainer
from headwater.training.schedules import constant

PARTS = {"mask": partial(Masked, modality="text", mode="substitute"), "next": Causal, "sound": partial(Causal, modality="audio")}
NAMES = list(PARTS)


def made(bandit):
    model = cases.model()
    torch.manual_seed(0)
    return model, Weighted(model, PARTS, turns=bandit).double(), cases.batch(model.readers, cases.examples(model.readers))


def told(bandit, step, losses, parts=NAMES):
    """One step in which the part that was drawn loses what `losses` says. Returns its name."""
    (name,) = bandit.choose(parts, {"step": step})
    bandit.see({f"{name}/it": Term(torch.tensor(6.0 * losses[name]), torch.tensor(3), 0.5)})
    bandit.after_step()
    return name


def test_shares_are_what_the_controller_makes_of_the_losses():
    bandit, sums, turns, before, paid, counts = Bandit(Progress(window=3), "drop", every=5, floor=0.1), {}, {}, {}, [], []
    bandit.meet(NAMES)
    for step in range(40):
        losses = {"mask": 4.0 - 0.05 * step, "next": 3.0, "sound": 2.0 + 0.1 * (step % 3)}
        name = told(bandit, step, losses)
        sums[name], turns[name] = sums.get(name, 0) + losses[name], turns.get(name, 0) + 1
        if step % 5 < 4:
            continue
        now = {n: sums[n] / turns[n] for n in sums}
        row = [before.get(n, np.nan) - now.get(n, np.nan) for n in NAMES]
        if np.isfinite(row).any():
            paid.append(row)
            counts.append([turns.get(n, 0) for n in NAMES])
            r, w = np.array(paid[-3:]), np.array(counts[-3:]) * np.isfinite(paid[-3:])
            with np.errstate(invalid="ignore"):
                mean = np.where(w.sum(0) > 0, np.nansum(r * w, 0) / w.sum(0), -np.inf)
            mean = np.clip(np.where(np.isinf(mean), mean.max(), mean), 0, None)
            expected = 0.1 + 0.7 * (mean / mean.sum() if mean.sum() else np.full(3, 1 / 3))
            assert_close(bandit.tally.share.numpy(), expected, rtol=1e-5, atol=1e-7)
        before, sums, turns = before | now, {}, {}
    assert len(paid) > 3


@pytest.mark.parametrize("controller", [Exp3(rate=1.0), UCB(temperature=0.1), Progress(), Forecast()])
def test_the_part_that_still_learns_gets_the_turns(controller):
    bandit = Bandit(controller, "progress", every=8, floor=0.05)
    bandit.meet(NAMES)
    losses, drawn = {"mask": 5.0, "next": 1.0, "sound": 3.0}, []
    for step in range(320):
        name = told(bandit, step, losses)
        drawn.append(name)
        losses["mask"] -= 0.01 * (name == "mask")
    share = drawn[160:].count("mask") / 160
    assert share > 0.6, f"{type(controller).__name__} drew it for {share:.0%}"


def test_realised_turns_are_the_shares_and_only_what_is_served_is_drawn():
    bandit = Bandit(floor=0.0)
    bandit.meet(NAMES)
    bandit.tally.share.copy_(torch.tensor([0.6, 0.3, 0.1]))
    drawn = [next(iter(bandit.choose(NAMES, {"step": step}))) for step in range(20_000)]
    assert_close([drawn.count(n) / 20_000 for n in NAMES], [0.6, 0.3, 0.1], rtol=0, atol=0.01)
    served = [next(iter(bandit.choose(["mask", "sound"], {"step": step}))) for step in range(20_000)]
    assert served.count("mask") / 20_000 == pytest.approx(6 / 7, abs=0.01)
    assert_close(bandit.chance, torch.tensor([6 / 7, 0.0, 1 / 7], dtype=torch.float64))
    bandit.tally.share.copy_(torch.tensor([1.0, 0.0, 0.0]))
    assert {next(iter(bandit.choose(["next", "sound"], {"step": step}))) for step in range(50)} == {"next", "sound"}


def test_pieces_count_as_one_step():
    whole, cut = Bandit(every=1, reward="loss"), Bandit(every=1, reward="loss")
    for bandit, micro in ((whole, 1), (cut, 3)):
        model, objective, batch = made(bandit)
        for step in range(6):
            for task in [objective.task(piece) for piece in objective.pieces(batch | {"step": step}, micro)]:
                terms = objective(model, task)
            assert terms[next(iter(terms))].metrics["share"] > 0
            objective.after_step(model, 0.0)
    assert whole.steps == cut.steps == 6
    assert_close(whole.tally.state_dict(), cut.tally.state_dict(), rtol=1e-5, atol=1e-6, equal_nan=True)


def test_questions_in_evaluation_do_not_count():
    bandit = Bandit()
    model, objective, batch = made(bandit)
    objective.eval()
    objective(model, objective.task(batch | {"step": 0}))
    objective.after_step(model, 0.0)
    assert bandit.steps == 0
    assert not bandit.heard


def test_a_part_without_targets_tells_nothing():
    bandit = Bandit(every=1, reward="loss")
    bandit.meet(NAMES)
    (name,) = bandit.choose(NAMES, {"step": 0})
    bandit.see({f"{name}/it": Term(torch.tensor(0.0), torch.tensor(0))})
    bandit.after_step()
    assert bandit.tally.before.isnan().all()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def fit(shards, steps=14, sharded=False, resume=None, save=None):
    """Parameters and buffers of a run in which objectives take turns."""
    parts = {"mask": partial(Masked, modality="text", mode="substitute"), "next": partial(Causal, prefix=["image"])}
    bandit = Bandit(Exp3(rate=1.0), every=3)
    plain = make()
    optimizer = partial(torch.optim.SGD, lr=0.1)
    objective = partial(Weighted, parts=parts, turns=bandit)
    module = Pretrainer(plain.backbone, objective, optimizer=optimizer, schedule=constant)
    fitting = trainer(steps, sharded, limit_val_batches=0)
    fitting.fit(module, pairs(shards), ckpt_path=resume, weights_only=True)
    if save:
        fitting.save_checkpoint(save)
    return {n: x.clone() for n, x in bandit.state_dict().items()}, bandit.steps.item()


def test_a_resumed_run_draws_the_same(shards, tmp_path):
    through, _ = fit(shards)
    fit(shards, steps=7, save=tmp_path / "half.ckpt")
    resumed, steps = fit(shards, resume=tmp_path / "half.ckpt")
    assert steps == 14
    assert through["tally.share"].tolist() != [0.5, 0.5]
    for name, x in through.items():
        assert torch.equal(x.nan_to_num(99), resumed[name].nan_to_num(99)), name


@pytest.mark.parametrize("sharded", [False, True])
def test_all_ranks_learn_the_same(ranks, shards, sharded):
    plain, _ = fit(shards)
    (a, _), (b, _) = ranks(fit, shards, 14, sharded)
    for name, x in a.items():
        assert torch.equal(x.nan_to_num(99), b[name].nan_to_num(99)), name
    assert_close(a, plain, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="every=0"):
        Bandit(every=0)
    with pytest.raises(ValueError, match=r"a floor of 0\.5"):
        made(Bandit(floor=0.5))
    bandit = Bandit()
    bandit.meet(NAMES)
    with pytest.raises(ValueError, match="serves none of mask, next, sound"):
        bandit.choose([], {"step": 0})
