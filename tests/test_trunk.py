import copy
import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from headwater.attention import plan
from headwater.init import initialise
from headwater.layers import Attention, Block, Mlp, make_norm
from headwater.position import Alibi, Learned, rotary, sincos
from headwater.position import rotate as rotate_by
from headwater.tokens import Tokens, attention_mask
from headwater.trunk import Trunk


def tokens(rows=2, n=5, width=16, axes=1, **fields):
    torch.manual_seed(0)
    return Tokens(torch.randn(rows, n, width), torch.randint(0, 9, (rows, n, axes)), **fields)


def rotate(x, angle):
    return rotate_by(x, (angle.cos(), angle.sin()))


def route(t, causal=False):
    return plan(attention_mask(t, t, causal), t.x, 2)


def test_sincos_is_the_formula_of_the_transformer_paper():
    code = sincos(torch.tensor([[3.0]]), 8)[0]
    angles = [3 / 10000 ** (2 * i / 8) for i in range(4)]
    assert_close(code, torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles]))


def test_sincos_gives_every_axis_its_own_run_and_pads_the_rest():
    code = sincos(torch.tensor([[1, 2, 3]]), 16)[0]
    for axis in range(3):
        assert_close(code[4 * axis : 4 * axis + 4], sincos(torch.tensor([[axis + 1]]), 4)[0])
    assert not code[12:].any()


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_rotary_scores_depend_on_the_difference_of_positions_alone(axes):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    a, b, shift = torch.randint(0, 20, (3, 1, 1, axes))

    def score(i, j):
        return (rotate(q, rotary(i, 16)) * rotate(k, rotary(j, 16))).sum()

    assert_close(score(a, b), score(a + shift, b + shift), rtol=0, atol=1e-5)
    assert not torch.isclose(score(a, b), score(a, b + shift), atol=1e-3)
    assert_close(rotate(q, rotary(a, 16)).norm(), q.norm())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("position", ["none", "rotary"])
def test_attention_equals_the_naive_formula(causal, position):
    attention = Attention(16, 2).double()
    t = tokens(valid=torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool())
    x, angle = t.x.double(), rotary(t.position, 8).double() if position == "rotary" else None
    turn = None if angle is None else (angle.cos(), angle.sin())
    got = attention(x, route(t, causal), turn)
    for b in range(2):
        q, k, v = (x[b] @ attention.qkv.weight.T + attention.qkv.bias).split(16, -1)
        heads = []
        for h in range(2):
            qh, kh, vh = (m[:, 8 * h : 8 * h + 8] for m in (q, k, v))
            if angle is not None:  # a pair is a complex number, turned by exp(i angle)
                qh, kh = (torch.complex(m[:, :4], m[:, 4:]) * torch.polar(torch.ones(5, 4).double(), angle[b, 0]) for m in (qh, kh))
                scores = (qh @ kh.conj().T).real / 8**0.5
            else:
                scores = qh @ kh.T / 8**0.5
            hidden = ~t.valid[b].expand(5, 5) | (torch.ones(5, 5).triu(1).bool() & causal)
            heads.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ vh)
        assert_close(got[b], torch.cat(heads, -1) @ attention.proj.weight.T + attention.proj.bias)


@pytest.mark.parametrize(("position", "shift_matters"), [("none", False), ("rotary", False), ("sincos", True)])
def test_positions_enter_as_promised(position, shift_matters):
    t = tokens()
    trunk = Trunk(16, 2, heads=2, position=position)
    for p in trunk.parameters():
        torch.nn.init.normal_(p, std=0.3)
    shuffled, shifted = (trunk(t._replace(position=p)).x for p in (t.position.flip(1), t.position + 5))
    assert torch.allclose(shuffled, trunk(t).x) == (position == "none")
    assert torch.allclose(shifted, trunk(t).x, rtol=1e-3, atol=1e-4) != shift_matters


def test_every_head_and_the_kernel_without_a_mask_agree_with_the_masked_one():
    trunk, t = Trunk(16, 2, heads=4), tokens()
    explicit = t._replace(valid=torch.ones(2, 5).bool())
    for causal in (False, True):
        assert_close(trunk(t, causal).x, trunk(explicit, causal).x, rtol=1e-5, atol=1e-5)


def test_a_new_condition_changes_nothing_and_a_trained_one_does():
    torch.manual_seed(0)
    trunk, t = Trunk(16, 2, heads=2, conditional=True), tokens()
    condition = torch.randn(2, 1, 16)
    assert_close(trunk(t, condition=condition).x, trunk(t).x, rtol=0, atol=0)
    trunk(t, condition=condition).x.pow(3).sum().backward()
    assert all(b.modulation.weight.grad.abs().sum() > 0 for b in trunk.blocks)
    torch.nn.init.normal_(trunk.blocks[0].modulation.weight, std=0.1)
    assert not torch.allclose(trunk(t, condition=condition).x, trunk(t).x)


