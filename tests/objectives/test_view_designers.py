"""Learned views: changes are what their formulas say, know nothing of rows and ranks, and their strengths follow the value."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import test_vpretraining as steered
import torch
from contracts import cases
from jsonargparse import ArgumentParser
from test_vpretraining import SHARES, made, value
from torch.testing import assert_close

from headwater import modalities, random
from headwater.model import Model
from headwater.objectives import Contrastive, Flow, JointEmbedding, Masked, Supervised
from headwater.objectives.designers import Blur, Colour, Designer, Drop, Erase, Families, Level, Noise, Views, Zoom
from headwater.objectives.designers.canvas import Canvas, Layout, layout_of
from headwater.objectives.designers.changes import covered, gaussian, hue, window
from headwater.objectives.estimators import Difference, Double
from headwater.objectives.objective import Objective
from headwater.tokens import Tokens


def hidden(modality):
    return partial(Masked, modality=modality, ratio=0.5, mode="substitute")


def labelled(modality):
    return partial(Supervised, label=modalities.Category(3), modality=modality)


def viewed(modality, changes, inner=None):
    return inner or hidden(modality), partial(Views, modality=modality, changes=changes), labelled(modality)


FAMILIES = {"plain": [], "colour": [Colour()], "space": [Zoom(0.5), Erase()]}
DESIGNED = {
    "image": viewed("image", [Colour(), Blur(3.0), Zoom(), Noise(), Erase()]),
    "audio": viewed("audio", [Level(), Erase(axes=[0], count=2), Erase(axes=[1]), Zoom(0.5, [0]), Noise()]),
    "video": viewed(
        "video", [Blur(1.0, [0]), Drop(axes=[0], temperature=0.5), Colour(), Zoom(axes=[1, 2])], partial(Flow, modality="video")
    ),
    "action": viewed("action", [Noise(), Drop(temperature=0.5), Level()]),
    "two views": viewed("image", [Colour(), Noise()], partial(JointEmbedding, projector=[8])),
    "families": (hidden("image"), partial(Families, modality="image", families=FAMILIES), labelled("image")),
    "learned families": (
        partial(Contrastive, a="image", b="text"),
        partial(Families, modality="image", families=FAMILIES, per="batch", learned=True, start={"colour": 3.0}),
        labelled("image"),
    ),
}


@pytest.fixture(params=DESIGNED)
def name(request, monkeypatch):
    monkeypatch.setitem(steered.DESIGNED, request.param, DESIGNED[request.param])
    return request.param


def test_a_difference_is_as_good_as_the_oracle(name):
    pretrainer, batch = made(*DESIGNED[name])
    exact, slopes, _ = value(pretrainer, batch, Double())
    found, gradients, _ = value(pretrainer, batch, Difference())
    assert exact != 0
    assert all(g.any() for g, p in zip(slopes, pretrainer.objective.designer.parameters(), strict=True))
    assert_close(found, exact, rtol=1e-3, atol=1e-9)
    assert steered.cosine(gradients, slopes) > 0.999
    assert_close(gradients, slopes, rtol=1e-2, atol=1e-5 * max(float(g.abs().max()) for g in slopes))


def test_the_value_is_the_drop_of_the_feedbacks_loss(name):
    steered.test_the_value_is_the_drop_of_the_feedbacks_loss(name)


def test_the_learner_takes_the_plain_step_on_the_changed_signal(name):
    steered.test_the_learner_takes_the_plain_step_on_the_detached_task(name)


# what changes are


def laid(x, cell=(1, 1, 1), extent=None, seeds=None, **layout):
    """A canvas of whole numbers (S, L, ..., C)."""
    extent = torch.tensor(x.shape[1:-1], dtype=x.dtype).expand(len(x), -1) if extent is None else extent
    seeds = torch.arange(len(x)) if seeds is None else seeds
    stride = (1,) * len(cell)
    return Canvas(x, ~x.isnan(), extent, seeds, cell), Layout(cell, stride, **layout)


def drawn(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def strong(change, canvas, layout, strength, **options):
    strengths = torch.full((len(change.knobs),), strength, dtype=torch.float64, **options)
    return strengths, change(canvas, strengths, layout, "view")


CHANGES = [Colour(), Level(), Noise(), Blur(), Zoom(), Erase(count=2), Drop()]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: type(change).__name__)
def test_strength_0_changes_nothing_and_more_changes_more(change):
    canvas, layout = laid(drawn(5, 1, 6, 8, 3), mean=(0.5,) * 3, std=(0.3,) * 3)
    away = []
    for strength in (0.0, 0.3, 1.0):
        strengths, x = strong(change, canvas, layout, strength, requires_grad=True)
        away.append(float((x - canvas.x).detach().square().mean()))
        (slope,) = torch.autograd.grad(x.square().sum(), strengths)
        assert slope.isfinite().all()
        assert strength == 0 or slope.all()
    assert away[0] < 1e-20 < 1e-6 < away[1] < away[2]


def test_colours_are_turned_about_the_grey_axis():
    angle = torch.tensor([0.4, -1.2], dtype=torch.float64)
    turn, eye = hue(angle), torch.eye(3, dtype=torch.float64)
    assert_close(turn @ turn.mT, eye.expand(2, 3, 3))
    assert_close(turn.sum(-1), torch.ones(2, 3, dtype=torch.float64))  # grey stays
    assert_close(turn.diagonal(dim1=1, dim2=2).sum(-1), 1 + 2 * angle.cos())
    assert_close(turn[0] @ hue(-angle)[0], eye)


def test_brightness_contrast_and_saturation_are_those_of_pixels():
    """Each alone, in pixels from 0 to 1."""
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    pixels = torch.rand(2, 1, 3, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    canvas, layout = laid((pixels - torch.tensor(mean)) / torch.tensor(std).double(), mean=mean, std=std)
    canvas = canvas._replace(x=(pixels - torch.tensor(mean).double()) / torch.tensor(std).double())
    draw = 2 * random.uniform(canvas.seed, (4,), "view").double() - 1
    for knob in range(3):
        strength = torch.zeros(4, dtype=torch.float64)
        strength[knob] = 0.7
        found = Colour(0.8)(canvas, strength, layout, "view") * torch.tensor(std).double() + torch.tensor(mean).double()
        for s in range(2):
            factor = 1 + 0.8 * 0.7 * float(draw[s, knob])
            dull = sum(w * pixels[s, ..., c] for c, w in enumerate((0.299, 0.587, 0.114)))[..., None]
            middle = {0: 0.0, 1: dull.mean(), 2: dull}[knob]
            assert_close(found[s], middle + (pixels[s] - middle) * factor)


def test_a_blur_is_a_gaussian_of_what_is_there():
    x = drawn(1, 7, 1, 1, 1)
    x[0, 5:] = math.nan
    canvas, layout = laid(x.clone())
    canvas = canvas._replace(x=x.nan_to_num())
    _, found = strong(Blur(3.0), canvas, layout, 0.8)
    width = 3.0 * 0.8 * float(random.uniform(canvas.seed, (), "view"))
    for i in range(5):
        weight = [math.exp(-((i - j) ** 2) / (2 * width**2)) for j in range(5)]
        assert_close(found[0, i, 0, 0, 0], sum(w * x[0, j, 0, 0, 0] for j, w in enumerate(weight)) / sum(weight), rtol=1e-5, atol=0)


def test_a_zoom_interpolates_in_its_window():
    x = drawn(1, 1, 1, 6, 1)
    canvas, layout = laid(x)
    _, found = strong(Zoom(0.25, [2]), canvas, layout, 0.9)
    size, where = random.uniform(canvas.seed, (2,), "view")[0].double().tolist()
    side = 1 - 0.75 * 0.9 * size
    for i in range(6):
        source = min(max((1 - side) * 6 * where + side * (i + 0.5) - 0.5, 0), 5)
        low = min(math.floor(source), 4)
        row = x[0, 0, 0, :, 0]
        assert_close(found[0, 0, 0, i, 0], row[low] + (source - low) * (row[low + 1] - row[low]))


def test_a_strip_covers_as_much_as_it_is_wide():
    centre, width = torch.tensor([2.3, 0.2]).double(), torch.tensor([1.7, 1.0]).double()
    cover = covered(centre, width, 6)
    assert_close(cover[0], torch.tensor([0, 0.55, 1, 0.15, 0, 0]).double())
    assert_close(cover[1], torch.tensor([0.7, 0, 0, 0, 0, 0]).double())  # the rest lies outside
    canvas, layout = laid(drawn(1, 6, 4, 2), cell=(2, 1))
    _, found = strong(Erase(0.5, axes=[0]), canvas, layout, 1.0)
    where, size = random.uniform(canvas.seed, (1, 1, 2), "view")[0, 0, 0].double()
    kept = 1 - covered(where[None] * 6, 0.5 * size[None] * 6, 6)[0]
    mean = canvas.x[0].mean((0, 1))
    assert_close(found[0], mean + (canvas.x[0] - mean) * kept[:, None, None])
    assert float(kept.min()) < 0.9


def test_dropped_are_whole_tokens_or_steps_at_the_rate():
    canvas, layout = laid(drawn(400, 6, 4, 1), cell=(2, 2))
    for axes, alike in ((None, (2, 2)), ([0], (2, 4))):
        _, found = strong(Drop(0.6, 0.02, axes), canvas, layout, 0.5)
        mean = canvas.x.mean((1, 2), keepdim=True)
        gone = (found - canvas.x) / (mean - canvas.x)
        block = gone.unflatten(1, (-1, alike[0])).unflatten(3, (-1, alike[1]))
        assert_close(block, block[:, :, :1, :, :1].expand_as(block), rtol=1e-6, atol=1e-6)
        assert abs(float((gone > 0.5).double().mean()) - 0.3) < 0.03
        assert float(((gone > 0.05) & (gone < 0.95)).double().mean()) < 0.05
    assert not torch.equal(gone[0], gone[1])


def test_noise_and_level_have_the_size_that_they_say():
    canvas, layout = laid(drawn(50, 20, 4, 1))
    _, found = strong(Noise(2.0), canvas, layout, 0.25)
    assert abs(float((found - canvas.x).std()) - 0.5) < 0.02
    _, found = strong(Level(0.5, 2.0), canvas, layout, 0.5)
    u, v = (2 * random.uniform(canvas.seed, (2,), "view").double() - 1).unbind(1)
    assert_close(found, canvas.x * (0.25 * u).exp()[:, None, None, None] + v[:, None, None, None])


def test_rows_of_weights():
    width = torch.tensor([0.0, 0.7], dtype=torch.float64)
    assert_close(gaussian(width, 5)[0], torch.eye(5, dtype=torch.float64))
    assert_close(gaussian(width, 5).sum(-1), torch.ones(2, 5, dtype=torch.float64))
    one, half = torch.ones(2, dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64)
    assert_close(window(one, half, 5 * one, 5), torch.eye(5, dtype=torch.float64).expand(2, 5, 5))
    assert_close(window(half, half, 3 * one, 5)[:, :, 3:], torch.zeros(2, 5, 2, dtype=torch.float64))  # nothing behind its end


# where changes act


KINDS = {
    "image": (Colour(), Blur(), Zoom(), Noise(), Erase()),
    "audio": (Level(), Zoom(), Noise(), Erase(axes=[0]), Drop()),
    "video": (Colour(), Blur(axes=[0]), Drop(axes=[0]), Noise()),
    "action": (Level(), Noise(), Drop(), Blur()),
}


@pytest.fixture(scope="module")
def model():
    return cases.model()


def views_of(model, modality, changes, **options):
    inner = Masked(model, modality, mode="substitute")
    return Views(model, inner, modality, list(changes), **options).double()


@pytest.mark.parametrize("modality", KINDS)
def test_a_canvas_is_the_signal(model, modality):
    """Numbers lie as the reader's `restore` lays them, come back bit by bit, and packed rows have the same canvas."""
    rows, packed = (cases.batch(model.readers, cases.examples(model.readers), packed=packed) for packed in (False, True))
    encoder = model.encoder(modality)
    layout, t = layout_of(encoder), rows[modality]
    canvas = layout.canvas(t, rows["seed"])
    assert layout.cell
    assert torch.equal(layout.tokens(canvas.x, t).x.nan_to_num(9.0), t.x.nan_to_num(9.0))
    for number in t.samples().tolist():
        signal = encoder.restore(t.map(lambda field, n=number: field[n : n + 1]))
        signal = torch.from_numpy(signal).double().reshape(*canvas.extent[number].long().tolist(), -1)
        inside = canvas.x[number][tuple(slice(int(n)) for n in canvas.extent[number])]
        pixels = ((inside + 1).clamp(0, 2) * 127.5).round()
        found = {"action": inside, "audio": 4 * inside - 5}.get(modality, pixels)
        assert_close(found, signal.nan_to_num(), rtol=1e-5, atol=1e-5)
    again = layout.canvas(packed[modality], packed["seed"])
    assert all(torch.equal(a, b) for a, b in zip(canvas[:3], again[:3], strict=True))
    assert_close(layout.tokens(again.x, packed[modality]).x, packed[modality].x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("kind", "cell"),
    [
        ("Image native", (1, 8, 8)),
        ("Audio patches", (4, 2)),
        ("Action chunks", (2,)),
        ("Series", (4, 1)),
        ("Series joint", (4, 1)),
        ("Tubelets", (2, 8, 8)),
        ("Wave", ()),
        ("Points", ()),
        ("Tokenised vectors", ()),
    ],
)
def test_other_cuts_come_back(kind, cell):
    """Of other readers; pictures and films lie as they are seen."""
    trunk = cases.trunk()
    encoder = modalities.Video(trunk, 16, 8, frames=4, tubelet=2) if kind == "Tubelets" else cases.ENCODERS[kind](trunk)
    t = cases.preparing(encoder).prepare(cases.collate([{"it": x} for x in encoder.reader.example(5, 0)], ["it"])["it"])
    layout = layout_of(encoder)
    canvas = layout.canvas(t, torch.arange(5))
    assert layout.cell == cell
    assert torch.equal(layout.tokens(canvas.x, t).x.nan_to_num(9.0), t.x.nan_to_num(9.0))
    assert int(canvas.real.sum()) == int((~t.x[t.real()].isnan()).sum())
    if kind in ("Image native", "Tubelets"):
        picture = torch.from_numpy(encoder.restore(t.map(lambda field: field[:1]))).float()
        extent = canvas.extent[0].long().tolist()
        inside = canvas.x[0, : extent[0], : extent[1], : extent[2]]
        assert_close(((inside + 1) * 127.5).round().reshape(picture.shape), picture, rtol=0, atol=1)


