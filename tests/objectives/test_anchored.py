import re
from functools import partial

import pytest
import torch
from contracts import cases
from torch import nn
from torch.testing import assert_close
from training.continued import NEXT, language_model, parameters, run, write

from headwater import distributed
from headwater.objectives import Anchored, Causal, Contrastive, Objective, Term
from headwater.objectives.anchored import pull, squared_gradients
from headwater.objectives.guide import Guide
from headwater.tokens import Tokens
from headwater.training.fisher import Fisher

ANCHORED = {**NEXT, "anchor": Anchored}
MATTERED = {**NEXT, "anchor": partial(Anchored, fisher=True)}
PLAIN = partial(torch.optim.SGD, lr=0.1)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write(tmp_path_factory.mktemp("texts"))


@pytest.mark.parametrize("important", [False, True])
def test_the_penalty_and_its_gradient_are_those_of_the_formula(important):
    g = torch.Generator().manual_seed(0)
    values, anchors, weights = (
        [torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((3, 4), (5,))] for _ in range(3)
    )
    weights = [w.square() for w in weights]
    for value in values:
        value.requires_grad_()
    found = pull(values, anchors, weights if important else None)
    expected = 0.0
    for value, anchor, weight in zip(values, anchors, weights):
        for theta, start, f in zip(value.flatten(), anchor.flatten(), weight.flatten()):
            expected = expected + 0.5 * (f if important else 1.0) * (theta - start) ** 2
    assert_close(found, expected)
    found.backward()
    for value, anchor, weight in zip(values, anchors, weights):
        assert_close(value.grad, (weight if important else 1.0) * (value.detach() - anchor))
    assert pull(anchors, anchors) == 0


class Logistic(Objective):
    """Binary labels in the last column, features before it; the model is a linear layer."""

    needs = ("x",)

    def numbers(self, batch):
        return {"it": batch["x"].real().sum()}

    def forward(self, model, batch):
        x, y = batch["x"].x[..., :-1], batch["x"].x[..., -1]
        loss = nn.functional.binary_cross_entropy_with_logits(model(x)[..., 0], y, reduction="none")
        return {"it": Term(loss.sum(), batch["x"].real().sum())}


def test_fisher_information_of_logistic_regression_is_the_analytic_one():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=g, dtype=torch.float64)
    y = (torch.rand(30, generator=g) < 0.5).double()
    model = nn.Linear(4, 1).double()
    signal = torch.cat([x, y[:, None]], 1)[:, None]
    batches = [{"x": Tokens(signal[k : k + 12], torch.zeros(len(signal[k : k + 12]), 1, 1, dtype=torch.long))} for k in (0, 12, 24)]
    for most in (30, 17):
        sums, count = squared_gradients(model, Logistic(), batches, most)
        away = (torch.sigmoid(model(x)[:, 0]) - y)[:most].square().detach()
        assert count == most
        assert_close(sums[0][0], (away[:, None] * x[:most].square()).sum(0))
        assert_close(sums[1][0], away.sum())


def test_only_named_and_trainable_parameters_are_held():
    model = cases.model()
    model.encoders["text"].head.requires_grad_(False)
    anchored = Anchored(model, "encoders.text")
    cases.displaced(anchored)
    anchored(model, {"seed": torch.zeros(1)})["anchored"].total.backward()
    got = {n for n, p in model.named_parameters() if p.grad is not None}
    assert got == {n for n, p in model.named_parameters() if "encoders.text" in n and ".head." not in n}


@pytest.mark.parametrize(
    ("error", "make"),
    [
        ("fit no parameter", lambda m: Anchored(m, "nothing")),
        ("no regular expression", lambda m: Anchored(m, "(")),
        ("set fisher: true", lambda m: Anchored(m).remember(m, [], 1)),
        ("compares the samples", lambda m: squared_gradients(m, Contrastive(m), [], 1)),
        ("before any was estimated", lambda m: Anchored(m, fisher=True)(m, {"seed": torch.zeros(1), "step": 0})),
        ("fisher, and part", lambda m: Fisher("old").parts(Causal(m))),
        ("expected 1 or more samples", lambda m: Fisher("old", samples=0)),
    ],
)
def test_mistakes_are_explained(error, make):
    with pytest.raises(ValueError, match=re.escape(error)):
        make(cases.model())


