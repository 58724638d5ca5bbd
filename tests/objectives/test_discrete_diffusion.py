import math

import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater import random
from headwater.modalities import Action
from headwater.model import Model
from headwater.objectives.discrete_diffusion import DiscreteDiffusion, filled, likelihood_weight, rates
from headwater.samplers import draw_ids
from headwater.tokens import Tokens
from headwater.trunk import Trunk

both = pytest.mark.parametrize("schedule", ["uniform", "cosine"])


def given(model, n=7, **options):
    return cases.batch(model.readers, cases.examples(model.readers, n), **options)


def sequences(x):
    """Ids (S, N), one sample per row, with its seed."""
    return {"choice": Tokens(x, torch.zeros(*x.shape, 1)), "seed": torch.arange(len(x))}


@both
def test_shares_are_drawn_as_they_should_be(schedule):
    batch = DiscreteDiffusion(cases.model(), "choice", schedule=schedule).task(sequences(torch.zeros(20000, 10, dtype=torch.long)))
    share = batch["asked"].double().mean(1)
    mean, square = (0.5, 1 / 3) if schedule == "uniform" else (2 / math.pi, 0.5)  # E r and E r^2
    assert abs(float(share.mean()) - mean) < 0.01
    assert abs(float(share.square().mean()) - (square + (mean - square) / 10)) < 0.01  # r^2 + r (1 - r) / N
    assert torch.equal(batch["choice"].x == 5, batch["asked"])  # the start id, and nowhere else


@both
def test_the_loss_of_exact_answers_is_the_likelihood(schedule):
    """Sequences of six equal ids of four kinds cost log 4, however many are hidden at once: all of it where nothing is seen."""
    x = (torch.arange(60000) % 4)[:, None].expand(-1, 6)
    batch = DiscreteDiffusion(cases.model(), "choice", schedule=schedule).task(sequences(x))
    nothing = batch["asked"].all(1, keepdim=True)
    cost = (batch["weight"] * batch["asked"] * nothing * math.log(4)).sum(1)
    assert abs(float(cost.mean()) - math.log(4)) < 5 * float(cost.std()) / 60000**0.5
    assert float(cost.std()) < 5


@pytest.mark.parametrize("weight", ["likelihood", "equal"])
@both
def test_the_loss_is_the_papers_formula_in_value_and_gradient(schedule, weight):
    """LLaDA's equation 3 and MaskGIT's equation 2, id by id."""
    model = cases.model()
    objective = DiscreteDiffusion(model, "choice", context=["text"], schedule=schedule, weight=weight)
    batch = given(model)
    found = objective.task(batch)
    term = objective(model, found)["diffusion"]
    raw, total, number = batch["choice"], 0.0, 0
    seeds, hidden = random.token_seed(batch["seed"], raw), torch.zeros_like(raw.real())
    shares = random.uniform(batch["seed"], (), "diffusion/rate").double()
    shares = shares if schedule == "uniform" else torch.cos(math.pi / 2 * shares)
    for b, n in raw.real().nonzero().tolist():
        hidden[b, n] = float(random.uniform(seeds[b, n], (), "diffusion/hidden")) < shares[b]
    shown = raw._replace(x=torch.where(hidden, model.encoder("choice").start, raw.x))
    y = model(model.embed({"choice": shown, "text": batch["text"]}))["choice"].x
    for b, n in raw.real().nonzero().tolist():
        number += 1 if weight == "likelihood" else int(hidden[b, n])
        if hidden[b, n]:
            r = float(shares[b])
            factor = 1 / r if schedule == "uniform" else math.pi / 2 * math.sqrt(1 - r * r) / r
            log_p = model.encoder("choice").unembed(y[b, n]).log_softmax(-1)[raw.x[b, n]]
            total = total - (factor if weight == "likelihood" else 1) * log_p
    assert_close(term.total.double(), total, rtol=1e-5, atol=1e-5)
    assert int(term.number) == number
    stem = model.encoder("choice").stem.weight
    got, expected = (torch.autograd.grad(value, stem, retain_graph=True)[0] for value in (term.total, total))
    assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_weights_are_one_over_share_and_density():
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    assert_close(likelihood_weight(rates(u, "uniform"), "uniform"), 1 / u)
    slope = math.pi / 2 * torch.sin(math.pi / 2 * u)  # -dr / du, one over the density
    assert_close(likelihood_weight(rates(u, "cosine"), "cosine"), slope / torch.cos(math.pi / 2 * u))


def test_hidden_ids_cannot_be_seen():
    model = cases.model()
    objective = DiscreteDiffusion(model, "choice")
    batch = given(model)
    other = batch["choice"]._replace(x=(batch["choice"].x + 1) % 5)
    a, b = (objective.task({**batch, "choice": t}) for t in (batch["choice"], other))
    mixed = torch.where(a["asked"], b["choice"].x, a["choice"].x)
    assert torch.equal(mixed, a["choice"].x)
    assert torch.equal(a["asked"], b["asked"])
    assert not torch.equal(a["answer"], b["answer"])


