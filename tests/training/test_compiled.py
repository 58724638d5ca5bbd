"""Compiled blocks: equal to eager ones, one compile per signature and shape, counted."""

import copy
from functools import partial

import pytest
import torch
import yaml
from contracts import cases
from torch.distributed.device_mesh import init_device_mesh
from torch.testing import assert_close

import headwater
from headwater import cli, distributed
from headwater.attention import higher_order
from headwater.modalities import Image
from headwater.model import Model
from headwater.objectives import Masked
from headwater.objectives.objective import weighted_sum
from headwater.pretrainer import Pretrainer, count
from headwater.tokens import Tokens
from headwater.training.checkpointing import forgetful
from headwater.training.compiled import Compiled
from headwater.training.sharding import shard
from headwater.trunk import Trunk


@pytest.fixture(autouse=True)
def fresh():
    before = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = before


def trunk(**options):
    torch.manual_seed(0)
    return Trunk(16, depth=3, heads=2, **options).double()


def tokens(rows=2, length=6, masked=False):
    draw = torch.Generator().manual_seed(rows * length)
    x = torch.randn(rows, length, 16, generator=draw, dtype=torch.float64).requires_grad_()  # as what a stem made
    valid = (torch.arange(length) < length - 1).expand(rows, -1) if masked else None
    return Tokens(x, torch.arange(length)[None, :, None].expand(rows, -1, -1), valid)


def learn(model, t):
    """What comes out, and all gradients."""
    y = model(t).x
    y.square().mean().backward()
    found = [y.detach(), *(p.grad for p in model.parameters())]
    model.zero_grad()
    return found


def test_blocks_share_one_compile_per_signature_and_shape():
    plain, quick = trunk(position="rotary"), trunk(position="rotary")
    compiled = Compiled("aot_eager")
    assert compiled.compile_blocks(quick) == 3
    assert compiled.compile_blocks(quick) == 0
    seen = []
    for t in (tokens(), tokens(), tokens(4), tokens(masked=True), tokens(), tokens(4)):
        assert_close(learn(quick, t), learn(plain, t), rtol=1e-10, atol=1e-12)
        seen.append(compiled.compiles)
    assert seen == [1, 1, 2, 3, 3, 3]


def test_dynamic_shapes_compile_less():
    quick, compiled = trunk(), Compiled("eager", dynamic=True)
    compiled.compile_blocks(quick)
    for length in range(4, 12):
        quick(tokens(length=length))
    assert compiled.compiles <= 2


def test_names_copies_and_evaluation():
    plain, quick = trunk(drop_path=0.3), trunk(drop_path=0.3)
    Compiled("eager").compile_blocks(quick)
    assert quick.state_dict().keys() == plain.state_dict().keys()
    assert_close(copy.deepcopy(quick).eval()(tokens()).x, plain.eval()(tokens()).x)
    with higher_order():  # compiled code steps aside
        y = quick.eval()(tokens()).x.square().sum()
    assert y.isfinite()


@pytest.mark.parametrize("compile_first", [True, False])
def test_with_activation_checkpointing(compile_first):
    plain, quick = trunk(), trunk()
    steps = [partial(forgetful, quick), partial(Compiled("aot_eager").compile_blocks, quick)]
    for step in steps[::-1] if compile_first else steps:
        assert step() == 3
    assert_close(learn(quick, tokens()), learn(plain, tokens()), rtol=1e-10, atol=1e-12)


def on_ranks(compiled):
    """Loss and gradients of a rank that holds a share of the parameters, and how often blocks were compiled."""
    torch.manual_seed(0)
    pretrainer = Pretrainer(Model({"image": Image(Trunk(16, depth=3, heads=2), size=16, patch=4)}), Masked).double()
    counter = Compiled("eager")
    if compiled:
        counter.compile_blocks(pretrainer)
    shard(pretrainer, init_device_mesh("cpu", (2,)))
    batch = cases.batch(pretrainer.readers, cases.examples(pretrainer.readers, 4), [distributed.rank(), 2 + distributed.rank()])
    for _ in range(2):
        task = pretrainer.hide(batch)
        loss = weighted_sum(pretrainer.ask(task), count([pretrainer.objective.numbers(task)]), 2)
        loss.backward()
    found = [p.grad.full_tensor() for p in pretrainer.parameters() if p.grad is not None]
    return loss.detach(), found, counter.compiles


def test_two_ranks_with_shares_of_the_parameters(ranks):
    plain, quick = (ranks(on_ranks, compiled)[0] for compiled in (False, True))
    assert_close(quick[:2], plain[:2], rtol=1e-10, atol=1e-12)
    assert quick[2] <= 3  # the encoder's blocks and the decoder's, with and without a mask


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"found the backend 'quick'; expected one of .*inductor"):
        Compiled("quick")
    with pytest.raises(ValueError, match="limit=0"):
        Compiled(limit=0)


def test_a_run_logs_recompiles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trunk = {"width": 16, "depth": 2, "heads": 2}
    callbacks = [
        {"class_path": "Compiled", "init_args": {"backend": "eager"}},
        {"class_path": "Checkpointed"},
        {"class_path": "Fused", "init_args": {"ops": {"layer_norm": "apex", "clip": "eager"}}},
    ]
    image = {"class_path": "Image", "init_args": {"size": 32, "patch": 16, "trunk": trunk}}
    recipe = {
        "model": {"backbone": {"encoders": {"image": image}}, "objective": {"class_path": "Masked"}},
        "data": {"batch_size": 4, "workers": 0, "train": {"things": {"shards": "embedded:things-train-*.tar", "views": ["image"]}}},
        "trainer": {"accelerator": "cpu", "max_steps": 3, "log_every_n_steps": 1, "callbacks": callbacks},
    }
    (tmp_path / "quick.yaml").write_text(yaml.safe_dump(recipe))
    cli.main(["fit", "--config", "quick.yaml"])
    rows = (tmp_path / "runs/quick/000/metrics.csv").read_text().splitlines()
    assert [row.rpartition(",")[2] for row in rows if ",compile/recompiles," in row] == ["0", "0", "0"]
    assert list(headwater.load_backbone(tmp_path / "runs/quick/000/backbone").reader) == ["image"]
