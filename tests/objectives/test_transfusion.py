from functools import partial

import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater.fusion import JointTokens
from headwater.generation import generate
from headwater.hub.backbone import Backbone
from headwater.modalities import Image, Text
from headwater.model import Model
from headwater.objectives import Causal, Flow, Transfusion
from headwater.objectives.likelihood import Anchor, Likelihood
from headwater.objectives.objective import part
from headwater.objectives.transfusion import turned
from headwater.process import Process
from headwater.trunk import Trunk


def made(**options):
    model = cases.model()
    objective = Transfusion(model, **options)
    readers = cases.readers(model, objective)
    batch = cases.batch(readers, cases.examples(readers))
    return model, objective, batch


def score(objective, model, batch):
    return objective(model, objective.task(batch))


def test_words_in_front_are_those_of_a_language_model_alone():
    model, objective, batch = made(first=0.0)
    alone = dict(batch, image=batch["image"]._replace(valid=torch.zeros_like(batch["image"].real())))
    blind = score(objective, model, alone)["causal"].total
    assert_close(score(objective, model, batch)["causal"].total, blind)
    assert blind.isfinite()


def test_words_behind_are_those_of_captioning_a_noisy_picture():
    model, objective, batch = made(first=1.0)
    task = objective.task(batch)
    parts, condition = model.at_time(model.embed(part(task, ("text", "image"))), "image", task["time"])
    plain = Causal(model, "text", ["image"])
    hidden = plain.task(batch)  # without a place behind the last word, which no word sees
    states = model({**parts, "text": model.embed({"text": hidden["text"]})["text"]}, True, condition)["text"].x
    expected = plain.score(model, states[:, : hidden["text"].position.shape[1]], hidden)["causal"].total
    assert_close(objective(model, task)["causal"].total, expected)
    assert task["time"].max() <= 0.5


@pytest.mark.parametrize("first", [0.0, 1.0])
def test_what_comes_later_never_reaches_what_comes_before(first):
    model, objective, batch = made(first=first)
    task = objective.task(batch)
    embedded, condition = model.at_time(model.embed(part(task, ("text", "image"))), "image", task["time"])
    parts = {name: t._replace(x=t.x.detach().requires_grad_()) for name, t in embedded.items()}
    y = model(parts, True, condition)
    words, picture = y["text"].x[:, : parts["text"].x.shape[1]], y["image"].x[:, : parts["image"].x.shape[1]]
    to_words = torch.autograd.grad(words.square().sum(), parts["image"].x, retain_graph=True, allow_unused=True)[0]
    to_picture = torch.autograd.grad(picture.square().sum(), parts["text"].x, retain_graph=True)[0]
    row = 0  # has both
    if first:
        assert to_words[row].abs().sum() > 0
        assert (to_picture[row, 1:] == 0).all()  # the place before the first word holds nothing but the mark of a beginning
    else:
        assert to_words is None or (to_words[row] == 0).all()
        assert (to_picture[row].abs().sum(-1) > 0)[task["text"].real()[row]].all()
    last = torch.autograd.grad(words[row, 1].sum(), parts["text"].x, retain_graph=True)[0]
    assert (last[row, 2:] == 0).all()
    one = torch.autograd.grad(picture[row, 0].square().sum(), parts["image"].x)[0]
    assert (one[row].abs().sum(-1) > 0).all()  # a picture sees itself in both directions


def test_the_share_that_begins_with_the_picture():
    _, objective, batch = made(first=0.3, most=0.4)
    seeds = torch.arange(20_000)
    front, time = turned(seeds, 0.3), objective.flow.times(seeds, "flow/time")
    assert abs(front.float().mean() - 0.3) < 0.01
    assert time[front].max() < 0.4 < time[~front].max()
    task = objective.task(batch)
    assert torch.equal(task["image"].order == 0, turned(batch["seed"], 0.3)[task["image"].sample()])


def test_the_flow_is_weighed():
    model, objective, batch = made(weight=2.5)
    terms = score(objective, model, batch)
    assert terms["flow"].weight == 2.5
    assert terms["causal"].weight == 1.0
    assert terms["flow"].number == Flow(model, "image").numbers(batch)["flow"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"first": 1.5}, "share"),
        ({"ids": "audio"}, "vectors"),
        ({"vectors": "text"}, "ids"),
        ({"likelihood": Likelihood(anchor=Anchor())}, "reference"),
    ],
)
def test_what_cannot_work_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        made(**options)


def test_what_was_learned_by_heart_is_painted_and_written():
    torch.manual_seed(0)
    encoders = {"text": Text(Trunk(64, 0, 2), length=8), "image": Image(Trunk(64, 0, 2), 8, 4)}
    model = Model(encoders, partial(JointTokens, trunk=Trunk(64, 2, 2)), processes={"image": Process(predicts="signal")})
    objective, names = Transfusion(model, first=0.5, most=0.5), ["red", "blue"]
    colours = [torch.tensor(c, dtype=torch.uint8).expand(8, 8, 3).numpy() for c in ([250, 20, 20], [20, 20, 250])]
    batch = {"text": names * 6, "image": colours * 6}
    prepared = Backbone(model, {}).batch(batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(160):
        task = objective.task({**prepared, "seed": torch.arange(12) + 12 * step, "sample": torch.arange(12)})
        optimizer.zero_grad()
        sum(t.weight * t.total / t.number for t in objective(model, task).values()).backward()
        optimizer.step()
    painted = generate(model, "image", layout="interleaved", text=names, steps=8)
    for found, wanted in zip(painted, colours, strict=True):
        assert abs(found.astype(int) - wanted).mean() < 25
    assert generate(model, "text", image=colours, temperature=0.0) == names
