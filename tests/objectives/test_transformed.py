from functools import partial
from itertools import permutations

import numpy as np
import pytest
import torch
from contracts import cases

from headwater import random
from headwater.datamodules.collate import collate
from headwater.modalities import Audio, Image, Series, Video
from headwater.model import Model
from headwater.objectives import Transformed
from headwater.objectives.transformed import Permutation, Reversal, Rotation, Speed
from headwater.trunk import Trunk

KINDS = {
    "reversal": (Reversal(), "video"),
    "permutation": (Permutation(3), "audio"),
    "speed": (Speed([1, 2], 2), "video"),
    "rotation": (Rotation(8), "image"),
    "rotation of films": (Rotation(8), "video"),
}


def tasks(name, packed):
    """The task of one batch under every kind, with the draw of the kind overruled."""
    transform, modality = KINDS[name]
    model = cases.model()
    o = Transformed(model, modality, transform)
    batch = cases.batch(model.readers, cases.examples(model.readers), packed=packed)
    found = [o.task({**batch, "seed": seeds(modality, transform, kind, len(batch["seed"]))}) for kind in range(transform.kinds)]
    return batch[modality], [(t[modality], t["fits"], t["kind"]) for t in found]


def seeds(modality, transform, kind, number):
    """So many seeds whose draw is this kind."""
    every = torch.arange(500)
    drawn = (random.uniform(every, (), f"transformed/{modality}") * transform.kinds).long()
    return every[drawn == kind][:number]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_nothing_but_values_tells_what_was_done(name, packed):
    """Places, masks, documents and orders are the same under every kind, and each kind happens."""
    before, found = tasks(name, packed)
    first, fits, _ = found[0]
    assert fits.any()
    for kind, (t, also, kinds) in enumerate(found):
        assert (kinds == kind).all()
        assert torch.equal(also, fits)
        for a, b in zip(t[1:], first[1:], strict=True):
            assert a is b is None or torch.equal(a, b)
        if kind:
            assert not torch.equal(t.x, first.x)
    untouched = ~fits[before.sample()]
    assert all(torch.equal(t.x[untouched], before.x[untouched]) for t, _, _ in found)


def one(modality, encoder, signal, transform, kind):
    """The signal's tokens after one kind was done to it."""
    model = Model({modality: encoder})
    o = Transformed(model, modality, transform)
    t = collate([{modality: encoder.reader.tokens(signal)}], [modality])[modality]
    task = o.task({modality: t, "seed": seeds(modality, transform, kind, 1)})
    assert task["fits"].all()
    assert task["kind"].tolist() == [kind]
    return task[modality]


@pytest.mark.parametrize("kind", range(4))
def test_rotation_is_that_of_the_picture(kind):
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    encoder = Image(cases.trunk(), 32, 8)
    t = one("image", encoder, picture, Rotation(8), kind)
    assert torch.equal(t.x[0], encoder.reader.tokens(np.rot90(picture, kind).copy()).x)
    films = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)
    films_encoder = Video(cases.trunk(), 32, 8, frames=4, tubelet=2)
    t = one("video", films_encoder, list(films), Rotation(8), kind)
    assert torch.equal(t.x[0], films_encoder.reader.tokens([*np.rot90(films, kind, (1, 2))]).x)


@pytest.mark.parametrize("kind", range(6))
def test_other_kinds_do_what_they_say(kind):
    encoder = Series(cases.trunk(), channels=1, steps=1)
    series = np.arange(11, dtype=np.float32)[:, None]
    plain = encoder.reader.tokens(series).x[:, 0]

    def after(transform, kind):
        t = one("series", encoder, series, transform, kind)
        return t.x[0, t.real()[0], 0]

    order = [*permutations(range(3))][kind]
    assert torch.equal(after(Permutation(3), kind), torch.cat([plain[3 * k : 3 * k + 3] for k in order]))
    assert torch.equal(after(Reversal(), kind % 2), plain.flip(0) if kind % 2 else plain)
    factor = [1, 2, 3][kind % 3]
    seen = after(Speed([1, 2, 3], 4), kind % 3)
    start = int((plain == seen[0]).nonzero())
    assert torch.equal(seen, plain[start::factor][:4])