def test_a_condition_per_token_touches_its_token_alone():
    trunk, t = Trunk(16, 1, heads=2, conditional=True), tokens()
    torch.nn.init.normal_(trunk.blocks[0].modulation.weight, std=0.1)
    one = torch.zeros(2, 5, 16)
    assert_close(trunk(t, condition=one).x, trunk(t, condition=one[:, :1]).x)


def test_weights_of_timm_load_by_name_and_give_its_output():
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0).eval()
    ours = Trunk(192, 2, heads=3, position="none")
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert missing == []
    assert not [n for n in unexpected if n.startswith(("blocks.", "norm."))]
    t = tokens(n=7, width=192)
    with torch.no_grad():
        assert_close(ours(t).x, theirs.norm(theirs.blocks(t.x)), rtol=1e-5, atol=1e-5)


def test_blocks_are_pre_norm_residuals():
    block, t = Block(16, Attention(16, 2), Mlp(16, 32), torch.nn.LayerNorm), tokens()
    for layer in (block.attn.proj, block.mlp.fc2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    assert torch.equal(block(t.x, route(t)), t.x)


def test_rows_without_a_real_token_come_out_finite_with_finite_gradients():
    trunk, t = Trunk(16, 1, heads=2), tokens(valid=torch.tensor([[0] * 5, [1] * 5]).bool())
    y = trunk(t).x
    y.sum().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in trunk.parameters())


@pytest.mark.parametrize(("width", "heads"), [(16, 3), (18, 6)])
def test_impossible_heads_are_refused(width, heads):
    with pytest.raises(ValueError, match="heads"):
        Trunk(width, 1, heads)


OPTIONS = {
    "plain": {},
    "rms, gated, grouped, no bias": {"norm": "rms", "activation": "silu", "gated": True, "kv_heads": 1, "bias": "none"},
    "bounded": {"norm": "tanh", "activation": "relu"},
    "parallel, qk norm": {"parallel": True, "qk_norm": True, "activation": "gelu_tanh"},
    "post": {"post": True, "entry_norm": True, "position": "none"},
    "registers": {"registers": 2, "layer_scale": 0.1, "position": "rotary"},
    "alibi": {"position": "alibi", "activation": "quick_gelu", "bias": "qkv"},
    "learned": {"position": Learned((9,)), "head_size": 12},
    "learned per axis": {"position": Learned((9,), factorised=True), "registers": 1},
}
options = pytest.mark.parametrize("name", OPTIONS)


def loud(name, **more):
    """A trunk whose branches and positions all weigh."""
    torch.manual_seed(1)
    trunk = Trunk(16, 2, heads=2, **copy.deepcopy(OPTIONS[name]), **more).double()
    for n, p in trunk.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in n else 0.0, std=0.3)
    return trunk


@options
def test_padding_and_packing_are_invisible_to_every_option(name):
    trunk = loud(name)
    a, b = torch.randn(1, 3, 16).double(), torch.randn(1, 4, 16).double()
    alone = [trunk(Tokens(x, torch.arange(x.shape[1])[None, :, None])).x for x in (a, b)]
    rows = Tokens(torch.cat([F.pad(a, (0, 0, 0, 1), value=9.0), b]), torch.arange(4)[None, :, None].expand(2, -1, -1))
    padded = trunk(rows._replace(valid=torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()))
    place = torch.tensor([0, 1, 2, 0, 1, 2, 3])[None, :, None]
    packed = trunk(Tokens(torch.cat([a, b], 1), place, None, torch.tensor([[0] * 3 + [5] * 4])))
    for number, sample in enumerate((0, 5)):
        assert_close(padded.x[number][padded.real()[number]], alone[number][0])
        assert_close(packed.x[0][(packed.sample() == sample)[0] & packed.real()[0]], alone[number][0])


@options
def test_every_parameter_of_every_option_gets_a_gradient(name):
    trunk = loud(name)
    trunk(tokens(width=16)._replace(x=torch.randn(2, 5, 16).double())).x.pow(3).sum().backward()
    assert [n for n, p in trunk.named_parameters() if p.grad is None or not p.grad.any()] == []


@options
def test_the_future_is_hidden_under_every_option(name):
    trunk, t = loud(name), tokens()
    x = t.x.double().requires_grad_()
    y = trunk(t._replace(x=x), causal=True).x
    for i in range(5):
        (grad,) = torch.autograd.grad(y[:, i].pow(3).sum(), x, retain_graph=True)
        assert grad[:, : i + 1].abs().sum(-1).all()
        assert not grad[:, i + 1 :].any()
    for i in range(5, y.shape[1]):  # registers see everything
        (grad,) = torch.autograd.grad(y[:, i].pow(3).sum(), x, retain_graph=True)
        assert grad.abs().sum(-1).all()


