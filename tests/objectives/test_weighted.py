import math
from collections import Counter
from functools import partial

import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater.objectives import Causal, Masked, Weighted
from headwater.objectives.objective import weighted_sum
from headwater.objectives.weighted import Alternate, Draw
from headwater.pretrainer import count

PARTS = {"mask": partial(Masked, modality="text", mode="substitute"), "next": Causal, "sound": partial(Causal, modality="audio")}
SHARES = {"mask": 0.5, "next": lambda progress: 1 - progress, "sound": 0.25}
MODES = {
    "all": (None, ["mask", "next", "sound"]),
    "draw": (Draw({"mask": 0.0, "next": 0.0}), ["sound"]),
    "alternate": (Alternate(steps=3), ["next"]),
    "alternate in order": (Alternate(["sound", "mask", "sound"]), ["sound"]),
}


class Coupled(Causal):
    """Says that it compares samples, so that it is not cut."""

    coupled = True


def made(parts=PARTS, **options):
    model = cases.model()
    torch.manual_seed(0)
    return model, Weighted(model, parts, **options).double(), cases.batch(model.readers, cases.examples(model.readers))


def gradients(loss, *modules):
    """name -> gradient, of all parameters that have one."""
    named = [(f"{i}.{n}", p) for i, module in enumerate(modules) for n, p in module.named_parameters()]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {n: g for (n, _), g in zip(named, found, strict=True) if g is not None}


def test_the_loss_is_the_weighted_sum_of_its_parts():
    model, objective, batch = made(weights={"mask": 0.25, "sound": 0.0})
    expected = 0
    for name, weight in {"mask": 0.25, "next": 1.0, "sound": 0.0}.items():
        expected = expected + weight * cases.loss(cases.terms(objective.parts[name], model, batch)[0])
    assert torch.equal(cases.loss(cases.terms(objective, model, batch)[0]), expected)


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_is_the_weighted_sum_of_separate_gradients(mode):
    turns, running = MODES[mode]
    weights = {"mask": 0.25, "next": lambda progress: 1 + 2 * progress}
    model, objective, batch = made(weights=weights, turns=turns)
    batch |= {"progress": 0.25, "step": 5}
    found, task = cases.terms(objective, model, batch)
    assert sorted(found) == sorted(n for n in objective.numbers(task))
    assert {n.partition("/")[0] for n in found} == set(running)
    got = gradients(cases.loss(found), model, objective.parts)
    expected = {}
    for name in running:
        loss = cases.loss(cases.terms(objective.parts[name], model, batch)[0])
        for n, g in gradients(loss, model, objective.parts).items():
            expected[n] = expected.get(n, 0) + {"mask": 0.25, "next": 1.5, "sound": 1.0}[name] * g
    assert got.keys() == expected.keys()
    assert_close(got, expected, rtol=1e-6, atol=1e-12)


def test_a_sample_teaches_only_the_part_that_drew_it():
    model, objective, batch = made(turns=Draw(SHARES, per="sample"))
    batch["progress"] = 0.5
    chosen = objective.turns.choose(list(PARTS), batch)
    assert torch.equal(sum(c.long() for c in chosen.values()), torch.ones(7, dtype=torch.int64))
    assert len({int(c.sum()) for c in chosen.values()} - {0}) > 0
    together = cases.terms(objective, model, batch)[0]
    samples = cases.examples(model.readers)
    for name, mine in chosen.items():
        numbers = mine.nonzero()[:, 0].tolist()
        (term,) = [t for n, t in together.items() if n.startswith(name)]
        if not numbers:
            assert term.number == 0
            continue
        (alone,) = cases.terms(objective.parts[name], model, cases.batch(model.readers, samples, numbers))[0].values()
        assert term.number == alone.number
        assert_close(term.total, alone.total, rtol=1e-5, atol=1e-6)


