"""GaLore: its formula typed anew, the paper's count of bytes, and the same on every rank."""

import io
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.testing import assert_close

from headwater import distributed
from headwater.training import AdamW8bit, GaLore, ScheduleFree
from headwater.training.optimizers.galore import directions, galore_numbers, project, restore
from headwater.training.optimizers.state import state_bytes

SHAPES = {"tall": (24, 16), "wide": (16, 40)}
LR, DECAY = 0.05, 0.1


def made(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()}


def groups(module):
    p = dict(module.named_parameters())
    return [{"params": [p["tall"], p["wide"]], "hidden": True}, {"params": [p["vector"]], "weight_decay": 0.0}]


class Holder(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        for name, w in made(dtype).items():
            self.register_parameter(name, nn.Parameter(w))
        self.vector = nn.Parameter(torch.ones(5, dtype=dtype))


def run(make, steps, dtype=torch.float64, module=None, optimizer=None, first=0):
    module = module or Holder(dtype)
    optimizer = optimizer or make(groups(module))
    for number in range(first, steps):
        for name, p in module.named_parameters():
            p.grad = made(dtype, 10 + number)[name] if name in SHAPES else torch.full_like(p, 0.1 * number)
        optimizer.step()
    return {n: p.detach() for n, p in module.named_parameters()}, optimizer


def galore(w, grads, rank, every, scale, reset=False, b1=0.9, b2=0.999, eps=1e-8):
    """Algorithm 2 of arXiv:2403.03507 for a matrix, on its shorter side, with AdamW's decoupled decay."""
    left = w.shape[0] <= w.shape[1]
    m = v = 0
    t = 0
    for number, g in enumerate(grads):
        if number % every == 0:
            u, _, vt = torch.linalg.svd(g)
            p = u[:, :rank] if left else vt[:rank].T
            p = p * torch.stack([column[column.abs().argmax()].sign() for column in p.T])
            if reset:
                m = v = t = 0
        t += 1
        r = p.T @ g if left else g @ p
        m, v = b1 * m + (1 - b1) * r, b2 * v + (1 - b2) * r * r
        n = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
        w = (1 - LR * DECAY) * w - LR * scale * (p @ n if left else n @ p.T)
    return w


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(("rank", "of"), [(4, (4, 4)), (0.25, (4, 4)), (16, (16, 16)), (400, (16, 16)), (0.01, (1, 1))])
@pytest.mark.parametrize("steps", [1, 10])
def test_equals_its_algorithm(rank, of, steps, reset):
    make = partial(GaLore, inner=partial(torch.optim.AdamW, lr=LR, weight_decay=DECAY), rank=rank, every=4, scale=0.3, reset=reset)
    found, _ = run(make, steps)
    for (name, w), r in zip(made().items(), of, strict=True):
        expected = galore(w, [made(seed=10 + n)[name] for n in range(steps)], r, 4, 0.3, reset)
        assert (expected - w).abs().max() > 1e-3
        assert_close(found[name], expected, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_at_full_rank_with_plain_descent_nothing_is_lost():
    """P P^T = 1: the projected steps are the steps themselves."""
    full, _ = run(partial(GaLore, inner=partial(torch.optim.SGD, lr=LR), rank=16, every=3, scale=1.0), 6)
    plain, _ = run(partial(torch.optim.SGD, lr=LR), 6)
    assert_close(full, plain, rtol=1e-12, atol=1e-12)


def test_the_others_take_the_inner_steps():
    found, _ = run(partial(GaLore, inner=partial(torch.optim.AdamW, lr=LR), rank=2), 5)
    plain, _ = run(partial(torch.optim.AdamW, lr=LR), 5)
    assert torch.equal(found["vector"], plain["vector"])
    assert not torch.equal(found["tall"], plain["tall"])


def test_the_projection_keeps_what_is_largest():
    g = made()["wide"]
    for rank in (1, 3, 16):
        p = directions(g, rank)
        assert_close(p.T @ p, torch.eye(rank, dtype=g.dtype))
        low = project(g, p)
        assert low.shape == (40, rank)
        lost = (restore(low, p, g) - g).square().sum()
        assert_close(lost, torch.linalg.svdvals(g)[rank:].square().sum())


@pytest.mark.parametrize("rank", [2, 4, 16])
def test_its_state_is_as_large_as_the_paper_says(rank):
    """m r + 2 n r numbers for a matrix of m x n with m <= n (table 1), and AdamW's for the rest."""
    _, optimizer = run(partial(GaLore, rank=rank), 3, torch.float32)
    steps = 4 * 3  # AdamW counts the steps of every parameter in a float32
    formula = sum(min(s) * rank + 2 * max(s) * rank for s in SHAPES.values())
    assert formula == sum(galore_numbers(s, rank) for s in SHAPES.values())
    assert state_bytes(optimizer) == 4 * formula + 4 * 2 * 5 + steps
    saved = [x for state in optimizer.state_dict()["state"].values() for x in state.values() if torch.is_tensor(x)]
    assert sum(x.numel() * x.element_size() for x in saved) == state_bytes(optimizer)


def test_a_quarter_of_the_rank_saves_over_sixty_percent():
    for shape in ((512, 512), (512, 1376), (768, 3072)):
        assert galore_numbers(shape, min(shape) // 4) < 0.4 * 2 * shape[0] * shape[1]


def test_eight_bits_keep_a_byte_per_moment():
    make = partial(GaLore, inner=partial(AdamW8bit, lr=LR, smallest=0, block=4), rank=4)
    _, optimizer = run(make, 3, torch.float32)
    moments = sum(2 * (max(s) * 4 + 4 * max(s)) for s in SHAPES.values())  # a byte each, and a float32 for a block of four
    assert state_bytes(optimizer) == moments + 4 * sum(min(s) * 4 for s in SHAPES.values()) + 4 * 2 * 5 + 4 * 3


def test_a_resumed_run_goes_on_between_two_projectors():
    make = partial(GaLore, inner=partial(AdamW8bit, lr=LR, smallest=0, block=4), rank=4, every=4)
    whole, straight = run(make, 9, torch.float32)
    module = Holder(torch.float32)
    _, optimizer = run(make, 6, torch.float32, module)
    file = io.BytesIO()
    torch.save((module.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    fresh = Holder(torch.float32)
    again = make(groups(fresh))
    fresh.load_state_dict(weights)
    again.load_state_dict(state)
    found, _ = run(make, 9, torch.float32, fresh, again, 6)
    assert all(torch.equal(found[n], whole[n]) for n in whole)
    assert [s["count"] for s in again.state.values() if "count" in s] == [8, 8]
    assert state_bytes(again) == state_bytes(straight)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "whole rank"),
        ({"rank": 2.5}, "whole rank"),
        ({"every": 0}, "the others above 0"),
        ({"inner": ScheduleFree}, "use it alone"),
        ({"inner": torch.optim.Adafactor}, "timm.optim.Adafactor with"),
    ],
)
def test_bad_settings_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        GaLore(groups(Holder()), **options)


def test_groups_without_hidden_matrices_are_refused():
    with pytest.raises(ValueError, match="as `Groups` makes them"):
        GaLore([{"params": list(Holder().parameters())}])


def on_ranks(sharded, eight):
    """The values and the projectors after some steps, the gradients the same on all ranks."""
    module = Holder(torch.float32)
    if sharded:
        fully_shard(module, mesh=init_device_mesh("cpu", (distributed.world(),)))
    inner = partial(AdamW8bit, lr=LR, smallest=0, block=4) if eight else partial(torch.optim.AdamW, lr=LR)
    optimizer = GaLore(groups(module), inner=inner, rank=4, every=3)
    for number in range(7):
        for name, p in module.named_parameters():
            g = made(torch.float32, 10 + number)[name] if name in SHAPES else torch.full((5,), 0.1 * number)
            p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g
        optimizer.step()
    values = {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in module.named_parameters()}
    numbers = {
        n: sum(x.to_local().numel() for x in optimizer.state[p].values() if isinstance(x, DTensor))
        for n, p in module.named_parameters()
    }
    return values, [s["projector"] for s in optimizer.state.values() if "projector" in s], numbers


@pytest.mark.parametrize("eight", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_hold_the_same_projectors_bitwise(ranks, sharded, eight):
    whole, projectors, _ = on_ranks(False, eight)
    (a, pa, kept), (b, pb, others) = ranks(on_ranks, sharded, eight)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert all(torch.equal(x, y) for x, y in zip(pa, pb, strict=True))
    assert_close(a, whole, rtol=1e-5, atol=1e-5)
    assert_close(pa, projectors)
    if sharded and not eight:  # moments are shared out
        assert {n: kept[n] + others[n] for n in SHAPES} == {n: 2 * max(s) * 4 for n, s in SHAPES.items()}