@pytest.mark.parametrize("modality", KINDS)
def test_neither_packing_nor_padding_nor_other_samples_matter(model, modality):
    """And the same seeds give the same view, other seeds another one."""
    samples = cases.examples(model.readers)
    views = views_of(model, modality, KINDS[modality])
    batch = cases.batch(model.readers, samples)
    found = by_sample(views.changed(batch)[modality])
    assert_close(by_sample(views.changed(cases.batch(model.readers, samples, packed=True))[modality]), found, rtol=1e-5, atol=1e-5)
    some = by_sample(views.changed(cases.batch(model.readers, samples, [5, 1]))[modality])
    assert_close(some, {new: found[old] for new, old in enumerate([5, 1])}, rtol=1e-5, atol=1e-5)  # float32 draws
    t = batch[modality]
    wide = t._replace(valid=t.real()).map(lambda field: torch.cat([field, field[:, :2]], 1))
    wide = wide._replace(valid=wide.valid & (torch.arange(wide.valid.shape[1]) < t.position.shape[1]))
    padded = views.changed({**batch, modality: wide})[modality]
    assert_close(by_sample(padded), found, rtol=1e-5, atol=1e-5)
    assert torch.equal(views.changed(batch)[modality].x.nan_to_num(), views.changed(batch)[modality].x.nan_to_num())
    other = by_sample(views.changed(cases.batch(model.readers, samples, salt=1))[modality])
    assert all(not torch.allclose(other[k], found[k], equal_nan=True) for k in found)
    for name in set(model.readers) - {modality}:
        assert views.changed(batch)[name] is batch[name]


