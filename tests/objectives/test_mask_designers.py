"""Learned masks: a race by scores hides as many tokens as before, and its probabilities carry the value's gradient."""

import itertools
from functools import partial

import pytest
import test_vpretraining as steered
import torch
from contracts import cases
from test_view_designers import cases_float
from test_vpretraining import SHARES, made, value
from torch.testing import assert_close

from headwater import modalities
from headwater.objectives import Causal, Masked, Supervised
from headwater.objectives.designers import MaskScores, Scored
from headwater.objectives.designers.masks import Seen, inclusion
from headwater.objectives.estimators import Difference, Double, Forward
from headwater.objectives.masks.policies import Uniform, lengths
from headwater.tokens import Tokens


def hiding(modality, mode="substitute", ratio=0.5, **options):
    return partial(Masked, modality=modality, mode=mode, ratio=ratio, policy=Scored(), width=16, **options)


def labelled(modality):
    return partial(Supervised, label=modalities.Category(3), modality=modality)


DESIGNED = {
    "text": (hiding("text", ratio=0.3), partial(MaskScores, hidden=8), labelled("text")),
    "text asked once": (hiding("text"), partial(MaskScores, hidden=8, ask="hidden"), labelled("text")),
    "video": (hiding("video", "drop", 0.75), partial(MaskScores, hidden=8, reads="learner"), labelled("video")),
    "audio asked once": (hiding("audio", "drop"), partial(MaskScores, hidden=8, ask="hidden"), labelled("audio")),
    "several": (
        partial(
            Masked,
            modality=["action", "text"],
            ratio={"action": 0.5, "text": 0.4},
            width=16,
            policy={"action": Uniform(), "text": Scored()},
        ),
        partial(MaskScores, hidden=8, modality="text", reads="learner"),
        labelled("text"),
    ),
}


@pytest.fixture(params=DESIGNED)
def name(request, monkeypatch):
    monkeypatch.setitem(steered.DESIGNED, request.param, DESIGNED[request.param])
    return request.param


def test_estimators_agree(name):
    pretrainer, batch = made(*DESIGNED[name])
    exact, slopes, _ = value(pretrainer, batch, Double())
    assert exact != 0
    assert all(g.any() for g in slopes)
    for estimator in (Forward(), Difference()):
        found, gradients, _ = value(pretrainer, batch, estimator)
        assert_close(found, exact, rtol=1e-2, atol=1e-9)
        assert steered.cosine(gradients, slopes) > 0.999


def test_the_learner_takes_the_plain_step_on_the_chosen_mask(name):
    steered.test_the_learner_takes_the_plain_step_on_the_detached_task(name)


@pytest.mark.parametrize("chosen", ["text", "video", "several"])
def test_the_value_is_the_drop_of_the_feedbacks_loss(chosen, monkeypatch):
    """Where every token is asked for, the value is a smooth function of the scores."""
    monkeypatch.setitem(steered.DESIGNED, chosen, DESIGNED[chosen])
    steered.test_the_value_is_the_drop_of_the_feedbacks_loss(chosen)


def ahead(shares, name, split):
    steered.DESIGNED[name] = DESIGNED[name]
    return steered.ahead(shares, name, split)


