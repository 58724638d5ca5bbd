"""The resolver: apex absent, stubbed, of another author, and present; every op against its plain formula."""

import sys
from copy import deepcopy
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import stub_apex
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from headwater import fused
from headwater.training import fused_optimizers as optimizers

KINDS = ("FusedAdamW", "FusedLamb", "FusedNovograd", "FusedSgd")


@pytest.fixture(autouse=True)
def fresh():
    """Nothing is remembered of what was found before."""
    fused.missing.cache_clear()
    fused.announce.cache_clear()
    yield
    fused.missing.cache_clear()


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """The record of a stand-in for apex, which takes every tensor for one on CUDA."""
    monkeypatch.setattr(fused, "kind", lambda like: ("cuda", False))
    return stub_apex.install(monkeypatch, tmp_path)


def called(stub):
    return [name for name, _, _ in stub]


def weights(seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in ((6, 4), (4,), (3, 2, 2))]


def train(make, steps=10, backend=None, state=None, late=False, skip=(), **options):
    """Parameters after some steps on drawn gradients, and the optimizer. late: the last one has none in the first steps."""
    params = weights()
    groups = [{"params": params[:1] + params[2:], "factor": 0.5}, {"params": params[1:2], "weight_decay": 0.0}]
    made = getattr(optimizers, make)(groups, lr=0.05, backend=backend, **{"weight_decay": 0.1, **options})
    if state is not None:
        made.load_state_dict(state)
    draw = torch.Generator().manual_seed(7)
    for step in range(steps):
        for k, p in enumerate(params):
            gradient = torch.randn(p.shape, generator=draw).to(p)
            p.grad = None if step in skip or (late and k == 2 and step < 3) else gradient
        made.step()
        made.zero_grad()
    return params, made


def test_without_apex_everything_runs_on_torch_and_says_why(caplog):
    with fused.preferring("apex"):
        for op in fused.NAMES:
            assert fused.resolve(op, torch.ones(2)) == "torch"
            assert "not installed" in fused.missing(op, "cuda")
        _, made = train("FusedAdamW")
    assert type(made) is torch.optim.AdamW
    assert made.param_groups[0]["fused"]
    assert caplog.text.count("adam runs on torch.optim.AdamW, fused: apex is not installed; docs/apex.md") == 1
    assert not [name for name in sys.modules if name.partition(".")[0] == "apex"]


def test_the_apex_of_the_package_index_is_recognised_and_not_run(monkeypatch, tmp_path):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('ran foreign code')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "is not NVIDIA's" in fused.missing("adam", "cuda")
    assert "pip uninstall apex" in fused.missing("layer_norm", "cuda")
    assert "apex" not in sys.modules


def test_reasons_are_those_of_each_op(monkeypatch, tmp_path):
    stub_apex.install(monkeypatch, tmp_path, without=("xentropy_cuda", "apex.fused_dense"))
    assert "runs on CUDA alone" in fused.missing("adam", "cpu")
    assert "DTensors" in fused.missing("adam", "cuda", True)
    assert "without its extension" not in fused.missing("adam", "cuda")
    assert "extension xentropy_cuda cannot be imported (ModuleNotFoundError" in fused.missing("xentropy", "cuda")
    assert "apex.fused_dense.fused_dense_gelu_dense_function cannot be imported" in fused.missing("mlp", "cuda")
    assert [op for op in fused.NAMES if fused.missing(op, "cuda")] == ["xentropy", "mlp"]


def test_extensions_inside_of_the_package_are_found(monkeypatch, tmp_path):
    stub_apex.install(monkeypatch, tmp_path, without=("amp_C",))
    assert fused.missing("sgd", "cuda")
    fused.missing.cache_clear()
    inside = ModuleType("apex._extensions.amp_C")
    monkeypatch.setitem(sys.modules, "apex._extensions", ModuleType("apex._extensions"))
    monkeypatch.setitem(sys.modules, "apex._extensions.amp_C", inside)
    inside.__spec__ = ModuleSpec("apex._extensions.amp_C", None)
    assert fused.missing("sgd", "cuda") == ""


