from functools import partial

import pytest
import torch
from torch.testing import assert_close
from training.continued import ADAM, language_model, run, write

from headwater import init
from headwater.modalities import Text
from headwater.model import Model
from headwater.training.salient import Salient, compact, salient, unfold
from headwater.trunk import Trunk

SALIENT = [partial(Salient, 0.1)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write(tmp_path_factory.mktemp("texts"))


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_the_largest_products_are_chosen_over_all_tensors(share):
    g = torch.Generator().manual_seed(0)
    values, gradients = ([torch.randn(shape, generator=g) for shape in ((5, 4), (3, 7), (9,))] for _ in range(2))
    products = sorted(
        (
            (float(abs(x * y)), t, k)
            for t, (p, d) in enumerate(zip(values, gradients))
            for k, (x, y) in enumerate(zip(p.flatten(), d.flatten()))
        ),
        reverse=True,
    )
    expected = {(t, k) for _, t, k in products[: round(share * 50)]}
    masks = salient(values, gradients, share)
    assert {(t, k) for t, mask in enumerate(masks) for k in mask.flatten().nonzero()[:, 0].tolist()} == expected


def test_a_share_learns_and_the_rest_stays_bit_for_bit(texts):
    done = run(texts, SALIENT, steps=5)
    masks = done.callbacks[0].masks
    start = dict(language_model().named_parameters())
    assert sum(int(m.sum()) for m in masks.values()) == round(0.1 * sum(m.numel() for m in masks.values()))
    for name, mask in masks.items():
        before, after = start[name.removeprefix("backbone.")], done.parameters[name]
        assert torch.equal(after[~mask], before[~mask])
        assert (after[mask] != before[mask]).all()
    embeddings = "backbone.encoders.text.stem.weight"
    assert not torch.equal(done.parameters[embeddings], start[embeddings.removeprefix("backbone.")])


def test_a_resumed_run_equals_one_that_went_through(texts, tmp_path):
    through = run(texts, SALIENT, steps=6)
    run(texts, SALIENT, steps=6, limit=3, save=tmp_path / "half.ckpt")
    resumed = run(texts, SALIENT, steps=6, resume=tmp_path / "half.ckpt")
    assert all(torch.equal(p, resumed.parameters[n]) for n, p in through.parameters.items())


def chosen(folder, strategy="ddp"):
    done = run(folder, SALIENT, strategy=strategy, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1))
    return done.callbacks[0].masks, done.parameters


def test_ranks_choose_alike(ranks, texts):
    masks, parameters = chosen(texts)
    (a, x), (b, y) = ranks(chosen, texts)
    assert all(torch.equal(a[n], b[n]) and torch.equal(a[n], masks[n]) for n in masks)
    assert all(torch.equal(x[n], y[n]) for n in x)
    assert_close(x, parameters, rtol=1e-4, atol=1e-5)


def refused(folder):
    try:
        chosen(folder, "fsdp2")
    except ValueError as error:
        return str(error)


def test_shares_cannot_be_compared(ranks, texts):
    assert all("no rank can compare" in answer for answer in ranks(refused, texts))


def test_one_percent_is_stored_in_less_than_three_and_loads_to_the_same_network():
    def model():
        return Model({"text": Text(Trunk(256, depth=4, heads=4), length=16)})

    trained = model()
    init.initialise(trained, 3)
    matrices = {n: p for n, p in trained.named_parameters() if p.ndim > 1 and ".blocks." in n}
    g = torch.Generator().manual_seed(0)
    masks = dict(
        zip(matrices, salient(list(matrices.values()), [torch.randn(p.shape, generator=g) for p in matrices.values()], 0.01))
    )
    with torch.no_grad():
        for name, p in matrices.items():
            p += masks[name]
        trained.encoders["text"].stem.weight += 1.0
    stored, again = compact(trained, masks), model()
    unfold(again, stored, 3)
    assert all(torch.equal(p, again.state_dict()[n]) for n, p in trained.state_dict().items())
    dense = sum(p.nbytes for p in matrices.values())
    assert sum(x.nbytes for name, x in stored.items() if not name.startswith("whole/")) < 0.03 * dense


def test_mistakes_are_explained(texts):
    with pytest.raises(ValueError, match="below 1"):
        Salient(1.0)
    with pytest.raises(ValueError, match="no matrix"):
        run(texts, [partial(Salient, 0.1, ["nothing"])], optimizer=ADAM)
    with pytest.raises(ValueError, match="does not have"):
        unfold(language_model(), {"whole/other": torch.zeros(1)}, 0)
