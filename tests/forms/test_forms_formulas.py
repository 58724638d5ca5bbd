"""The formulas of low-rank, sparse, masked and ternary weights, typed anew; what they cost; what stays exactly zero."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from headwater import init
from headwater.forms import LoRA, LowRank, Masked, SparseLowRank, Ternary, densified
from headwater.forms.lora import rescaled
from headwater.forms.low_rank import balanced, truncated
from headwater.forms.masked import largest, n_of_m
from headwater.forms.sparse import composed, support
from headwater.forms.ternary import rounded, straight, ternary
from headwater.modalities import Text
from headwater.model import Model
from headwater.training.restarts import Jagged, restart
from headwater.training.schedules import Cosine, Linear, Step
from headwater.trunk import Trunk


def stack(*sizes):
    """Linear layers with the names blocks.0.fc1, blocks.1.fc1, ... and given weights, in float64."""
    torch.manual_seed(0)
    blocks = {str(i): nn.ModuleDict({"fc1": nn.Linear(*size)}) for i, size in enumerate(sizes)}
    return nn.ModuleDict({"blocks": nn.ModuleDict(blocks)}).double()


def first(made):
    return made.get_submodule("blocks.0.fc1")


def test_the_error_of_an_svd_is_the_tail_of_the_singular_values():
    made = stack((40, 24))
    weight = first(made).weight.detach().clone()
    LowRank(rank=7, start="svd")(made)
    tail = torch.linalg.svdvals(weight)[7:].square().sum().sqrt()
    assert_close((weight - first(made).weight).norm(), tail, rtol=1e-10, atol=0)
    assert_close(first(made).u.norm(), first(made).v.norm(), rtol=1e-10, atol=0)
    assert sum(p.numel() for p in made.parameters()) == 7 * (40 + 24) + 24


def test_balancing_keeps_the_product_and_equals_the_svd_of_it():
    u, v = torch.randn(20, 5, dtype=torch.float64), 30 * torch.randn(5, 13, dtype=torch.float64)
    a, b = balanced(u, v)
    c, d = truncated(u @ v, 5)
    assert_close(a @ b, u @ v, rtol=0, atol=1e-10)
    assert_close(a.norm(), b.norm(), rtol=1e-10, atol=0)
    assert_close((a.norm(dim=0), b.norm(dim=1)), (c.norm(dim=0), d.norm(dim=1)), rtol=1e-9, atol=0)


def test_directions_and_lengths():
    weight, moved = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    growth = torch.randn(6, dtype=torch.float64)
    got = rescaled(weight, moved, growth)
    for old, now, more, row in zip(weight.tolist(), moved.tolist(), growth.tolist(), got.tolist(), strict=True):
        length = sum(w * w for w in old) ** 0.5 + more
        size = sum(m * m for m in now) ** 0.5
        assert_close(torch.tensor(row), torch.tensor([length * m / size for m in now]), rtol=1e-6, atol=1e-6)
    weight_of = torch.randn(6, 4, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((got * weight_of).sum(), moved)  # lengths are constants
    assert_close(gradient, weight_of * ((weight.norm(dim=1) + growth) / moved.detach().norm(dim=1))[:, None])


def test_a_support_is_a_uniform_draw_of_exactly_so_many_places():
    places = support(60, (10, 20), 3, "a")
    assert len(places.unique()) == 60
    assert places.min() >= 0
    assert places.max() < 200
    assert torch.equal(places, support(60, (10, 20), 3, "a"))
    assert not torch.equal(places, support(60, (10, 20), 3, "b"))
    hits = torch.zeros(200)
    for seed in range(1000):
        hits[support(60, (10, 20), seed, "a")] += 1
    assert (hits / 1000 - 0.3).abs().max() < 5 * (0.3 * 0.7 / 1000) ** 0.5


def test_sparse_plus_low_rank_by_loops():
    made = stack((7, 5))
    SparseLowRank(rank=2, density=0.2, alpha=3.0)(made)
    ours = first(made)
    with torch.no_grad():
        ours.b.normal_()
    a, b = ours.a.tolist(), ours.b.tolist()
    expected = [[1.5 * sum(b[o][r] * a[r][i] for r in range(2)) for i in range(7)] for o in range(5)]
    for place, value in zip(ours.index.tolist(), ours.values.tolist(), strict=True):
        expected[place // 7][place % 7] += value
    assert_close(ours.weight, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    alone = composed(None, ours.values, ours.index, (5, 7))
    assert int((alone != 0).sum()) == 7 == len(ours.values)


# table 2 of arXiv:2406.02214: width, hidden, layers, rank, parameters in millions, gigabytes of weights, moments and places
TABLE = {"60M": (512, 1376, 8, 128, 44, 0.26), "130M": (768, 2048, 12, 256, 97, 0.60), "350M": (1024, 2736, 24, 256, 194, 1.24)}
TABLE |= {"1B": (2048, 5461, 24, 512, 646, 4.16)}


@pytest.mark.parametrize("size", TABLE)
def test_parameters_and_memory_are_those_of_the_paper(size):
    width, hidden, layers, rank, millions, gigabytes = TABLE[size]
    with torch.device("meta"):
        block = {n: nn.Linear(width, width, bias=False) for n in "qkvo"}
        block |= {n: nn.Linear(width, hidden, bias=False) for n in ("gate", "up")} | {"down": nn.Linear(hidden, width, bias=False)}
        made = nn.ModuleDict({"embed": nn.Embedding(32000, width), "head": nn.Linear(width, 32000, bias=False)})
        made["blocks"] = nn.ModuleList(nn.ModuleDict(block) for _ in range(1))
        SparseLowRank(r"blocks\.", rank=rank, density=0.03)(made)
    for p in (made.to(torch.bfloat16)).parameters():
        assert p.dtype == torch.bfloat16
    matrices = [(width, width)] * 4 + [(width, hidden)] * 3
    ours = sum(p.numel() for p in made["blocks"].parameters())
    assert ours == sum(rank * (i + o) + round(0.03 * i * o) for i, o in matrices)
    every = layers * ours + 2 * 32000 * width
    places = layers * sum(b.numel() * b.element_size() for b in made["blocks"].buffers())
    assert abs(every / 1e6 - millions) < 1
    assert abs((3 * 2 * every + places) / 1e9 - gigabytes) < 0.01  # weights and two moments in bfloat16, places in 8 bytes


def test_optimizer_states_have_the_size_of_the_form():
    made = stack((64, 32), (64, 32))
    SparseLowRank(rank=4, density=0.05)(made)
    optimizer = torch.optim.AdamW(made.parameters())
    sum(m.weight.square().sum() + m.bias.sum() for m in (first(made), made.get_submodule("blocks.1.fc1"))).backward()
    optimizer.step()
    moments = sum(s["exp_avg"].numel() for s in optimizer.state.values())
    assert moments == 2 * (4 * (64 + 32) + round(0.05 * 64 * 32) + 32)


def test_masks_have_exactly_so_many_entries():
    scores = torch.tensor([[3.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert largest(scores, 2).sum(-1).tolist() == [2, 2]
    weight = torch.randn(6, 16)
    kept = n_of_m(weight.abs(), 2, 4)
    for row, mask in zip(weight, kept, strict=True):
        for start in range(0, 16, 4):
            best = sorted(range(start, start + 4), key=lambda i: -abs(float(row[i])))[:2]
            assert [i for i in range(start, start + 4) if mask[i]] == sorted(best)
    for by, sizes in (("random", ((40, 24), (24, 8))), ("magnitude", ((40, 24), (24, 8)))):
        made = stack(*sizes)
        dense = [made.get_submodule(f"blocks.{i}.fc1").weight.detach().clone() for i in range(2)]
        Masked(sparsity=0.7, by=by)(made)
        layers = [made.get_submodule(f"blocks.{i}.fc1") for i in range(2)]
        total = sum(w.numel() for w in dense)
        if by == "random":
            assert [int(m.mask.sum()) for m in layers] == [round(0.3 * w.numel()) for w in dense]
        else:
            assert sum(int(m.mask.sum()) for m in layers) == round(0.3 * total)
            bound = torch.cat([w.abs().flatten() for w in dense]).sort(descending=True).values[round(0.3 * total) - 1]
            assert all(torch.equal(m.mask, w.abs() >= bound) for m, w in zip(layers, dense, strict=True))
        assert all(torch.equal(m.weight, w * m.mask) for m, w in zip(layers, dense, strict=True))


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_masked_entries_stay_exactly_zero_under_decay_and_momentum(optimizer):
    made, form = stack((16, 8)), Masked(sparsity=0.5)
    form(made)
    ours = first(made)
    mask = ours.mask.clone()
    make = {"AdamW": partial(torch.optim.AdamW, lr=0.01), "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9)}[optimizer]
    steps = make(made.parameters(), weight_decay=0.1)
    for number in range(5):
        form.at(made, number / 5)
        steps.zero_grad()
        ours(torch.randn(9, 16, dtype=torch.float64)).square().sum().backward()
        assert not ours.full.grad[~mask].any()
        steps.step()
        assert not ours.weight[~mask].any()
        assert not ours.full[~mask].any()
    assert torch.equal(ours.mask, mask)


def test_a_mask_that_goes_changes_no_answer_and_all_entries_learn():
    made, form = stack((16, 8)), Masked(sparsity=Step(0.75, 0.0, 0.5))
    form(made)
    ours, x = first(made), torch.randn(9, 16, dtype=torch.float64)
    steps = torch.optim.AdamW(made.parameters(), lr=0.01, weight_decay=0.1)
    for number in range(4):
        form.at(made, number / 8)
        steps.zero_grad()
        ours(x).square().sum().backward()
        steps.step()
    before = ours(x)
    assert int((ours.weight != 0).sum()) == 32
    form.at(made, 0.5)
    assert torch.equal(ours(x), before)
    steps.zero_grad()
    ours(x).square().sum().backward()
    assert (ours.full.grad != 0).all()
    plain = densified(made)
    assert torch.equal(first(plain)(x), ours(x))


def test_pruning_by_degrees_only_takes_away():
    made, form = stack((40, 24)), Masked(sparsity=Linear(0.0, 0.9, 0.8), by="magnitude")
    form(made)
    last = first(made).mask.clone()
    assert last.all()
    for progress in (0.0, 0.3, 0.6, 0.9):
        form.at(made, progress)
        now = first(made).mask
        assert not (now & ~last).any()
        assert int(now.sum()) == round((1 - min(0.9, 0.9 * progress / 0.8)) * 960)
        last = now.clone()


def test_a_mask_is_that_of_its_checkpoint_though_weights_have_moved():
    made, form = stack((16, 8)), Masked(sparsity=0.5, by="magnitude")
    form(made)
    mask = first(made).mask.clone()
    with torch.no_grad():
        first(made).full.copy_(torch.randn(8, 16))
    form.at(made, 0.3)
    assert torch.equal(first(made).mask, mask)


def test_ternary_weights_by_loops():
    weight = torch.randn(5, 7, dtype=torch.float64)
    scale = sum(abs(float(w)) for w in weight.flatten()) / 35
    expected = [[scale * round(max(-1.0, min(1.0, float(w) / scale))) for w in row] for row in weight]
    assert_close(ternary(weight), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    assert set((ternary(weight) / scale).round(decimals=9).flatten().tolist()) <= {-1.0, 0.0, 1.0}
    x = torch.randn(4, 9, dtype=torch.float64)
    for row, got in zip(x, rounded(x, 8), strict=True):
        step = max(abs(float(v)) for v in row) / 127
        assert_close(got, torch.tensor([step * round(float(v) / step) for v in row], dtype=torch.float64), rtol=0, atol=1e-12)


def test_gradients_go_straight_through_the_rounding():
    made = stack((16, 8))
    Ternary()(made)
    ours, x = first(made), torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 8, dtype=torch.float64)
    got = torch.autograd.grad((ours(x) * weight).sum(), [x, ours.full])
    w, q = ternary(ours.full.detach()), rounded(x.detach(), 8)
    assert_close(ours(x), q @ w.T + ours.bias, rtol=0, atol=1e-12)
    assert_close(got, (weight @ w, weight.T @ q), rtol=0, atol=1e-12)
    target = torch.randn(5)
    assert_close(straight(torch.ones(5), target, torch.tensor(0.3)), 1 + 0.3 * (target - 1))


def test_the_strength_of_rounding_follows_its_schedule_and_zero_is_the_plain_layer():
    made, plain = stack((16, 8)), stack((16, 8))
    form = Ternary(strength=Linear(0.0, 1.0, 0.5))
    form(made)
    x = torch.randn(3, 16, dtype=torch.float64)
    assert torch.equal(first(made)(x), first(plain)(x))
    for progress, strength in ((0.2, 0.4), (0.6, 1.0)):
        form.at(made, progress)
        assert abs(float(first(made).strength) - strength) < 1e-6
        w = first(made).full.detach()
        assert_close(first(made).weight, w + strength * (ternary(w) - w), rtol=0, atol=1e-6)
    assert len(first(made).weight.detach().abs().mul(1e9).round().unique()) == 2  # 0 and one scale


def test_a_restart_merges_begins_anew_and_is_forgotten_by_the_optimizer():
    made = stack((16, 8), (16, 8))
    LoRA("blocks.0", rank=2, alpha=4.0, frozen=False)(made)
    LowRank("blocks.1", rank=3)(made)
    ours, low, x = first(made), made.get_submodule("blocks.1.fc1"), torch.randn(5, 16, dtype=torch.float64)
    ours.base.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad])
    for _ in range(3):
        optimizer.zero_grad()
        (ours(x).square().sum() + low(x).square().sum()).backward()
        optimizer.step()
    answers, a, weight = (ours(x), low(x)), ours.a.detach().clone(), ours.base.weight.detach().clone()
    assert all(p in optimizer.state for p in (ours.a, ours.b, low.u, low.v, low.bias))
    restart(made, optimizer, 7)
    assert_close((ours(x), low(x)), answers, rtol=0, atol=1e-12)
    assert not ours.b.any()
    assert not torch.equal(ours.a, a)
    assert not torch.equal(ours.base.weight, weight)
    assert not any(p in optimizer.state for p in (ours.a, ours.b, low.u, low.v))
    assert low.bias in optimizer.state
    assert_close(low.u.norm(), low.v.norm())
    again = stack((16, 8))
    LoRA(rank=2, alpha=4.0)(again)
    restart(again, optimizer, 7)
    assert torch.equal(first(again).a, ours.a)  # a function of seed and name


def test_the_jagged_schedule():
    schedule, inner = Jagged(Cosine(0.0), 4, 0.2), Cosine(0.0)
    for step in range(101):
        progress = step / 100
        within = 1.0 if step == 100 else (progress * 4) % 1
        assert abs(schedule(progress) - inner(progress) * min(1.0, within / 0.2)) < 1e-12
    with pytest.raises(ValueError, match="expected"):
        Jagged(inner, 0)


def test_the_parameters_of_a_model_count_what_the_form_has():
    dense, ours = (Model({"text": Text(Trunk(64, 2, 2), length=8)}, forms=f) for f in ((), [SparseLowRank(rank=8, density=0.03)]))
    sizes = [(64, 192), (64, 64), (64, 256), (256, 64)]
    saved = 2 * sum(i * o - 8 * (i + o) - round(0.03 * i * o) for i, o in sizes)
    count = [sum(p.numel() for p in m.parameters()) for m in (dense, ours)]
    assert count[0] - count[1] == saved
    assert init.factors(ours, init.MuP(32)).keys() >= {"encoders.text.trunk.blocks.0.mlp.fc1.values"}
