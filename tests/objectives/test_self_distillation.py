import copy
from functools import partial

import pytest
import torch
from contracts import cases
from torch.nn import functional as F
from torch.testing import assert_close

from headwater.objectives import SelfDistillation
from headwater.objectives.comparison import Prototypes, Regression
from headwater.objectives.masks.policies import Uniform
from headwater.objectives.self_distillation import Hidden, picked
from headwater.tokens import Tokens
from headwater.view import View

DINO = partial(Prototypes, prototypes=12, sizes=[16, 8])
BYOL = partial(Regression, sizes=[16, 8], hidden=8)


def made(modality="image", seed=0, packed=False, **options):
    """A model, an objective whose teacher is another model, and a batch."""
    model = cases.model(fuse=None)
    objective = SelfDistillation(model, modality, **{"compare": DINO, "smalls": 2} | options).double()
    if objective.teacher is not None:
        generator = torch.Generator().manual_seed(seed)
        for p in objective.teacher.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    readers = cases.readers(model, objective)
    return model, objective, cases.batch(readers, cases.examples(readers, 5), packed=packed)


def vectors(encoder, t):
    return encoder.pool(encoder(encoder.embed(t))).x


def test_the_loss_is_that_of_dino():
    model, objective, batch = made()
    found, _ = cases.terms(objective, model, batch)
    teacher, head = objective.teacher.module["model"], objective.teacher.module["head"]
    loss = []
    for t in objective.large:
        target = (head(vectors(teacher.encoders["image"], batch[t])) / 0.04).softmax(-1)
        for v in objective.needs:
            if v != t:
                answer = (objective.compare.head(vectors(model.encoders["image"], batch[v])) / 0.1).log_softmax(-1)
                loss.append(-(target * answer).sum(-1))
    assert found["views"].number == 5
    assert_close(found["views"].total, torch.stack(loss).mean(0).sum())


@pytest.mark.parametrize("own", [True, False])
def test_hidden_tokens_are_scored_as_in_ibot(own):
    policy = Hidden(Uniform(), ratio=(0.3, 0.6), share=0.7, compare=DINO if own else None)
    model, objective, batch = made("video", hidden=policy, smalls=0)
    found, task = cases.terms(objective, model, batch)
    student, taught = model.encoders["video"], objective.teacher.module
    assert (objective.compare_tokens.head is objective.compare.head) != own
    total, some = 0, 0
    for key in objective.large:
        hidden = task[f"{key}/hidden"].x
        t = student.embed(batch[key])
        t = t._replace(x=torch.where(hidden[..., None], objective.mask, t.x))
        answers = objective.compare_tokens.head(student(t).x)
        targets = taught["token_head"](taught["model"].encoders["video"](taught["model"].encoders["video"].embed(batch[key])).x)
        for s in range(5):
            places = hidden[s].nonzero()[:, 0].tolist()
            some += bool(places)
            for n in places:
                error = -((targets[s, n] / 0.04).softmax(-1) * (answers[s, n] / 0.1).log_softmax(-1)).sum()
                total = total + error / len(places)
    assert 0 < some < 10
    assert found["tokens"].number == 10
    assert_close(found["tokens"].total, total)


def test_spread_is_that_of_the_large_views():
    model, objective, batch = made(spread=0.1)
    term = cases.terms(objective, model, batch)[0]["spread"]
    found = []
    for key in objective.large:
        x = F.normalize(vectors(model.encoders["image"], batch[key]), dim=-1)
        apart = torch.cdist(x, x) + 9 * torch.eye(5)
        found.append(-apart.amin(1).log().sum())
    assert term.weight == 0.1
    assert_close(term.total, sum(found) / 2)


