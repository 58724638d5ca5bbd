import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater.objectives import Causal, Contrastive, Prefixed
from headwater.tokens import Tokens


def test_the_loss_is_that_of_a_prefix_language_model():
    """-sum_t>=p log p(x_t | x_1 .. x_t-1), where the first p places see each other, each t in a run of its own."""
    model = cases.model()
    objective = Prefixed(model, known=(0.2, 0.8))
    samples = cases.examples(model.readers)
    task = objective.task(cases.batch(model.readers, samples, packed=True))
    encoder, loss, text = model.encoder("text"), 0, task["text"]
    for number, sample in enumerate(samples):
        if "text" not in sample:
            continue
        mine = (text.sample() == number) & text.real()
        asked, ids = task["asked"][mine], torch.cat([torch.tensor([encoder.start]), sample["text"].x])
        known = int((~asked).sum())
        assert 0.2 * len(asked) - 1 <= known <= 0.8 * len(asked)
        assert asked.tolist() == [False] * known + [True] * (len(asked) - known)
        for t in range(known, len(asked)):
            place = torch.arange(t + 1)
            seen = Tokens(ids[None, : t + 1], place[None, :, None], order=torch.where(place < known, 0, place)[None])
            y = model(model.embed({"text": seen}), True)["text"].x[0, t]
            loss = loss - encoder.unembed(y).log_softmax(-1)[ids[t + 1]]
    assert_close(objective(model, task)["causal"].total.double(), loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("modality", ["text", "image", "audio", "video"])
def test_beginnings_see_themselves_and_nothing_sees_the_future(modality):
    model = cases.model()
    objective = Prefixed(model, inner=lambda m: Causal(m, modality), known=(0.5, 0.5))
    task = objective.task(cases.batch(model.readers, cases.examples(model.readers), [0]))
    t, length = task[modality], int(task[modality].real().sum())
    known = int((~task["asked"] & t.real()).sum())
    assert known == length // 2
    embedded = model.embed({modality: t})[modality]
    x = embedded.x.detach().requires_grad_()
    y = model({modality: embedded._replace(x=x)}, True)[modality].x
    moved = (torch.autograd.grad(y[0, k, 0], x, retain_graph=True)[0][0] for k in range(length))
    felt = torch.stack([change.abs().sum(-1) > 1e-12 for change in moved])
    place = torch.arange(length)
    both = (place < known)[:, None] & (place < known)
    assert torch.equal(felt[:, :length], both | (place[:, None] >= place))


def test_whole_shares_leave_one_token_and_none_leaves_all():
    model = cases.model()
    batch = cases.batch(model.readers, cases.examples(model.readers))
    plain = Causal(model).task(batch)
    whole, none = (Prefixed(model, known=(share, share)).task(batch) for share in (1.0, 0.0))
    assert whole["asked"].sum() == len(batch["text"].samples())
    assert torch.equal(none["asked"], plain["asked"])


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="smaller one first"):
        Prefixed(cases.model(), known=(0.9, 0.1))
    with pytest.raises(ValueError, match="expected Causal"):
        Prefixed(cases.model(), inner=lambda m: Contrastive(m, "text", "image"))
