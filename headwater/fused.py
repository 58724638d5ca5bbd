"""Which kernels the fused operations run on: NVIDIA's apex where it is installed and serves them, else torch's own.

An op is resolved when it is called, and imports nothing but its own part of apex. Ops run on torch unless the callback `Fused` of
headwater.training, which every run has where apex is installed, or `preferring`, says otherwise. What asks for apex and does not
get it runs on torch and says why, once.
Signatures and formulas are the same for every backend: what differs between apex and torch (defaults, forms of state) is
evened out here. Facts of apex are from https://github.com/NVIDIA/apex.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from headwater import distributed

Name = Literal[
    "adam", "distributed_adam", "lamb", "novograd", "sgd", "clip", "layer_norm", "rms_norm", "xentropy", "mlp", "sparsity"
]
Backend = Literal["apex", "torch", "eager"]
log = logging.getLogger(__name__)
NAMES: tuple[Name, ...] = get_args(Name)


class Op(NamedTuple):
    """Where apex has an op, the compiled extensions that it needs, and what torch runs in its place."""

    module: str
    name: str
    extensions: tuple[str, ...]
    torch: str


OPS: dict[Name, Op] = {
    "adam": Op("apex.optimizers", "FusedAdam", ("amp_C",), "torch.optim.AdamW, fused"),
    "distributed_adam": Op(
        "apex.contrib.optimizers.distributed_fused_adam",
        "DistributedFusedAdam",
        ("amp_C", "distributed_adam_cuda"),
        "torch's ZeroRedundancyOptimizer of AdamW, fused",
    ),
    "lamb": Op("apex.optimizers", "FusedLAMB", ("amp_C",), "timm.optim.Lamb, foreach"),
    "novograd": Op("apex.optimizers", "FusedNovoGrad", ("amp_C",), "timm.optim.NvNovoGrad"),
    "sgd": Op("apex.optimizers", "FusedSGD", ("amp_C",), "torch.optim.SGD, fused"),
    "clip": Op("apex.multi_tensor_apply", "multi_tensor_applier", ("amp_C",), "torch.nn.utils.get_total_norm, foreach"),
    "layer_norm": Op("apex.normalization.fused_layer_norm", "fused_layer_norm_affine", ("fused_layer_norm_cuda",), "F.layer_norm"),
    "rms_norm": Op("apex.normalization.fused_layer_norm", "fused_rms_norm_affine", ("fused_layer_norm_cuda",), "F.rms_norm"),
    "xentropy": Op("apex.contrib.xentropy", "SoftmaxCrossEntropyLoss", ("xentropy_cuda",), "F.cross_entropy"),
    "mlp": Op("apex.fused_dense", "fused_dense_gelu_dense_function", ("fused_dense_cuda",), "F.linear and F.gelu"),
    "sparsity": Op("apex.contrib.sparsity.sparse_masklib", "create_mask", (), "torch.topk of every four"),
}
BUILT = "docs/apex.md tells how to build NVIDIA's"
_preferred: dict[Name, Backend] = {}  # of the process: backward passes that compute again have threads of their own


@contextmanager
def preferring(choice: Backend | dict[Name, Backend]) -> Iterator[None]:
    """Ops inside run on this backend where it serves them; of a dict, those that it names."""
    before = dict(_preferred)
    prefer(choice)
    try:
        yield
    finally:
        _preferred.clear()
        _preferred.update(before)


def prefer(choice: Backend | dict[Name, Backend]) -> None:
    """The same for the rest of the process."""
    _preferred.update(dict.fromkeys(NAMES, choice) if isinstance(choice, str) else choice)


def resolve(op: Name, like: Tensor | Iterable[Tensor], backend: Backend | None = None) -> Backend:
    """The backend that an op runs on for such tensors. backend: what is wanted; None = what the run prefers."""
    wanted = backend or _preferred.get(op, "torch")
    if wanted == "apex" and (why := missing(op, *kind(like))):
        announce(op, why)
        return "torch"
    return wanted


def kind(like: Tensor | Iterable[Tensor]) -> tuple[str, bool]:
    """Type of the device of tensors, and whether FSDP2 has split them."""
    every = [like] if isinstance(like, Tensor) else list(like)
    return (every[0].device.type if every else "cpu"), any(isinstance(x, DTensor) for x in every)


@lru_cache(maxsize=64)
def missing(op: Name, device: str, split: bool = False) -> str:
    """Why apex does not serve an op there; empty = it does. split: for tensors that FSDP2 has split."""
    if why := absent():
        return why
    if device != "cuda":
        return f"apex runs on CUDA alone, and this is {device}"
    if split:
        return "FSDP2 splits parameters into DTensors, which apex's kernels do not take"
    for name in OPS[op].extensions:
        try:
            extension(name, OPS[op].module)
        except Exception as error:  # what was built for another torch or CUDA fails in many ways
            return f"apex's extension {name} cannot be imported ({words(error)}); {BUILT} with it"
    try:
        load(op)
    except Exception as error:
        return f"{OPS[op].module}.{OPS[op].name} cannot be imported ({words(error)})"
    return ""


def absent() -> str:
    """Why there is no apex of NVIDIA's at all; empty = there is. Nothing is imported."""
    spec = find_spec("apex")
    if spec is None:
        return f"apex is not installed; {BUILT}"
    places = list(spec.submodule_search_locations or ())
    if not any((Path(place) / "multi_tensor_apply").is_dir() for place in places):
        where = places[0] if places else spec.origin
        return f"the apex in {where} is not NVIDIA's: the package index has another one of that name. pip uninstall apex; {BUILT}"
    return ""


