import copy
import math
from functools import partial

import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater.model import Reader
from headwater.objectives import Causal
from headwater.objectives.likelihood import (
    Anchor,
    Answers,
    Confidence,
    Focal,
    HashDrop,
    Likelihood,
    Power,
    Rewarded,
    Shape,
    Soft,
    Tempered,
    Unlikelihood,
    spread,
)
from headwater.tokens import Tokens

SHAPES = {
    "likelihood": (Shape(), lambda p: -math.log(p), lambda p: -1 / p),
    "power": (Power(), lambda p: -p, lambda p: -1.0),
    "power 10": (Power(10), lambda p: -(p**10), lambda p: -10 * p**9),
    "tempered": (Tempered(0.3), lambda p: (1 - p**0.3) / 0.3, lambda p: -(p**-0.7)),
    "focal": (Focal(2.0), lambda p: -((1 - p) ** 2) * math.log(p), lambda p: 2 * (1 - p) * math.log(p) - (1 - p) ** 2 / p),
    "unlikelihood": (Unlikelihood(), lambda p: -math.log(1 - p), lambda p: 1 / (1 - p)),
}


class Marks(Reader):
    """Rewards of segments, for tests."""

    features = 1

    def example(self, n, seed):
        return [marks([0, 2], [1.0, -1.0 + k]) for k in range(n)]


def marks(starts, rewards):
    return Tokens(torch.tensor(rewards, dtype=torch.float32)[:, None], torch.tensor(starts)[:, None])


def softmax(row):
    top = max(row)
    e = [math.exp(z - top) for z in row]
    return [x / sum(e) for x in e]


def example(rows=2, length=5, vocab=6):
    torch.manual_seed(0)
    logits = torch.randn(rows, length, vocab, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(vocab, (rows, length))
    return logits, Tokens(ids, torch.arange(length).expand(rows, length)[..., None])


def scored(likelihood, logits, tokens, batch=None):
    """The costs (B, N) where the vectors are the logits."""
    return likelihood.score(lambda x: x, logits, tokens, tokens.real(), batch or {})


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_equals_its_closed_form_with_its_gradient(name):
    shape, f, slope = SHAPES[name]
    logits, tokens = example()
    cost = scored(Likelihood(shape), logits, tokens)
    (grad,) = torch.autograd.grad(cost.sum(), logits)
    for b in range(2):
        for n in range(5):
            p = softmax(logits[b, n].tolist())
            y = int(tokens.x[b, n])
            assert math.isclose(cost[b, n].item(), f(p[y]), rel_tol=1e-9)
            for v in range(6):  # df/dz_v = f'(p_y) * p_y * ([v = y] - p_v)
                assert math.isclose(grad[b, n, v].item(), slope(p[y]) * p[y] * ((v == y) - p[v]), rel_tol=1e-7, abs_tol=1e-12)


def test_shapes_meet_where_they_should():
    log_p = torch.linspace(-5, -0.01, 20, dtype=torch.float64)
    assert_close(Tempered(1e-7)(log_p), -log_p, rtol=1e-5, atol=1e-8)
    assert_close(Tempered(1.0)(log_p), 1 + Power(1.0)(log_p))


def test_certain_answers_are_finite_and_still_unlearned():
    logits = torch.tensor([[[60.0, 0.0, 0.0]]], requires_grad=True)
    tokens = Tokens(torch.tensor([[0]]), torch.zeros(1, 1, 1, dtype=torch.int64))
    for shape in (Unlikelihood(), Focal(0.5)):
        assert scored(Likelihood(shape), logits, tokens).isfinite().all()
    log_p = torch.zeros(1, requires_grad=True)  # p = 1, as float32 rounds it
    (slope,) = torch.autograd.grad(Unlikelihood()(log_p).sum(), log_p)
    assert slope.isfinite()
    assert slope > 1e3


def test_confidence_is_the_likelihood_times_a_constant_probability():
    logits, tokens = example()
    cost = scored(Likelihood(weights=[Confidence(0.5)]), logits, tokens)
    log_p = logits.log_softmax(-1).gather(-1, tokens.x[..., None])[..., 0]
    assert_close(cost, -(log_p.detach().exp() ** 0.5) * log_p)
    a, b = (torch.autograd.grad(c.sum(), logits, retain_graph=True)[0] for c in (cost, -(log_p.detach().exp() ** 0.5) * log_p))
    assert_close(a, b)


# hash-drop


def test_the_same_passage_drops_the_same_tokens_wherever_it_stands():
    torch.manual_seed(0)
    drop, passage = HashDrop(k=3, h=4), torch.randint(200, (300,))
    alone = drop.keeps(Tokens(passage[None], torch.arange(300)[None, :, None]))[0]
    before = torch.randint(200, (17,))
    later = drop.keeps(Tokens(torch.cat([before, passage])[None], torch.arange(317)[None, :, None]))[0]
    assert torch.equal(later[17 + 4 :], alone[4:])
    packed = Tokens(
        torch.cat([before, passage])[None], torch.arange(317)[None, :, None], document=(torch.arange(317) >= 17).long()[None]
    )
    assert torch.equal(drop.keeps(packed)[0, 17:], alone)  # a document does not look into the one before it
    assert alone[:4].all()
    other = passage.clone()
    other[100] = 201
    changed = drop.keeps(Tokens(other[None], torch.arange(300)[None, :, None]))[0] != alone
    assert not changed[:101].any()
    assert not changed[105:].any()


@pytest.mark.parametrize("k", [3, 4, 16])
def test_about_one_in_k_tokens_is_dropped(k):
    torch.manual_seed(0)
    ids = torch.randint(256, (50, 1000))
    keeps = HashDrop(k=k).keeps(Tokens(ids, torch.arange(1000).expand(50, 1000)[..., None]))
    assert abs((~keeps[:, 13:]).double().mean() - 1 / k) < 0.02 / k
    assert (~HashDrop(k=k, salt=1).keeps(Tokens(ids, torch.zeros(50, 1000, 1))) & keeps).any()


def test_dropped_tokens_are_neither_scored_nor_counted():
    model = cases.model()
    objective = Causal(model, likelihood=Likelihood(drop=HashDrop(k=2, h=1))).double()
    batch = cases.batch(model.readers, cases.examples(model.readers))
    terms, task = cases.terms(objective, model, batch)
    logits = objective.predict(model, task)
    total, number, dropped = 0.0, 0, 0
    for b in range(7):
        for n in range(task["answer"].shape[1]):
            if batch["text"].real()[b, n]:
                if objective.likelihood.drop.keeps(batch["text"])[b, n]:
                    total, number = total - math.log(softmax(logits[b, n].tolist())[int(task["answer"][b, n])]), number + 1
                else:
                    dropped += 1
    assert dropped > 10
    assert terms["causal"].number == number
    assert_close(float(terms["causal"].total), total)


# rewards


def test_rewards_hold_from_their_segments_first_token_on():
    t = Tokens(torch.zeros(2, 6), torch.arange(6).expand(2, 6)[..., None], document=torch.tensor([[4, 4, 4, 7, 7, 7], [5] * 6]))
    t = t._replace(position=torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])[..., None])
    label = Tokens(
        torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [9.0]]]),
        torch.tensor([[0, 1, 0], [2, 4, 0]])[..., None],
        torch.tensor([[True, True, True], [True, True, False]]),
        torch.tensor([[4, 4, 7], [5, 5, 5]]),
    )
    nan = math.nan
    expected = torch.tensor([[1.0, 2.0, 2.0, 3.0, 3.0, 3.0], [nan, nan, 4.0, 4.0, 5.0, 5.0]])
    assert_close(spread(label, t), expected, equal_nan=True)
    assert spread(label.map(lambda field: field[:, :0]), t).isnan().all()


