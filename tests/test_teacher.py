"""Teachers follow without gradient; parts of a model share its weights."""

import copy

import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater import distributed
from headwater.objectives.heads import GlobalNorm, Projector, moments
from headwater.teacher import Teacher
from headwater.tokens import Pooled


def test_a_teacher_is_the_moving_average_and_never_trains():
    model = cases.model()
    teacher = Teacher(model.only(["image"]))
    before = copy.deepcopy(teacher.module.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    teacher.follow(model.only(["image"]), 0.9)
    for name, value in teacher.module.state_dict().items():
        assert_close(value, before[name] * 0.9 + model.only(["image"]).state_dict()[name] * 0.1)
    teacher.copy(model.only(["image"]))
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), model.only(["image"]).parameters(), strict=True))
    assert not any(p.requires_grad for p in teacher.parameters())
    teacher.train()
    assert not any(module.training for module in teacher.modules())


def test_part_of_a_model_shares_it_and_leaves_its_mode_alone():
    model = cases.model()
    part = model.only(["image@global0", "text"], fusion=True)
    assert list(part.encoders) == ["image", "text"] == list(part.projections)
    assert part.encoders["image"] is model.encoders["image"]
    assert part.fusion is model.fusion
    model.eval()
    model.only(["image"])
    assert not any(module.training for module in model.modules())
    batch = cases.batch(model.readers, cases.examples(model.readers))
    assert_close(part.represent({"text": batch["text"]})["text"].x, model.represent({"text": batch["text"]})["text"].x)


@pytest.mark.parametrize("packed", [False, True])
def test_pieces_give_the_vectors_and_the_gradient_of_the_whole(packed):
    model = cases.model()
    whole = cases.batch(model.readers, cases.examples(model.readers), packed=packed)
    batch = {"image": whole["image"], "text": whole["text"]}

    def ask(piece):
        """A vector per sample, and every token of its own."""
        encoded = model.encode(model.embed(piece))
        t = encoded["image"]
        first = t.real() & t.given()
        return {"pooled": model.pool("text", encoded["text"]), "tokens": Pooled(t.x[first], t.sample()[first])}

    found = {}
    for chunks in (1, 3):
        model.chunks = chunks
        model.zero_grad()
        out = model.in_pieces(ask, batch)
        (out["pooled"].x.square().sum() ** 2 + out["tokens"].x.pow(3).sum() * out["tokens"].x.mean()).backward()
        found[chunks] = out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    (a, grads), (b, others) = found[1], found[3]
    for name in a:
        order = a[name].sample.argsort(stable=True)
        assert torch.equal(a[name].sample[order], b[name].sample)
        assert_close(a[name].x[order], b[name].x)
    assert_close(grads, others)


def statistics(share):
    """Value and gradient of what depends on the statistics of all ranks, on this rank's share of 7 rows."""
    x = torch.arange(21.0, dtype=torch.float64).view(7, 3).sin().requires_grad_()
    rows = x[share[distributed.rank()]]
    norm = GlobalNorm(3).double()
    mean, variance = moments(rows)
    loss = (norm(rows) ** 3).sum() + len(rows) * (variance.log().sum() + mean.prod()) / 7
    loss.backward()
    return distributed.total(loss), distributed.total(x.grad)


@pytest.mark.parametrize("share", [[[0, 2, 3, 5, 6], [1, 4]], [[], [0, 1, 2, 3, 4, 5, 6]]])
def test_statistics_of_all_ranks_are_those_of_one_process(ranks, share):
    expected = statistics([[*share[0], *share[1]]])
    for got in ranks(statistics, share):
        assert_close(got, expected)


def test_the_global_norm_is_batch_norm():
    x = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_close(GlobalNorm(4).double()(x), torch.nn.BatchNorm1d(4).double()(x))


def test_a_projector_has_norms_between_its_layers_and_one_behind_when_asked():
    kinds = [type(layer).__name__ for layer in Projector([4, 8, 8, 2])]
    assert kinds == ["Linear", "GlobalNorm", "GELU", "Linear", "GlobalNorm", "GELU", "Linear"]
    last = Projector([4, 8, 2], last_norm=True)[-1]
    assert isinstance(last, GlobalNorm)
    assert last.weight is None
    assert [type(layer).__name__ for layer in Projector([4, 8, 2], "none")] == ["Linear", "GELU", "Linear"]
    with pytest.raises(ValueError, match="sizes"):
        Projector([4])
