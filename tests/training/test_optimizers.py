"""Every optimizer of docs/optimizers.md: against its paper's formula typed anew, resumed, named in YAML, on shares of ranks."""

import copy
import io
import math
from functools import partial
from typing import ClassVar

import pytest
import runs
import timm.optim
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from headwater import distributed
from headwater.training import AdamW8bit, GaLore, Mixed, ScheduleFree
from headwater.training.groups import Groups, check_options
from headwater.training.optimizers.quantised import dequantise, dynamic_codes, quantise
from headwater.training.optimizers.state import state_bytes
from headwater.training.optimizers.timescale import decay_for, timescale

LR, DECAY = 0.02, 0.1
SHAPES = {"tall": (12, 7), "wide": (6, 10), "head": (5, 6), "bias": (7,)}
HIDDEN = ("tall", "wide")


def weights(dtype=torch.float64):
    made = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=made, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()}


def gradients(steps, dtype=torch.float64):
    made = torch.Generator().manual_seed(1)
    return [{n: torch.randn(s, generator=made, dtype=torch.float64).to(dtype) for n, s in SHAPES.items()} for _ in range(steps)]


def groups(module, decay=DECAY):
    p = dict(module.items() if isinstance(module, nn.ParameterDict) else module.named_parameters())
    return [
        {"params": [p[name] for name in HIDDEN], "hidden": True, "weight_decay": decay},
        {"params": [p["head"]], "weight_decay": decay, "factor": 0.5},
        {"params": [p["bias"]], "weight_decay": 0.0},
    ]


def run(make, steps, dtype=torch.float64, start=0, module=None, optimizer=None):
    """Steps with given gradients and a rate that changes, as the Pretrainer changes it."""
    module = module or nn.ParameterDict(weights(dtype))
    optimizer = optimizer or make(groups(module))
    for number, grads in list(enumerate(gradients(steps, dtype)))[start:]:
        for name, p in module.items():
            p.grad = grads[name].clone()
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = rate(group["initial_lr"], number) * group.get("factor", 1.0)
        optimizer.step()
    return module, optimizer


def rate(first, number):
    return first * (1 + number) / 3


def lr_of(name, number):
    return rate(LR, number) * (0.5 if name == "head" else 1.0)


def wd_of(name):
    return 0.0 if name == "bias" else DECAY


# Formulas, each from its paper: (name, first value, gradients) -> last value


def adamw(name, w, grads, b1=0.9, b2=0.999, eps=1e-8):
    m = v = 0
    for t, g in enumerate(grads):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        mh, vh = m / (1 - b1 ** (t + 1)), v / (1 - b2 ** (t + 1))
        w = w - lr_of(name, t) * (mh / (vh.sqrt() + eps) + wd_of(name) * w)
    return w


def sgd(name, w, grads):
    m = 0
    for t, g in enumerate(grads):
        m = 0.9 * m + g + wd_of(name) * w
        w = w - lr_of(name, t) * m
    return w


def lion(name, w, grads, b1=0.9, b2=0.99):
    m = torch.zeros_like(w)
    for t, g in enumerate(grads):
        w = w - lr_of(name, t) * (torch.sign(b1 * m + (1 - b1) * g) + wd_of(name) * w)
        m = b2 * m + (1 - b2) * g
    return w


def lamb(name, w, grads, b1=0.9, b2=0.999, eps=1e-6):
    m = v = 0
    for t, g in enumerate(grads):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        r = (m / (1 - b1 ** (t + 1))) / ((v / (1 - b2 ** (t + 1))).sqrt() + eps) + wd_of(name) * w
        trust = w.norm() / r.norm() if wd_of(name) else 1.0  # timm leaves what does not decay alone
        w = w - lr_of(name, t) * trust * r
    return w


def novograd(name, w, grads, b1=0.95, b2=0.98, eps=1e-8):
    m, v = 0, None
    for t, g in enumerate(grads):
        v = g.square().sum() if v is None else b2 * v + (1 - b2) * g.square().sum()
        m = b1 * m + (g / (v.sqrt() + eps) + wd_of(name) * w)
        w = w - lr_of(name, t) * m
    return w


