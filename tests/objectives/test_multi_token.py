from functools import partial

import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater.objectives import Causal, MultiToken, Prefixed
from headwater.objectives.multi_token import further
from headwater.tokens import Tokens


def test_further_stays_in_the_document():
    t = Tokens(torch.zeros(1, 5), torch.zeros(1, 5, 1), document=torch.tensor([[3, 3, 3, 4, 4]]))
    column, there = further(t, 1)
    assert column[there].tolist() == [1, 2, 4]
    assert there.tolist() == [[True, True, False, True, False]]
    assert not further(t, 5)[1].any()
    assert further(t, torch.tensor([[2, 1, 0, 0, 7]]))[1].tolist() == [[True, True, True, True, False]]


def alone(model, sample):
    """A text by itself: the tokens that go in, their states, and its ids."""
    ids = sample["text"].x
    before = torch.cat([torch.tensor([model.encoder("text").start]), ids[:-1]])
    t = Tokens(before[None], torch.arange(len(ids))[None, :, None])
    return t._replace(x=model(model.embed({"text": t}), True)["text"].x[:, : len(ids)]), ids


def naive(model, objective, samples, k):
    """-sum_t log p(x_t+k | x_1 .. x_t-1, and in a chain x_t .. x_t+k-1), each text alone, place by place."""
    encoder, loss, number = model.encoder("text"), 0, 0
    for sample in (s for s in samples if "text" in s):
        t, ids = alone(model, sample)
        for place in range(len(ids) - k):
            if objective.chained:
                state = t.map(lambda field, place=place: field[:, : place + 1])
                for i in range(k):
                    head, token = objective.heads[i], encoder.stem(ids[None, i : place + 1 + i])
                    joined = torch.cat([head.norms[0](state.x), head.norms[1](token)], -1)
                    state = head.trunk(state._replace(x=joined @ head.join.weight.T), causal=True)
            else:
                state = objective.heads[k - 1].trunk(t.map(lambda field, place=place: field[:, : place + 1]), causal=True)
            loss = loss - encoder.unembed(state.x[0, -1]).log_softmax(-1)[ids[place + k]]
            number += 1
    return loss, number


@pytest.mark.parametrize("chained", [False, True])
def test_a_head_is_scored_by_a_shifted_cross_entropy(chained):
    model = cases.model(fuse=None)
    objective = MultiToken(model, weights=(0.3, lambda progress: progress), chained=chained).double()
    samples = cases.examples(model.readers)
    batch = {**objective.task(cases.batch(model.readers, samples, packed=True)), "progress": 0.7}
    terms, parameters = objective(model, batch), [model.encoder("text").stem.weight, *objective.heads.parameters()]
    for k, weight in ((1, 0.3), (2, 0.7)):
        loss, number = naive(model, objective, samples, k)
        term = terms[f"ahead{k}"]
        assert_close(term.total.double(), loss, rtol=1e-6, atol=1e-6)
        assert (term.number, term.weight) == (number, weight)
        found, wanted = (torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True) for x in (term.total, loss))
        for a, b in zip(found, wanted, strict=True):
            assert (a is None or not a.any()) if b is None else torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_the_next_token_is_scored_as_by_causal():
    model = cases.model()
    objective, plain = MultiToken(model, prefix=["image"]).double(), Causal(model, prefix=["image"])
    batch = cases.batch(model.readers, cases.examples(model.readers))
    assert_close(objective(model, objective.task(batch))["causal"], plain(model, plain.task(batch))["causal"])


@pytest.mark.parametrize("known", [0.0, 0.5])
def test_no_head_sees_what_it_is_asked_for(known):
    """In a chain, what head k says at place t depends on ids up to t + k - 1 alone, in a prefix that sees itself too."""
    model = cases.model(fuse=None)
    make = partial(MultiToken, weights=(1.0, 1.0, 1.0), chained=True)
    objective = Prefixed(model, inner=make, known=(known, known)).double()
    task, heads = objective.task(cases.batch(model.readers, cases.examples(model.readers), [0])), objective.inner.heads
    states, said, place = objective.inner.states(model, task).detach(), {}, 1
    heard = [head.register_forward_hook(lambda _, __, t: found.append(t.x[0, place].detach())) for head in heads]
    for changed in (None, *range(states.shape[1])):
        x, found = task["answer"].clone(), []
        if changed is not None:
            x[0, changed] = (x[0, changed] + 1) % 200
        objective.inner.score(model, states, {**task, "answer": x})
        said[changed] = found
    assert len(heard) == len(said[None]) == 3
    for changed in range(states.shape[1]):
        for k in range(3):
            same = torch.allclose(said[changed][k], said[None][k], rtol=0, atol=1e-12)
            assert same == (changed > place + k), (changed, k)


def test_the_model_stays_what_it_is():
    model = cases.model()
    kept = {name: p.shape for name, p in model.named_parameters()}
    MultiToken(model, weights=[0.3])
    assert {name: p.shape for name, p in model.named_parameters()} == kept


@pytest.mark.parametrize("options", [{"weights": ()}, {"depth": 0}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match="expected a weight for each head"):
        MultiToken(cases.model(), **options)