RULES = {
    "exp": lambda p, r: math.exp(min((r - 0.5) / 0.7, math.log(3.0))) * -math.log(p),
    "linear": lambda p, r: max(-3.0, min(3.0, r - 0.5)) * -math.log(p),
    "filter": lambda p, r: (r >= 0.2) * -math.log(p),
    "unlikelihood": lambda p, r: -math.log(p) if r >= 0.2 else -0.3 * math.log(1 - p),
}


@pytest.mark.parametrize("rule", RULES)
def test_rewards_weigh_tokens_as_their_rule_says(rule):
    logits, tokens = example()
    weighing = Rewarded(Marks(), rule, beta=0.7, baseline=0.5, most=3.0, threshold=0.2, alpha=0.3)
    label = Tokens(torch.tensor([[[0.1], [4.0]], [[-5.0], [0.0]]]), torch.tensor([[0, 2], [1, 4]])[..., None])
    label = label._replace(valid=torch.tensor([[True, True], [True, False]]))
    rewards = [[0.1, 0.1, 4.0, 4.0, 4.0], [None, -5.0, -5.0, -5.0, -5.0]]
    cost = scored(Likelihood(weights=[weighing]), logits, tokens, {"reward": label})
    expected = torch.zeros(2, 5, dtype=torch.float64)
    for b in range(2):
        for n in range(5):
            p, r = softmax(logits[b, n].tolist())[int(tokens.x[b, n])], rewards[b][n]
            expected[b, n] = -math.log(p) if r is None else RULES[rule](p, r)
    assert_close(cost, expected, rtol=1e-6, atol=1e-9)
    assert_close(Answers(cost, tokens, {}).log_p, cost)


