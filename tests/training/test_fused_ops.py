"""The callback that chooses kernels: what it asks for, what it falls back to, what it measures, and what a resumed run has."""

from types import SimpleNamespace

import pytest
import stub_apex
import torch
import yaml
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.testing import assert_close

from headwater import cli, distributed, fused
from headwater.layers import Mlp
from headwater.training import fused_ops
from headwater.training.fused_ops import Fused, FusedMlp, fastest, seconds, work
from headwater.training.fused_optimizers import DistributedAdamW, FusedAdamW
from headwater.trunk import Trunk

SMALL = {"width": 32, "depth": 2, "heads": 2}
RECIPE = {
    "model": {
        "backbone": {"encoders": {"image": {"class_path": "Image", "init_args": {"size": 32, "patch": 16, "trunk": SMALL}}}},
        "objective": {"class_path": "Masked"},
        "optimizer": {"class_path": "FusedAdamW", "init_args": {"lr": 0.01}},
    },
    "data": {"batch_size": 4, "workers": 0, "train": {"things": {"shards": "embedded:things-train-*.tar"}}},
    "trainer": {"accelerator": "cpu", "max_steps": 2, "callbacks": [{"class_path": "Fused", "init_args": {"ops": "auto"}}]},
}


@pytest.fixture(autouse=True)
def fresh():
    fused.missing.cache_clear()
    yield
    fused.missing.cache_clear()
    fused._preferred.clear()


def trainer(checkpoint=None, device="cpu"):
    return SimpleNamespace(ckpt_path=checkpoint, strategy=SimpleNamespace(root_device=torch.device(device)))


def test_ops_are_asked_for_while_a_run_lasts():
    callback = Fused({"adam": "eager", "layer_norm": "apex"})
    module = nn.Sequential(nn.LayerNorm(4))
    callback.setup(trainer(), module, "fit")
    assert fused._preferred == {"adam": "eager", "layer_norm": "apex"}
    assert type(module[0]) is nn.LayerNorm  # apex is not there
    callback.teardown(trainer(), module, "fit")
    assert fused._preferred == {}
    with pytest.raises(ValueError, match=r"found ops \['norm'\]; expected some of adam"):
        Fused({"norm": "apex"})


def test_norms_and_feed_forward_layers_are_swapped_where_apex_serves(monkeypatch, tmp_path):
    calls = stub_apex.install(monkeypatch, tmp_path)
    monkeypatch.setattr(fused, "kind", lambda like: ("cuda", False))
    torch.manual_seed(0)
    module = nn.Sequential(nn.LayerNorm(8), Mlp(8, 16, "gelu_tanh"), Mlp(8, 16), Mlp(8, 16, "gelu_tanh", gated=True)).bfloat16()
    x, names = torch.randn(2, 3, 8).bfloat16(), list(module.state_dict())
    y = module(x)
    callback = Fused("apex")
    callback.setup(trainer(), module, "fit")
    assert [type(m) for m in module] == [fused.LayerNorm, FusedMlp, Mlp, Mlp]
    assert list(module.state_dict()) == names
    assert_close(module(x), y)
    assert [name for name, _, _ in calls] == ["fused_layer_norm_affine", "fused_dense_gelu_dense_function"]
    callback.teardown(trainer(), module, "fit")
    assert_close(module(x), y)
    assert len(calls) == 2


@pytest.mark.parametrize("op", fused_ops.MEASURED)
def test_what_is_chosen_was_never_slower_than_the_plain_form(monkeypatch, op):
    device, module, found = torch.device("cpu"), Trunk(16, depth=1, heads=2), {}
    monkeypatch.setattr(fused_ops, "ROWS", 64)
    monkeypatch.setattr(fused_ops, "VOCAB", 64)

    def timed(call, device):
        found[len(found)] = seconds(call, device)
        return found[len(found) - 1]

    monkeypatch.setattr(fused_ops, "seconds", timed)
    chosen = fastest(op, module, device)
    assert chosen in ("eager", "torch")
    assert min(found.values()) == found[["eager", "torch"].index(chosen)] <= found[0]
    work(op, "torch", module, device)()
    assert fastest("sparsity", module, device) == "torch"


def test_a_resumed_run_has_what_the_first_one_chose(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "auto.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    monkeypatch.setattr(fused_ops, "fastest", lambda op, module, device: "eager")
    cli.main(["fit", "--config", str(recipe)])
    monkeypatch.setattr(fused_ops, "fastest", lambda op, module, device: "torch")
    (checkpoint,) = {p.resolve() for p in (tmp_path / "runs").rglob("*.ckpt")}
    callback = Fused("auto")
    callback.setup(trainer(checkpoint), nn.Linear(1, 1), "fit")
    assert set(callback.chosen.values()) == {"eager"}
    other = Fused("torch")
    other.setup(trainer(checkpoint), nn.Linear(1, 1), "fit")
    assert set(other.chosen.values()) == {"torch"}  # what is asked for by name holds


def on_ranks(state=None):
    """Three steps with the state split over two ranks; parameters, and the state gathered on the first."""
    params = [nn.Parameter(torch.arange(6.0).view(2, 3) / 6), nn.Parameter(torch.ones(4))]
    groups = [{"params": params[:1], "factor": 0.5}, {"params": params[1:], "weight_decay": 0.0}]
    made = DistributedAdamW(groups, lr=0.1, weight_decay=0.1)
    if state is not None:
        made.load_state_dict(state)
    for step in range(3):
        for p in params:
            p.grad = torch.sin(p.detach() + step)
        made.step()
    split = isinstance(made, ZeroRedundancyOptimizer)
    mine = sum(len(s) > 0 for s in (made.optim if split else made).state.values())
    if split:
        made.consolidate_state_dict(to=0)
    return split, [p.detach() for p in params], mine, made.state_dict() if distributed.rank() == 0 else None


def test_two_ranks_keep_half_of_the_state_each(ranks):
    (split, a, mine, state), (_, b, others, _) = ranks(on_ranks)
    whole, plain, every, _ = on_ranks()
    assert (split, whole) == (True, False)
    assert (mine, others, every) == (1, 1, 2)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert_close(a, plain, rtol=1e-6, atol=1e-6)
    more = ranks(on_ranks, state)[0][1]
    assert_close(more, again(state), rtol=1e-6, atol=1e-6)


def again(state):
    """One process goes on from the state of two ranks."""
    params = [nn.Parameter(torch.arange(6.0).view(2, 3) / 6), nn.Parameter(torch.ones(4))]
    made = FusedAdamW([{"params": params[:1]}, {"params": params[1:]}], lr=0.1, weight_decay=0.1)
    made.load_state_dict(state)
    for step in range(3):
        for p in params:
            p.grad = torch.sin(p.detach() + step)
        made.step()
    return [p.detach() for p in params]