def test_realised_shares_are_those_asked_for():
    names, n = list(PARTS), 40_000
    for progress, expected in ((0.0, [0.5, 1.0, 0.25]), (1.0, [0.5, 0.0, 0.25])):
        drawn = Counter(next(iter(Draw(SHARES).choose(names, {"step": step, "progress": progress}))) for step in range(n))
        seed = torch.arange(n)
        by_sample = Draw(SHARES, per="sample").choose(names, {"seed": seed, "progress": progress})
        for name, share in zip(names, expected, strict=True):
            assert abs(drawn[name] / n - share / sum(expected)) < 0.01
            assert abs(by_sample[name].double().mean() - share / sum(expected)) < 0.01


def test_only_parts_that_the_batch_serves_are_drawn_and_take_turns():
    _, objective, batch = made(turns=Draw({"mask": 100.0}))
    sounds = {k: batch[k] for k in ("audio", "seed", "sample")}
    assert set(objective.task(sounds | {"step": 3})) == {"step", "sound"}
    objective.turns = Alternate(["mask", "sound"], steps=2)
    assert [next(iter(objective.turns.choose(list(PARTS), {"step": s}))) for s in range(5)] == [
        "mask",
        "mask",
        "sound",
        "sound",
        "mask",
    ]
    assert set(objective.task(sounds)) == {"sound"}


@pytest.mark.parametrize(
    "turns", [None, Draw({"next": 0.0}), Draw(per="sample"), Alternate(["pair", "next"])], ids=["all", "batch", "sample", "turns"]
)
def test_pieces_hide_what_the_whole_batch_hides(turns):
    parts = {"next": PARTS["next"], "pair": partial(Coupled, modality="video"), "sound": PARTS["sound"]}
    model, objective, batch = made(parts, turns=turns)
    batch |= {"step": 0, "progress": 0.0}
    whole = cases.terms(objective, model, batch)[0]
    pieces = [cases.terms(objective, model, piece)[0] for piece in objective.pieces(batch, 3)]
    for name, term in whole.items():
        found = [piece[name] for piece in pieces if name in piece]
        assert_close(sum(t.total for t in found), term.total, rtol=1e-5, atol=1e-6)
        assert sum(t.number for t in found) == term.number
    assert {name for piece in pieces for name in piece} == set(whole)


def test_a_weighted_sum_inside_of_another_one_finds_its_own_parts():
    inner = partial(Weighted, parts={"pair": partial(Coupled, modality="video")}, weights={"pair": lambda progress: progress})
    model, objective, batch = made({"inner": inner, "next": Causal})
    pieces = objective.pieces(batch | {"progress": 0.5}, 2)
    terms = cases.terms(objective, model, pieces[0])[0]
    assert terms.keys() == {"inner/pair/causal"}
    assert terms["inner/pair/causal"].weight == 0.5


def test_losses_over_the_logarithm_of_their_classes():
    model, objective, batch = made(per_class=True, weights={"next": 0.5})
    found = cases.terms(objective, model, batch)[0]
    assert found["next/causal"].weight == 0.5 / math.log(model.encoder("text").vocab)
    assert found["sound/causal"].weight == 1.0  # it predicts vectors


def test_a_schedule_sets_the_weight_and_is_logged():
    model, objective, batch = made(weights={"next": lambda progress: 4 * progress})
    for progress in (0.0, 0.5):
        found = cases.terms(objective, model, batch | {"progress": progress})[0]
        assert found["next/causal"].weight == found["next/causal"].metrics["weight"] == 4 * progress
        assert "weight" not in found["mask/masked"].metrics


def norms(weights, shares, rank=0):
    model, objective, _ = made(weights=weights, log_gradients_every=2)
    batch = cases.batch(model.readers, cases.examples(model.readers), shares[rank])
    found = cases.terms(objective, model, batch | {"step": 4})[0]
    return {name: term.metrics["gradient"] for name, term in found.items()}


def norms_of_this_rank(weights, shares):
    from headwater import distributed

    return norms(weights, shares, distributed.rank())


