import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater.modalities import Image, Text
from headwater.model import Model
from headwater.objectives.causal import Causal
from headwater.sequence import shift
from headwater.tokens import Tokens


def test_shift_gives_each_place_the_token_before_it():
    x = torch.tensor([[5, 6, 7, 8, 9]])
    t = Tokens(x, torch.zeros(1, 5, 1), document=torch.tensor([[3, 3, 3, 4, 4]]))
    assert shift(t, start=99).x.tolist() == [[99, 5, 6, 99, 8]]
    assert shift(t._replace(document=None), start=99).x.tolist() == [[99, 5, 6, 7, 8]]
    assert shift(t._replace(x=x[..., None].float()), None).x[..., 0].tolist() == [[0, 5, 6, 0, 8]]


def test_the_loss_is_that_of_a_language_model():
    """-sum_t log p(x_t | start, x_1 .. x_t-1), each text alone and each prefix run anew."""
    model = cases.model(fuse=None)
    objective = Causal(model)
    samples = cases.examples(model.readers)
    batch = objective.task(cases.batch(model.readers, samples, packed=True))
    loss = 0
    for sample in samples:
        if "text" not in sample:
            continue
        ids = torch.cat([torch.tensor([model.encoder("text").start]), sample["text"].x])
        for t in range(1, len(ids)):
            seen = Tokens(ids[None, :t], torch.arange(t)[None, :, None])
            y = model(model.embed({"text": seen}), causal=True)["text"].x[0, t - 1]  # behind it are registers, the future is not
            loss = loss - model.encoder("text").unembed(y).log_softmax(-1)[ids[t]]
    assert_close(objective(model, batch)["causal"].total.double(), loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("modality", ["text", "image", "audio", "choice", "action", "video"])
def test_answers_do_not_see_what_they_are_asked_for(modality):
    model = cases.model()
    objective = Causal(model, modality, context=["image"] if modality != "image" else None)
    batch = cases.batch(model.readers, cases.examples(model.readers))
    t, place = batch[modality], 2
    x = t.x.clone()
    x[:, place] = (x[:, place] + 1) % 5 if objective.ids else x[:, place] + 1
    with torch.no_grad():
        a, b = (objective.predict(model, objective.task(batch | {modality: t._replace(x=v)})) for v in (t.x, x))
    assert torch.equal(a[:, : place + 1], b[:, : place + 1])
    assert (a[:, place + 1] != b[:, place + 1]).any(-1)[t.real()[:, place + 1]].all()  # but the next one does


def test_a_prefix_is_seen_whole_from_the_beginning():
    model = cases.model()
    objective = Causal(model, "text", prefix=["image"])
    batch = cases.batch(model.readers, cases.examples(model.readers))
    x = batch["image"].x.clone().requires_grad_()
    task = objective.task(batch | {"image": batch["image"]._replace(x=x)})
    objective.predict(model, task)[:, 0].square().sum().backward()
    assert (x.grad.abs().amax(-1) > 0)[batch["text"].real()[:, 0]].all()


def test_context_unfolds_in_step():
    """The action of step t sees the frames up to t and no later one."""
    model = cases.model()
    objective = Causal(model, "choice", context=["video"])
    batch = cases.batch(model.readers, cases.examples(model.readers), [1])
    x = batch["video"].x.clone().requires_grad_()
    task = objective.task(batch | {"video": batch["video"]._replace(x=x)})
    frames = batch["video"].position[0, :, 0]
    for step in range(2):
        (grad,) = torch.autograd.grad(objective.predict(model, task)[0, step].square().sum(), x)
        assert torch.equal(grad[0].abs().amax(-1) > 0, frames <= step)


def test_a_context_needs_a_fusion():
    model = Model({"text": Text(cases.trunk()), "image": Image(cases.trunk())})
    with pytest.raises(ValueError, match="fusion"):
        Causal(model, prefix=["image"])
