"""A stand-in for NVIDIA's apex: its names and signatures over plain torch, on any device, and a record of every call.

Formulas are typed from its documentation and kernels (https://github.com/NVIDIA/apex), among them what differs from torch: steps
that are counted by group, LAMB that clips by itself, a first run that the last parameter of a group decides, an id 0 that pads.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
from torch.nn import functional as F
from torch.optim import Optimizer

CALLS = []  # (name, positional, keyword)


def record(name, *args, **kwargs):
    CALLS.append((name, args, kwargs))


class Counting(Optimizer):
    """Steps belong to groups, and grow whether there are gradients or not."""

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group["step"] + 1 if "step" in group else 1
            self.update(group, [p for p in group["params"] if p.grad is not None])

    def moments(self, p):
        if not self.state[p]:
            self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        return self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]


class FusedAdam(Counting):
    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        adam_w_mode=True,
        weight_decay=0.0,
        amsgrad=False,
        set_grad_none=True,
        capturable=False,
        master_weights=False,
    ):
        record("FusedAdam", lr=lr, betas=betas, eps=eps, adam_w_mode=adam_w_mode, weight_decay=weight_decay)
        super().__init__(params, dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay))
        self.adam_w_mode = adam_w_mode

    def update(self, group, params):
        (b1, b2), t = group["betas"], group["step"]
        for p in params:
            (m, v), g = self.moments(p), p.grad if self.adam_w_mode else p.grad + group["weight_decay"] * p
            m.mul_(b1).add_((1 - b1) * g)
            v.mul_(b2).add_((1 - b2) * g * g)
            change = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + group["eps"])
            p.sub_(group["lr"] * (change + (group["weight_decay"] * p if self.adam_w_mode else 0)))


class FusedLAMB(Counting):
    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.01,
        amsgrad=False,
        adam_w_mode=True,
        grad_averaging=True,
        set_grad_none=True,
        max_grad_norm=1.0,
        use_nvlamb=False,
    ):
        record("FusedLAMB", lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
        super().__init__(
            params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, bias_correction=True, max_grad_norm=max_grad_norm)
        )

    def update(self, group, params):
        (b1, b2), t = group["betas"], group["step"]
        norm = torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"] if p.grad is not None]).norm()
        for p in params:
            (m, v), g = self.moments(p), p.grad / max(float(norm) / group["max_grad_norm"], 1.0)
            m.mul_(b1).add_((1 - b1) * g)
            v.mul_(b2).add_((1 - b2) * g * g)
            change = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + group["eps"]) + group["weight_decay"] * p
            ratio = p.norm() / change.norm() if group["weight_decay"] and p.norm() > 0 and change.norm() > 0 else 1.0
            p.sub_(group["lr"] * ratio * change)


class FusedNovoGrad(Counting):
    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        amsgrad=False,
        reg_inside_moment=False,
        grad_averaging=True,
        norm_type=2,
        init_zero=False,
        set_grad_none=True,
    ):
        given = dict(bias_correction=bias_correction, reg_inside_moment=reg_inside_moment, grad_averaging=grad_averaging)
        record("FusedNovoGrad", lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **given)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **given))

    def update(self, group, params):
        (b1, b2), t = group["betas"], group["step"]
        fix1, fix2 = (1 - b1**t, (1 - b2**t) ** 0.5) if group["bias_correction"] else (1, 1)
        now = torch.stack([p.grad.norm() for p in params])
        norms = group.setdefault("exp_avg_sq", [None, now])[1]
        group["exp_avg_sq"][1] = (b2 * norms**2 + (1 - b2) * now**2).sqrt()
        for p, n in zip(params, group["exp_avg_sq"][1], strict=True):
            (m, _), decay = self.moments(p), group["weight_decay"] * p
            inside, share = group["reg_inside_moment"], 1 - b1 if group["grad_averaging"] else 1
            m.mul_(b1).add_(share * (p.grad / (n / fix2 + group["eps"]) + decay if inside else p.grad))
            p.sub_(group["lr"] * (m / fix1 if inside else m / fix1 / (n / fix2 + group["eps"]) + decay))


class FusedSGD(Counting):
    def __init__(self, params, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, wd_after_momentum=False):
        record("FusedSGD", lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov))

    def update(self, group, params):
        first = True
        for p in params:
            first = "momentum_buffer" not in self.state[p]
            self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        for p in params:
            g, m = p.grad + group["weight_decay"] * p, self.state[p]["momentum_buffer"]
            m.copy_(g if first else group["momentum"] * m + g)
            p.sub_(group["lr"] * (g + group["momentum"] * m if group["nesterov"] else m))


class DistributedFusedAdam(Optimizer):
    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        adam_w_mode=True,
        weight_decay=0.0,
        amsgrad=False,
        overlap_grad_sync=True,
        average_grad_sync=True,
    ):
        record("DistributedFusedAdam", lr=lr, adam_w_mode=adam_w_mode, overlap_grad_sync=overlap_grad_sync)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))


class SoftmaxCrossEntropyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, smoothing=0.0, padding_idx=0, half_to_float=False):
        record("SoftmaxCrossEntropyLoss", smoothing=smoothing, padding_idx=padding_idx, half_to_float=half_to_float)
        ctx.save_for_backward(logits, labels)
        ctx.smoothing, ctx.padding = smoothing, padding_idx
        log_p = logits.float().log_softmax(-1)
        loss = -(1 - smoothing) * log_p.gather(1, labels[:, None])[:, 0] - smoothing * log_p.mean(-1)
        return loss.masked_fill(labels == padding_idx, 0).to(torch.float32 if half_to_float else logits.dtype)

    @staticmethod
    def backward(ctx, grad):
        logits, labels = ctx.saved_tensors
        target = F.one_hot(labels, logits.shape[1]) * (1 - ctx.smoothing) + ctx.smoothing / logits.shape[1]
        slope = (logits.float().softmax(-1) - target) * grad.masked_fill(labels == ctx.padding, 0)[:, None]
        return slope.to(logits.dtype), None, None, None, None


def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    record("fused_layer_norm_affine", tuple(normalized_shape), eps)
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    record("fused_rms_norm_affine", tuple(normalized_shape), eps)
    return F.rms_norm(input, normalized_shape, weight, eps)


def fused_dense_gelu_dense_function(input, weight1, bias1, weight2, bias2):
    record("fused_dense_gelu_dense_function", tuple(input.shape))
    return F.linear(F.gelu(F.linear(input, weight1, bias1), approximate="tanh"), weight2, bias2)


def multi_tensor_applier(op, noop_flag_buffer, tensor_lists, *args):
    return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)


def multi_tensor_l2norm(chunk_size, noop_flag, tensor_lists, per_tensor_python=None):
    record("multi_tensor_l2norm", len(tensor_lists[0]), per_tensor_python)
    assert noop_flag.dtype == torch.int32
    return torch.stack([x.float().norm() for x in tensor_lists[0]]).norm()[None], torch.empty(0)


def multi_tensor_scale(chunk_size, noop_flag, tensor_lists, scale):
    record("multi_tensor_scale", len(tensor_lists[0]))
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source * scale)


def create_mask(tensor, pattern="m4n2_1d", density=0.5):
    record("create_mask", pattern)
    fours = tensor.abs().reshape(-1, 4)
    rank = fours.argsort(dim=1).argsort(dim=1)
    return (rank >= 2).reshape(tensor.shape).to(tensor.dtype)


MODULES = {
    "apex": (),
    "apex.multi_tensor_apply": (multi_tensor_applier,),
    "apex.optimizers": (FusedAdam, FusedLAMB, FusedNovoGrad, FusedSGD),
    "apex.contrib": (),
    "apex.contrib.optimizers": (),
    "apex.contrib.optimizers.distributed_fused_adam": (DistributedFusedAdam,),
    "apex.contrib.xentropy": (SoftmaxCrossEntropyLoss,),
    "apex.contrib.sparsity": (),
    "apex.contrib.sparsity.sparse_masklib": (create_mask,),
    "apex.normalization": (),
    "apex.normalization.fused_layer_norm": (fused_layer_norm_affine, fused_rms_norm_affine),
    "apex.fused_dense": (fused_dense_gelu_dense_function,),
    "amp_C": (multi_tensor_l2norm, multi_tensor_scale),
    "distributed_adam_cuda": (),
    "fused_layer_norm_cuda": (),
    "fused_dense_cuda": (),
    "xentropy_cuda": (),
}


def install(monkeypatch, folder, without=()):
    """Put it on sys.modules; `folder` is where it claims to be. without: modules that it was built without."""
    (folder / "apex" / "multi_tensor_apply").mkdir(parents=True)
    CALLS.clear()
    for name, members in MODULES.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = [str(folder / name.replace(".", "/"))]
        module.__spec__.submodule_search_locations = module.__path__
        for member in members:
            setattr(module, member.__name__, member)
        if name in without:
            monkeypatch.delitem(sys.modules, name, raising=False)
        else:
            monkeypatch.setitem(sys.modules, name, module)
    return CALLS
