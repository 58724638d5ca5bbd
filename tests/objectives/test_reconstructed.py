"""Autoencoding: every term against its formula typed anew, who gets which gradient, and codebooks that move with the steps."""

from functools import partial

import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater import distributed, modalities
from headwater.modalities import Autoencoder
from headwater.modalities.bottlenecks import FSQ, KL, VQ
from headwater.model import Model
from headwater.objectives import Reconstructed
from headwater.objectives.objective import weighted_sum
from headwater.objectives.reconstructed import Adversary, Perceptual, usage
from headwater.pretrainer import count
from headwater.trunk import Trunk


def made(bottleneck=None, kind=None, **options):
    torch.manual_seed(0)
    encoder = (kind or (lambda t: modalities.Image(t, 16, 8)))(cases.trunk())
    model = Model({"it": Autoencoder(encoder, bottleneck() if bottleneck else VQ(8, 4), cases.trunk(12))}).double()
    return model, Reconstructed(model, "it", **options).double()


def batch_of(model, numbers=range(5)):
    encoder = model.encoder("it")
    return cases.batch({"it": cases.preparing(encoder)}, [{"it": t} for t in encoder.reader.example(5, 0)], numbers)


def test_terms_equal_the_formula():
    model, objective = made(
        partial(KL, 3), lambda t: modalities.Action(t, slots=3), distance="absolute", weight=lambda progress: 0.5 * progress
    )
    batch = batch_of(model) | {"progress": 0.5}
    terms = objective(model, batch)
    t, encoder = batch["it"], model.encoder("it")
    rebuilt = encoder.rebuild(t, batch["seed"], 0.5)
    wrong, cost, number = 0.0, 0.0, 0
    for b, n in t.real().nonzero().tolist():
        slots = [(v - w).abs() for v, w in zip(rebuilt.values[b, n], t.x[b, n], strict=True) if not w.isnan()]
        wrong, cost, number = wrong + sum(slots) / len(slots), cost + rebuilt.coded.loss[b, n], number + 1
    assert {n: int(term.number) for n, term in terms.items()} == {"reconstructed": number, "bottleneck": number}
    assert_close(terms["reconstructed"].total, wrong)
    assert_close(terms["bottleneck"].total, cost)
    assert (terms["reconstructed"].weight, terms["bottleneck"].weight) == (1.0, 0.25)


def test_ids_are_scored_by_their_likelihood():
    model, objective = made(partial(FSQ, (4, 4)), lambda t: modalities.Action(t, choices=5))
    batch = batch_of(model)
    (term,) = objective(model, batch).values()
    scores = model.encoder("it").rebuild(batch["it"], batch["seed"]).values.log_softmax(-1)
    wanted = sum(-scores[b, n, batch["it"].x[b, n]] for b, n in batch["it"].real().nonzero().tolist())
    assert_close(term.total, wanted)


def test_what_is_drawn_comes_from_the_seeds():
    model, objective = made(partial(KL, 3))
    batch = batch_of(model)
    one, same, other = (objective(model, batch | {"seed": batch["seed"] + k})["reconstructed"].total for k in (0, 0, 1))
    assert one == same
    assert one != other


def test_usage_counts_codes():
    ids = torch.tensor([[[0, 1], [0, 2], [2, 0]], [[3, 1], [3, 1], [2, 0]]])
    found = usage(ids, torch.tensor([[True, True, False]] * 2), 4)
    assert_close(found["usage"], torch.tensor(4 / 8))
    second = torch.tensor([0.75, 0.25])
    assert_close(found["perplexity"], (2 + (-(second * second.log()).sum()).exp()) / 2)