def adafactor(name, w, grads, decay=-0.8, eps2=1e-3, relative=True):
    """relative: steps as large as the parameter, and the rate at most 1 / sqrt(t): torch's; timm's takes the rate as it is."""
    row = col = v = 0
    for t, g in enumerate(grads):
        new, square, lr = (t + 1) ** decay, g * g, lr_of(name, t)
        if w.ndim > 1:
            row = (1 - new) * row + new * square.mean(1, keepdim=True)
            col = (1 - new) * col + new * square.mean(0, keepdim=True)
            estimate = row @ col / row.mean()
        else:
            estimate = v = (1 - new) * v + new * square
        u = g / estimate.sqrt()
        u = u / max(1.0, float(u.square().mean().sqrt()))
        size = max(eps2, float(w.square().mean().sqrt())) * min(1, 1 / (lr * math.sqrt(t + 1))) if relative else 1
        w = w - lr * wd_of(name) * w - lr * size * u
    return w


def muon(w, grads, name, momentum=0.95):
    buffer = torch.zeros_like(w)
    for t, g in enumerate(grads):
        buffer = momentum * buffer + (1 - momentum) * g
        x = ((1 - momentum) * g + momentum * buffer).bfloat16()
        x = x.T if w.shape[0] > w.shape[1] else x
        x = x / x.norm()
        for _ in range(5):
            a = x @ x.T
            x = torch.addmm(x, torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
        x = x.T if w.shape[0] > w.shape[1] else x
        w = w * (1 - lr_of(name, t) * wd_of(name)) - lr_of(name, t) * 0.2 * math.sqrt(max(w.shape)) * x
    return w


def mixed(name, w, grads):
    return muon(w, grads, name) if name in HIDDEN else adamw(name, w, grads)


def schedule_free(name, w, grads, b1=0.9, b2=0.999, eps=1e-8):
    """Of the paper's algorithm 1: x is what counts, y is made of x and z each time."""
    x = z = w
    v, total, peak = 0, 0.0, 0.0
    for t, g in enumerate(grads):
        y = (1 - b1) * z + b1 * x
        lr = lr_of(name, t)
        v = b2 * v + (1 - b2) * g * g
        z = z - lr * (g / ((v / (1 - b2 ** (t + 1))).sqrt() + eps) + wd_of(name) * y)
        peak = max(peak, lr)
        total += peak**2
        x = (1 - peak**2 / total) * x + peak**2 / total * z
    return x


CASES = {
    "AdamW": (partial(torch.optim.AdamW, lr=LR), adamw, 1e-12),
    "SGD": (partial(torch.optim.SGD, lr=LR, momentum=0.9), sgd, 1e-12),
    "Adafactor": (partial(torch.optim.Adafactor, lr=LR), adafactor, 1e-9),
    "Adafactor of timm": (
        partial(timm.optim.Adafactor, lr=LR, min_dim_size_to_factor=2),
        partial(adafactor, relative=False),
        1e-9,
    ),
    "Lion": (partial(timm.optim.Lion, lr=LR), lion, 1e-12),
    "LAMB": (partial(timm.optim.Lamb, lr=LR, max_grad_norm=None), lamb, 1e-12),
    "NovoGrad": (partial(timm.optim.NvNovoGrad, lr=LR), novograd, 1e-6),  # its second moment is a float32
    "Muon": (
        partial(
            Mixed, hidden=partial(torch.optim.Muon, lr=LR, adjust_lr_fn="match_rms_adamw"), rest=partial(torch.optim.AdamW, lr=LR)
        ),
        mixed,
        5e-4,  # Newton and Schulz in bfloat16
    ),
    "ScheduleFree": (partial(ScheduleFree, lr=LR), schedule_free, 1e-12),
    "AdamW8bit": (partial(AdamW8bit, lr=LR), adamw, 1e-12),  # all of it is small; eight bits: below
}
RESUMED = {
    **CASES,
    "AdamW8bit packed": (partial(AdamW8bit, lr=LR, smallest=0, block=4), None, 0),
    "GaLore": (partial(GaLore, inner=partial(torch.optim.AdamW, lr=LR), rank=3, every=3), None, 0),
    "GaLore 8 bit": (partial(GaLore, inner=partial(AdamW8bit, lr=LR, smallest=0, block=4), rank=3, every=3), None, 0),
    "GaLore Lion": (partial(GaLore, inner=partial(timm.optim.Lion, lr=LR), rank=0.5, every=3, reset=True), None, 0),
    "GaLore Adafactor": (
        partial(GaLore, inner=partial(timm.optim.Adafactor, lr=LR, min_dim_size_to_factor=2), rank=0.5, every=3),
        None,
        0,
    ),
}


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("name", CASES)
def test_equals_its_formula(name, steps):
    make, formula, tolerance = CASES[name]
    module, optimizer = run(make, steps)
    if name == "ScheduleFree":
        optimizer.eval()
    for part, first in weights().items():
        expected = formula(part, first, [g[part] for g in gradients(steps)])
        assert (expected - first).abs().max() > 1e-4
        assert_close(module[part].detach(), expected, rtol=tolerance, atol=tolerance, msg=lambda m, part=part: f"{part}: {m}")


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(name, dtype):
    make = RESUMED[name][0]
    whole, straight = run(make, 8, dtype)
    half, optimizer = run(make, 4, dtype)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "model": half.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = nn.ParameterDict({n: torch.zeros(s, dtype=dtype) for n, s in SHAPES.items()})
    again = make(groups(fresh))
    fresh.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    run(make, 8, dtype, 4, fresh, again)
    assert all(torch.equal(fresh[n], whole[n]) for n in SHAPES)
    ours, theirs = again.state_dict(), straight.state_dict()
    for number, state in theirs["state"].items():
        for key, value in state.items():
            found = ours["state"][number][key]
            assert torch.equal(found, value) and found.dtype == value.dtype if torch.is_tensor(value) else found == value


@pytest.mark.parametrize("name", RESUMED)
def test_a_step_without_gradients_changes_nothing(name):
    make = RESUMED[name][0]
    module, optimizer = run(make, 3, torch.float32)
    before, held = copy.deepcopy(module.state_dict()), copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(before[n], p) for n, p in module.items())
    if name != "LAMB":  # counts steps by group, with or without gradients
        assert_close(optimizer.state_dict()["state"], held["state"], rtol=0, atol=0)


