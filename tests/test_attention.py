"""Kernels: each one that can be had here gives what the dense mask gives, and nothing falls back in silence."""

import logging

import pytest
import torch
from torch.testing import assert_close

from headwater import attention
from headwater.attention import Route, attend, higher_order, plan
from headwater.tokens import Tokens, attention_mask
from headwater.trunk import Trunk

INDEX = torch.arange(12)
DOCUMENT = torch.stack([INDEX // 5, 7 + INDEX // 3])
VALID = torch.stack([INDEX < 11, INDEX != 4])
CASES = {
    "packed": Tokens(INDEX, INDEX[None, :, None].expand(2, -1, -1), VALID, DOCUMENT),
    "packed, nothing padded": Tokens(INDEX, INDEX[None, :, None].expand(2, -1, -1), None, DOCUMENT),
    "ordered": Tokens(INDEX, INDEX[None, :, None].expand(2, -1, -1), VALID, None, (INDEX // 2).expand(2, -1)),
    "ordered in documents": Tokens(INDEX, INDEX[None, :, None].expand(2, -1, -1), VALID, DOCUMENT),
}


def heads(n=12, number=2):
    torch.manual_seed(0)
    return (torch.randn(2, number, n, 16, dtype=torch.float64) for _ in range(3))


def by_hand(q, k, v, see):
    """One query after the other."""
    out = torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        seen = see[b, i].nonzero()[:, 0]
        if len(seen):
            out[b, h, i] = (q[b, h, i] @ k[b, h, seen].T / 4).softmax(0) @ v[b, h, seen]
    return out


@pytest.mark.parametrize("name", CASES)
def test_dense_and_flex_routes_equal_the_formula(name):
    t, (q, k, v) = CASES[name], heads()
    mask = attention_mask(t, t, causal=name.startswith("ordered"))
    assert mask.kind == name.split(",")[0].split()[0]
    see = mask.dense[:, 0].expand(2, 12, 12)
    expected = by_hand(q, k, v, see)
    assert_close(attend(q, k, v, Route(mask=mask.dense)), expected)
    some = see.any(-1)[:, None, :, None]
    assert_close(attend(q, k, v, Route(blocks=attention.blocks(mask))) * some, expected)


@pytest.mark.parametrize("name", ["packed", "packed, nothing padded"])
def test_the_route_over_lengths_equals_the_dense_one(name, monkeypatch):
    """The kernel itself needs a GPU; what is fed to it and put back is checked with the formula in its place."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def formula(q, k, v, ends, ends_k, longest, longest_k):
        assert torch.equal(ends, ends_k)
        most = int((ends[1:] - ends[:-1]).max())
        assert most <= longest == longest_k < 2 * most  # a bound, so that compiled code meets few of them
        runs = zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
        return torch.cat(
            [
                ((q[a:b].transpose(0, 1) @ k[a:b].permute(1, 2, 0) / 4).softmax(-1) @ v[a:b].transpose(0, 1)).transpose(0, 1)
                for a, b in runs
            ]
        )

    monkeypatch.setattr(varlen, "varlen_attn", formula)
    t, (q, k, v) = CASES[name], heads()
    mask = attention_mask(t, t)
    real = t.real()[:, None, :, None]
    expected = attend(q, k, v, Route(mask=mask.dense)) * real
    assert_close(attend(q, k, v, Route(lengths=attention.lengths(mask))), expected)


def test_grouped_heads_are_repeated_heads():
    q, k, v = heads(number=4)
    few = k[:, :2], v[:, :2]
    expected = attend(q, *(m.repeat_interleave(2, 1) for m in few), Route())
    assert_close(attend(q, *few, Route()), expected)


def test_a_dense_mask_is_announced_once(caplog):
    attention.announce.cache_clear()
    trunk, t = Trunk(16, 1, heads=2), CASES["packed"]._replace(x=torch.randn(2, 12, 16))
    with caplog.at_level(logging.WARNING):
        trunk(t), trunk(t)
        trunk(t._replace(document=None))  # a mask over keys alone costs nothing
    (record,) = caplog.records
    assert record.message.startswith("attention of packed rows runs with a dense mask on cpu: varlen: needs an accelerator")


def test_positions_that_bias_every_score_say_so(caplog):
    attention.announce.cache_clear()
    trunk, t = Trunk(16, 1, heads=2, position="alibi"), Tokens(torch.randn(1, 4, 16), torch.zeros(1, 4, 1))
    with caplog.at_level(logging.WARNING):
        trunk(t), trunk(t)
    assert [r.message for r in caplog.records] == [
        "attention of full rows runs with a dense mask on cpu: its positions add a number to every score"
    ]


def test_the_table_says_what_runs_and_why_not():
    table = attention.kernels("cpu")
    assert set(table) == {"full", "causal", "padded", "packed", "ordered"}
    for kind, row in table.items():
        assert row["flash"] == row["math"] == ""
        assert "accelerator" in row["flex"]
        assert attention.runs(kind, "cpu") == "flash"
    assert "not implemented" in attention.fails("flash", "full", "cpu", torch.float32, 64, "double backward")
    assert attention.fails("math", "packed", "cpu", torch.float32, 64, "forward mode") == ""


def second(trunk, t, direction, causal=False):
    """The gradient of <gradient of the loss, direction>."""
    parameters = list(trunk.parameters())
    first = torch.autograd.grad(trunk(t, causal).x.pow(3).sum(), parameters, create_graph=True)
    return torch.autograd.grad(sum((g * d).sum() for g, d in zip(first, direction, strict=True)), parameters)


@pytest.mark.parametrize("causal", [False, True])
def test_higher_order_gradients_are_exact_and_only_inside(causal):
    torch.manual_seed(0)
    trunk, t = Trunk(16, 1, heads=2).double(), Tokens(torch.randn(2, 6, 16).double(), torch.zeros(2, 6, 1))
    direction = [torch.randn_like(p) for p in trunk.parameters()]

    def gradient(shift):
        for p, d in zip(trunk.parameters(), direction, strict=True):
            p.data.add_(d, alpha=shift)
        found = torch.autograd.grad(trunk(t, causal).x.pow(3).sum(), list(trunk.parameters()))
        for p, d in zip(trunk.parameters(), direction, strict=True):
            p.data.sub_(d, alpha=shift)
        return found

    small = 1e-5
    expected = [(a - b) / (2 * small) for a, b in zip(gradient(small), gradient(-small), strict=True)]
    with higher_order():
        exact = second(trunk, t, direction, causal)
        change = torch.func.jvp(lambda x: trunk(t._replace(x=x), causal).x, (t.x,), (torch.ones_like(t.x),))[1]
    assert_close(list(exact), expected, rtol=1e-4, atol=1e-6)
    shifted = [trunk(t._replace(x=t.x + shift), causal).x for shift in (small, -small)]
    assert_close(change, (shifted[0] - shifted[1]) / (2 * small), rtol=1e-4, atol=1e-6)
    with pytest.raises(RuntimeError, match="not implemented"):
        second(trunk, t, direction, causal)


def test_compiled_blocks_step_aside_in_higher_order():
    trunk, t = Trunk(16, 1, heads=2), Tokens(torch.randn(1, 4, 16), torch.zeros(1, 4, 1))
    called = []
    trunk.blocks[0].compile(backend=lambda graph, inputs: called.append(1) or graph.forward)
    with higher_order():
        second(trunk, t, [torch.ones_like(p) for p in trunk.parameters()])
    assert called == []
    trunk(t)
    assert called


@pytest.mark.skipif(not torch.cuda.is_available(), reason="block-sparse kernels need a GPU")
@pytest.mark.parametrize("kind", ["packed", "ordered"])
def test_block_sparse_kernels_run_on_a_gpu(kind):
    assert attention.runs(kind, "cuda", torch.bfloat16) in ("varlen", "flex")
    index = torch.arange(256, device="cuda").expand(2, 256)
    t = Tokens(torch.randn(2, 256, 128, device="cuda"), index[..., None], None, index // 100)
    trunk = Trunk(128, 1, heads=2).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        mask = attention_mask(t, t, kind == "ordered")
        route = plan(mask, t.x, 2)
        assert route.mask is None
        fast = trunk(t, kind == "ordered").x
    with torch.no_grad():
        slow = trunk.double()(t._replace(x=t.x.double()), kind == "ordered").x
    assert_close(fast.double(), slow, rtol=0, atol=0.05)