def test_replaced_ids_are_any_and_all_are_asked_for():
    objective = DiscreteDiffusion(cases.model(), "choice", corruption="uniform")
    x = torch.full((20000, 5), 2)
    batch = objective.task(sequences(x))
    assert batch["asked"].all()
    assert (batch["weight"] == 1).all()
    assert abs(float((batch["choice"].x != x).double().mean()) - 0.5 * 4 / 5) < 0.01
    assert (batch["choice"].x.flatten().bincount(minlength=5)[[0, 1, 3, 4]] / 1e5 - 0.1).abs().max() < 0.01
    assert int(objective.numbers(batch)["diffusion"]) == 100000


@pytest.mark.parametrize("corruption", ["absorb", "uniform"])
def test_answers_are_fed_back_and_all_ids_are_asked_for_again(corruption):
    model = cases.model()
    objective = DiscreteDiffusion(model, "choice", corruption=corruption, weight="equal", unroll=0.7)
    batch = objective.task(given(model))
    shown = []
    handle = model.encoder("choice").stem.register_forward_hook(lambda _, args, out: shown.append(args[0]))
    terms = objective(model, batch)
    handle.remove()
    first, again = shown
    real = batch["choice"].real()
    assert torch.equal(first[~batch["asked"]], again[~batch["asked"]])
    assert (again[real] < 5).all()
    y = model(model.embed({"choice": batch["choice"]._replace(x=again)}))["choice"].x
    log_p = model.encoder("choice").unembed(y).log_softmax(-1).gather(-1, batch["answer"][..., None])[..., 0]
    assert_close(terms["unrolled"].total, -(log_p * real).sum())
    assert terms["unrolled"].weight == 0.7
    assert terms["unrolled"].number == real.sum()


def test_short_texts_are_filled_up_with_their_end():
    model = cases.model()
    objective = DiscreteDiffusion(model, fill=True)
    rows, packed = given(model), given(model, packed=True)
    reader, length = model.readers["text"], model.encoder("text").blank().position.shape[1]
    for batch in (rows, packed):
        whole = filled(batch["text"], reader.end, objective.places, 7)
        for sample in batch["text"].samples():
            own, all_ = (t.x[(t.sample() == sample) & t.real()] for t in (batch["text"], whole))
            assert torch.equal(all_[: len(own)], own)
            assert (all_[len(own) :] == reader.end).all()
            assert len(all_) == length
            here = (whole.sample() == sample) & whole.real()
            assert torch.equal(whole.position[here], model.encoder("text").blank().position[0].to(whole.position))
        assert torch.equal(whole.samples(), batch["text"].samples())
    assert int(objective.numbers(objective.task(rows))["diffusion"]) == length * len(rows["text"].samples())


def test_a_rule_is_learned_and_sequences_are_made_in_less_steps_than_tokens():
    """Twelve ids that count up from any of five: five questions are enough, and what is given stays."""
    torch.manual_seed(0)
    model = Model({"choice": Action(Trunk(64, 2, 2, position="rotary"), choices=5)})
    objective = DiscreteDiffusion(model, "choice")
    step = torch.optim.AdamW(model.parameters(), 3e-3)
    for number in range(300):
        step.param_groups[0]["lr"] = 3e-3 * (1 - number / 300)
        start = torch.arange(64) + number
        x = (start[:, None] + torch.arange(12)) % 5
        batch = {"choice": canvas(x), "seed": torch.arange(64) + 64 * number}
        term = objective(model, objective.task(batch))["diffusion"]
        step.zero_grad()
        (term.total / term.number).backward()
        step.step()
    model.eval()
    x, free = torch.zeros(200, 12, dtype=torch.long), torch.ones(200, 12, dtype=torch.bool)
    x[:100, 4], free[:100, 4] = 3, False
    made = draw_ids(model, "choice", canvas(x), free, torch.arange(200), steps=5).x
    right = (made == (made[:, :1] + torch.arange(12)) % 5).all(1)
    assert (made[:100, 4] == 3).all()
    assert right.float().mean() > 0.95
    assert (made[100:, 0].bincount(minlength=5) > 5).all()  # each beginning comes up


def canvas(x):
    return Tokens(x, torch.arange(12)[None, :, None].expand(len(x), -1, -1))


def test_vectors_and_encoders_that_look_back_are_refused():
    model = cases.model()
    with pytest.raises(ValueError, match="image is made of vectors"):
        DiscreteDiffusion(model, "image")
    with pytest.raises(ValueError, match="no id that ends it"):
        DiscreteDiffusion(model, "choice", fill=True)
    with pytest.raises(ValueError, match="unroll -1"):
        DiscreteDiffusion(model, unroll=-1)
    model.encoder("text").causal = True
    with pytest.raises(ValueError, match="never looks ahead"):
        DiscreteDiffusion(model)