class TestYaml:
    """One line: the class; its own defaults hold whatever stood there before."""

    LINES: ClassVar = {
        "torch.optim.AdamW": {"betas": [0.9, 0.999], "weight_decay": 0.01},
        "torch.optim.SGD": {"momentum": 0.0, "weight_decay": 0.0},
        "torch.optim.Adafactor": {"weight_decay": 0.0},
        "timm.optim.Adafactor": {"weight_decay": 0.0},
        "timm.optim.Lion": {"betas": [0.9, 0.99], "weight_decay": 0.0},
        "timm.optim.Lamb": {"eps": 1e-6},
        "timm.optim.NvNovoGrad": {"betas": [0.95, 0.98]},
        "Mixed": {},
        "ScheduleFree": {"weight_decay": 0.0},
        "AdamW8bit": {"block": 256},
        "GaLore": {"rank": 0.25, "every": 200, "scale": 0.25},
    }
    NESTED: ClassVar = {
        "GaLore": {"rank": 2, "inner": {"class_path": "AdamW8bit", "init_args": {"lr": 0.01}}},
        "Mixed": {"rest": {"class_path": "timm.optim.Lion", "init_args": {"lr": 0.01}}},
    }

    GIVEN: ClassVar = [*((name, {"lr": 0.01} if name == "timm.optim.Adafactor" else {}) for name in LINES), *NESTED.items()]

    @pytest.mark.parametrize(("name", "given"), GIVEN)
    def test_one_line_makes_it_and_the_saved_config_again(self, name, given):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--optimizer", type=OptimizerCallable | None, default=None)
        config = parser.parse_string(yaml.safe_dump({"optimizer": {"class_path": name, "init_args": given}}))
        found = yaml.safe_load(parser.dump(config))["optimizer"]["init_args"]
        assert {k: found[k] for k in self.LINES[name]} == self.LINES[name] | {
            k: v for k, v in given.items() if k in self.LINES[name]
        }
        again = parser.instantiate(parser.parse_string(parser.dump(config))).optimizer
        module, optimizer = run(again, 2, torch.float32)
        assert all(not torch.equal(module[n], w) for n, w in weights(torch.float32).items())
        assert type(optimizer).__name__ == name.rpartition(".")[2]


def test_the_pretrainer_leaves_each_optimizer_its_own_defaults():
    from headwater.pretrainer import Pretrainer

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Pretrainer, "model", skip={"backbone", "objective"})
    found = parser.parse_args(["--model.optimizer=timm.optim.Lion"]).model.optimizer.init_args
    assert (tuple(found.betas), found.weight_decay) == ((0.9, 0.99), 0.0)