def by_sample(t):
    """Sample -> its real tokens, with absent numbers as 9."""
    return {n: t.x[(t.sample() == n) & t.real()].detach().nan_to_num(9.0) for n in t.samples().tolist()}


def test_two_views_have_their_own_draws(model):
    inner = JointEmbedding(model, projector=[8])
    views = Views(model, inner, "image", [Noise()]).double()
    readers = cases.readers(model, inner)
    batch = cases.batch(readers, cases.examples(readers))
    noise = [views.changed(batch)[key].x - batch[key].x for key in inner.needs]
    assert len(noise) == 2
    assert abs(float(torch.corrcoef(torch.stack([n.detach().flatten() for n in noise]))[0, 1])) < 0.1


def test_at_strength_0_the_task_is_the_plain_one(model):
    for modality, changes in KINDS.items():
        views = views_of(model, modality, changes)
        views.raw.data.fill_(-100.0)
        batch = cases.batch(model.readers, cases.examples(model.readers))
        assert_close(by_sample(views.changed(batch)[modality]), by_sample(batch[modality]))


# families


def test_families_are_drawn_with_their_shares():
    model = cases.model()
    inner = Masked(model, "image")
    families = Families(model, inner, "image", {"a": [Level(shift=5.0)], "b": [], "c": [Noise()]}, start={"a": 2, "b": 1}).double()
    assert_close(families.tell()["share/a"], torch.tensor(0.5).double())
    one = cases.batch(model.readers, cases.examples(model.readers, 1))["image"]
    batch = {"image": one.map(lambda field: field.expand(500, *field.shape[1:])), "seed": random.fold(torch.arange(500), "s")}
    changed = families.design(inner, batch, None, False)["image"].x - batch["image"].x
    plain, level = (changed == 0).flatten(1).all(1), ((changed.std((1, 2)) / changed.abs().amax((1, 2))) < 0.5)
    assert abs(float(plain.double().mean()) - 0.25) < 0.07
    again = families.design(inner, batch, None, False)["image"].x
    assert torch.equal(again - batch["image"].x, changed)
    assert level.any()
    families.per = "batch"
    kinds = {
        bool((families.design(inner, {**batch, "step": k}, None, False)["image"].x == batch["image"].x).all()) for k in range(20)
    }
    assert kinds == {True, False}


