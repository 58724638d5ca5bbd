"""What an objective's terms do not depend on: padding, packing, the order of rows, and other samples."""

import pytest
from contracts import cases
from torch.testing import assert_close

from headwater.tokens import Tokens

every = pytest.mark.parametrize("name", cases.OBJECTIVES)


def totals(made, name, *args, **kwargs):
    model, objective, readers, samples = made(name)
    found, _ = cases.terms(objective, model, cases.batch(readers, samples, *args, **kwargs))
    return {k: (t.total.detach().double(), t.number) for k, t in found.items()}


def same(a, b):
    assert a.keys() == b.keys()
    for k in a:
        assert_close(a[k], b[k], rtol=1e-5, atol=1e-5)


@every
def test_padding_is_invisible(name, made):
    model, objective, readers, samples = made(name)
    plain = cases.batch(readers, samples)
    padded = {k: cases.pad(v) if isinstance(v, Tokens) else v for k, v in plain.items()}
    a, b = (cases.terms(objective, model, given)[0] for given in (plain, padded))
    for k in a:
        assert_close(a[k].total, b[k].total, rtol=1e-5, atol=1e-5)
        assert a[k].number == b[k].number


@every
def test_packing_equals_rows(name, made):
    same(totals(made, name), totals(made, name, packed=True))


@every
def test_row_order_is_invisible(name, made):
    same(totals(made, name), totals(made, name, [4, 6, 0, 3, 5, 1, 2]))


@every
def test_uncoupled_samples_do_not_feel_each_other(name, made):
    if made(name)[1].coupled:
        pytest.skip("its loss mixes samples by design")
    parts = [totals(made, name, numbers) for numbers in ([3], [0, 1], [2, 4, 5, 6])]
    same(totals(made, name), {k: tuple(sum(p[k][i] for p in parts) for i in (0, 1)) for k in parts[0]})