OPTIONS = {
    "dino": {},
    "sinkhorn and hidden": {"compare": partial(DINO, balance="sinkhorn"), "hidden": Hidden(Uniform()), "spread": 0.1},
    "byol": {"compare": BYOL, "smalls": 0},
    "simsiam": {"compare": BYOL, "momentum": None, "smalls": 0},
    "small only": {"larges": 1},
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_two_pieces_equal_one(name, packed):
    results = []
    for chunks in (1, 2):
        model, objective, batch = made("video", packed=packed, **OPTIONS[name])
        assert objective.pieces(batch, chunks) == [batch]  # comparisons need all samples
        model.chunks = chunks
        loss = cases.loss(cases.terms(objective, model, batch)[0])
        loss.backward()
        grads = {n: p.grad for n, p in torch.nn.ModuleList([model, objective]).named_parameters() if p.grad is not None}
        results.append((loss, grads))
    assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


def test_the_teacher_follows_and_gets_no_gradient():
    model, objective, batch = made(momentum=lambda progress: 0.5 + 0.4 * progress)
    cases.loss(cases.terms(objective, model, batch)[0]).backward()
    assert all(p.grad is None and not p.requires_grad for p in objective.teacher.parameters())
    students = copy.deepcopy([*model.only(["image"]).parameters(), *objective.compare.head.parameters()])
    before = copy.deepcopy([*objective.teacher.parameters()])
    objective.after_step(model, 0.5)
    for t, old, p in zip(objective.teacher.parameters(), before, students, strict=True):
        assert_close(t, 0.7 * old + 0.3 * p)
    objective.start(model)
    assert all(torch.equal(t, p) for t, p in zip(objective.teacher.parameters(), students, strict=True))
    assert objective.compare.centre.any()


def test_a_teacher_without_momentum_is_the_student_itself():
    losses = []
    for momentum in (None, 0.0):
        model, objective, batch = made("text", compare=BYOL, smalls=0, momentum=momentum)
        objective.start(model)
        loss = cases.loss(cases.terms(objective, model, batch)[0])
        loss.backward()
        losses.append(
            (loss, [p.grad for p in model.encoders["text"].trunk.parameters()], objective.compare.predictor[0].weight.grad)
        )
    assert_close(losses[0], losses[1])


@pytest.mark.parametrize(
    ("larges", "hidden", "looks"), [(1, None, False), (1, Hidden(Uniform(), share=1.0), True), (2, None, True)]
)
def test_what_the_student_sees(larges, hidden, looks):
    model, objective, batch = made(larges=larges, hidden=hidden)
    x = batch["image@global0"].x.requires_grad_()
    cases.loss(cases.terms(objective, model, batch)[0]).backward()
    assert (x.grad is not None and bool(x.grad.any())) == looks


def test_views_are_declared_with_their_looks():
    objective = made(larges=2, smalls=3, small=View(scale=0.25))[1]
    assert list(objective.views) == [f"image@{name}" for name in ("global0", "global1", "local0", "local1", "local2")]
    assert objective.views["image@local1"].scale == 0.25
    assert objective.views["image@global1"].share == (0.4, 1.0)


def test_ratios_are_drawn_per_sample():
    hidden = Hidden(Uniform(), ratio=(0.2, 0.4), share=0.25)
    ratio = hidden.ratios(torch.arange(4000), "a")
    assert abs((ratio > 0).double().mean() - 0.25) < 0.03
    assert ratio[ratio > 0].min() >= 0.2
    assert ratio.max() <= 0.4
    assert abs(ratio[ratio > 0].mean() - 0.3) < 0.01
    assert not torch.equal(ratio, hidden.ratios(torch.arange(4000), "b"))


def test_chosen_tokens_come_by_sample_and_without_registers():
    document = torch.tensor([[2, 2, 0], [1, 3, 3]])
    t = Tokens(torch.arange(8.0).view(2, 4, 1), torch.zeros(2, 4, 1), document=torch.cat([document, torch.tensor([[2], [1]])], 1))
    x, sample = picked(t, torch.tensor([[True, True, True], [True, False, True]]))
    assert sample.tolist() == [0, 1, 2, 2, 3]
    assert x.flatten().tolist() == [2.0, 4.0, 0.0, 1.0, 6.0]


WRONG = [
    {"larges": 0},
    {"larges": 1, "smalls": 0},
    {"momentum": None, "larges": 1},
    {"momentum": None, "hidden": Hidden()},
    {"momentum": 1.5},
    {"spread": 0.1, "larges": 1},
]


@pytest.mark.parametrize("options", WRONG)
def test_bad_settings_are_named(options):
    with pytest.raises(ValueError, match=r"expected|set"):
        SelfDistillation(cases.model(fuse=None), "image", **options)


@pytest.mark.parametrize("wrong", [{"ratio": (0.5, 0.1)}, {"ratio": (0.0, 0.5)}, {"share": 0.0}])
def test_bad_hiding_is_named(wrong):
    with pytest.raises(ValueError, match="expected"):
        Hidden(**wrong)
