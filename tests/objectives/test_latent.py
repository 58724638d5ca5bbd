"""Latent prediction against the papers' formulas typed anew, sample by sample, and what may be seen of what."""

from functools import partial

import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater.modalities import Image
from headwater.objectives import Latent
from headwater.objectives.distances import DISTANCES, distance_of
from headwater.objectives.latent import moment
from headwater.objectives.masks.policies import Blocks, Suffix, Uniform
from headwater.tokens import Tokens
from headwater.trunk import Trunk


def example(objective, model, **changes):
    """A batch of seven samples, and its task."""
    batch = cases.batch(model.readers, cases.examples(model.readers), **changes)
    return batch, objective.task(batch)


def made(seed=0, fuse=None, **options):
    model = cases.model(seed, fuse)
    torch.manual_seed(seed + 1)
    objective = Latent(model, width=16, **options).double()
    with torch.no_grad():  # so that the teacher is somebody else
        for p in objective.teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, objective


def normal(x):
    """Mean 0 and deviation 1, by hand."""
    return (x - x.mean()) / (((x - x.mean()) ** 2).mean() + 1e-5).sqrt()


def smooth(a, b):
    """Smooth L1, number by number."""
    return sum(0.5 * d * d if d.abs() < 1 else d.abs() - 0.5 for d in (a - b)) / len(a)


def alone(t, keep, row):
    """The kept tokens of one row, as a batch of one."""
    place = keep[row].nonzero()[:, 0]
    return Tokens(t.x[row, place][None], t.position[row, place][None])


@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_is_that_of_i_jepa(packed):
    """Mean over the four blocks' patches of smoothL1(predictor(context, places), LN(teacher(all)))."""
    model, objective = made(policy=Blocks((0.2, 0.2), (0.75, 1.5)), ratio=0.3)
    batch, task = example(objective, model, packed=packed)
    total = objective(model, task)["latent"].total
    raw, encoder, teacher = batch["image"], model.encoder("image"), objective.teacher.encoder("image")
    expected = 0.0
    for row in range(len(raw.x)):
        for sample in raw.sample()[row][raw.real()[row]].unique():
            own = raw.real() & (raw.sample() == sample)
            whole, context = alone(raw, own, row), alone(raw, own & task["visible"], row)
            wanted = teacher(teacher.embed(whole)).x[0].detach()
            seen = encoder(encoder.embed(context))  # with its register, behind
            for block in task["asked"].unbind(1):
                asked = block[row][own[row]].nonzero()[:, 0]
                x = torch.cat([objective.query.expand(len(asked), -1), objective.enter["image"](seen.x[0])])
                position = torch.cat([whole.position[0, asked], seen.position[0]])
                order = torch.cat([torch.zeros(len(asked), dtype=torch.int64), seen.order[0]])  # registers have no place
                answer = objective.out(objective.predictor(Tokens(x[None], position[None], order=order[None])).x[0])
                expected = expected + sum(smooth(answer[k], normal(wanted[place])) for k, place in enumerate(asked))
    assert_close(total, expected)
    weights = [p for p in (*model.encoder("image").parameters(), *objective.parameters()) if p.requires_grad]
    got, other = (torch.autograd.grad(value, weights, allow_unused=True) for value in (total, expected))
    for a, b in zip(got, other, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-10)


