"""Which kernel attention runs on, decided once per forward pass and never silently.

Scaled dot products of torch choose among flash, efficient, cuDNN and math kernels by themselves. Masks of packed rows and of
orders are worth more: on an accelerator they go to FlexAttention or to variable-length flash, which never touch the hidden
blocks. Every kernel is tried on tiny tensors before it is used, so the table of `kernels` shows what runs, and why not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from headwater import fused
from headwater.tokens import Kind, Mask, Tokens, attention_mask

Kernel = Literal["flash", "efficient", "cudnn", "varlen", "flex", "math"]
Power = Literal["backward", "double backward", "forward mode", "vmap"]
BACKENDS: dict[Kernel, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
BLOCK_SPARSE = ("packed", "ordered")  # the kinds whose mask is as large as queries times keys
log = logging.getLogger(__name__)
_differentiable: ContextVar[bool] = ContextVar("differentiable", default=False)


class Lengths(NamedTuple):
    """Packed rows without their padding. place: (T,) of the real tokens in (B * N,); ends: (S + 1,) int32; longest: of all."""

    place: Tensor
    ends: Tensor
    longest: int


class Route(NamedTuple):
    """How attention runs in one forward pass. mask: bool or float, (B or 1, H or 1, Q or 1, K)."""

    causal: bool = False
    mask: Tensor | None = None
    blocks: Any = None
    lengths: Lengths | None = None


@contextmanager
def higher_order() -> Iterator[None]:
    """Attention inside can be differentiated twice, in forward mode, and under vmap: math kernels, nothing compiled.

    It holds for forward passes made inside, in towers of other libraries too as long as they use torch's own attention.
    """
    token = _differentiable.set(True)
    try:
        with fused.preferring("torch"), sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _differentiable.reset(token)


def higher_order_is_on() -> bool:
    """True inside `higher_order`."""
    return _differentiable.get()


def plan(mask: Mask, like: Tensor, heads: int, bias: Tensor | None = None) -> Route:
    """The kernel for a mask. like: (B, N, D) what will attend, for its device and dtype; bias: (B or 1, H, Q, K) on the scores."""
    if bias is not None:
        announce(mask.kind, like.device.type, "its positions add a number to every score")
        see = mask.dense
        if mask.causal:
            see = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).tril()
        return Route(mask=bias.to(like.dtype) if see is None else bias.to(like.dtype).masked_fill(~see, float("-inf")))
    if mask.kind in BLOCK_SPARSE and not higher_order_is_on():
        chosen, why = chosen_kernel(mask.kind, like.device.type, kernel_dtype(like), like.shape[-1] // heads)
        if chosen == "varlen" and mask.document is not None and mask.document[0] is mask.document[1]:
            return Route(lengths=lengths(mask))
        if chosen == "flex":
            return Route(blocks=blocks(mask))
        announce(mask.kind, like.device.type, why)
    return Route(mask.causal, mask.dense)


def attend(q: Tensor, k: Tensor, v: Tensor, route: Route) -> Tensor:
    """softmax(q k^T / sqrt(d)) v. q: (B, H, Q, d); k, v: (B, H or fewer that divide it, K, d) -> (B, H, Q, d)."""
    grouped = q.shape[1] != k.shape[1]
    if route.blocks is not None:
        return compiled_flex()(q, k, v, block_mask=route.blocks, enable_gqa=grouped)
    if grouped:  # the fused CPU kernel knows no groups
        k, v = (m.repeat_interleave(q.shape[1] // m.shape[1], 1) for m in (k, v))
    if route.lengths is not None:
        return over_lengths(q, k, v, route.lengths)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=route.mask, is_causal=route.causal)


def kernel_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which attention will run: autocast's, where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def blocks(mask: Mask) -> Any:
    """The mask for FlexAttention: which blocks of 128 x 128 are full, partly hidden, or empty."""
    from torch.nn.attention.flex_attention import create_block_mask

    pairs = [pair for pair in (mask.document, mask.order) if pair is not None]
    (rows, queries), keys = pairs[0][0].shape, pairs[0][1].shape[1]
    valid, document, order = mask.valid, mask.document, mask.order

    def see(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = k >= 0
        if valid is not None:
            allowed = allowed & valid[b, k]
        if document is not None:
            allowed = allowed & (document[0][b, q] == document[1][b, k])
        if order is not None:
            allowed = allowed & (order[0][b, q] >= order[1][b, k])
        return allowed

    return create_block_mask(see, rows, None, queries, keys, device=str(pairs[0][0].device))


@lru_cache(maxsize=1)
def compiled_flex() -> Any:
    """FlexAttention as one kernel; on the CPU, where that has no backward, its plain form."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if torch.cuda.is_available() else flex_attention


def lengths(mask: Mask) -> Lengths:
    """Packed self-attention as runs of real tokens, sorted by row and document."""
    assert mask.document is not None
    document = mask.document[0]
    length = document.shape[1]
    real = torch.ones_like(document, dtype=torch.bool) if mask.valid is None else mask.valid
    place = real.flatten().nonzero()[:, 0]
    row = place // length
    _, run = torch.stack([row, document.flatten()[place]]).unique(dim=1, return_inverse=True)
    count = run.bincount()
    ends = F.pad(count.cumsum(0), (1, 0)).to(torch.int32)
    return Lengths(place[run.argsort(stable=True)], ends, 1 << (int(count.max()) - 1).bit_length())


