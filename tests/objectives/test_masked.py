import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater.objectives.masked import Masked, choose, indices
from headwater.tokens import Tokens


def documents(lengths, padding=0):
    """One row that holds documents of these lengths and then padding."""
    number = sum(lengths) + padding
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor([*lengths[:-1], lengths[-1] + padding]))[None]
    valid = torch.arange(number)[None] < sum(lengths)
    return Tokens(torch.zeros(1, number), torch.zeros(1, number, 1), valid, document)


@pytest.mark.parametrize("ratio", [0.15, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("padding", [0, 5])
def test_each_document_hides_its_exact_share(ratio, padding):
    lengths = [1, 2, 3, 10, 17, 40]
    t = documents(lengths, padding)
    hidden = choose(t, torch.arange(6), ratio, "mask")
    for k, n in enumerate(lengths):
        expected = 1 if n == 1 else min(max(round(ratio * n), 1), n - 1)
        assert int(hidden[0][t.document[0] == k].sum()) == expected
    assert not (hidden & ~t.valid).any()


def test_every_token_is_hidden_as_often():
    t = Tokens(torch.zeros(4000, 8), torch.zeros(4000, 8, 1))
    hidden = choose(t, torch.arange(4000), 0.25, "mask")
    assert (hidden.sum(1) == 2).all()
    assert (hidden.float().mean(0) - 0.25).abs().max() < 4 * (0.25 * 0.75 / 4000) ** 0.5
    together = (hidden[:, :1] & hidden[:, 1:]).float().mean(0)  # pairs too: 2/8 * 1/7
    assert (together - 2 / 8 / 7).abs().max() < 4 * (0.036 / 4000) ** 0.5


def test_another_name_or_seed_hides_other_tokens():
    t = Tokens(torch.zeros(3, 40), torch.zeros(3, 40, 1))
    a, b, c = choose(t, torch.arange(3), 0.5, "a"), choose(t, torch.arange(3), 0.5, "b"), choose(t, torch.arange(3) + 9, 0.5, "a")
    assert (a != b).any(1).all()
    assert (a != c).any(1).all()
    assert (a[0] != a[1]).any()


def test_indices_list_the_chosen_in_order():
    chosen = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0]]).bool()
    index, real = indices(chosen, even=False)
    assert index[real].tolist() == [1, 3, 0]
    assert real.tolist() == [[True, True], [True, False]]


def test_normalized_targets_are_those_of_mae():
    """engine: target = (target - mean) / (var + 1e-6) ** .5, facebookresearch/mae models_mae.py."""
    objective = Masked(cases.model(), "image", normalize=True, width=16)
    x = torch.rand(2, 3, 48) * 7 + 2
    mean, var = x.mean(dim=-1, keepdim=True), x.var(dim=-1, keepdim=True)
    expected = (x - mean) / (var + 1.0e-6) ** 0.5
    assert_close(objective._target(x), expected)
    absent = torch.full((2, 3, 4), torch.nan)  # slots that a robot does not have change nothing for the others
    assert_close(objective._target(torch.cat([x, absent], -1)), torch.cat([expected, absent], -1), equal_nan=True)


@pytest.mark.parametrize("mode", ["drop", "substitute"])
def test_hidden_values_do_not_reach_the_answer(mode):
    model = cases.model()
    objective = Masked(model, "image", ratio=0.5, mode=mode, width=16).double()
    batch = objective.task(cases.batch(model.readers, cases.examples(model.readers)))
    raw, hidden = batch["image"], batch["hidden"]
    index, asked = indices(hidden, even=False)
    ask = objective._drop if mode == "drop" else objective._substitute
    other = batch | {"image": raw._replace(x=torch.where(hidden[..., None], raw.x + 5, raw.x))}
    shown = batch | {"image": raw._replace(x=torch.where(hidden[..., None], raw.x, raw.x + 5))}
    a, b, c = (ask(model, given, index, asked, False)[asked] for given in (batch, other, shown))
    assert torch.equal(a, b)
    assert not torch.isclose(a, c).all(-1).any()


def test_the_loss_is_the_mean_error_of_hidden_places_alone():
    model = cases.model()
    objective = Masked(model, "text", ratio=0.4, mode="substitute").double()
    batch = objective.task(cases.batch(model.readers, cases.examples(model.readers)))
    term = objective(model, batch)["masked"]
    parts = model.embed({"text": batch["text"]})
    parts["text"] = parts["text"]._replace(x=torch.where(batch["hidden"][..., None], objective.mask, parts["text"].x))
    logits = objective.out(model(parts)["text"].x)
    loss = 0
    for b, n in batch["hidden"].nonzero().tolist():
        loss = loss - logits[b, n].log_softmax(-1)[batch["text"].x[b, n]]
    assert_close(term.total.double(), loss, rtol=1e-5, atol=1e-5)
    assert term.number == batch["hidden"].sum()


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1.5])
def test_a_ratio_outside_zero_to_one_is_refused(ratio):
    with pytest.raises(ValueError, match="ratio"):
        Masked(cases.model(), ratio=ratio)