def test_distances_number_by_number():
    a, b = torch.randn(2, 5, 7, dtype=torch.float64) * 2
    for i in range(5):
        cosine = (a[i] * b[i]).sum() / (a[i].square().sum() * b[i].square().sum()).sqrt()
        by_hand = {
            "squared": sum((x - y) ** 2 for x, y in zip(a[i], b[i], strict=True)) / 7,
            "absolute": sum(abs(x - y) for x, y in zip(a[i], b[i], strict=True)) / 7,
            "smooth": smooth(a[i], b[i]),
            "cosine": 1 - cosine,
        }
        for kind, value in by_hand.items():
            assert_close(distance_of(kind)(a, b)[i], value)
    assert set(by_hand) == set(DISTANCES)
    with pytest.raises(ValueError, match="expected one of squared"):
        distance_of("euclid")


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_hidden_is_not_in_the_question(packed):
    model, objective = made(policy=Uniform(), ratio=0.3, targets=2, window=Uniform(), window_ratio=0.6)
    batch, task = example(objective, model, packed=packed)
    heard = []
    objective.predictor.register_forward_hook(lambda _, given, answer: heard.append([t.x[t.real()] for t in (given[0], answer)]))
    a = objective(model, task)["latent"].total
    raw = batch["image"]
    assert not (task["visible"] & task["asked"].any(1)).any()
    for sample in raw.samples():
        own = raw.real() & (raw.sample() == sample)
        assert (task["asked"] & own[:, None]).sum((0, 2)).tolist() == [max(1, round(0.3 * int(own.sum())))] * 2
    unseen = raw.real() & ~task["visible"]
    other = raw._replace(x=torch.where(unseen[..., None], raw.x + 1, raw.x))
    b = objective(model, task | {"image": other})["latent"].total
    assert torch.equal(heard[0][0], heard[1][0])
    assert torch.equal(heard[0][1], heard[1][1])
    assert a != b  # the targets moved


def test_a_small_document_never_loses_everything():
    model, objective = made(policy=Uniform(), ratio=0.5, targets=4)
    batch, task = example(objective, model)
    whole = task["asked"].any(1) | task["visible"]
    assert torch.equal(whole, batch["image"].real())
    assert task["visible"].any(1).all()
    assert task["asked"][:, 0].any(1).all()


@pytest.mark.parametrize("ahead", [1, 2])
def test_ahead_sees_only_what_lies_far_enough_back(ahead):
    """The prediction of a frame depends on frames and actions up to `ahead` steps before, and on the mission."""
    model, objective = made(modality="video", ahead=ahead, prefix=["text"], context=["choice"], fuse="JointTokens")
    batch = cases.batch(model.readers, cases.examples(model.readers))
    x = batch["video"].x.clone().requires_grad_()
    actions, words = {}, {}
    model.encoder("choice").stem.register_forward_hook(lambda module, given, y: actions.update(x=keep(y)))
    model.encoder("text").stem.register_forward_hook(lambda module, given, y: words.update(x=keep(y)))
    answers = []
    objective.out.register_forward_hook(lambda module, given, y: answers.append(y))
    task = objective.task(batch | {"video": batch["video"]._replace(x=x)})
    objective(model, task)
    frame, step = moment(batch["video"]), moment(batch["choice"])
    asked = [f[there] for f, there in zip(frame, task["asked"][:, 0], strict=True)]
    for wanted in sorted({int(f) for row in asked for f in row}):
        chosen = torch.zeros_like(answers[0])
        for row, frames in enumerate(asked):
            chosen[row, : len(frames)] = (frames == wanted)[:, None]
        given = torch.autograd.grad((answers[0] * chosen).square().sum(), [x, actions["x"], words["x"]], retain_graph=True)
        films, acts, text = (g.abs().amax(-1) > 0 for g in given)
        rows = chosen.flatten(1).any(1)
        assert not films[frame > wanted - ahead].any()
        assert films[(frame <= wanted - ahead) & batch["video"].real() & rows[:, None]].all()
        assert not acts[step > wanted - ahead].any()
        assert acts[(step <= wanted - ahead) & batch["choice"].real() & rows[:, None]].any()
        assert text[batch["text"].real() & rows[:, None]].all()
    assert all((f >= ahead).all() for f in asked)
    assert int(task["asked"].sum()) == int((batch["video"].real() & (frame >= ahead)).sum())


def keep(y):
    y.retain_grad()
    return y


