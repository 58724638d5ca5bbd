"""Tokenisers of every kind of signal: there and back, one code per place or few for the whole, and what stays frozen."""

from functools import partial

import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater import modalities
from headwater.init import initialise
from headwater.modalities import Autoencoder
from headwater.modalities.bottlenecks import FSQ, KL, VQ, Plain
from headwater.model import Model
from headwater.objectives import Reconstructed
from headwater.tokens import Tokens

KINDS = {
    "image": lambda t: modalities.Image(t, 16, 8),
    "audio": lambda t: modalities.Audio(t, bands=4, frames=4, height=2, seconds=0.2),
    "video": lambda t: modalities.Video(t, 16, 8, frames=4),
    "action": lambda t: modalities.Action(t, slots=3, steps=8),
    "choices": lambda t: modalities.Action(t, choices=5, steps=8),
    "text": lambda t: modalities.Text(t, length=12),
}
BOTTLENECKS = {
    "vq": lambda: VQ(16, 4),
    "residual": lambda: VQ(8, 4, 3, normalise=False, decay=0.9),
    "fsq": lambda: FSQ((5, 4)),
    "kl": lambda: KL(4),
    "frozen": lambda: Plain(),
}


def made(kind="image", bottleneck="vq", registers=0, **options):
    torch.manual_seed(0)
    encoder = KINDS[kind](cases.trunk(registers=registers))
    options = {"frozen": bottleneck == "frozen", "codes": "registers" if registers else "tokens"} | options
    return Autoencoder(encoder, BOTTLENECKS[bottleneck](), cases.trunk(12), **options).double().eval()


def raw(autoencoder, numbers=range(4), packed=False):
    samples = [{"it": t} for t in autoencoder.reader.example(4, 0)]
    return cases.batch({"it": cases.preparing(autoencoder)}, samples, numbers, packed)["it"]


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
def test_codes_decode_to_what_was_rebuilt(kind, bottleneck, registers):
    autoencoder = made(kind, bottleneck, registers)
    t = raw(autoencoder)
    rebuilt, codes = autoencoder.rebuild(t).values, autoencoder.codes(t)
    values = rebuilt.argmax(-1) if autoencoder.vocab else rebuilt
    back = autoencoder.decode(codes)
    if registers:  # on the canvas of the longest signal, for which shorter ones were not rebuilt
        canvas = autoencoder.encoder.blank()
        assert codes.position.shape[1] == 3 * autoencoder.bottleneck.books
        assert torch.equal(back.position, canvas.position.expand(4, -1, -1))
        if not (long := t.real().sum(1) == canvas.position.shape[1]).any():
            return
        t, back, values = (x.map(lambda f: f[long]) if isinstance(x, Tokens) else x[long] for x in (t, back, values))
    elif autoencoder.bottleneck.books == 1:
        assert torch.equal(codes.position, t.position)
    assert torch.equal(back.position, t.position)
    assert_close(back.x[t.real()], values[t.real()])


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("bottleneck", ["vq", "residual", "kl"])
def test_packed_and_padded_signals_have_the_codes_that_they_have_alone(bottleneck, registers):
    autoencoder = made("audio", bottleneck, registers)

    def codes(t):
        found = autoencoder.codes(t)
        return {int(s): found.x[(found.sample() == s) & found.real()] for s in found.samples()}

    alone = [codes(raw(autoencoder, [k]))[0] for k in range(4)]
    for packed in (False, True):
        together = codes(raw(autoencoder, packed=packed))
        assert len(together) == 4
        for k, one in enumerate(alone):
            assert_close(together[k], one)


def test_ids_of_several_codebooks_stand_in_a_row_each_in_a_range_of_its_own():
    autoencoder = made("video", "residual")
    t = raw(autoencoder)
    codes = autoencoder.codes(t)
    number = t.position.shape[1]
    assert codes.x.shape == (4, 3 * number)
    assert torch.equal(codes.x // 8, torch.arange(3).repeat(number).expand(4, -1))
    assert torch.equal(codes.position[:, ::3, :-1], t.position)
    assert torch.equal(codes.position[..., -1].long(), codes.x // 8)
    assert torch.equal(codes.order, t.order.repeat_interleave(3, 1))
    assert_close(autoencoder.decode(codes._replace(x=(codes.x + 8) % 24)).x, autoencoder.decode(codes).x)
    with pytest.raises(ValueError, match="3 codebooks"):
        autoencoder.decode(codes.map(lambda field: field[:, :-1]))


def test_the_canvas_of_codes_has_their_places():
    for registers in (0, 3):
        for bottleneck in ("residual", "kl"):
            autoencoder = made("image", bottleneck, registers)
            blank, codes = autoencoder.blank_codes(), autoencoder.codes(raw(autoencoder))
            assert torch.equal(blank.position, codes.position[:1])
            assert blank.x.shape == codes.x[:1].shape
            assert not blank.x.any()


def test_a_causal_tokeniser_codes_what_comes_in_before_the_rest_is_there():
    autoencoder = made("action", "residual", causal=True)
    t = raw(autoencoder)
    start = t.map(lambda field: field[:, :2])
    whole, first = autoencoder.codes(t), autoencoder.codes(start)
    assert torch.equal(whole.x[:, :6], first.x)
    assert_close(autoencoder.decode(whole).x[:, :2], autoencoder.decode(first).x)


def test_a_frozen_encoder_keeps_its_weights_and_its_mode():
    encoder = KINDS["image"](cases.trunk())
    before = {n: p.clone() for n, p in encoder.trunk.named_parameters()}
    autoencoder = Autoencoder(encoder, Plain(noise=0.1), cases.trunk(12), frozen=True)
    initialise(autoencoder.train(), 3)
    assert autoencoder.training
    assert not encoder.training
    assert all(torch.equal(before[n], p) for n, p in encoder.trunk.named_parameters())
    assert not any(p.requires_grad for p in encoder.parameters())
    assert autoencoder.bottleneck.features == encoder.width


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("kind", ["image", "audio", "video", "action", "choices"])
def test_one_line_changes_what_is_coded_and_it_learns(kind, registers):
    torch.manual_seed(0)
    autoencoder = Autoencoder(
        KINDS[kind](cases.trunk(32, registers=registers)),
        FSQ((8, 6, 5)),
        cases.trunk(32),
        codes="registers" if registers else "tokens",
    )
    model = Model({"it": autoencoder})
    objective = Reconstructed(model, "it")
    batch = {"it": raw(autoencoder), "seed": torch.arange(4)}
    batch["it"] = batch["it"]._replace(x=batch["it"].x.float()) if batch["it"].x.is_floating_point() else batch["it"]
    optimizer = torch.optim.Adam([*model.parameters()], 3e-3)
    losses = []
    for _ in range(120):
        term = objective(model, batch)["reconstructed"]
        losses.append(term.total / term.number)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "wrong",
    [
        partial(made, codes="registers"),
        partial(made, registers=2, causal=True),
        partial(made, pooling="registers"),
    ],
)
def test_bad_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match="registers"):
        wrong()


def test_packed_codes_of_whole_signals_are_not_decoded():
    autoencoder = made("action", "vq", 2)
    with pytest.raises(ValueError, match="one signal per row"):
        autoencoder.decode(autoencoder.codes(raw(autoencoder, packed=True)))