def test_neither_player_moves_the_other():
    model, objective = made(partial(FSQ, (4, 4)), adversary=partial(Adversary, trunk=cases.trunk(8), weight=0.3))
    batch = batch_of(model)
    terms = objective(model, batch)
    raw, judge = batch["it"], objective.adversary
    rebuilt = model.encoder("it").rebuild(raw, batch["seed"]).values
    real, made_up = judge.score(raw), judge.score(raw._replace(x=rebuilt))
    mine, theirs = list(model.parameters()), list(judge.parameters())
    told = sum(max(0, 1 - r) + max(0, 1 + f) for r, f in zip(real.flatten(), made_up.flatten(), strict=True))
    assert_close(terms["discriminator"].total, told)
    assert_close(terms["fooled"].total, -made_up.sum())
    assert terms["fooled"].weight == terms["discriminator"].weight == 0.3
    apart = torch.autograd.grad(-made_up.sum(), mine, retain_graph=True, allow_unused=True)
    found = torch.autograd.grad(terms["fooled"].total, mine, retain_graph=True, allow_unused=True)
    assert_close([g for g in found if g is not None], [g for g in apart if g is not None])
    back = torch.autograd.grad(terms["fooled"].total, theirs, retain_graph=True, allow_unused=True)
    assert all(g is None or g.abs().max() < 1e-12 for g in back)
    assert all(g is None for g in torch.autograd.grad(terms["discriminator"].total, mine, retain_graph=True, allow_unused=True))
    frozen = judge.score(raw._replace(x=rebuilt.detach()))
    wanted = torch.autograd.grad((1 - real).relu().sum() + (1 + frozen).relu().sum(), theirs)
    assert_close(torch.autograd.grad(terms["discriminator"].total, theirs), wanted)


def test_features_are_compared_by_a_tower_that_does_not_train():
    tower = modalities.Image(cases.trunk(), 16, 8).double()
    model, objective = made(partial(FSQ, (4, 4)), perceptual=partial(Perceptual, tower=tower, weight=0.7))
    batch = batch_of(model)
    term = objective(model, batch)["perceptual"]
    values = model.encoder("it").rebuild(batch["it"], batch["seed"]).values
    a, b = (tower(tower.embed(t)).x for t in (batch["it"], batch["it"]._replace(x=values)))
    wanted = sum(1 - (x @ y) / (x.norm() * y.norm()) for x, y in zip(a.flatten(0, 1), b.flatten(0, 1), strict=True))
    assert_close(term.total, wanted)
    assert term.weight == 0.7
    (grad,) = torch.autograd.grad(term.total, model.encoder("it").head.weight)
    assert grad.any()
    assert not any(p.requires_grad for p in objective.parameters())


def trained(shares):
    """Loss of the last step, and codebooks, after three steps in which this rank had its share of the samples."""
    model, objective = made(
        partial(VQ, 8, 4, 2, normalise=False, decay=0.5, revive=0.5), lambda t: modalities.Audio(t, bands=4, frames=4)
    )
    batch = batch_of(model, shares[distributed.rank()])
    step = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        task = objective.task(batch)
        loss = weighted_sum(objective(model, task), count([objective.numbers(task)]), distributed.world())
        step.zero_grad()
        loss.backward()
        for p in model.parameters():
            p.grad = distributed.total(torch.zeros_like(p) if p.grad is None else p.grad) / distributed.world()
        step.step()
        objective.after_step(model, 0.5)
    return distributed.total(loss) / distributed.world(), model.encoder("it").bottleneck.table()


@pytest.mark.parametrize("shares", [[[0, 2, 3], [1, 4]], [[3], [0, 1], [2, 4]]])
def test_codebooks_of_ranks_are_those_of_one_process(pools, shares):
    loss, table = trained([[k for share in shares for k in share]])
    found = pools[len(shares)](trained, shares)
    for got, other in found:
        assert_close(got, loss)
        assert_close(other, table)
        assert torch.equal(other, found[0][1])


def test_codes_are_moved_once_per_step_however_many_pieces_it_had():
    tables = []
    for pieces in (1, 2):
        model, objective = made(partial(VQ, 8, 4, decay=0.5))
        for piece in objective.pieces(batch_of(model), pieces):
            objective(model, objective.task(piece))
        with torch.no_grad():  # what is only looked at is not learned from
            objective(model, batch_of(model))
        objective.after_step(model, 0.1)
        tables.append(model.encoder("it").bottleneck.table())
    assert_close(*tables)


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        ("expected an Autoencoder", lambda: Reconstructed(Model({"image": modalities.Image(cases.trunk(), 16, 8)}))),
        ("found distance", lambda: made(distance="far")),
        (
            "made of ids",
            lambda: made(kind=lambda t: modalities.Text(t, length=8), adversary=partial(Adversary, trunk=cases.trunk())),
        ),
        ("drop_path", lambda: made(adversary=partial(Adversary, trunk=Trunk(16, 1, 2, drop_path=0.1)))),
        ("the tower for it reads", lambda: made(perceptual=partial(Perceptual, tower=modalities.Image(cases.trunk(), 16, 4)))),
    ],
)
def test_bad_arguments_are_refused(message, wrong):
    with pytest.raises(ValueError, match=message):
        wrong()