def test_bad_segments_are_unlearned_where_plain_likelihood_learns_them():
    """Token 1 is bad. Trained on rows of which 30 % are marked-bad segments, the reward-aware rules give it far less."""
    bad = {}
    for rule in (None, "exp", "linear", "filter", "unlikelihood"):
        weights = [Rewarded(Marks(), rule, beta=0.25, threshold=0.0)] if rule else []
        logits = torch.zeros(1, 1, 4, requires_grad=True)
        step = torch.optim.SGD([logits], lr=0.1)
        ids = torch.tensor([[1, 1, 1, 0, 0, 2, 2, 3, 3, 3]])
        label = Tokens(torch.tensor([[[-1.0], [1.0]]]), torch.tensor([[0, 3]])[..., None])
        tokens = Tokens(ids, torch.arange(10)[None, :, None])
        for _ in range(300):
            step.zero_grad()
            scored(Likelihood(weights=weights), logits.expand(1, 10, 4), tokens, {"reward": label}).mean().backward()
            step.step()
        bad[rule] = float(logits.softmax(-1)[0, 0, 1])
    assert bad.pop(None) > 0.25
    assert all(p < 0.06 for p in bad.values()), bad


# references


def test_an_anchor_is_the_divergence_from_the_reference_scaled_by_its_sureness():
    logits, _ = example()
    reference = 3 * torch.randn(2, 5, 6, dtype=torch.float64)
    for power in (0.0, 2.0):
        found = Anchor(power=power)(logits, reference)
        for b in range(2):
            for n in range(5):
                p, q = softmax(logits[b, n].tolist()), softmax(reference[b, n].tolist())
                sure = 1 + sum(x * math.log(x) for x in q) / math.log(6)
                expected = sure**power * sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
                assert math.isclose(found[b, n].item(), expected, rel_tol=1e-9)
    even, certain = torch.zeros(1, 1, 6), torch.tensor([[[80.0, 0, 0, 0, 0, 0]]])
    near = certain + torch.tensor([0.0, 1, 0, 0, 0, 0])
    assert Anchor(power=1.0)(logits[:1, :1].float(), even).abs().max() < 1e-6
    assert_close(Anchor(power=1.0)(near, certain), Anchor()(near, certain))


def test_soft_answers_count_only_where_the_reference_is_unsure():
    logits, tokens = example()
    reference = torch.randn(2, 5, 6, dtype=torch.float64) * torch.tensor([[0.1], [0.1], [9.0], [9.0], [9.0]])
    cost = Soft(0.3, threshold=1.0)(scored(Likelihood(), logits, tokens), logits, reference)
    sides = set()
    for b in range(2):
        for n in range(5):
            p, q = softmax(logits[b, n].tolist()), softmax(reference[b, n].tolist())
            plain, unsure = -math.log(p[int(tokens.x[b, n])]), -sum(x * math.log(x) for x in q) >= 1.0
            sides.add(unsure)
            mixed = 0.7 * plain + 0.3 * sum(x * math.log(x / y) for x, y in zip(q, p, strict=True))
            assert math.isclose(cost[b, n].item(), mixed if unsure else plain, rel_tol=1e-9)
    assert sides == {True, False}


def test_the_anchor_holds_the_model_near_its_start():
    away = {}
    for weight in (0.0, 5.0):
        model = cases.model()
        objective = Causal(model, likelihood=Likelihood(weights=[Confidence()], anchor=Anchor(weight))).double()
        objective.start(model)
        given = cases.batch(model.readers, cases.examples(model.readers))
        before = copy.deepcopy(objective.reference.state_dict())
        step = torch.optim.Adam(model.parameters(), lr=1e-3)
        for number in range(15):
            terms = cases.terms(objective, model, given)[0]
            if number == 0:
                assert abs(terms["anchor"].total) < 1e-8
            step.zero_grad()
            cases.loss(terms).backward()
            step.step()
        away[weight] = float(terms["anchor"].total / terms["anchor"].number)
        assert all(torch.equal(before[n], p) for n, p in objective.reference.state_dict().items())
    assert away[5.0] < 0.2 * away[0.0]


def test_another_model_can_be_the_reference_and_start_leaves_it_alone():
    model, other = cases.model(), cases.model(seed=1)
    objective = Causal(model, likelihood=Likelihood(soft=Soft(1.0, 0.0), reference=other)).double()
    objective.start(model)
    assert_close(dict(objective.reference.module.named_parameters()), dict(other.named_parameters()))
    given = cases.batch(model.readers, cases.examples(model.readers))
    (term,) = cases.terms(objective, model, given)[0].values()
    term.total.backward()
    assert all(p.grad is None for p in objective.reference.parameters())


def test_weights_of_the_anchor_follow_the_run():
    likelihood = Likelihood(anchor=Anchor(lambda progress: 1 - progress))
    assert likelihood.anchored(0.25) == 0.75
    assert Likelihood().anchored(0.5) == 0.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(Power, 0), "k=0"),
        (partial(HashDrop, 1), "k=1"),
        (partial(HashDrop, 4, 0), "h=0"),
        (partial(Soft, 2), "share 2"),
        (partial(Rewarded, Marks(), beta=0), "beta=0"),
        (lambda: Likelihood(reference=cases.model()), "nobody asks"),
        (lambda: Rewarded(cases.model().readers["action"]), "3 numbers per token"),
        (lambda: Causal(cases.model(), "audio", likelihood=Likelihood()), "vectors; expected ids"),
    ],
)
def test_mistakes_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
