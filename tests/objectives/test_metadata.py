import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater.modalities import Facts, Text
from headwater.modalities.text import TextReader
from headwater.model import Model
from headwater.objectives import Causal, Conditioned, Contrastive, MultiToken
from headwater.objectives.metadata import told_before
from headwater.tokens import Tokens
from headwater.training.schedules import Step
from headwater.trunk import Trunk

READER = Facts(["source", "tags"])


def test_facts_are_lines_and_an_empty_one():
    t = READER.tokens({"source": "web", "tags": ["a", 2], "other": 1})
    assert bytes(t.x.tolist()) == b"source: web\ntags: a, 2\n\n"
    assert bytes(READER.tokens({"tags": None, "source": "web"}).x.tolist()) == b"source: web\n\n"
    assert len(READER.tokens({}).x) == len(READER.tokens({"source": None}).x) == 0
    assert len(Facts(["source"], length=5).tokens({"source": "web"}).x) == 5


def test_metadata_stands_before_its_own_text_and_positions_run_on():
    text = Tokens(
        torch.tensor([[1, 2, 3], [4, 5, 0]]),
        torch.arange(3).expand(2, 3)[..., None],
        torch.tensor([[True] * 3, [True, True, False]]),
    )
    facts = Tokens(torch.tensor([[9], [8]]), torch.zeros(2, 1, 1, dtype=torch.int64), torch.tensor([[True], [False]]))
    both, before = told_before(text, facts, 2)
    assert both.x.tolist() == [[9, 1, 2, 3], [4, 5, 0, 0]]
    assert both.position[..., 0].tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert (before & both.real()).tolist() == [[True, False, False, False], [False] * 4]
    assert told_before(text._replace(valid=text.real() & False), facts, 2)[0].real().sum() == 0


def made(texts, facts, **options):
    """A model of texts alone, the objective, and a batch."""
    torch.manual_seed(0)
    model = Model({"text": Text(Trunk(16, 2, 2))}).double()
    objective = Conditioned(model, READER, **options).double()
    samples = [
        {"text": model.encoder("text").reader.tokens(text), "metadata": READER.tokens(f)}
        for text, f in zip(texts, facts, strict=True)
    ]
    return model, objective, cases.batch({**model.readers, **objective.readers}, samples)


TEXTS, FACTS = ["a dog", "two boats sing", "the sea"], [{"source": "web"}, {}, {"source": "book", "tags": ["x"]}]


@pytest.mark.parametrize("inner", [Causal, MultiToken])
def test_metadata_has_no_loss_and_no_gradient_of_its_own(inner):
    model, objective, batch = made(TEXTS, FACTS, inner=inner)
    task = objective.task(batch)
    states = objective.inner.states(model, task).detach().requires_grad_()
    logits = []
    unembed = model.encoder("text").unembed
    model.encoder("text").unembed = lambda x: logits.append(x) or unembed(x)
    terms = objective.inner.score(model, states, task)
    assert terms["causal"].number == sum(len(text) + 1 for text in TEXTS)
    before = ~task["asked"] & task["text"].real()
    assert int(before.sum()) == sum(len(READER.tokens(f).x) for f in FACTS)
    (gradient,) = torch.autograd.grad(terms["causal"].total, states)
    assert not gradient[before].any()
    assert gradient[task["asked"]].any(-1).all()


def test_the_loss_is_that_of_the_text_given_its_metadata():
    model, objective, batch = made(TEXTS, FACTS)
    encoder, loss = model.encoder("text"), 0
    for text, facts in zip(TEXTS, FACTS, strict=True):
        told, ids = READER.tokens(facts).x, encoder.reader.tokens(text).x
        whole = torch.cat([torch.tensor([encoder.start]), told, ids])
        y = model(model.embed({"text": Tokens(whole[None, :-1], torch.arange(len(whole) - 1)[None, :, None])}), True)["text"].x
        log_p = encoder.unembed(y)[0].log_softmax(-1)
        loss = loss - sum(log_p[len(told) + t, i] for t, i in enumerate(ids))
    found = objective(model, objective.task(batch))["causal"].total
    assert_close(found.double(), loss, rtol=1e-9, atol=1e-9)
    a, b = (torch.autograd.grad(x, [*model.parameters()]) for x in (found, loss))
    assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_the_rate_falls_to_nothing_and_the_rest_is_the_plain_text():
    model, objective, batch = made(TEXTS * 40, FACTS * 40, rate=Step(1.0, 0.0, 0.9))
    plain = Causal(model).task(batch)
    for progress, told in ((0.0, True), (0.89, True), (0.95, False)):
        task = objective.task({**batch, "progress": progress})
        assert (task["text"].x.shape != plain["text"].x.shape) == told
    assert torch.equal(task["text"].x, plain["text"].x)
    assert torch.equal(task["asked"], plain["asked"])
    _, half, batch = made(["a"] * 600, [FACTS[0]] * 600, rate=0.3)
    assert abs(float((half.told(batch)[1]).any(1).float().mean()) - 0.3) < 0.05


def test_what_cannot_be_is_refused():
    model = cases.model()
    with pytest.raises(ValueError, match="same tokenizer"):
        Conditioned(model, TextReader(extra=5))
    with pytest.raises(ValueError, match="inner objective reads text"):
        Conditioned(model, READER, label="text")
    with pytest.raises(ValueError, match="which has None"):
        Conditioned(model, READER, inner=lambda m: Causal(m, "image"), modality="image")
    assert Conditioned(model, READER, inner=lambda m: Contrastive(m, "text", "image")).needs == ("text", "image", "metadata")