def test_a_denoising_predictor_is_asked_for_the_velocity():
    model, objective = made(modality="audio", policy=Suffix(), ratio=0.5, targets=1, distance="flow")
    _, task = example(objective, model)
    answers, given = [], []
    objective.out.register_forward_hook(lambda module, _, y: answers.append(y))
    objective.noisy.register_forward_hook(lambda module, x, _: given.append(x[0]))
    total, target = objective(model, task)["latent"].total, objective._target(model, task)
    expected, asked = 0.0, task["asked"][:, 0]
    for row, time in enumerate(task["time"]):
        for k, place in enumerate(asked[row].nonzero()[:, 0]):
            noise = task["noise"][row, place]
            assert_close(given[0][row, k], (1 - time) * target[row, place] + time * noise, check_dtype=False)
            expected += ((answers[0][row, k] - (noise - target[row, place])) ** 2).mean()
    assert_close(total, expected)


def test_the_teacher_gets_no_gradient_and_moves_as_told():
    for source, share in (("average", 0.75), ("start", 1.0)):
        model, objective = made(teacher=source, momentum=lambda progress: 0.5 + progress)
        before = [p.clone() for p in objective.teacher.parameters()]
        objective(model, example(objective, model)[1])["latent"].total.backward()
        assert all(p.grad is None for p in objective.teacher.parameters())
        objective.after_step(model, 0.25)
        mine = model.only(["image"]).parameters()
        for old, new, student in zip(before, objective.teacher.parameters(), mine, strict=True):
            assert_close(new, share * old + (1 - share) * student)
        objective.start(model)
        for new, student in zip(objective.teacher.parameters(), model.only(["image"]).parameters(), strict=True):
            assert torch.equal(new, student)


def test_another_encoder_can_be_the_teacher():
    model = cases.model()
    objective = Latent(model, width=16, teacher=Image(Trunk(24, 1, 2), 16, 8)).double()
    before = [p.clone() for p in objective.teacher.parameters()]
    objective.start(model)
    objective.after_step(model, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, objective.teacher.parameters(), strict=True))
    assert objective.out.out_features == 24
    assert objective(model, example(objective, model)[1])["latent"].total.isfinite()


def test_what_cannot_work_is_said():
    model = cases.model()
    with pytest.raises(ValueError, match="nothing of a sample is seen"):
        Latent(model, ratio=1.0)
    with pytest.raises(ValueError, match="found ratio 0"):
        Latent(model, ratio=0.0)
    with pytest.raises(ValueError, match="targets 0"):
        Latent(model, targets=0)
    with pytest.raises(ValueError, match="window_ratio 2"):
        Latent(model, window=Uniform(), window_ratio=2)
    with pytest.raises(ValueError, match="found teacher 'ema'"):
        Latent(model, teacher="ema")
    with pytest.raises(ValueError, match="momentum 2"):
        Latent(model, momentum=2)
    with pytest.raises(ValueError, match="has no encoder"):
        Latent(model, "smell")
    model.encoder("audio").maskable = False
    with pytest.raises(ValueError, match="cannot work on a subset"):
        Latent(model, "audio")
    with pytest.raises(ValueError, match="mixes in no order"):
        Latent(cases.model(fuse="Bottleneck"), "video", ahead=1)


def test_predicted_features_become_like_the_teachers():
    """Frozen targets of a small model are learned: the cosine at hidden places rises."""
    model, objective = made(policy=Uniform(), ratio=0.4, targets=2, teacher="start", distance="squared")
    make = partial(cases.batch, model.readers, cases.examples(model.readers))
    step = torch.optim.Adam([*model.parameters(), *objective.parameters()], 3e-3)
    cosines = []
    for _ in range(60):
        term = objective(model, objective.task(make()))["latent"]
        step.zero_grad()
        (term.total / term.number).backward()
        step.step()
        cosines.append(float(term.metrics["cosine"]))
    assert cosines[-1] > cosines[0] + 0.3
    assert term.metrics["spread"] > 0