def extension(name: str, beside: str = "apex") -> Any:
    """A compiled extension of apex; some versions have it inside of the package, or beside the module that uses it."""
    for place in (f"{beside}.{name}", f"apex._extensions.{name}"):
        with suppress(ModuleNotFoundError):
            return import_module(place)
    return import_module(name)


def words(error: Exception) -> str:
    """An error in one short line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"


def load(op: Name) -> Any:
    """apex's own function or class."""
    return getattr(import_module(OPS[op].module), OPS[op].name)


@lru_cache(maxsize=64)
def announce(op: Name, why: str) -> None:
    """Say once what runs instead, on the first rank."""
    if distributed.rank() == 0:
        log.warning("%s runs on %s: %s", op, OPS[op].torch, why)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm on apex's kernel. Compiled code, and tensors that apex does not serve, have torch's."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or resolve("layer_norm", x) != "apex":
            return super().forward(x)
        return load("layer_norm")(x, self.weight, self.bias, self.normalized_shape, self.eps)


class RMSNorm(nn.RMSNorm):
    """The same for nn.RMSNorm."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or self.eps is None or resolve("rms_norm", x) != "apex":
            return super().forward(x)
        return load("rms_norm")(x, self.weight, self.normalized_shape, self.eps)


NORMS: dict[type[nn.Module], type[nn.Module]] = {nn.LayerNorm: LayerNorm, nn.RMSNorm: RMSNorm}


def swap_norms(module: nn.Module) -> int:
    """Norms with weights (and biases) by those of this file, in place; returns how many. Parameters stay the same objects."""
    found = [m for m in module.modules() if type(m) in NORMS and all(p is not None for p in m._parameters.values())]
    for norm in found:
        norm.__class__ = NORMS[type(norm)]  # so that whoever holds the module, a teacher or FSDP2, need not be told
    return len(found)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Over the last dimension. The plain formula, which the kernels are measured against."""
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight + bias


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Over the last dimension, in its plain formula (Zhang and Sennrich 2019, arXiv:1910.07467)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, backend: Backend | None = None) -> Tensor:
    """Two linear layers around GELU in its tanh form: (..., D), (H, D), (H,), (E, H), (E,) -> (..., E).

    apex has it for half precision; what is wider runs on torch.
    """
    half = x.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(x.device.type)
    if half and resolve("mlp", x, backend) == "apex":
        return load("mlp")(x.flatten(0, -2), w1, b1, w2, b2).unflatten(0, x.shape[:-1])
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)


