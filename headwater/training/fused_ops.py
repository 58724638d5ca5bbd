"""What a run asks of headwater.fused: one word for all ops, others for some, or whatever is fastest here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from headwater import distributed, fused
from headwater.fused import NAMES, Backend, Name, missing
from headwater.layers import Mlp
from headwater.training.fused_optimizers import FusedAdamW

Choice = Backend | Literal["auto"]
MEASURED: tuple[Name, ...] = ("adam", "clip", "layer_norm", "rms_norm", "xentropy")
ROWS, VOCAB = 2048, 8192  # of what is measured: tokens, and answers to choose from


class Fused(pl.Callback):
    """`trainer.callbacks: [{class_path: Fused, init_args: {ops: apex}}]`: the kernels of a run.

    Norms of the whole module are swapped before it is sharded or wrapped, under the same names. Optimizers of
    headwater.training.fused_optimizers, clipping and cross entropies ask when they are called.

    Args:
        ops: backend of all ops, or of some by name; others stay with torch. "apex" falls back to torch, op by op, and says why.
            "auto" = the fastest of those that run here, measured once on the first rank; the checkpoint keeps the choice, so
            that a resumed run computes the same.
    """

    def __init__(self, ops: Choice | dict[Name, Choice] = "apex") -> None:
        asked = dict.fromkeys(NAMES, ops) if isinstance(ops, str) else ops
        if stray := set(asked) - set(NAMES):
            raise ValueError(f"found ops {sorted(stray)}; expected some of {', '.join(NAMES)}")
        self.asked: dict[Name, Choice] = dict(asked)  # type: ignore[arg-type]
        self.chosen: dict[Name, Backend] = {}
        self.before: dict[Name, Backend] | None = None  # what the process preferred outside of the run

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Before FSDP2 and DDP."""
        self.before = dict(fused._preferred)
        kept = recorded(trainer.ckpt_path, self.state_key)
        device = trainer.strategy.root_device
        for op, ask in self.asked.items() if not self.chosen else ():  # once, and not again to validate
            self.chosen[op] = (kept.get(op) or fastest(op, pl_module, device)) if ask == "auto" else ask
        fused.prefer(self.chosen)
        like = torch.empty(0, device=device)
        if "apex" in (fused.resolve("layer_norm", like), fused.resolve("rms_norm", like)):
            fused.swap_norms(pl_module)
        if fused.resolve("mlp", like) == "apex":
            swap_mlps(pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.before is not None:
            fused._preferred.clear()
            fused._preferred.update(self.before)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")

    def state_dict(self) -> dict[str, Any]:
        return {"chosen": dict(self.chosen)}


class FusedMlp(Mlp):
    """An Mlp on apex's kernel."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(x)
        return fused.mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


def swap_mlps(module: nn.Module) -> int:
    """Mlps with GELU in its tanh form and biases, in place; returns how many. Others have no kernel in apex."""
    every: list[Any] = [m for m in module.modules() if type(m) is Mlp]
    found = [m for m in every if m.activation == "gelu_tanh" and not m.gated and m.fc1.bias is not None]
    for one in found:
        one.__class__ = FusedMlp
    return len(found)


def recorded(checkpoint: Any, key: str) -> dict[Name, Backend]:
    """What the run chose before it was stopped: callbacks are told only after all has been built."""
    if not checkpoint:
        return {}
    return torch.load(checkpoint, mmap=True, map_location="cpu", weights_only=True)["callbacks"].get(key, {}).get("chosen", {})


def fastest(op: Name, module: nn.Module, device: torch.device) -> Backend:
    """The fastest backend of an op for shapes of this module, the same on all ranks; torch where none is measured."""
    if op not in MEASURED:
        return "torch"
    choices: list[Backend] = [b for b in ("eager", "torch", "apex") if b != "apex" or not missing(op, device.type)]
    times = torch.zeros(len(choices), device=device)
    if distributed.rank() == 0:
        times += torch.tensor([seconds(work(op, b, module, device), device) for b in choices], device=device)
    return choices[int(distributed.total(times).argmin())]


def work(op: Name, backend: Backend, module: nn.Module, device: torch.device) -> Callable[[], Any]:
    """One call of an op, forward and backward where it has both, on tensors like those of the module."""
    like: dict[str, Any] = {"device": device, "dtype": next((p.dtype for p in module.parameters()), torch.float32)}
    if op in ("adam", "clip"):
        tensors = [nn.Parameter(torch.ones(p.shape, **like)) for p in module.parameters() if p.requires_grad]
        gradients = [torch.ones_like(p) for p in tensors]
        for p, gradient in zip(tensors, gradients, strict=True):
            p.grad = gradient
        if op == "clip":
            return lambda: fused.scale_gradients(gradients, 1.0, fused.gradient_norm(gradients, backend), backend)
        return FusedAdamW(tensors, backend=backend).step
    if op == "xentropy":
        logits, target = torch.ones(ROWS, VOCAB, requires_grad=True, **like), torch.arange(ROWS, device=device)
        return lambda: fused.cross_entropy(logits, target, backend=backend).sum().backward()
    kind: type[nn.Module] = nn.LayerNorm if op == "layer_norm" else nn.RMSNorm
    every: list[Any] = [m for m in module.modules() if isinstance(m, kind)]
    width = max((m.weight.numel() for m in every if m.weight is not None), default=256)
    norm = kind(width, eps=1e-6, **like)
    x = torch.ones(ROWS, width, requires_grad=True, **like)
    if backend == "eager":
        plain: Any = fused.layer_norm if op == "layer_norm" else fused.rms_norm
        return lambda: plain(x, *norm.parameters(), 1e-6).sum().backward()
    fused.swap_norms(norm)

    def call() -> None:
        with fused.preferring({op: backend}):
            norm(x).sum().backward()

    return call


def seconds(call: Callable[[], Any], device: torch.device, times: int = 5) -> float:
    """Median of a few calls, after one that warms up."""
    found = []
    for _ in range(times + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])