def test_the_value_of_families_is_the_mean_over_draws():
    """Masked takes samples one by one: the weighted loss equals the mean of the losses of all draws."""
    model = cases.model()
    inner = Masked(model, "image", width=16).double()
    families = Families(model, inner, "image", {"a": [Colour()], "b": [Erase()]}, start={"a": 3.0}).double()
    batch = cases.batch(model.readers, cases.examples(model.readers, 2))
    ahead = families.ask(inner, model, families.design(inner, batch, inner.look(model, batch), True))["masked"]
    wanted = 0.0
    every = [view.changed(batch)["image"].x for view in families.views.values()]
    for draw in ((a, b) for a in (0, 1) for b in (0, 1)):
        mixed = batch["image"]._replace(x=torch.stack([every[kind][row] for row, kind in enumerate(draw)]))
        loss = inner(model, inner.task({**batch, "image": mixed}))["masked"].total
        wanted = wanted + math.prod((0.75, 0.25)[kind] for kind in draw) * loss
    assert_close(ahead.total, wanted)


def test_a_family_that_hurts_loses_its_share():
    """Value and shares move together: the gradient by a logit is share * (value of the family - value)."""
    pretrainer, batch = made(*DESIGNED["families"])
    exact, (slopes,), _ = value(pretrainer, batch, Double())
    shares = pretrainer.objective.designer.logits.softmax(-1)
    alone = []
    for number in range(3):
        with torch.no_grad():
            pretrainer.objective.designer.logits.copy_(torch.where(torch.arange(3) == number, 0.0, -1e4))
        alone.append(value(pretrainer, batch, Double())[0])
    assert_close(slopes, shares * (torch.stack(alone) - exact))


