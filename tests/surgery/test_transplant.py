import pytest
import torch
from torch.testing import assert_close

from headwater import init
from headwater.fusion import CrossAttend
from headwater.hub import load_backbone, pretrained, save_backbone
from headwater.modalities import Text
from headwater.modalities.text import TextReader
from headwater.model import Encoder, Model
from headwater.objectives import Causal
from headwater.position import Learned, Rotary
from headwater.pretrainer import Pretrainer
from headwater.surgery import bidirectional, longer, redrawn, transplanted, within
from headwater.surgery.context import stretched
from headwater.tokens import Tokens
from headwater.trunk import Trunk


def text(seed=0, depth=2, position="rotary", length=16):
    torch.manual_seed(seed)
    made = Text(Trunk(16, depth, 2, position=position), length=length).eval()
    for p in made.trunk.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return made


def seen(encoder, texts=("ab", "some words"), causal=False):
    from headwater.datamodules.collate import collate

    t = collate([{"it": encoder.reader.tokens(x)} for x in texts], ["it"])["it"]
    with torch.no_grad():
        return encoder(encoder.embed(t), causal).x[t.real()]


@pytest.mark.parametrize(("parts", "word"), [(["attention"], ".attn."), (["mlp"], ".mlp."), ([r"blocks\.1\."], "blocks.1.")])
def test_parts_of_another_encoder(parts, word):
    one, other = text(0), text(1)
    made = transplanted(one, other, parts)
    for name, value in made.state_dict().items():
        assert torch.equal(value, (other if word in name else one).state_dict()[name])
    assert made.settled
    assert not one.settled
    assert {row.ours for row in made.report.rows if row.how == "renamed"} == {n for n in one.state_dict() if word in n}


def test_all_or_nothing_is_the_identity():
    one = text(0)
    assert_close(seen(transplanted(one, one, ["."])), seen(one), rtol=0, atol=0)


def test_parts_start_anew_and_stay_so():
    one = text(0)
    made = redrawn(one, ["embedding"], seed=3)
    for name, value in made.state_dict().items():
        fresh = name.startswith(("stem.", "head."))
        assert torch.equal(value, one.state_dict()[name]) != fresh
    again = redrawn(one, ["embedding"], seed=3)
    assert_close(again.state_dict(), made.state_dict(), rtol=0, atol=0)
    kept = {n: p.clone() for n, p in made.state_dict().items()}
    Pretrainer(Model({"text": made}), Causal, init=init.Normal())
    assert_close(made.state_dict(), kept, rtol=0, atol=0)


def test_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match="found nothing called 'atention'"):
        redrawn(text(), ["atention"])
    with pytest.raises(ValueError, match="other shape"):
        transplanted(text(), Text(Trunk(32, 2, 2, position="rotary"), length=16), ["mlp"])
    with pytest.raises(ValueError, match=r"the source has no trunk\.blocks\.1"):
        transplanted(text(depth=2), text(depth=1), ["attention"])


def test_a_causal_model_looks_ahead_when_it_is_told_to():
    torch.manual_seed(0)
    reader = TextReader(length=16)
    causal = Encoder(reader, Trunk(16, 2, 2, position="rotary"), pooling="last", causal=True).eval()
    made = bidirectional(causal, pooling="mean")
    assert_close(seen(made, causal=True), seen(causal), rtol=0, atol=0)
    both = seen(made, ["abcdef"]), seen(made, ["abcdeg"])
    alone = seen(causal, ["abcdef"]), seen(causal, ["abcdeg"])
    assert torch.equal(alone[0][:5], alone[1][:5])
    assert not torch.allclose(both[0][0], both[1][0])
    assert made.pooling == "mean"


def test_a_decoder_becomes_an_encoder_and_a_decoder(tmp_path):
    """Both halves start from it, and behind closed gates it goes on as it did."""
    decoder = text()
    save_backbone(Model({"text": decoder}), tmp_path / "lm")
    halves = {name: pretrained(tmp_path / "lm") for name in ("source", "text")}
    model = Model(halves, lambda w: CrossAttend(w, asks={"text": ["source"]}, depth=2, gated=True)).eval()
    raw = {name: one.reader.example(3, 0)[0].map(lambda f: f[None]) for name, one in halves.items()}
    with torch.no_grad():
        joint = model(model.embed(raw), True)["text"].x
        assert_close(joint, decoder(decoder.embed(raw["text"]), True).x)


def test_a_model_keeps_all_else():
    one, other = text(0), text(1)
    model = Model({"a": one, "b": other}, lambda w: CrossAttend(w), space=8)
    made = within(model, "a", longer(one, 64, base=1e5))
    assert made.fusion is model.fusion
    assert made.encoder("b") is other
    assert_close(made.projections.state_dict(), model.projections.state_dict())
    assert made.encoder("a").reader.most == 64
    with pytest.raises(ValueError, match="width 32"):
        within(model, "a", Text(Trunk(32, 1, 2), length=16))


def test_longer_texts_by_a_larger_base_or_by_interpolation(tmp_path):
    one = text()
    made = longer(one, 64)
    assert_close(seen(made), seen(one), rtol=0, atol=0)  # short ones are what they were
    assert len(made.reader.tokens("x" * 100).x) == 64
    assert isinstance(made.trunk.position, Rotary)
    slow = longer(one, 64, base=5e5)
    assert slow.trunk.position.base == 5e5
    assert not torch.allclose(seen(slow), seen(one), atol=1e-4)
    save_backbone(Model({"text": slow}), tmp_path / "long")
    again = load_backbone(tmp_path / "long").model.encoder("text")
    assert (again.reader.most, again.trunk.position.base) == (64, 5e5)


def test_places_between_those_that_were_learned():
    one = text()
    near, far = Tokens(torch.zeros(1, 4, 1), torch.arange(4.0)[None, :, None]), torch.arange(0, 16.0, 4)[None, :, None]
    made = longer(one, 64, stretch=4.0)
    angles = made.trunk.position.angle(near._replace(position=far), 8)
    assert_close(angles, one.trunk.position.angle(near, 8))


def test_learned_positions_are_interpolated():
    one = text(position=Learned([16]))
    made = longer(one, 31)
    table, old = made.trunk.position.table.detach(), one.trunk.position.table.detach()
    assert_close(table[::2], old)
    assert_close(table[1::2], (old[1:] + old[:-1]) / 2)
    assert torch.equal(stretched(old, 16), old)


def test_what_cannot_be_longer_is_refused():
    with pytest.raises(ValueError, match="at least as many"):
        longer(text(), 8)
    with pytest.raises(ValueError, match="leave both out"):
        longer(text(position="sincos"), 32, base=1e5)