def test_what_does_not_fit_counts_nothing():
    model = Model({"image": Image(cases.trunk(), 24, 8, "native"), "audio": Audio(cases.trunk(), bands=4, frames=4)}).double()
    pictures = [
        np.zeros(size, np.uint8) for size in ((24, 24, 3), (32, 8, 3), (16, 16, 3))
    ]  # 4 patches of the second are no square
    samples = [{"image": model.readers["image"].tokens(p)} for p in pictures]
    batch = cases.batch({"image": model.readers["image"]}, samples)
    assert Transformed(model, "image", Rotation(8)).task(batch)["fits"].tolist() == [True, False, True]
    sounds = cases.batch(
        {"audio": model.readers["audio"]}, [{"audio": t.map(lambda f: f[:2])} for t in model.readers["audio"].example(2, 0)]
    )
    o = Transformed(model, "audio", Permutation(3))
    task = o.task(sounds)
    assert o.numbers(task) == {"transformed": 0}
    assert torch.equal(task["audio"].x, sounds["audio"].x)


def accuracy(make, transform, modality, signals, train=40, steps=60):
    """Trained on `train` signals at a time, new ones in each step; scored on others."""
    torch.manual_seed(0)
    model = Model({modality: make()})
    o = Transformed(model, modality, transform)
    step = torch.optim.Adam([*model.parameters(), *o.parameters()], 3e-3)
    for number in range(steps + 5):
        t = signals(number, train)
        batch = {modality: t, "seed": torch.arange(len(t.x)) + 10**6 * number}
        (term,) = o(model, o.task(batch)).values()
        if number < steps:
            step.zero_grad()
            (term.total / term.number).backward()
            step.step()
        else:
            yield term.metrics["accuracy"].item()


def noise(encoder, number, rows):
    reader = encoder.reader
    generator = torch.Generator().manual_seed(number)
    t = collate([{"it": t} for t in reader.example(rows, number)], ["it"])["it"]
    return t._replace(x=torch.randn(*t.x.shape, generator=generator))


@pytest.mark.parametrize("name", KINDS)
def test_on_noise_it_stays_at_chance(name):
    transform, modality = KINDS[name]
    make = {
        "video": partial(Video, Trunk(16, 1), 16, 8, frames=4),
        "audio": partial(Audio, Trunk(16, 1), bands=4, frames=4),
        "image": partial(Image, Trunk(16, 1), 16, 8),
    }[modality]
    found = [*accuracy(make, transform, modality, partial(noise, make()), train=64)]
    chance, asked = 1 / transform.kinds, 5 * 64
    assert abs(np.mean(found) - chance) < 4 * (chance * (1 - chance) / asked * 2) ** 0.5


@pytest.mark.parametrize("name", ["reversal", "rotation"])
def test_on_signals_with_a_direction_it_learns(name):
    """Films that grow brighter, and pictures that are bright at the top."""
    transform, modality = KINDS[name]
    ramp = torch.linspace(-1, 1, 4)

    def signals(number, rows):
        generator = torch.Generator().manual_seed(number)
        if modality == "video":
            film = ramp[None, :, None, None, None] + 0.5 * torch.randn(rows, 4, 16, 16, 3, generator=generator)
            frames = ((film.clamp(-3, 3) / 6 + 0.5) * 255).to(torch.uint8).numpy()
            tokens = [make().reader.tokens([*f]) for f in frames]
        else:
            picture = torch.linspace(-1, 1, 16)[None, :, None, None] + 0.5 * torch.randn(rows, 16, 16, 3, generator=generator)
            tokens = [make().reader.tokens(p) for p in ((picture.clamp(-3, 3) / 6 + 0.5) * 255).to(torch.uint8).numpy()]
        return make().reader.prepare(collate([{"it": t} for t in tokens], ["it"])["it"])

    make = {"video": partial(Video, Trunk(16, 1), 16, 8, frames=4), "image": partial(Image, Trunk(16, 1), 16, 8)}[modality]
    assert np.mean([*accuracy(make, transform, modality, signals, steps=40)]) > 0.9


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="6 segments"):
        Permutation(6)
    with pytest.raises(ValueError, match="two or more different paces"):
        Speed([2, 2])
    model = cases.model()
    with pytest.raises(ValueError, match="set patch and channels as the reader has"):
        Transformed(model, "audio", Rotation()).task(cases.batch(model.readers, cases.examples(model.readers)))