# ranks, precision, refusals


def ahead(shares, name, split):
    steered.DESIGNED[name] = DESIGNED[name]
    return steered.ahead(shares, name, split)


@pytest.mark.parametrize("split", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("chosen", ["audio", "video", "families", "learned families"])
def test_two_ranks_look_ahead_as_one_process_does(ranks, chosen, split):
    alone = ahead([sorted(SHARES[0] + SHARES[1])], chosen, split)
    for found in ranks(ahead, SHARES, chosen, split):
        assert_close(found, alone, rtol=1e-5, atol=1e-9)


def test_bfloat16_and_float32(name):
    pretrainer, batch = made(*DESIGNED[name])
    pretrainer.float()
    single = {
        key: cases_float(value) if key != "feedback" else {k: cases_float(v) for k, v in value.items()}
        for key, value in batch.items()
    }
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probe, _ = steered.step(pretrainer, single)
    assert probe.told["value"].isfinite()
    phi = [p.grad for n, p in pretrainer.named_parameters() if n.startswith("objective.designer")]
    assert phi
    assert all(g.isfinite().all() and g.any() for g in phi)


def cases_float(value):
    return value._replace(x=value.x.float()) if isinstance(value, Tokens) and value.x.is_floating_point() else value


@pytest.mark.parametrize(
    ("designer", "said"),
    [
        (partial(Views, modality="choice", changes=[Noise()]), "the objective reads image"),
        (partial(Views, modality="image", changes=[Noise()], start=1.0), "above 0 and below 1"),
        (partial(Views, modality="image", changes=[Blur(axes=[3])]), "axes"),
        (partial(Families, modality="image", families={"a": []}), "two or more"),
        (partial(Families, modality="image", families={"a": [], "b": []}, start={"c": 1.0}), "two or more"),
    ],
)
def test_what_cannot_work_is_refused(model, designer, said):
    with pytest.raises(ValueError, match=said):
        designer(model, Masked(model, "image"))


def test_more_refusals(model):
    with pytest.raises(ValueError, match="made of ids"):
        Views(model, Masked(model, "text", mode="substitute"), "text", [Noise()])
    with pytest.raises(ValueError, match="no picture"):
        Views(model, Masked(model, "audio"), "audio", [Colour()])
    regions = cases.OBJECTIVES["Regions phrases"](model)
    with pytest.raises(ValueError, match="away from its labels"):
        Views(model, regions, "image", [Zoom()])
    Views(model, regions, "image", [Colour()])
    for kind, options in (
        (Colour, {"most": 2.0}),
        (Noise, {"most": 0.0}),
        (Zoom, {"least": 0.0}),
        (Erase, {"count": 0}),
        (Drop, {"most": 1.0}),
    ):
        with pytest.raises(ValueError, match="found"):
            kind(**options)


def test_a_recipe_spells_them_out(model):
    """What jsonargparse makes of the YAML of a recipe."""
    parser = ArgumentParser()
    parser.add_argument("--designer", type=Callable[[Model, Objective], Designer])
    colour = {"class_path": "headwater.objectives.designers.Colour", "init_args": {"most": 0.5}}
    zoom = {"class_path": "headwater.objectives.designers.Zoom", "init_args": {"least": 0.5, "axes": [1, 2]}}
    told = {"modality": "image", "families": {"plain": [], "both": [colour, zoom]}, "start": {"both": 3.0}}
    config = {"designer": {"class_path": "headwater.objectives.designers.Families", "init_args": told}}
    made = parser.instantiate(parser.parse_object(config)).designer(model, Masked(model, "image"))
    assert [type(change) for change in made.views.both.changes.values()] == [Colour, Zoom]
    assert made.views.both.changes["zoom"].axes == [1, 2]
    assert_close(made.tell()["share/both"], torch.tensor(0.75))