def test_a_choice_holds_for_some_ops_and_for_a_while():
    with fused.preferring({"adam": "eager"}):
        assert fused.resolve("adam", torch.ones(1)) == "eager"
        assert fused.resolve("sgd", torch.ones(1)) == "torch"
        with fused.preferring("torch"):
            assert fused.resolve("adam", torch.ones(1)) == "torch"
        assert fused.resolve("adam", torch.ones(1)) == "eager"
    assert fused._preferred == {}


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("steps", [1, 10])
def test_backends_take_the_same_steps(stub, make, steps):
    options = {"momentum": 0.9, "nesterov": True} if make == "FusedSgd" else {}
    plain, _ = train(make, steps, "eager", **options)
    quick, _ = train(make, steps, "torch", **options)
    apex, made = train(make, steps, "apex", **options)
    assert type(made).__name__ == called(stub)[0]
    assert_close(quick, plain, rtol=1e-12, atol=1e-12)
    assert_close(apex, plain, rtol=1e-7, atol=1e-7)  # second moments of NovoGrad are float32


def test_adam_is_its_formula():
    (p, *_), _ = train("FusedAdamW", 3, "torch")
    w, m, v, draw = weights()[0].detach(), 0.0, 0.0, torch.Generator().manual_seed(7)
    for t in range(1, 4):
        g, *_ = [torch.randn(x.shape, generator=draw).double() for x in weights()]
        w = w - 0.05 * 0.1 * w
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w - 0.05 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)


def test_apex_is_called_with_what_makes_it_equal(stub):
    for make in KINDS:
        getattr(optimizers, make)(weights(), lr=0.1, backend="apex")
    of = {name: kwargs for name, _, kwargs in stub}
    assert of["FusedAdam"]["adam_w_mode"] is True
    assert of["FusedAdam"]["weight_decay"] == 0.01
    assert of["FusedLAMB"]["max_grad_norm"] == float("inf")
    assert of["FusedNovoGrad"]["bias_correction"] is False
    assert of["FusedNovoGrad"]["reg_inside_moment"] is True


@pytest.mark.parametrize(("first", "then"), [("apex", "torch"), ("torch", "apex"), ("apex", "apex"), ("eager", "torch")])
@pytest.mark.parametrize("make", ["FusedAdamW", "FusedLamb", "FusedSgd"])
def test_a_checkpoint_goes_on_with_another_backend(stub, make, first, then):
    options = {"momentum": 0.9} if make == "FusedSgd" else {}
    params, whole = train(make, 6, "eager", **options)
    _, made = train(make, 3, first, **options)
    state = made.state_dict()
    again = getattr(optimizers, make)(
        [{"params": params[:1] + params[2:]}, {"params": params[1:2]}], lr=0.05, backend=then, **options
    )
    again.load_state_dict(deepcopy(state))  # torch keeps the tensors that it is given
    for group, other in zip(again.state_dict()["param_groups"], whole.state_dict()["param_groups"], strict=True):
        assert group["lr"] == other["lr"]
        assert group["weight_decay"] == other["weight_decay"]
    assert again.param_groups[0]["factor"] == 0.5
    for one in again.state_dict()["state"].values():
        assert float(one.get("step", 3)) == 3
    for p in params:
        p.grad = torch.ones_like(p)
    again.step()
    assert all(float(one.get("step", 4)) == 4 for one in again.state_dict()["state"].values())
    assert_close(made.state_dict()["state"], state["state"])  # saving changes nothing


def test_a_step_without_gradients_does_not_count(stub):
    whole, _ = train("FusedAdamW", 6, "eager", skip=(0, 3))
    left, made = train("FusedAdamW", 6, "apex", skip=(0, 3))
    assert made.param_groups[0]["step"] == 4
    assert_close(left, whole, rtol=1e-10, atol=1e-10)


