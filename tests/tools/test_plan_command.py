"""`headwater plan`: bytes against a real step, formulas of the strategies, verdicts, and the roofline."""

import json
from copy import deepcopy
from functools import lru_cache, partial

import pytest
import torch
import yaml
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from headwater.tools import describe
from headwater.tools import plan as module
from headwater.tools.cost import example
from headwater.tools.plan import costs_of, parsed, plan, planned, roofline
from headwater.tools.train import built
from headwater.training.sharding import shard

MACHINE = {"flops": 1e12, "bytes": 1e11, "source": "as given"}
TRUNK = {"width": 64, "depth": 4, "heads": 2}
RECIPE = {
    "model": {
        "backbone": {"encoders": {"image": {"class_path": "Image", "init_args": {"size": 32, "patch": 4, "trunk": TRUNK}}}},
        "objective": {"class_path": "Masked", "init_args": {"ratio": 0.5}},
    },
    "data": {"batch_size": 64},
}
told = partial(planned, RECIPE, machine=MACHINE)


@lru_cache
def cost(share, checkpointed):
    return costs_of(RECIPE, share, checkpointed)


@pytest.fixture
def once(monkeypatch):
    """Every cost is found once for all tests."""
    monkeypatch.setattr(module, "costs_of", lambda recipe, *rest: deepcopy(cost(*rest)))


def real(share=0):
    """Bytes of parameters, gradients and optimizer state after a real step; of this rank, if the parameters are shared out."""
    pretrainer = built(RECIPE, "cpu")
    pretrainer.objective.start(pretrainer.backbone)
    if share:
        shard(pretrainer, init_device_mesh("cpu", (share,)))
    optimizer = torch.optim.AdamW(pretrainer.parameters())
    for p in pretrainer.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    held = {
        "parameters": pretrainer.parameters(),
        "gradients": (p.grad for p in pretrainer.parameters()),
        "optimizer": (x for state in optimizer.state.values() for x in state.values()),
    }
    return {name: sum(map(bytes_of, tensors)) for name, tensors in held.items()}


def bytes_of(x):
    x = x.to_local() if isinstance(x, DTensor) else x
    return x.numel() * x.element_size()


def test_bytes_are_those_of_a_real_step(once):
    found = told(ranks=1, memory=80e9, batch=64)
    assert [one["strategy"] for one in found["ways"]] == ["one process", "one process"]
    memory = found["ways"][0]["memory"]
    assert {name: memory[name] for name in real()} == real()
    assert found["parameters"] * 4 == memory["parameters"]


def test_shares_are_those_of_real_ranks(ranks, once):
    of_rank = ranks(real, 2)
    found = next(one for one in told(ranks=2, memory=80e9, batch=64)["ways"] if one["strategy"] == "fsdp2")["memory"]
    for name in ("parameters", "gradients", "optimizer"):
        assert sum(one[name] for one in of_rank) / 2 == pytest.approx(found[name], rel=0.01)
    assert sum(one["parameters"] for one in of_rank) == 2 * found["parameters"]


def test_checkpointing_saves_activations_and_costs_flops():
    plain, again = (costs_of(RECIPE, 16, checkpointed) for checkpointed in (False, True))
    assert again["memory"]["activations"] < 0.5 * plain["memory"]["activations"]
    assert 1.15 * plain["flops"] < again["flops"] < 1.35 * plain["flops"]
    assert {n: again["memory"][n] for n in ("parameters", "optimizer")} == {
        n: plain["memory"][n] for n in ("parameters", "optimizer")
    }


def test_counted_activations_of_checkpointed_blocks_are_those_of_a_real_run():
    from headwater.objectives.objective import weighted_sum
    from headwater.training.checkpointing import forgetful

    pretrainer = built(RECIPE, "cpu")
    forgetful(pretrainer)
    own = {p.untyped_storage()._cdata for p in pretrainer.parameters()}
    task = pretrainer.hide(example(pretrainer, 16, None))
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.untyped_storage()._cdata, x), lambda x: x):
        weighted_sum(pretrainer.ask(task), pretrainer.objective.numbers(task), 1)
    real = sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in own)
    assert costs_of(RECIPE, 16, True)["memory"]["activations"] == pytest.approx(real, rel=0.1)


def test_strategies_add_what_they_need(once):
    ways = {(one["strategy"], one["checkpointed"]): one["memory"] for one in told(ranks=4, memory=80e9, batch=64)["ways"]}
    ddp, fsdp = ways["ddp", False], ways["fsdp2", False]
    assert ddp["buckets"] == ddp["gradients"]
    assert fsdp["optimizer"] == ddp["optimizer"] / 4
    assert fsdp["activations"] == ddp["activations"]
    assert fsdp["gathered"] > 0
    assert ways["ddp", True]["computed again"] < ddp["activations"] - ways["ddp", True]["activations"]


def test_verdicts_say_what_to_change(once):
    assert told(ranks=2, memory=80e9, batch=64)["verdict"].startswith("fits as it is, with strategy ddp, model.micro: 1")
    whole = sum(told(ranks=2, memory=80e9, batch=4096)["ways"][0]["memory"].values())
    tight = told(ranks=2, memory=1e9 + whole / 2, batch=4096)
    assert tight["verdict"].startswith("does not fit as it is")
    assert "the fastest that fits: strategy ddp, " in tight["verdict"]
    assert "does not fit in any way: at least" in told(ranks=2, memory=1.001e9, batch=4096)["verdict"]


def test_unknown_activations_are_said(monkeypatch):
    def fails(*given):
        raise RuntimeError("no step")

    monkeypatch.setattr(describe, "measure", fails)
    found = told(ranks=1, memory=80e9, batch=4)
    assert "activations are not in it" in found["verdict"]
    assert "no step" in found["notes"][0]


def test_the_command(tmp_path, capsys, once):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    plan(str(path), "2x24GiB", tflops=100.0, bandwidth=2000.0)
    said = capsys.readouterr().out
    for part in ("2 x 25.8 GB", "as given", "fsdp2", "computed", "fits as it is"):
        assert part in said
    plan(str(path), "1x1MB", batch=8, tflops=100.0, bandwidth=2000.0, json=True)
    assert json.loads(capsys.readouterr().out)["batch"] == 8


def test_expected_time_is_that_of_the_roofline(once):
    one = told(ranks=1, memory=80e9, batch=64)["ways"][0]
    compute = one["flops"] / 1e12
    assert one["seconds"] > compute
    faster = planned(RECIPE, 1, 80e9, 64, MACHINE | {"flops": 2e12})["ways"][0]
    assert one["seconds"] - faster["seconds"] == pytest.approx(compute / 2)


def test_the_roofline_is_measured_and_says_where():
    found = roofline(None, 500.0)
    assert found["bytes"] == 500e9
    assert found["flops"] > 1e8
    assert "of this machine" in found["source"] or "cuda" in found["source"]


@pytest.mark.parametrize("words", ["8", "8x80", "0x80GB", "8x80TB", "x80GB"])
def test_devices_that_are_not_understood(words):
    with pytest.raises(ValueError, match="such as 8x80GB"):
        parsed(words)


@pytest.mark.slow
def test_a_recipe_with_compiled_fused_and_checkpointed_blocks_is_planned(capsys):
    plan("multi_gpu", "8x80GB", tflops=400.0, bandwidth=3000.0, json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["notes"] == []
    assert found["parameters"] > 2e7
    assert found["verdict"].startswith("fits as it is")
