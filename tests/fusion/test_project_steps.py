"""Projected tokens that move the position on by less than a word does, and a language model that stays as it is."""

import hashlib
from functools import partial

import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater.fusion import Project
from headwater.modalities import Image, Text
from headwater.model import Model
from headwater.objectives import Causal
from headwater.tokens import Tokens
from headwater.trunk import Trunk


def small(step=1.0, position="rotary", frozen=()):
    torch.manual_seed(0)
    text = Text(Trunk(32, 2, 2, position), length=24)
    return Model({"image": Image(Trunk(48, 1, 2), 32, 16), "text": text}, partial(Project, step=step), frozen=frozen).double()


def embedded(model, packed=False):
    batch = cases.batch(model.readers, cases.examples(model.readers, n=5), packed=packed)
    return model.embed({n: t for n, t in batch.items() if isinstance(t, Tokens)})


@pytest.mark.parametrize("position", ["sincos", "rotary", "alibi"])
@pytest.mark.parametrize("step", [0.5, 1 / 256])
def test_positions_are_those_of_a_row_written_by_hand(step, position):
    """M patches at 0, step, 2 step, ...; words at M step, M step + 1, ..."""
    model = small(step, position)
    parts = embedded(model)
    got = model(parts, True)["text"].x
    pictures = model.encoder("image")(parts["image"], True)
    for s in range(5):
        words = parts["text"].x[s : s + 1, parts["text"].real()[s]]
        patches = model.fusion.enter["image"](pictures.x[s : s + 1, pictures.real()[s]])
        n, m = words.shape[1], patches.shape[1]
        place = torch.cat([step * torch.arange(m), m * step + torch.arange(n)])
        order = torch.cat([torch.zeros(m, dtype=torch.long), m + torch.arange(n)])[None]
        row = Tokens(torch.cat([patches, words], 1), place[None, :, None], order=order)
        assert_close(got[s, :n], model.encoder("text").trunk(row, True).x[0, m:])


def test_packing_changes_nothing():
    model = small(0.25)
    rows, packed = embedded(model), embedded(model, packed=True)
    alone, together = (model(parts, True)["text"].x[:, : parts["text"].x.shape[1]] for parts in (rows, packed))
    for s in range(5):
        mine = packed["text"].real() & (packed["text"].sample() == s)
        assert_close(together[mine], alone[s, rows["text"].real()[s]])


def test_words_alone_are_bit_for_bit_those_of_the_language_model():
    model = small(0.25)
    parts = embedded(model)
    plain = model.encoder("text")(parts["text"], causal=True).x
    assert torch.equal(model({"text": parts["text"]}, True)["text"].x, plain)


def test_a_step_is_a_positive_share_of_a_word():
    with pytest.raises(ValueError, match="found step 0"):
        Project({"image": 8, "text": 8}, step=0)


def digest(module):
    """Of all weights, bit by bit."""
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in module.state_dict().values())).hexdigest()


def test_with_frozen_encoders_only_the_projector_changes():
    model = small(0.5, frozen=["text", "image"])
    objective = Causal(model, prefix=["image"])
    batch = cases.batch(model.readers, cases.examples(model.readers, n=5))
    parts = {"text": model.encoder("text"), "image": model.encoder("image"), "projector": model.fusion}
    before = {name: digest(part) for name, part in parts.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(4):
        cases.loss(objective(model, objective.task(batch))).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = {name: digest(part) for name, part in parts.items()}
    assert [name for name in parts if after[name] != before[name]] == ["projector"]
