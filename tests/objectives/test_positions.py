from functools import partial

import numpy as np
import pytest
import torch
from contracts import cases
from torch.nn import functional as F
from torch.testing import assert_close

from headwater.datamodules.collate import collate
from headwater.modalities import Audio, Image, Text
from headwater.model import Model
from headwater.objectives import Positions
from headwater.tokens import Tokens
from headwater.trunk import Trunk


def made(seen=0.5, **trunk):
    torch.manual_seed(0)
    model = Model({"image": Image(cases.trunk(**trunk), 32, 8)}).double()
    o = Positions(model, cells=[1, 4, 4], seen=seen).double()
    return model, o, cases.batch(model.readers, cases.examples(model.readers))


@pytest.mark.parametrize("packed", [False, True])
def test_the_bag_tells_no_position(packed):
    model = cases.model()
    batch = cases.batch(model.readers, cases.examples(model.readers), packed=packed)
    o = Positions(model, "text", [24], seen=0.25)
    bag, place, asked = (o.task(batch)[k] for k in ("text", "place", "asked"))
    assert not bag.position.any()
    assert bag.order is bag.document is None
    raw = batch["text"]
    for row, sample in enumerate(raw.samples().tolist()):
        mine = (raw.sample() == sample) & raw.real()
        length = int(mine.sum())
        assert asked[row].sum() == length
        assert place[row][asked[row]].sort().values.tolist() == [*range(length)]
        assert torch.equal(bag.x[row][asked[row]], raw.x[mine][place[row][asked[row]]])
        assert bag.valid[row].sum() == max(1, round(0.25 * length))
        assert not (bag.valid[row] & ~asked[row]).any()
        assert place[row][asked[row]].tolist() != [*range(length)]  # the index does not tell either


def test_every_patch_asks_and_attention_sees_only_a_part():
    """One block of the trunk typed anew: queries of all patches, keys and values of those that are seen."""
    model, o, batch = made(seen=0.25)
    task = o.task(batch)
    bag, block = task["image"], model.encoder("image").trunk.blocks[0]
    trunk = model.encoder("image").trunk
    x = model.embed({"image": bag})["image"].x + trunk.position.add(bag)[:, :1]  # the same code for all
    h = block.norm1(x)
    q, k, v = block.attn.qkv(h).unflatten(-1, (3, trunk.heads, -1)).permute(2, 0, 3, 1, 4)
    out = []
    for row in range(len(x)):
        keys = bag.valid[row]
        weight = (q[row] @ k[row][:, keys].transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        out.append((weight @ v[row][:, keys]).transpose(0, 1).flatten(1))
    y = x + block.attn.proj(torch.stack(out))
    y = trunk.norm(y + block.mlp(block.norm2(y)))
    (term,) = o(model, task).values()
    expected = F.cross_entropy(o.head(y).flatten(0, 1), task["place"].flatten(), reduction="sum")
    assert term.number == 16 * 7
    assert_close(term.total, expected)


def test_an_unseen_patch_changes_its_own_answer_only():
    model, o, batch = made(seen=0.25)
    task = o.task(batch)
    bag = task["image"]
    column = int((~bag.valid[0]).nonzero()[0])
    other = bag.x.clone()
    other[0, column] += 1
    a, b = (model.encode(model.embed({"image": bag._replace(x=x)}))["image"].x for x in (bag.x, other))
    changed = (a != b).any(-1)
    assert changed[0, column]
    assert changed.sum() == 1


def learned(encoder, cells, signals, steps=60):
    torch.manual_seed(0)
    model = Model({"it": encoder})
    o = Positions(model, "it", cells, seen=0.5)
    step = torch.optim.Adam([*model.parameters(), *o.parameters()], 5e-3)
    right = []
    for number in range(steps + 5):
        t = signals(number)
        (term,) = o(model, o.task({"it": t, "seed": torch.arange(len(t.x)) + 1000 * number})).values()
        if number < steps:
            step.zero_grad()
            (term.total / term.number).backward()
            step.step()
        else:
            right.append(term.metrics["accuracy"].item())
    return np.mean(right)


ENCODERS = {
    "image": (lambda: Image(Trunk(32, 2), 16, 4), [1, 4, 4]),
    "audio": (lambda: Audio(Trunk(32, 2), bands=4, frames=4), [16]),
    "text": (lambda: Text(Trunk(32, 2), length=16), [16]),
}


def tokens(name, number, rows, structure):
    """Noise, plus what depends on the place."""
    encoder, cells = ENCODERS[name][0](), ENCODERS[name][1]
    generator = torch.Generator().manual_seed(number)
    count = int(np.prod(cells))
    position = torch.cartesian_prod(*map(torch.arange, cells)).reshape(count, -1).expand(rows, -1, -1)
    if encoder.vocab:
        x = torch.randint(0, 4, (rows, count), generator=generator)
        return Tokens(x + structure * 4 * torch.arange(count), position)
    x = torch.randn(rows, count, encoder.features, generator=generator)
    wave = torch.randn(count, encoder.features, generator=torch.Generator().manual_seed(0))
    return Tokens(x + structure * wave, position)


@pytest.mark.parametrize("name", ENCODERS)
def test_on_noise_it_stays_at_chance_and_on_structure_it_learns(name):
    make, cells = ENCODERS[name]
    chance, asked = 1 / np.prod(cells), 5 * 32 * np.prod(cells)
    on_noise = learned(make(), cells, partial(tokens, name, rows=32, structure=0))
    assert abs(on_noise - chance) < 5 * (chance / asked) ** 0.5
    assert learned(make(), cells, partial(tokens, name, rows=32, structure=1)) > 5 * chance


def test_real_padding_tells_nothing():
    """Texts of all lengths of the same letter: the place of a letter cannot be told, so the loss is that of guessing."""
    reader = Text(Trunk(32, 1), length=9, end="").reader

    def signals(number):
        return collate([{"it": reader.tokens("a" * (1 + (k + number) % 8))} for k in range(32)], ["it"])["it"]

    right = learned(Text(Trunk(32, 1), length=9, end=""), [8], signals)
    assert right < np.mean([1 / n for n in range(1, 9)]) + 0.1


def test_wrong_arguments_are_refused():
    model = made()[0]
    with pytest.raises(ValueError, match="a share above 0"):
        Positions(model, seen=0)
    text = Text(cases.trunk())
    text.causal = True
    with pytest.raises(ValueError, match="the encoder of text is causal"):
        Positions(Model({"text": text}), "text", [8])