def test_codes_are_those_of_the_paper():
    for signed in (True, False):
        codes = dynamic_codes(signed)
        assert len(codes) == 256 == len(set(codes.tolist()))
        assert (codes.diff() > 0).all()
        assert float(codes[-1]) == 1
        assert 0 in codes
        assert float(codes[codes > 0][0]) == pytest.approx(0.55e-6 if signed else 0.325e-6)  # smallest power of ten
        top = codes[codes > 0.1][:-1]
        assert len(top) == (64 if signed else 128)  # the largest power of ten is the finest
        assert_close(top.diff(), torch.full((len(top) - 1,), 0.9 / len(top)), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_quantising_takes_the_nearest_code_of_each_block(signed):
    x = torch.randn(3, 11, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1.0, 50.0])[:, None]
    x = x if signed else x.square()
    x[1, 4:8] = 0
    codes = dynamic_codes(signed)
    got, scale = quantise(x, codes, 4)
    assert (got.dtype, got.shape, scale.shape) == (torch.uint8, (3, 11), (3, 3))
    back = dequantise(got, scale, codes, 4)
    for i in range(3):
        for j in range(11):
            largest = x[i, j // 4 * 4 : j // 4 * 4 + 4].abs().max()
            nearest = min(codes.tolist(), key=lambda c, i=i, j=j, largest=largest: abs(c * largest - x[i, j]))
            assert float(back[i, j]) == pytest.approx(nearest * float(largest), rel=1e-6)
    assert (back - x).abs().max() < 0.01 * x.abs().max()


def test_eight_bits_are_as_many_as_promised_and_step_nearly_as_adamw():
    rows, columns = 40, 300
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    made = {}
    for make in (partial(AdamW8bit, lr=1e-2, weight_decay=0.1), partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)):
        p, noise = nn.Parameter(w.clone()), torch.Generator().manual_seed(1)
        optimizer = make([p])
        for _ in range(20):
            p.grad = torch.randn(rows, columns, generator=noise) + w
            optimizer.step()
        made[type(optimizer)] = optimizer, p.detach()
    (eight, ours), (_, theirs) = made.values()
    assert state_bytes(eight) == 2 * (rows * columns + 4 * rows * math.ceil(columns / 256)) + 4
    assert (ours - theirs).norm() < 0.03 * (theirs - w).norm()
    marked = [{"params": [nn.Parameter(w.clone())], "hidden": True}, {"params": [nn.Parameter(w.clone())]}]
    both = AdamW8bit(marked)
    for group in marked:
        group["params"][0].grad = w.clone()
    both.step()
    assert [sorted(s) for s in both.state.values()][1] == ["exp_avg", "exp_avg_sq", "step"]  # what is not hidden stays whole


def test_schedule_free_evaluates_at_the_average_and_comes_back():
    make = CASES["ScheduleFree"][0]
    module, optimizer = run(make, 5, torch.float32)
    there = copy.deepcopy(module.state_dict())
    optimizer.eval()
    optimizer.eval()
    average = copy.deepcopy(module.state_dict())
    assert all((there[n] - average[n]).abs().max() > 1e-4 for n in there)
    with pytest.raises(RuntimeError, match=r"call `train\(\)`"):
        run(make, 6, torch.float32, 5, module, optimizer)
    saved = copy.deepcopy((module.state_dict(), optimizer.state_dict()))  # a checkpoint of the average
    optimizer.train()
    assert all(torch.equal(there[n], p) for n, p in module.items())
    run(make, 8, torch.float32, 5, module, optimizer)
    fresh = nn.ParameterDict(weights(torch.float32))
    again = make(groups(fresh))
    fresh.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    again.train()
    run(make, 8, torch.float32, 5, fresh, again)
    assert all(torch.equal(fresh[n], module[n]) for n in module)


def test_the_timescale_is_where_a_step_has_faded():
    rate, decay, batch, data = 1e-3, 0.1, 32, 1e6
    share = timescale(rate, decay, batch, data)
    assert (1 - rate * decay) ** (share * data / batch) == pytest.approx(1 / math.e, rel=1e-3)
    assert decay_for(share, rate, batch, data) == pytest.approx(decay)
    assert decay_for(share, rate, 2 * batch, data) == pytest.approx(2 * decay)
    with pytest.raises(ValueError, match="found rate 0"):
        timescale(0, decay, batch, data)


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        for name, w in weights(torch.float32).items():
            self.register_parameter(name, nn.Parameter(w))