def test_momentum_of_parameters_that_come_late_is_right(stub):
    whole, _ = train("FusedSgd", 6, "eager", late=True, momentum=0.9)
    assert_close(train("FusedSgd", 6, "apex", late=True, momentum=0.9)[0], whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_clipped_alike(stub, dtype):
    found = {}
    for backend in ("eager", "torch", "apex"):
        gradients = [p.detach().clone() for p in weights(dtype=dtype)]
        norm = fused.gradient_norm(gradients, backend)
        fused.scale_gradients(gradients, 0.5, norm, backend)
        found[backend] = (norm.to(dtype), gradients)
    assert_close(found["torch"], found["eager"])
    assert_close(found["apex"], found["eager"], rtol=1e-6, atol=1e-6)
    params = weights(dtype=dtype)
    for p in params:
        p.grad = p.detach().clone()
    assert_close(torch.nn.utils.clip_grad_norm_(params, 0.5), found["torch"][0])
    assert_close([p.grad for p in params], found["torch"][1])
    assert called(stub) == ["multi_tensor_l2norm", "multi_tensor_scale"]


def test_gradients_of_several_dtypes_are_clipped_together(stub):
    mixed = [torch.ones(4), torch.ones(5, dtype=torch.bfloat16)]
    norm = fused.gradient_norm(mixed, "apex")
    fused.scale_gradients(mixed, 1.5, norm, "apex")
    assert float(norm) == pytest.approx(3)
    assert_close(mixed[0], torch.full((4,), 0.5))
    assert_close(mixed[1], torch.full((5,), 0.5, dtype=torch.bfloat16))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(stub, smoothing):
    draw = torch.Generator().manual_seed(0)
    target = torch.tensor([0, 3, 4, 0, 1])
    found = {}
    for backend, dtype in (("eager", torch.float64), ("torch", torch.float64), ("apex", torch.float32)):
        logits = torch.randn(5, 6, generator=draw.manual_seed(0), dtype=torch.float64).to(dtype).requires_grad_()
        loss = fused.cross_entropy(logits, target, smoothing, backend)
        (loss * torch.arange(1, 6)).sum().backward()
        found[backend] = (loss.detach(), logits.grad)
    q = F.one_hot(target, 6) * (1 - smoothing) + smoothing / 6
    logits = torch.randn(5, 6, generator=draw.manual_seed(0), dtype=torch.float64)
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    assert_close(found["eager"], (-(q * p.log()).sum(-1), (p - q) * torch.arange(1, 6)[:, None]))
    assert_close(found["torch"], found["eager"])
    assert_close(found["apex"], tuple(x.float() for x in found["eager"]), rtol=1e-5, atol=1e-5)  # the id 0 is asked for, too
    assert stub == [("SoftmaxCrossEntropyLoss", (), {"smoothing": smoothing, "padding_idx": -1, "half_to_float": False})]


def test_half_precision_logits_give_float32_losses(stub):
    logits, target = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.tensor([0, 2, 4])
    with fused.preferring("apex"):
        apex = fused.cross_entropy(logits, target)
    assert stub[0][2]["half_to_float"] is True
    assert apex.dtype == fused.cross_entropy(logits, target).dtype == torch.float32
    assert_close(apex, fused.cross_entropy(logits, target, backend="eager"))
    fused.cross_entropy(logits.double(), target, backend="apex")
    assert len(stub) == 1  # apex has no kernel for float64


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norms_keep_their_names_and_their_values(stub, norm):
    plain = nn.Sequential(norm(8, eps=1e-5), nn.Linear(8, 8), norm(8, eps=1e-3)).double()
    nn.init.normal_(plain[0].weight, generator=torch.Generator().manual_seed(1))
    before, held = plain.state_dict(), {id(p) for p in plain.parameters()}
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    y = plain(x)
    gradient = torch.autograd.grad(y.square().sum(), [x, *plain.parameters()])
    assert fused.swap_norms(plain) == 2
    assert isinstance(plain[0], norm)
    assert plain.state_dict().keys() == before.keys()
    assert {id(p) for p in plain.parameters()} == held
    formula = fused.layer_norm if norm is nn.LayerNorm else fused.rms_norm
    assert_close(formula(x, *plain[0].parameters(), 1e-5), F.layer_norm(x, (8,), *plain[0].parameters()) if norm is nn.LayerNorm
                 else F.rms_norm(x, (8,), plain[0].weight, 1e-5))  # fmt: skip
    for backend, calls in (("torch", 0), ("apex", 2)):
        with fused.preferring(backend):
            made = plain(x)
            assert_close(torch.autograd.grad(made.square().sum(), [x, *plain.parameters()]), gradient)
        assert len(stub) == calls
        assert_close(made, y)
    assert stub[1][1] == ((8,), 1e-3)


def test_norms_without_parameters_stay():
    bare = nn.Sequential(nn.LayerNorm(8, elementwise_affine=False), nn.LayerNorm(8, bias=False), nn.LayerNorm(8))
    assert fused.swap_norms(bare) == 1
    assert [type(m) for m in bare] == [nn.LayerNorm, nn.LayerNorm, fused.LayerNorm]


def test_mlp(stub):
    draw = torch.Generator().manual_seed(0)
    x, w1, b1, w2, b2 = (torch.randn(s, generator=draw) for s in ((2, 3, 4), (8, 4), (8,), (5, 8), (5,)))
    h = x @ w1.T + b1
    h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    assert_close(fused.mlp(x, w1, b1, w2, b2, "apex"), h @ w2.T + b2)
    assert stub == []  # apex has half precision only
    half = [m.bfloat16() for m in (x, w1, b1, w2, b2)]
    assert_close(fused.mlp(*half, "apex"), fused.mlp(*half, "torch"), rtol=0.05, atol=0.05)
    assert stub == [("fused_dense_gelu_dense_function", ((6, 4),), {})]


def test_two_of_every_four_stay(stub):
    weight = torch.tensor([[1.0, -5, 2, 3, 0, 7, 0.5, -1], [4, 3, 2, 1, 1, 2, 3, 4]])
    kept = torch.tensor([[0, 1, 0, 1, 0, 1, 0, 1], [1, 1, 0, 0, 0, 0, 1, 1]]).bool()
    for backend in ("torch", "apex"):
        assert torch.equal(fused.two_of_four(weight, backend), kept)
    assert called(stub) == ["create_mask"]
    with pytest.raises(ValueError, match=r"\(2, 6\).*multiple of 4"):
        fused.two_of_four(torch.ones(2, 6))


@pytest.mark.parametrize("op", fused.NAMES)
def test_real_apex_equals_the_plain_formula(op):
    if why := fused.missing(op, "cuda" if torch.cuda.is_available() else "cpu"):
        pytest.skip(f"NVIDIA's apex does not serve {op} here: {why}")
    if op in ("adam", "lamb", "novograd", "sgd"):
        make = {"adam": "FusedAdamW", "lamb": "FusedLamb", "novograd": "FusedNovograd", "sgd": "FusedSgd"}[op]
        found = {}
        for backend in ("apex", "eager"):
            params = [nn.Parameter(p.detach().cuda().float()) for p in weights()]
            made = getattr(optimizers, make)(params, lr=0.05, weight_decay=0.1, backend=backend)
            for step in range(10):
                for p in params:
                    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).cuda()
                made.step()
            found[backend] = [p.detach() for p in params]
        assert_close(found["apex"], found["eager"], rtol=1e-5, atol=1e-5)
    elif op in ("layer_norm", "rms_norm"):
        norm = (nn.LayerNorm if op == "layer_norm" else nn.RMSNorm)(256, eps=1e-5).cuda()
        x = torch.randn(64, 256, device="cuda", requires_grad=True)
        plain = torch.autograd.grad(norm(x).square().sum(), [x, *norm.parameters()])
        fused.swap_norms(norm)
        with fused.preferring("apex"):
            assert_close(torch.autograd.grad(norm(x).square().sum(), [x, *norm.parameters()]), plain, rtol=1e-4, atol=1e-4)
    elif op == "clip":
        found = []
        for backend in ("apex", "eager"):
            gradients = [p.detach().cuda().float() for p in weights()]
            fused.scale_gradients(gradients, 0.5, fused.gradient_norm(gradients, backend), backend)
            found.append(gradients)
        assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    elif op == "xentropy":
        logits, target = torch.randn(64, 1000, device="cuda", requires_grad=True), torch.arange(64, device="cuda")
        found = [fused.cross_entropy(logits, target, 0.1, b) for b in ("apex", "eager")]
        assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
        slopes = [torch.autograd.grad(loss.sum(), logits)[0] for loss in found]
        assert_close(slopes[0], slopes[1], rtol=1e-5, atol=1e-6)
    elif op == "mlp":
        given = [torch.randn(s, device="cuda").bfloat16() / 8 for s in ((64, 256), (1024, 256), (1024,), (256, 1024), (256,))]
        assert_close(fused.mlp(*given, "apex"), fused.mlp(*given, "torch"), rtol=0.05, atol=0.05)
    elif op == "sparsity":
        weight = torch.randn(64, 256, device="cuda")
        assert torch.equal(fused.two_of_four(weight, "apex"), fused.two_of_four(weight, "torch"))
    else:
        pytest.skip("DistributedFusedAdam needs a group of NCCL ranks: benchmarks/speed/fused.py")