def over_lengths(q: Tensor, k: Tensor, v: Tensor, runs: Lengths) -> Tensor:
    """Attention within every run alone; padding comes out as zero."""
    from torch.nn.attention.varlen import varlen_attn

    rows, heads, length, size = q.shape
    q, k, v = (m.transpose(1, 2).reshape(rows * length, heads, size)[runs.place] for m in (q, k, v))
    y: Any = varlen_attn(q, k, v, runs.ends, runs.ends, runs.longest, runs.longest)
    out = y.new_zeros(rows * length, heads, size).index_copy(0, runs.place, y)
    return out.reshape(rows, length, heads, size).transpose(1, 2)


@lru_cache(maxsize=256)
def announce(kind: str, device: str, why: str) -> None:
    """Say once that something as large as queries x keys is built."""
    log.warning("attention of %s rows runs with a dense mask on %s: %s", kind, device, why)


@lru_cache(maxsize=256)
def chosen_kernel(kind: Kind, device: str, dtype: torch.dtype, size: int) -> tuple[Kernel | None, str]:
    """The block-sparse kernel for such a mask, or None and the reason. size: d of a head."""
    found = {kernel: fails(kernel, kind, device, dtype, size) for kernel in ("varlen", "flex")}
    for kernel, why in found.items():
        if not why:
            return kernel, ""  # type: ignore[return-value]
    return None, "; ".join(f"{kernel}: {why}" for kernel, why in found.items())


def kernels(device: str, dtype: torch.dtype = torch.float32, size: int = 64) -> dict[Kind, dict[Kernel, str]]:
    """Kind of mask -> kernel -> why it does not run there, forward and backward; empty = it runs."""
    return {kind: {kernel: fails(kernel, kind, device, dtype, size) for kernel in get_args(Kernel)} for kind in get_args(Kind)}


def runs(kind: Kind, device: str, dtype: torch.dtype = torch.float32, size: int = 64) -> Kernel:
    """The kernel on which attention with such a mask runs there."""
    chosen = chosen_kernel(kind, device, dtype, size)[0] if kind in BLOCK_SPARSE else None
    if chosen is not None:
        return chosen
    q = torch.randn(2, 2, 128, size, device=device, dtype=dtype, requires_grad=True)
    route = _example("math", kind, device)
    choice = torch._fused_sdp_choice(q, q, q, attn_mask=route.mask, is_causal=route.causal)
    return next(kernel for kernel, backend in BACKENDS.items() if backend.value == choice)


@lru_cache(maxsize=1024)
def fails(kernel: Kernel, kind: Kind, device: str, dtype: torch.dtype, size: int, power: Power = "backward") -> str:
    """Why a kernel does not serve such a mask, found by trying it on two rows of 128 tokens; empty = it does."""
    if kernel in ("flex", "varlen") and device == "cpu":
        return "needs an accelerator to train"
    if kernel == "varlen" and kind != "packed":
        return "serves documents only, without an order"
    with torch.enable_grad(), torch.autocast(device, enabled=False):
        try:
            qkv = torch.randn(3, 2, 2, 128, size, device=device, dtype=dtype)
            route = _example(kernel, kind, device)
            with sdpa_kernel(BACKENDS[kernel]) if kernel in BACKENDS else nullcontext():
                _exercise(qkv, route, power)
        except Exception as error:  # each kernel refuses in its own way
            said = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
            return f"torch has none for this on {device}" if said.startswith("No viable backend") else said
    return ""


def _example(kernel: Kernel, kind: Kind, device: str) -> Route:
    """A mask of that kind on two rows of 128 tokens, for that kernel."""
    index = torch.arange(128, device=device).expand(2, 128)
    valid = index < 100 if kind != "full" and kind != "causal" else None
    t = Tokens(index, index[..., None], valid, index // 32 if kind == "packed" else None, index if kind == "ordered" else None)
    mask = attention_mask(t, t, kind in ("causal", "ordered"))
    if kernel == "flex":
        everything = torch.zeros_like(index)
        return Route(blocks=blocks(mask if mask.kind in BLOCK_SPARSE else Mask("packed", valid, (everything, everything))))
    return Route(lengths=lengths(mask)) if kernel == "varlen" else Route(mask.causal, mask.dense)


def _exercise(qkv: Tensor, route: Route, power: Power) -> None:
    """Differentiate a tiny attention in the way that is asked for."""

    def loss(x: Tensor) -> Tensor:
        return attend(x[0], x[1], x[2], route).square().sum()

    if power == "forward mode":
        torch.func.jvp(loss, (qkv,), (torch.ones_like(qkv),))
    elif power == "vmap":
        torch.func.vmap(loss)(torch.stack([qkv, qkv]))
    else:
        qkv.requires_grad_()
        (first,) = torch.autograd.grad(loss(qkv), qkv, create_graph=power == "double backward")
        if power == "double backward":
            first.square().sum().backward()
