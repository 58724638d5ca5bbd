"""Every fusion trains one model of five modalities on real samples."""

from functools import partial

import pytest
import torch
from contracts import cases

from headwater.datamodules.collate import collate
from headwater.fusion import Chain, Complete, JointTokens, Resampler
from headwater.modalities import Action, Audio, Image, Text, Video
from headwater.model import Model
from headwater.objectives.masks.policies import Uniform
from headwater.objectives.objective import score
from headwater.trunk import Trunk

ADDS = {"Complete": Complete, "Resampler": Resampler}  # somebody must read what they add


def fusion(name):
    if name not in ADDS:
        return cases.FUSIONS[name]
    return partial(Chain, fusions=[partial(ADDS[name], queries=4), partial(JointTokens, trunk=Trunk(32, 1, 2))])


def encoders():
    def trunk():
        return Trunk(32, 1, 2)

    return {
        "image": Image(trunk(), 32, 8),
        "text": Text(trunk(), length=16),
        "audio": Audio(trunk(), bands=16, frames=16, seconds=1.0),
        "video": Video(trunk(), 28, 14, frames=4),
        "action": Action(trunk(), choices=7, steps=4),
    }


@pytest.fixture(scope="module")
def real(read):
    """Twelve things (picture, words, voice) and twelve episodes (video, words, actions) in a batch; every fifth lost its words."""
    readers = {n: e.reader for n, e in encoders().items()}
    samples = read("things-train", readers, 12) + read("episodes-train", readers, 12)
    for sample in samples[::5]:
        del sample["text"]
    return {n: readers[n].prepare(t) for n, t in collate(samples, [*readers]).items()}


def restored(model, real, seed):
    """A third of the tokens of all modalities hidden at once, and asked for: mean error per modality, summed."""
    hidden = {n: Uniform()(t, torch.arange(24) + seed, 0.3, n) for n, t in real.items()}
    parts = {n: t._replace(x=t.x * ~hidden[n][..., None]) for n, t in model.embed(real).items()}
    out, loss = model(parts), torch.zeros(())
    for n, t in real.items():
        encoder = model.encoder(n)
        error = score(encoder.unembed(out[n].x[:, : t.x.shape[1]]), t.x, encoder.vocab is not None)
        loss = loss + (error * hidden[n]).sum() / hidden[n].sum()
    return loss


@pytest.mark.parametrize("name", cases.FUSIONS)
def test_a_model_of_five_modalities_learns(name, real):
    torch.manual_seed(0)
    model = Model(encoders(), fusion(name))
    step, moved, losses = torch.optim.Adam(model.parameters(), lr=4e-3), set(), []
    for number in range(25):
        loss = restored(model, real, number % 2)
        step.zero_grad()
        loss.backward()
        moved |= {n for n, p in model.fusion.named_parameters() if p.grad is not None and p.grad.any()}
        step.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-2:]) < 0.75 * sum(losses[:2]), losses
    assert {n for n, _ in model.fusion.named_parameters()} == moved