def test_a_strong_pull_keeps_the_start(texts):
    start = dict(language_model().named_parameters())
    free, held = (run(texts, parts=ANCHORED, weights={"anchor": w}, optimizer=PLAIN).parameters for w in (0.0, 5.0))

    def away(found):
        return sum(float((found[f"backbone.{n}"] - p).square().sum()) for n, p in start.items()) ** 0.5

    assert 0 < away(held) < 0.6 * away(free)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_and_pieces_pull_like_one_process(ranks, texts, strategy):
    for parts in (ANCHORED, MATTERED if strategy == "ddp" else ANCHORED):
        callbacks = [partial(Fisher, "old", samples=6, part="next")] if parts is MATTERED else []
        weights = {"anchor": 100.0 if callbacks else 2.0}
        options = {"parts": parts, "weights": weights, "optimizer": PLAIN}
        plain = run(texts, callbacks, **options).parameters
        pieces = run(texts, callbacks, micro=2, **options).parameters
        a, b = ranks(partial(parameters, strategy=strategy, **options), texts, callbacks)
        assert all(torch.equal(a[n], b[n]) for n in a)
        assert_close(pieces, plain, rtol=1e-4, atol=1e-6)
        assert_close(a, plain, rtol=1e-4, atol=1e-6)


def split(folder):
    """Who asks for Fisher information where no rank has it."""
    try:
        run(folder, [partial(Fisher, "old")], parts=MATTERED, strategy="fsdp2")
    except ValueError as error:
        return str(error)


def test_shares_have_no_gradient_of_a_sample(ranks, texts):
    assert all("no rank holds the gradient" in answer for answer in ranks(split, texts))


def test_a_resumed_run_keeps_anchor_and_information(texts, tmp_path):
    options = {"callbacks": [partial(Fisher, "old", samples=5)], "parts": MATTERED, "weights": {"anchor": 100.0}}
    through = run(texts, **options)
    run(texts, **options, limit=2, save=tmp_path / "half.ckpt")
    resumed = run(texts, **options, resume=tmp_path / "half.ckpt")
    assert all(torch.equal(p, resumed.parameters[n]) for n, p in through.parameters.items())
    anchored = resumed.pretrainer.objective.parts["anchor"]
    assert anchored.samples == 5
    assert any(p.any() for p in anchored.importance.parameters())


def test_information_of_stages_adds_up(texts):
    model = language_model()
    anchored = Anchored(model, fisher=True)
    anchored.start(model)
    found = [torch.ones_like(p) for p in model.parameters()]
    anchored.remember(model, found, 3)
    anchored.start(model)  # of the next stage, which carried it over
    anchored.remember(model, found, 4, keep=0.5)
    assert anchored.samples == 7
    assert all((p == 1.5).all() for p in anchored.importance.parameters())


def test_ranks_share_the_samples(ranks, texts):
    alone, both = information(texts), ranks(information, texts)
    assert_close(both[0], alone, rtol=1e-4, atol=1e-8)
    assert_close(both[1], both[0], rtol=0, atol=0)
    assert distributed.world() == 1


def information(folder):
    done = run(folder, [partial(Fisher, "old", samples=8)], parts=MATTERED, weights={"anchor": 1.0}, steps=1)
    return [p.detach() for p in done.pretrainer.objective.parts["anchor"].importance.parameters()]


def test_a_compatible_average_follows_the_student_and_its_start():
    model, m = language_model(), 0.9
    guide = Guide(model, "compatible", ["text"], momentum=m)
    guide.start(model)
    start = [p.clone() for p in guide.module.parameters()]
    expected = start
    for step in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * (step + 1)
        guide.after_step(model, 0.0)
        expected = [m * e + (1 - m) / 2 * (p + s) for e, p, s in zip(expected, model.parameters(), start)]
        assert_close([p.detach() for p in guide.module.parameters()], [e.detach() for e in expected])
