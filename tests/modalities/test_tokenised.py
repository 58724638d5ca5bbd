"""A modality as codes: what objectives meet, that the tokeniser stays as it was, and that it travels with the model."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from contracts import cases
from torch.testing import assert_close

import headwater
from headwater import modalities
from headwater.init import Normal, initialise
from headwater.modalities import Autoencoder, Tokenised
from headwater.modalities.bottlenecks import FSQ, KL, VQ
from headwater.model import Model
from headwater.objectives import Causal, Contrastive, DiscreteDiffusion, Flow, Masked
from headwater.trunk import Trunk

FIXTURES = cases.FIXTURES


def made(bottleneck=None, kind=modalities.Image, conditional=False):
    torch.manual_seed(0)
    autoencoder = Autoencoder(kind(cases.trunk(), 16, 8), bottleneck or FSQ((5, 4)), cases.trunk(12))
    return Tokenised(autoencoder, cases.trunk(conditional=conditional))


def prepared(encoder, n=4):
    samples = [{"it": t} for t in encoder.reader.example(n, 0)]
    batch = cases.batch({"it": cases.preparing(encoder)}, samples)
    return batch["it"]._replace(x=batch["it"].x.float()) if encoder.vocab is None else batch["it"]


def test_signals_become_codes_and_codes_signals():
    encoder = made()
    codes, (first, *_) = prepared(encoder), encoder.reader.example(4, 0)
    raw = encoder.reader.prepare(first.map(lambda field: field[None]))
    assert torch.equal(encoder.tokeniser.codes(raw).x[0], codes.x[0])
    assert (encoder.vocab, codes.x.shape) == (20, (4, 4))
    picture = encoder.restore(codes)
    assert picture.shape == (16, 16, 3)
    assert (picture == encoder.reader.restore(encoder.tokeniser.decode(codes.map(lambda f: f[:1])))).all()
    assert encoder.blank().x.shape == (1, 4)
    assert encoder.allowed(codes.position) is None


def test_a_place_allows_the_ids_of_its_codebook():
    encoder = made(VQ(8, 4, 3, normalise=False))
    codes = prepared(encoder)
    allowed = encoder.allowed(codes.position)
    assert allowed.shape == (4, 12, 24)
    assert (allowed.sum(-1) == 8).all()
    assert allowed.gather(-1, codes.x[..., None]).all()


@pytest.mark.parametrize(
    ("bottleneck", "objective"),
    [
        (lambda: FSQ((5, 4)), partial(Causal, modality="it")),
        (lambda: VQ(8, 4, 2, normalise=False), partial(Causal, modality="it")),
        (lambda: VQ(8, 4), partial(Masked, modality="it", mode="substitute", ratio=0.5)),
        (lambda: VQ(8, 4), partial(DiscreteDiffusion, modality="it")),
        (lambda: FSQ((5, 4)), partial(Contrastive, a="it", b="text")),
        (lambda: KL(4), partial(Flow, modality="it")),
        (lambda: KL(4), partial(Masked, modality="it", ratio=0.5, width=16)),
    ],
)
def test_every_kind_of_objective_trains_on_codes_and_the_tokeniser_does_not(bottleneck, objective):
    encoder = made(bottleneck(), conditional=True)
    model = Model({"it": encoder, "text": modalities.Text(cases.trunk(), length=12)}, space=8)
    ask = objective(model)
    text = cases.batch({"it": model.readers["text"]}, [{"it": t} for t in model.readers["text"].example(4, 0)])["it"]
    batch = {"it": prepared(encoder), "text": text, "seed": torch.arange(4)}
    before = {n: p.clone() for n, p in encoder.tokeniser.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in [*model.parameters(), *ask.parameters()] if p.requires_grad], 1e-2)
    losses = []
    for _ in range(40):
        loss = cases.loss(ask(model.train(), ask.task(batch, ask.look(model, batch))))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ask.after_step(model, 0.5)
    assert losses[-1] < losses[0]
    assert not encoder.tokeniser.training
    assert all(torch.equal(before[n], p) for n, p in encoder.tokeniser.state_dict().items())
    assert all(p.grad is None for p in encoder.tokeniser.parameters())


def test_a_trained_tokeniser_is_not_drawn_anew():
    encoder = made()
    before = {n: p.clone() for n, p in encoder.state_dict().items()}
    initialise(encoder, 7, Normal())
    same = {n for n, p in encoder.state_dict().items() if torch.equal(before[n], p)}
    assert {n for n in before if n.startswith("tokeniser.")} <= same
    assert "stem.weight" not in same


AGAIN = """
import sys, torch, headwater
b = headwater.load_backbone(sys.argv[1])
found = torch.load(sys.argv[2])
t = b.batch({"it": list(found["pictures"].numpy())})["it"]
e = b.model.encoder("it")
assert torch.equal(t.x, found["codes"]), "codes"
assert (torch.from_numpy(e.restore(t)) == found["rebuilt"]).all(), "picture"
assert torch.allclose(b.embed(it=list(found["pictures"].numpy()))["it"], found["vectors"], atol=1e-5), "vectors"
assert not any(p.requires_grad for p in e.tokeniser.parameters()) and not e.train().tokeniser.training, "frozen"
"""


@pytest.mark.parametrize("bottleneck", [lambda: VQ(16, 4, 2, normalise=False, decay=0.9), lambda: KL(4)])
def test_the_tokeniser_travels_with_the_model(tmp_path, bottleneck):
    torch.manual_seed(0)
    source = Model({"image": Autoencoder(modalities.Image(cases.trunk(), 16, 8), bottleneck(), cases.trunk(12))})
    for value in source.encoder("image").bottleneck.state_dict().values():
        value.add_(0.1 * torch.rand_like(value))  # as if it had been trained
    headwater.save_backbone(source, tmp_path / "tokeniser")
    trained = headwater.load_backbone(tmp_path / "tokeniser").model.encoder("image")
    model = Model({"it": Tokenised(trained, cases.trunk())})
    headwater.save_backbone(model, tmp_path / "model")
    b = headwater.load_backbone(tmp_path / "model")
    pictures = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    codes = b.batch({"it": list(pictures.numpy())})["it"]
    whole = source.encoder("image").eval()
    raw = whole.reader.prepare(cases.collate([{"it": whole.reader.tokens(p.numpy())} for p in pictures], ["it"])["it"])
    assert torch.equal(whole.codes(raw).x, codes.x)
    rebuilt = torch.from_numpy(b.model.encoder("it").restore(codes))
    found = {"pictures": pictures, "codes": codes.x, "rebuilt": rebuilt, "vectors": b.embed(it=list(pictures.numpy()))["it"]}
    torch.save(found, tmp_path / "found.pt")
    subprocess.run([sys.executable, "-c", AGAIN, tmp_path / "model", tmp_path / "found.pt"], check=True)


@pytest.mark.parametrize("coding", ["bins", "fast"])
def test_actions_have_tokenisers_of_their_own_that_serve_causal_prediction(coding):
    options = {"slots": 2, "tokenizer": str(FIXTURES / "fast.json")} if coding == "fast" else {"slots": 3}
    model = Model({"action": modalities.ActionTokens(Trunk(16, 1, 2), coding, **options)})
    objective = Causal(model, "action")
    reader = model.readers["action"]
    batch = cases.batch({"action": reader}, [{"action": t} for t in reader.example(4, 0)])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = cases.loss(objective(model, objective.task(batch)))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    again = reader.tokens(reader.restore(batch["action"].map(lambda field: field[:1])))
    assert_close(again.x, reader.example(4, 0)[0].x)


def test_a_tokeniser_is_an_autoencoder():
    with pytest.raises(ValueError, match="found a tokeniser Image"):
        Tokenised(modalities.Image(cases.trunk(), 16, 8), cases.trunk())


@pytest.mark.parametrize(
    ("bottleneck", "objective", "way", "registers"),
    [
        (lambda: VQ(8, 4, 3, normalise=False), Causal, "causal", 0),
        (lambda: VQ(8, 4), Causal, "causal", 3),
        (lambda: VQ(8, 4), DiscreteDiffusion, "diffusion", 0),
    ],
)
def test_a_picture_that_was_learned_by_heart_is_generated_again(bottleneck, objective, way, registers):
    torch.manual_seed(0)
    options = {"codes": "registers"} if registers else {}
    image = modalities.Image(cases.trunk(registers=registers), 16, 8)
    model = Model({"image": Tokenised(Autoencoder(image, bottleneck(), cases.trunk(12), **options), cases.trunk(32))})
    ask = objective(model, modality="image")
    raw = cases.collate([{"image": t} for t in image.reader.example(1, 0)], ["image"])
    batch = model.prepare(raw)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for step in range(200):
        loss = cases.loss(ask(model, ask.task(batch | {"seed": torch.tensor([step])})))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    (made,) = headwater.generate(model.eval(), "image", way=way, temperature=0.0)
    assert (made == model.encoder("image").restore(batch["image"])).all()
