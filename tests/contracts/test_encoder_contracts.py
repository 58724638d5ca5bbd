"""What every exported encoder and its reader keep."""

import copy
import json
import pickle

import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater import modalities, random
from headwater.datamodules.collate import collate
from headwater.model import Encoder, Reader
from headwater.spec import build
from headwater.tokens import Tokens

every = pytest.mark.parametrize("name", cases.ENCODERS)
NOT_INVERTIBLE = {"Audio"}  # a waveform out of a spectrogram needs a vocoder; test_audio checks what restore gives


def make(name, seed=0):
    torch.manual_seed(seed)
    return cases.ENCODERS[name](cases.trunk()).double()


def raw(encoder, n=5, packed=False):
    samples = [{"it": t} for t in encoder.reader.example(n, 0)]
    return cases.batch({"it": cases.preparing(encoder)}, samples, packed=packed)["it"]


def test_every_export_has_a_case():
    encoders = {cls.__name__ for cls in cases.exports(modalities) if issubclass(cls, Encoder)}
    assert {type(make(name)).__name__ for name in cases.ENCODERS} >= encoders


@every
def test_example_is_a_function_of_its_seed(name):
    reader = make(name).reader
    a, again, other = (torch.cat([t.x.flatten().double().nan_to_num() for t in reader.example(5, s)]) for s in (0, 0, 1))
    assert torch.equal(a, again)
    assert a.shape != other.shape or not torch.equal(a, other)


@every
def test_reader_survives_copy_and_pickle(name):
    reader = make(name).reader
    for other in (copy.deepcopy(reader), pickle.loads(pickle.dumps(reader))):
        assert other.spec == reader.spec
        assert vars(other).keys() == vars(reader).keys()
        assert all(torch.equal(a.position, b.position) for a, b in zip(reader.example(3, 0), other.example(3, 0), strict=True))


@every
def test_restore_is_the_inverse_of_reading(name):
    reader = make(name).reader
    if type(reader).restore is Reader.restore:
        pytest.skip("this reader has no way back")
    samples = reader.example(4, 0)
    ready = reader.prepare(collate([{"it": t} for t in samples], ["it"])["it"])
    for i, t in enumerate(samples):
        signal = reader.restore(ready.map(lambda field, i=i: field[i : i + 1]))
        if name.split()[0] not in NOT_INVERTIBLE:
            again = reader.tokens(signal)
            assert_close(again.x, t.x, equal_nan=True)
            assert torch.equal(again.position, t.position)


@every
def test_coordinate_zero_never_runs_backwards(name):
    for t in make(name).reader.example(4, 0):
        assert t.position.ndim == 2
        assert (t.position[1:, 0] >= t.position[:-1, 0]).all()


@every
def test_spec_makes_the_same_encoder_again(name):
    encoder = make(name)
    again = build(json.loads(json.dumps(encoder.spec)))
    assert type(again) is type(encoder)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in encoder.named_parameters()}
    assert again.reader.spec == encoder.reader.spec


@every
def test_embed_does_not_mix_tokens(name):
    encoder = make(name)
    t = raw(encoder)
    other = t.x.clone()
    other[:, 1] = (other[:, 1] + 1) % encoder.vocab if encoder.vocab else other[:, 1].nan_to_num() + 1
    changed = (encoder.embed(t).x != encoder.embed(t._replace(x=other)).x).any(-1)
    assert changed[:, 1].all()
    assert not changed[:, 0].any()
    assert not changed[:, 2:].any()


@every
def test_subsets_keep_their_place(name):
    """An encoder that is maskable gives tokens the same vectors when all others are marked as padding or really left out."""
    encoder = make(name)
    t = encoder.embed(raw(encoder))
    keep = random.uniform(torch.arange(t.x.shape[1]), (), "keep") < 0.6
    marked = encoder(t._replace(valid=t.real() & keep))
    taken = encoder(t.take(keep.nonzero().T.expand(len(t.x), -1)))
    assert_close(taken.x[taken.real()], marked.x[:, keep][taken.real()])