def cross_entropy(logits: Tensor, target: Tensor, smoothing: float = 0.0, backend: Backend | None = None) -> Tensor:
    """(T, V), (T,) ids -> (T,) in float32 at least: -sum of q log p, q = 1 - smoothing on the target plus smoothing / V on all.

    apex keeps half precision logits as they are for the backward pass, and has no second derivative.
    """
    half = logits.dtype in (torch.float16, torch.bfloat16)
    chosen = resolve("xentropy", logits, backend)
    if chosen == "apex" and (half or logits.dtype == torch.float32):
        return load("xentropy").apply(logits, target, smoothing, -1, half)  # -1: its default skips the id 0 as padding
    wide = logits.float() if half else logits
    if chosen != "eager":
        return F.cross_entropy(wide, target, reduction="none", label_smoothing=smoothing)
    log_p = wide - wide.logsumexp(-1, keepdim=True)
    return -(1 - smoothing) * log_p.gather(-1, target[:, None])[:, 0] - smoothing * log_p.mean(-1)


def gradient_norm(gradients: Iterable[Tensor], backend: Backend | None = None) -> Tensor:
    """The norm of all gradients together, (); of what FSDP2 has split a DTensor."""
    held = list(gradients)
    chosen = resolve("clip", held, backend)
    if chosen != "apex" or not held:
        return torch.nn.utils.get_total_norm(held, foreach=None if chosen == "torch" else False)
    norms = [multi_tensor("multi_tensor_l2norm", [same], False)[0] for same in by_dtype(held)]
    return torch.linalg.vector_norm(torch.cat(norms))


def scale_gradients(gradients: Iterable[Tensor], most: float, norm: Tensor, backend: Backend | None = None) -> None:
    """In place by min(1, most / (norm + 1e-6)): what `torch.nn.utils.clip_grads_with_norm_` does. norm: of all of them."""
    held = list(gradients)
    scale = (most / (norm + 1e-6)).clamp(max=1.0)
    chosen = resolve("clip", held, backend)
    if chosen == "apex":
        for same in by_dtype(held):
            multi_tensor("multi_tensor_scale", [same, same], scale)
    elif chosen == "torch" and held:
        torch._foreach_mul_(held, scale)
    else:
        for gradient in held:
            gradient.mul_(scale)


def multi_tensor(kernel: str, lists: list[list[Tensor]], *rest: Any) -> Any:
    """A kernel of apex over lists of tensors; what it would tell of overflows is not asked for."""
    overflow = torch.zeros(1, dtype=torch.int32, device=lists[0][0].device)
    return load("clip")(getattr(extension("amp_C"), kernel), overflow, lists, *rest)


def by_dtype(tensors: list[Tensor]) -> list[list[Tensor]]:
    """apex's kernels take tensors of one dtype."""
    kinds = dict.fromkeys(x.dtype for x in tensors)
    return [[x for x in tensors if x.dtype == dtype] for dtype in kinds]


def two_of_four(weight: Tensor, backend: Backend | None = None) -> Tensor:
    """(E, D) -> (E, D) bool: the two largest of every four neighbours along D, the pattern that sparse tensor cores take.

    Mishra et al. 2021, arXiv:2104.08378. ValueError where D is no multiple of four.
    """
    if weight.ndim != 2 or weight.shape[1] % 4:
        raise ValueError(f"found a weight of shape {tuple(weight.shape)}; expected a matrix whose second size is a multiple of 4")
    if resolve("sparsity", weight, backend) == "apex":
        return load("sparsity")(weight, "m4n2_1d").bool()
    largest = weight.detach().abs().unflatten(1, (-1, 4)).topk(2, -1).indices
    return torch.zeros_like(weight, dtype=torch.bool).unflatten(1, (-1, 4)).scatter_(-1, largest, True).flatten(1)