def on_shares(name, steps, again_at):
    """The values after some steps with FSDP2's shares, saved and loaded in between."""
    module = Holder()
    if distributed.world() > 1:
        fully_shard(module, mesh=init_device_mesh("cpu", (distributed.world(),)))
    make = RESUMED[name][0]
    optimizer = make(groups(module))
    for number, grads in enumerate(gradients(steps, torch.float32)):
        for part, p in module.named_parameters():
            whole = grads[part]
            if isinstance(p, DTensor):
                from torch.distributed.tensor import distribute_tensor

                whole = distribute_tensor(whole, p.device_mesh, p.placements)
            p.grad = whole
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = rate(group["initial_lr"], number) * group.get("factor", 1.0)
        optimizer.step()
        if number + 1 == again_at and distributed.world() > 1:
            if hasattr(optimizer, "eval"):
                optimizer.eval()
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state = get_optimizer_state_dict(module, optimizer, options=options)
            every = [state]
            torch.distributed.broadcast_object_list(every)  # the file that all ranks read
            optimizer = make(groups(module))
            optimizer.zero_grad()
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
            set_optimizer_state_dict(module, optimizer, every[0], options=options)
            if hasattr(optimizer, "train"):
                optimizer.train()
    values = {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in module.named_parameters()}
    return values, state_bytes(optimizer)


WHOLE = {
    "Adafactor": "take AdamW8bit or GaLore",
    "Adafactor of timm": "take AdamW8bit or GaLore",
    "GaLore Adafactor": "take AdamW8bit or GaLore",
    "NovoGrad": "another trainer.strategy",
}
SHARED = [name for name in RESUMED if name not in WHOLE]


def on_refused_shares(name):
    module = Holder()
    fully_shard(module, mesh=init_device_mesh("cpu", (distributed.world(),)))
    made = groups(module)
    try:
        check_options(RESUMED[name][0](made), made)
    except ValueError as error:
        return str(error)
    return "allowed"


@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_work_on_shares_says_so(ranks, name):
    assert all(WHOLE[name] in said for said in ranks(on_refused_shares, name))


@pytest.mark.parametrize("name", SHARED)
def test_shares_of_ranks_step_like_the_whole(ranks, name):
    whole, size = on_shares(name, 6, 3)
    (a, part), (b, other) = ranks(on_shares, name, 6, 3)
    assert all(torch.equal(a[n], b[n]) for n in a)
    loose = 2e-2 if name == "Muon" else 1e-5  # Newton and Schulz in bfloat16
    assert_close(a, whole, rtol=loose, atol=loose)
    if name in ("AdamW", "AdamW8bit packed", "ScheduleFree"):
        assert part + other <= size + 4 * len(SHAPES)  # nothing is kept twice but the numbers of steps


RUNS = {
    "Muon": Mixed,
    "GaLore": partial(GaLore, rank=4, every=2),
    "GaLore 8 bit": partial(GaLore, inner=partial(AdamW8bit, lr=1e-2, smallest=0, block=4), rank=4, every=2),
    "ScheduleFree": partial(ScheduleFree, lr=1e-2),
    "AdamW8bit": partial(AdamW8bit, lr=1e-2, smallest=0, block=8),
}


def trained(shards, name, steps, sharded, folder=None):
    """Parameters after a run of the Trainer, which goes on from the checkpoint in the folder, and leaves one."""
    pretrainer = runs.make(runs.COUPLED, optimizer=RUNS[name], groups=Groups(0.9))
    made = runs.trainer(steps, sharded)
    last = None if folder is None else folder / "last.ckpt"
    made.fit(pretrainer, runs.pairs(shards), ckpt_path=last if last and last.exists() else None, weights_only=True)
    if last:
        made.save_checkpoint(last)
    return {n: runs.whole(p) for n, p in pretrainer.named_parameters()}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return runs.write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_runs_go_from_one_process_to_shares_and_back(ranks, shards, name, tmp_path):
    straight = trained(shards, name, 4, False)
    trained(shards, name, 1, False, tmp_path)
    ranks(trained, shards, name, 2, True, tmp_path)
    a, b = ranks(trained, shards, name, 3, True, tmp_path)
    assert all(torch.equal(a[n], b[n]) for n in a)
    found = trained(shards, name, 4, False, tmp_path)
    loose = 2e-3 if name == "Muon" else 5e-4
    assert_close(found, straight, rtol=loose, atol=loose)


@pytest.mark.parametrize("name", RUNS)
def test_ranks_train_like_one_process(ranks, shards, name):
    a, b = ranks(trained, shards, name, 3, False)
    assert all(torch.equal(a[n], b[n]) for n in a)
    loose = 2e-3 if name == "Muon" else 5e-4
    assert_close(a, trained(shards, name, 3, False), rtol=loose, atol=loose)


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_of_the_trainer_is_the_uninterrupted_one(shards, name, tmp_path):
    trained(shards, name, 2, False, tmp_path)
    straight, resumed = trained(shards, name, 4, False), trained(shards, name, 4, False, tmp_path)
    assert all(torch.equal(straight[n], p) for n, p in resumed.items())
