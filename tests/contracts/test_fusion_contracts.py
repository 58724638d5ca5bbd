"""What every exported fusion keeps."""

import json

import pytest
import torch
from contracts import cases
from contracts.test_encoder_contracts import sees
from torch.testing import assert_close

from headwater import fusion
from headwater.spec import build

every = pytest.mark.parametrize("name", cases.FUSIONS)
WIDTHS = {"text": 24, "action": 16, "video": 16}


def make(name, seed=0):
    torch.manual_seed(seed)
    return cases.FUSIONS[name](WIDTHS).double()


def parts(packed=False):
    model = cases.model(fuse=None)
    batch = cases.batch(model.readers, cases.examples(model.readers, n=4), packed=packed)
    return model.embed({name: batch[name] for name in WIDTHS})


def test_every_export_has_a_case():
    assert {type(make(name)).__name__ for name in cases.FUSIONS} >= set(fusion.__all__)


@every
def test_keys_and_widths_are_as_promised(name):
    made, given = make(name), parts()
    out = made(given)
    assert {n: t.x.shape for n, t in out.items()} == {n: (*t.x.shape[:2], made.widths[n]) for n, t in given.items()}


@every
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_tokens_reach_each_other_within_a_sample_and_never_backwards(name, packed, causal):
    made = make(name)
    sees(parts(packed), lambda given: made(given, causal), causal)


@every
def test_any_subset_of_the_modalities_is_accepted(name):
    made, given = make(name), parts()
    alone = made({"text": given["text"]})
    empty = {n: t if n == "text" else t._replace(valid=torch.zeros_like(t.real())) for n, t in given.items()}
    real = given["text"].real()
    assert_close(alone["text"].x[real], made(empty)["text"].x[real])


@every
def test_the_order_of_modalities_does_not_matter(name):
    made, given = make(name), parts()
    a, b = made(given), made(dict(reversed(given.items())))
    for n in given:
        assert_close(a[n].x[given[n].real()], b[n].x[given[n].real()])


@every
def test_views_use_the_part_of_their_modality(name):
    made, given = make(name), parts()
    assert_close(made({"text@crop0": given["text"]})["text@crop0"].x, made({"text": given["text"]})["text"].x)


@every
def test_every_parameter_gets_a_gradient(name):
    made, given = make(name), parts()
    sum((t.x * torch.randn_like(t.x))[t.real()].sum() for t in made(given).values()).backward()
    assert [n for n, p in made.named_parameters() if p.grad is None or not p.grad.any()] == []


@every
def test_spec_makes_the_same_fusion_again(name):
    made = make(name)
    again = build(json.loads(json.dumps(made.spec)))
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in made.named_parameters()}
    assert again.widths == made.widths
