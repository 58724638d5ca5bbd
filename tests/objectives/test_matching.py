import pytest
import torch
from contracts import cases
from torch.nn import functional as F
from torch.testing import assert_close

from headwater import distributed, random
from headwater.objectives import Matching
from headwater.objectives.matching import strangers
from headwater.objectives.objective import weighted_sum
from headwater.pretrainer import count
from headwater.tokens import mean_pool


def made(fuse="JointTokens", a="image", b="text", **options):
    model = cases.model(fuse=fuse)
    torch.manual_seed(0)
    o = Matching(model, a, b, **options).double()
    return model, o, cases.examples(model.readers)


def test_strangers_are_drawn_from_the_softmax_of_the_others_scores():
    score = torch.tensor([[9.0, 0.0, 1.0, -1.0]])
    seeds = torch.arange(2000)
    found = torch.stack([strangers(score, s[None], seeds[:4], 0, "x")[0] for s in seeds + 10])
    share = found.bincount(minlength=4) / len(found)
    expected = F.softmax(torch.tensor([-torch.inf, 0.0, 1.0, -1.0]), 0)
    assert share[0] == 0
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / 2000).sqrt() + 1e-9).all()


def test_a_draw_belongs_to_the_samples_and_not_to_rows_or_ranks():
    torch.manual_seed(0)
    score, seed, order = torch.randn(6, 6), torch.arange(6) * 7, torch.tensor([3, 1, 5, 0, 4, 2])
    whole = strangers(score, seed, seed, 0, "x")
    shuffled = strangers(score[order][:, order], seed[order], seed[order], 0, "x")
    assert torch.equal(order[shuffled], whole[order])
    assert torch.equal(strangers(score[4:], seed[4:], seed, 4, "x"), whole[4:])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("fuse", ["JointTokens", "CrossAttend", "Resampler", "Bottleneck", "Routed", "Complete"])
@pytest.mark.parametrize("negatives", ["hard", "random"])
def test_each_pair_is_scored_as_if_the_model_had_met_it_alone(negatives, fuse, packed):
    """Every pair typed anew: raw tokens side by side in one row, the whole model, the means of fused tokens, the head."""
    model, o, samples = made(fuse, negatives=negatives)
    batch = cases.batch(model.readers, samples, packed=packed)
    (term,) = cases.terms(o, model, batch)[0].values()
    both = [k for k, s in enumerate(samples) if "image" in s and "text" in s]
    seed = batch["seed"][both]
    rows = cases.batch({k: model.readers[k] for k in ("image", "text")}, [samples[k] for k in both])
    a, b = (F.normalize(p.x.float(), dim=-1) for p in model.represent({k: rows[k] for k in ("image", "text")}).values())
    score = a @ b.T / 0.07 if negatives == "hard" else torch.zeros(len(both), len(both))
    pairs = [(k, k) for k in range(len(both))]
    for name, scores, turn in (("matching/b", score, 1), ("matching/a", score.T, -1)):
        noise = random.gumbel(random.fold(seed[:, None], seed[None]), (), name)
        drawn = (scores + noise).fill_diagonal_(-torch.inf).argmax(1)
        pairs += [(k, int(other))[::turn] for k, other in enumerate(drawn)]
    total = 0
    for number, (left, right) in enumerate(pairs):
        one = {
            "image": rows["image"].map(lambda f, k=left: f[k : k + 1]),
            "text": rows["text"].map(lambda f, k=right: f[k : k + 1]),
        }
        fused = model(model.embed(one))
        means = [mean_pool(fused[n] if n in one else fused[n]._replace(order=None)).x for n in o.read]
        logit = o.head(torch.cat(means, -1))[0, 0]
        total = total - F.logsigmoid(logit if number < len(both) else -logit)
    assert term.number == len(pairs) == 3 * len(both)
    assert_close(term.total, total)
    weights = [*o.parameters(), *model.encoders["image"].trunk.parameters(), *model.fusion.parameters()]
    for got, wanted in zip(*(torch.autograd.grad(v, weights, allow_unused=True) for v in (term.total, total)), strict=True):
        if wanted is not None:
            assert_close(got, wanted)


def test_pieces_of_a_batch_give_the_loss_and_gradient_of_the_whole():
    found = []
    for chunks in (1, 2, 3):
        model, o, samples = made()
        model.chunks = chunks
        (term,) = cases.terms(o, model, cases.batch(model.readers, samples))[0].values()
        term.total.backward()
        found.append((term.total, [p.grad for p in [*model.parameters(), *o.parameters()]]))
    for other in found[1:]:
        assert_close(found[0], other)


def test_one_sample_alone_has_its_own_pair_only():
    model, o, samples = made()
    (term,) = cases.terms(o, model, cases.batch(model.readers, samples[:1]))[0].values()
    assert term.number == 1
    assert term.total.isfinite()


def lonely(chunks):
    """Two ranks of one sample each: the stranger is on the other one. With pieces, of which a rank may have none."""
    model, o, samples = made()
    model.chunks = chunks
    both = [k for k, s in enumerate(samples) if "text" in s][:2]
    batch = cases.batch(model.readers, samples, both if distributed.world() == 1 else [both[distributed.rank()]])
    task = o.task(batch)
    numbers = count([o.numbers(task)])
    loss = weighted_sum(o(model, task), numbers, distributed.world())
    loss.backward()
    grad = o.head[1][0].weight.grad
    return distributed.total(loss) / distributed.world(), distributed.total(grad) / distributed.world()


def test_the_stranger_may_be_on_another_rank(ranks):
    whole = lonely(1)
    for found in ranks(lonely, 1):
        assert_close(found, whole)


def test_wrong_arguments_are_refused():
    model = cases.model()
    with pytest.raises(ValueError, match="the model has no fusion"):
        Matching(cases.model(fuse=None))
    with pytest.raises(ValueError, match="behind the fusion, but strangers lend encoded tokens"):
        Matching(cases.model(fuse="Chain"))
    model.space = None
    with pytest.raises(ValueError, match="hard negatives need the same size"):
        Matching(model)
    Matching(model, negatives="random")