def test_branches_are_what_their_papers_write():
    t, x = tokens(), tokens().x.double()
    for name in ("parallel, qk norm", "post", "plain"):
        block = loud(name).blocks[0]
        attended = lambda y, block=block: block.attn(y, route(t), None)  # noqa: E731
        if name == "post":
            middle = block.norm1(x + attended(x))
            expected = block.norm2(middle + block.mlp(middle))
        elif name == "plain":
            middle = x + attended(block.norm1(x))
            expected = middle + block.mlp(block.norm2(middle))
        else:
            expected = x + attended(block.norm1(x)) + block.mlp(block.norm1(x))
        assert_close(block(x, route(t)), expected)


def test_gated_layers_and_norms_are_their_formulas():
    mlp, x = Mlp(16, 24, "silu", gated=True, bias=False).double(), tokens().x.double()
    gate, value = mlp.fc1.weight[:24], mlp.fc1.weight[24:]
    inner = (x @ gate.T) / (1 + (-(x @ gate.T)).exp()) * (x @ value.T)
    assert_close(mlp(x), inner @ mlp.fc2.weight.T)
    rms, tanh = make_norm("rms", 16, 1e-6).double(), make_norm("tanh", 16, 1e-6).double()
    assert_close(rms(x), x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt())
    assert tanh(1e6 * x).abs().max() <= 1
    assert_close(tanh(x), torch.tanh(0.5 * x))


def test_alibi_is_a_slope_per_head_over_the_distance():
    alibi, t = Alibi(), tokens()
    alibi.fit(16, 2)
    bias = alibi.bias(t, t)
    assert bias.shape == (2, 2, 5, 5)
    far = abs(int(t.position[1, 0, 0]) - int(t.position[1, 4, 0]))
    assert_close(bias[1, :, 0, 4], torch.tensor([-(2.0**-4) * far, -(2.0**-8) * far]))


def test_a_learned_table_is_read_by_row_and_column():
    learned = Learned((3, 4))
    learned.fit(8, 1)
    initialise(learned)
    position = torch.tensor([[[0, 2, 1], [0, 0, 3]]])
    code = learned.add(Tokens(torch.zeros(1, 2, 8), position))
    assert torch.equal(code[0], learned.table[[2 * 4 + 1, 3]])
    with pytest.raises(ValueError, match=r"grid of \[3, 5\].*\[3, 4\]"):
        learned.add(Tokens(torch.zeros(1, 2, 8), torch.tensor([[[0, 2, 4], [0, 0, 3]]])))
    factorised = Learned((3, 4), axes=(1, 2), factorised=True)
    factorised.fit(8, 1)
    initialise(factorised)
    code = factorised.add(Tokens(torch.zeros(1, 2, 8), position))
    assert_close(code[0], factorised.table[[2, 0]] + factorised.table[[3 + 1, 3 + 3]])


def test_stochastic_depth_skips_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    trunk = Trunk(16, 3, heads=2, drop_path=0.5)
    t = tokens(rows=400)
    t = t._replace(x=t.x[:1].expand(400, -1, -1))
    y = trunk(t._replace(position=torch.zeros(400, 5, 1))).x
    kinds = {tuple(row.round(decimals=4).tolist()) for row in y[:, 0]}
    assert 2 < len(kinds) <= 2**4  # the first block always runs
    packed = trunk(Tokens(t.x[:1, :4], t.position[:1, :4], None, torch.tensor([[0, 0, 3, 3]])))
    assert packed.x.isfinite().all()
    keep = trunk.kept(t)
    assert_close(keep.mean((2, 3, 4)), torch.ones(3, 2), rtol=0, atol=0.2)
    assert trunk.eval().kept(t) is None


@pytest.mark.parametrize(
    "options",
    [{}, {"post": True}, {"parallel": True}, {"position": "rotary", "kv_heads": 1}, {"position": "alibi"}, {"registers": 2}],
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_first_tokens_alone_come_out_as_they_do_among_all(options, causal, packed):
    torch.manual_seed(0)
    model = Trunk(16, 2, heads=2, conditional="post" not in options and "parallel" not in options, **options).double()
    document = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [2, 2, 3, 3, 3, 3, 3]]) if packed else None
    valid = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])
    t = Tokens(torch.randn(2, 7, 16).double(), torch.arange(7)[None, :, None].expand(2, 7, 1), valid, document)
    for condition in (None, torch.randn(2, 1, 16).double()) if model.conditional else (None,):
        whole, some = model(t, causal, condition), model(t, causal, condition, first=5)
        torch.testing.assert_close(some.x[valid[:, :5]], whole.x[:, :5][valid[:, :5]])
        assert some.position.shape[:2] == some.x.shape[:2] == (2, 5)