@pytest.mark.parametrize("split", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("chosen", ["text", "video", "audio asked once"])
def test_two_ranks_look_ahead_as_one_process_does(ranks, chosen, split):
    alone = ahead([sorted(SHARES[0] + SHARES[1])], chosen, split)
    for found in ranks(ahead, SHARES, chosen, split):
        assert_close(found, alone, rtol=1e-5, atol=1e-9)


def test_bfloat16(name):
    pretrainer, batch = made(*DESIGNED[name])
    pretrainer.float()
    batch = {k: {n: cases_float(v) for n, v in x.items()} if k == "feedback" else cases_float(x) for k, x in batch.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probe, _ = steered.step(pretrainer, batch)
    assert probe.told["value"].isfinite()
    phi = [p.grad for n, p in pretrainer.named_parameters() if n.startswith("objective.designer")]
    assert phi
    assert all(g.isfinite().all() and g.any() for g in phi)


# the race


def row(n, samples=None):
    position = torch.zeros(1, n, 1, dtype=torch.int32)
    return Tokens(torch.zeros(1, n, 1), position, None, None if samples is None else torch.tensor([samples]))


def test_probabilities_are_those_of_the_race():
    """Of many tokens; sums and derivatives hold for any number."""
    torch.manual_seed(0)
    score = 2 * torch.randn(1, 200, dtype=torch.float64)
    for number in (1, 20, 150, 199):
        likely = inclusion(row(200), score, torch.tensor([number]))
        assert_close(likely.sum(), torch.tensor(float(number)).double(), rtol=1e-9, atol=0)
        noise = -(-torch.rand(4000, 200, dtype=torch.float64).log()).log()
        places = (score + noise).topk(number).indices
        often = torch.bincount(places.flatten(), minlength=200) / 4000
        assert float((often - likely[0]).abs().max()) < 0.05
        assert float((often - likely[0]).abs().mean()) < 0.01
    uniform = inclusion(row(5), torch.zeros(1, 5, dtype=torch.float64), torch.tensor([2]))
    assert_close(uniform, torch.full((1, 5), 0.4, dtype=torch.float64))


def test_a_few_tokens_against_all_orders():
    """Exact chances of the first three of six, summed over all orders in which they can come, and where they lead."""
    score = torch.tensor([[1.5, 0.2, -0.4, 0.9, -1.0, 0.1]], dtype=torch.float64, requires_grad=True)
    rate = score[0].exp()
    chances = [0.0] * 6
    for first in itertools.permutations(range(6), 3):
        chance, left = 1.0, rate.sum()
        for k in first:
            chance, left = chance * rate[k] / left, left - rate[k]
        for k in first:
            chances[k] = chances[k] + chance
    wanted, found = torch.stack(chances), inclusion(row(6), score, torch.tensor([3]))[0]
    assert float((found - wanted).detach().abs().max()) < 0.04
    worth = torch.tensor([0.3, -1.0, 0.5, 2.0, 0.1, -0.4], dtype=torch.float64)
    slopes = [torch.autograd.grad((worth * p).sum(), score) for p in (wanted, found)]
    assert steered.cosine(*slopes) > 0.99


def test_probabilities_have_the_derivative_of_the_race():
    score = torch.tensor([[1.5, 0.2, -0.4, 0.9, 2.0, 0.1, -2.0]], dtype=torch.float64, requires_grad=True)
    t, number = row(7, [0, 0, 0, 1, 1, 1, 1]), torch.tensor([2, 1])
    assert torch.autograd.gradcheck(lambda s: inclusion(t, s, number), (score,))
    likely = inclusion(t, score, number)
    assert_close(likely[:, :3], inclusion(row(3), score[:, :3], number[:1]))
    (slope,) = torch.autograd.grad(likely[0, 3:].sum(), score)
    assert_close(slope, torch.zeros_like(slope))  # what one gains others lose
    for none in (0, 7):
        likely = inclusion(row(7), score, torch.tensor([none]))
        assert_close(likely, torch.full_like(likely, none / 7), rtol=0, atol=1e-3)
        assert torch.autograd.grad(likely.square().sum(), score)[0].isfinite().all()


def shown(name, packed=False, salt=0, numbers=None, ahead=False):
    """The designer, its inner objective, the model and what it makes of a batch."""
    pretrainer, _ = made(*DESIGNED[name])
    model, objective = pretrainer.backbone, pretrainer.objective
    batch = cases.batch(model.readers, cases.examples(model.readers), numbers, packed, salt)
    with torch.set_grad_enabled(ahead):
        hints = objective.designer.look(objective.inner, model, batch, ahead)
        return objective, model, batch, objective.designer.design(objective.inner, batch, hints, ahead)


def hidden_by_sample(t, hidden):
    return {n: hidden[(t.sample() == n) & t.real()].tolist() for n in t.samples().tolist()}


def test_masks_are_those_of_the_seed(name):
    """Packing, padding and other samples do not matter; the count is that of any policy; another seed has another mask."""
    objective, _, batch, task = shown(name)
    which = objective.designer.modality
    found = hidden_by_sample(batch[which], task["hidden"][which])
    _, _, packed, again = shown(name, packed=True)
    assert hidden_by_sample(packed[which], again["hidden"][which]) == found
    _, _, some, others = shown(name, numbers=[6, 2])
    rows = hidden_by_sample(some[which], others["hidden"][which])
    assert rows == {new: found[old] for new, old in enumerate([6, 2]) if old in found}
    ratio = objective.inner.ratio[which]
    plain = Uniform()(batch[which], batch["seed"], ratio)
    assert {n: sum(x) for n, x in found.items()} == {n: sum(x) for n, x in hidden_by_sample(batch[which], plain).items()}
    _, _, salted, other = shown(name, salt=1)
    assert hidden_by_sample(salted[which], other["hidden"][which]) != found
    assert "worth" not in task
    _, _, _, looked = shown(name, ahead=True)
    assert torch.equal(looked["hidden"][which], task["hidden"][which])


def test_high_scores_are_hidden_first():
    objective, _, batch, _ = shown("video")
    designer, t = objective.designer, batch["video"]
    score = torch.where(torch.arange(t.x.shape[1]) % 4 == 3, -30.0, 30.0).expand(t.x.shape[:2])  # a quarter is kept
    designer.scores = lambda *_: score
    task = designer.design(objective.inner, batch, Seen({"looked": {}, "scores": {}}, t.x), False)
    assert torch.equal(task["hidden"]["video"], (score > 0) & t.real())


@pytest.mark.parametrize("chosen", ["text", "video"])
def test_every_error_counts_by_its_probability(chosen):
    """Against errors gathered mask by mask, and probabilities by themselves; every token is asked for."""
    objective, model, batch, task = shown(chosen, ahead=True)
    inner, t = objective.inner, batch[chosen]
    errors, times = torch.zeros(t.x.shape[:2], dtype=torch.float64), torch.zeros(t.x.shape[:2], dtype=torch.float64)
    number = lengths(t._replace(valid=task["hidden"][chosen]), len(batch["seed"]))
    for one in (task, *task["turns"]):
        assert torch.equal(lengths(t._replace(valid=one["hidden"][chosen]), len(number)), number)
        plain = {key: v for key, v in one.items() if key != "worth"}
        places = one["places"][chosen]
        wrong = inner._errors(model, plain)[chosen][0]
        for b in range(len(errors)):
            for k, n in enumerate(places.column[b].tolist()):
                if places.real is None or places.real[b, k]:
                    errors[b, n] += wrong[b, k].detach()
                    times[b, n] += 1
    assert float((times[t.real()] > 0).double().mean()) > 0.95
    score = objective.designer.scores(t, objective.designer.look(inner, model, batch, True).read)
    likely = inclusion(t, score, number)
    term = objective.designer.ask(inner, model, task)["masked"]
    assert_close(term.total, (likely * errors / times.clamp(min=1)).sum())
    assert term.number == number.sum()


def test_asked_once_the_gradient_is_that_of_log_p():
    objective, model, batch, task = shown("text asked once", ahead=True)
    designer, inner, t = objective.designer, objective.inner, batch["text"]
    plain = {key: v for key, v in task.items() if key != "worth"}
    total = designer.ask(inner, model, task)["masked"].total
    assert_close(total, inner(model, plain)["masked"].total)
    likely = inclusion(t, designer.scores(t, t.x), lengths(t._replace(valid=task["hidden"]["text"]), len(batch["seed"])))
    places, wrong = task["places"]["text"], inner._errors(model, plain)["text"][0].detach()
    loss = 0.0
    for b, k in places.real.nonzero().tolist():
        loss = loss + wrong[b, k] * likely[b, places.column[b, k]].log()
    phi = list(designer.parameters())
    for a, b in zip(torch.autograd.grad(total, phi), torch.autograd.grad(loss, phi), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize(
    ("inner", "designer", "said"),
    [
        (partial(Causal, modality="text"), MaskScores, "expected Masked"),
        (partial(Masked, modality="image"), MaskScores, "whose policy is Scored"),
        (hiding("image"), partial(MaskScores, modality="text"), "expected one of image"),
        (hiding("image", "drop", 1.0, context=["text"]), MaskScores, "nothing to choose"),
        (hiding("image"), partial(MaskScores, bound=0.0), "bound above 0"),
    ],
)
def test_what_cannot_work_is_refused(inner, designer, said):
    model = cases.model()
    with pytest.raises(ValueError, match=said):
        designer(model, inner(model))
    objective = hiding("image")(model).double()
    with pytest.raises(ValueError, match="found no scores"):
        objective.task(cases.batch(model.readers, cases.examples(model.readers)))