def test_logged_gradient_norms_are_those_of_each_term_alone(ranks):
    weights = {"mask": 0.5, "next": 2.0}
    model, objective, batch = made(weights=weights, log_gradients_every=2)
    assert all("gradient" not in t.metrics for t in cases.terms(objective, model, batch | {"step": 3})[0].values())
    got = norms(weights, [list(range(7))])
    for name, part in objective.parts.items():
        loss = weights.get(name, 1.0) * cases.loss(cases.terms(part, model, batch)[0])
        alone = torch.cat([g.flatten() for g in gradients(loss, model).values()]).norm()
        (measured,) = [norm for n, norm in got.items() if n.startswith(name)]
        assert_close(measured, alone, rtol=1e-5, atol=1e-9)
    for every in ranks(norms_of_this_rank, weights, [[0, 2, 3, 5, 6], [1, 4]]):
        assert_close(every, got, rtol=1e-5, atol=1e-7)


def test_logging_gradients_leaves_them_alone():
    plain, logged = (made(log_gradients_every=every) for every in (0, 1))
    a, b = (gradients(cases.loss(cases.terms(o, m, batch)[0]), m, o) for m, o, batch in (plain, logged))
    assert_close(a, b, rtol=0, atol=0)


def drawn_on_every_rank(shares):
    from headwater import distributed

    model, objective, _ = made(turns=Draw())
    batch = cases.batch(model.readers, cases.examples(model.readers), shares[distributed.rank()])
    names = []
    for step in range(6):
        task = objective.task(batch | {"step": step})
        numbers = count([objective.numbers(task)])
        names.append((sorted(numbers), float(weighted_sum(objective(model, task), numbers, 2))))
    return names


def test_all_ranks_draw_the_same_part(ranks):
    a, b = ranks(drawn_on_every_rank, [[0, 2, 3, 5, 6], [1, 4]])
    assert [names for names, _ in a] == [names for names, _ in b]
    assert len({tuple(names) for names, _ in a}) > 1


def test_parts_whose_modality_is_not_there_are_left_out():
    model, objective, batch = made()
    found, task = cases.terms(objective, model, {k: batch[k] for k in ("audio", "seed", "sample")})
    assert found.keys() == objective.numbers(task).keys() == {"sound/causal"}


def test_parts_hide_the_same_modality_each_in_its_own_way():
    _, objective, batch = made()
    task = objective.task(batch)
    assert torch.equal(task["mask"]["text"].x, batch["text"].x)  # masked later, after embed
    assert not torch.equal(task["next"]["text"].x, batch["text"].x)


def test_hints_reach_the_part_that_asked_and_after_step_reaches_all():
    model, objective, batch = made()
    seen, stepped = {}, []
    for name, one in objective.parts.items():
        one.look = lambda model, batch, name=name: f"hint of {name}"
        one.task = lambda batch, hints, name=name: seen.setdefault(name, hints)
        one.after_step = lambda model, progress, name=name: stepped.append((name, progress))
    objective.task(batch, objective.look(model, batch))
    objective.after_step(model, 0.3)
    assert seen == {name: f"hint of {name}" for name in PARTS}
    assert stepped == [(name, 0.3) for name in PARTS]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": {"typo": 1.0}}, "weights name .*typo.*parts are"),
        ({"turns": Draw({"typo": 1.0})}, "turns name .*typo"),
        ({"turns": Alternate(["typo"])}, "turns name .*typo"),
        ({"parts": {"step": Causal}}, "parts called .*step"),
    ],
)
def test_mistakes_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        made(**options)


def test_shares_without_a_part_to_draw_are_refused():
    _, objective, batch = made(turns=Draw({"sound": 0.0}))
    with pytest.raises(ValueError, match=r"shares that sum to 0.*sound"):
        objective.task({k: batch[k] for k in ("audio", "seed", "sample")})
    with pytest.raises(ValueError, match="0 steps"):
        Alternate(steps=0)