@every
@pytest.mark.parametrize("registers", [0, 2])
def test_padded_and_packed_samples_are_encoded_as_if_alone(name, registers):
    if registers and name == "Video factorised":
        pytest.skip("it takes no registers: they belong to no moment and no place")
    encoder = cases.ENCODERS[name](cases.trunk(registers=registers, position="rotary")).double()
    samples = [{"it": t} for t in encoder.reader.example(5, 0)]

    def encode(numbers, packed=False, behind=0):
        t = cases.batch({"it": cases.preparing(encoder)}, samples, numbers, packed)["it"]
        if behind:
            rubbish = t.map(lambda f: f[:, :1].expand(-1, behind, *f.shape[2:]))
            t = Tokens(*(None if f is None else torch.cat([f, g], 1) for f, g in zip(t, rubbish, strict=True)))
            t = t._replace(valid=torch.cat([t.real()[:, :-behind], torch.zeros(len(t.position), behind, dtype=torch.bool)], 1))
        y = encoder(encoder.embed(t))
        return {int(s): y.x[(y.sample() == s) & y.real()] for s in y.samples()}, encoder.pool(y).x

    alone = [encode([i]) for i in range(5)]
    for tokens, pooled in (encode(range(5)), encode(range(5), behind=3), encode(range(5), packed=True)):
        for i, (one, vector) in enumerate(alone):
            assert_close(tokens[i], one[0])
            assert_close(pooled[i], vector[0])


@every
def test_unembed_and_pool_have_the_promised_shapes(name):
    encoder = make(name)
    y = encoder(encoder.embed(raw(encoder)))
    assert encoder.unembed(y.x).shape == (*y.x.shape[:2], encoder.vocab or encoder.features)
    assert encoder.pool(y).x.shape == (5, encoder.dim)


@every
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("position", ["sincos", "rotary"])
def test_no_later_order_reaches_an_earlier_one(name, packed, position):
    encoder = cases.ENCODERS[name](cases.trunk(position=position)).double()
    sees({"it": encoder.embed(raw(encoder, packed=packed))}, lambda parts: {"it": encoder(parts["it"], causal=True)})


def sees(parts: dict[str, Tokens], mix, causal=True):
    """Checks who reaches whom, by gradients: a key must reach a query when it is real, of its sample, and not later; else never."""
    parts = {n: t._replace(x=t.x.detach().requires_grad_()) for n, t in parts.items()}
    out = mix(parts)
    probe = {n: torch.randn_like(t.x[0, 0]) for n, t in out.items()}  # a plain sum has no gradient behind a LayerNorm
    order = {n: t.place() if t.order is None else t.order for n, t in parts.items()}
    for q, t in out.items():
        for i in range(t.x.shape[1]):
            grads = torch.autograd.grad((t.x[:, i] @ probe[q]).sum(), [k.x for k in parts.values()], retain_graph=True)
            for (k, key), grad in zip(parts.items(), grads, strict=True):
                allowed = key.real() & (key.sample() == parts[q].sample()[:, i : i + 1])
                if causal:
                    allowed = allowed & (order[k] <= order[q][:, i : i + 1])
                if k == q:  # a token always reaches itself along the residual stream
                    allowed[:, i] = True
                real = parts[q].real()[:, i]
                assert torch.equal((grad.abs().amax(-1) > 0)[real], allowed[real]), f"{k} -> {q}[{i}]"


@every
def test_a_token_is_embedded_alone_where_the_encoder_says_so(name):
    encoder = make(name)
    if not encoder.pointwise:
        pytest.skip("its embedding looks at the other tokens")
    t = raw(encoder)
    index = torch.arange(0, t.position.shape[1], 2).expand(len(t.x), -1)
    assert_close(encoder.embed(t.take(index)).x, encoder.embed(t).take(index).x)
