"""The layers of a transformer block. Parameter names follow timm's VisionTransformer (attn.qkv.weight, mlp.fc1.weight)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from headwater.attention import Route, attend
from headwater.cache import Kept
from headwater.init import BRANCH, ONE, ZERO, Rule, constant
from headwater.position import rotate

Turn = tuple[Tensor, Tensor]
NormKind = Literal["layer", "rms", "tanh"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]
Bias = Literal["all", "qkv", "none"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


class DynamicTanh(nn.Module):
    """weight * tanh(alpha * x) + bias: bounded, and in place of a norm (Zhu et al. 2025, arXiv:2503.10622)."""

    def __init__(self, width: int, alpha: float = 0.5) -> None:
        super().__init__()
        self.initial = alpha
        self.alpha = nn.Parameter(torch.tensor([alpha]))  # of one dimension: FSDP2 splits no scalars
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def init_rules(self) -> dict[str, Rule]:
        return {"alpha": constant(self.initial), "weight": ONE, "bias": ZERO}

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * torch.tanh(self.alpha * x) + self.bias


def make_norm(kind: NormKind, width: int, eps: float) -> nn.Module:
    """A norm over the last dimension. eps does not concern "tanh"."""
    if kind == "tanh":
        return DynamicTanh(width)
    return nn.LayerNorm(width, eps=eps) if kind == "layer" else nn.RMSNorm(width, eps=eps)


class Attention(nn.Module):
    """Multi-head self-attention. x: (B, N, D) -> (B, N, D).

    Args:
        width, heads: D and the number of heads.
        kv_heads: keys and values have so many heads, each serving a group of queries (Ainslie et al. 2023, arXiv:2305.13245).
        size: d of a head; None = width / heads.
        norm: of queries and keys, over d (Dehghani et al. 2023, arXiv:2302.05442); None = none.
        bias: which linear layers have one.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        size: int | None = None,
        norm: Callable[[int], nn.Module] | None = None,
        bias: Bias = "all",
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads or heads, size or width // heads
        self.qkv = nn.Linear(width, (heads + 2 * self.kv_heads) * self.size, bias=bias != "none")
        self.q_norm, self.k_norm = (norm(self.size) if norm else nn.Identity() for _ in range(2))
        self.proj = nn.Linear(heads * self.size, width, bias=bias == "all")

    def init_rules(self) -> dict[str, Rule]:
        return {"qkv.weight": BRANCH, "proj.weight": BRANCH}

    def forward(
        self, x: Tensor, route: Route, turn: Turn | None, past: tuple[Kept, int] | None = None, first: int | None = None
    ) -> Tensor:
        """turn: cosine and sine of rotary positions, or None. past: what its trunk keeps, and the number of this block in it.

        first: only so many of the tokens ask, and have an answer; None = all.
        """
        qkv = rearrange(self.qkv(x), "b n (h d) -> b h n d", d=self.size)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
        q, k = self.q_norm(q[:, :, :first]), self.k_norm(k)
        if turn is not None:
            q, k = rotate(q, (turn[0][:, :, :first], turn[1][:, :, :first])), rotate(k, turn)
        if past is not None:
            k, v = past[0].append(past[1], k, v)
        return self.proj(rearrange(attend(q, k, v, route), "b h n d -> b n (h d)"))


class CrossAttention(nn.Module):
    """Queries from one sequence, keys and values from another. x: (B, Q, D), y: (B, K, source) -> (B, Q, D)."""

    def __init__(self, width: int, heads: int, source: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width), nn.Linear(source, 2 * width)
        self.proj = nn.Linear(width, width)

    def init_rules(self) -> dict[str, Rule]:
        return {"q.weight": BRANCH, "kv.weight": BRANCH, "proj.weight": BRANCH}

    def forward(self, x: Tensor, y: Tensor, route: Route) -> Tensor:
        """route: of `plan(attention_mask(query, key), x, heads)`. A query that may see no key gets the bias of `proj` alone."""
        q = rearrange(self.q(x), "b n (h d) -> b h n d", h=self.heads)
        k, v = rearrange(self.kv(y), "b n (two h d) -> two b h n d", two=2, h=self.heads)
        return self.proj(rearrange(attend(q, k, v, route), "b h n d -> b n (h d)"))


class Mlp(nn.Module):
    """Two linear layers around an activation. x: (B, N, D) -> (B, N, D).

    gated: the activated half of the first layer multiplies the other one (Shazeer 2020, arXiv:2002.05202).
    """

    def __init__(self, width: int, hidden: int, activation: Activation = "gelu", gated: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.activation, self.gated = activation, gated
        self.fc1 = nn.Linear(width, 2 * hidden if gated else hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, width, bias=bias)

    def init_rules(self) -> dict[str, Rule]:
        return {"fc1.weight": BRANCH, "fc2.weight": BRANCH}

    def forward(self, x: Tensor) -> Tensor:
        x, act = self.fc1(x), ACTIVATIONS[self.activation]
        if self.gated:
            gate, value = x.chunk(2, -1)
            return self.fc2(act(gate) * value)
        return self.fc2(act(x))


class LayerScale(nn.Module):
    """A learned factor per feature on a branch (Touvron et al. 2021, arXiv:2103.17239)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.initial, self.gamma = initial, nn.Parameter(torch.full((width,), initial))

    def init_rules(self) -> dict[str, Rule]:
        return {"gamma": constant(self.initial)}

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """One transformer block.

    Its norms stand before the branches, or with `post` behind the sums; with `parallel` both branches start from one norm.
    With `conditional` its norms are scaled, shifted and gated by a condition: DiT's adaLN-Zero (Peebles and Xie 2023,
    arXiv:2212.09748; https://github.com/facebookresearch/DiT).
    """

    def __init__(
        self,
        width: int,
        attn: Attention,
        mlp: nn.Module,
        norm: Callable[[int], nn.Module],
        conditional: bool = False,
        parallel: bool = False,
        post: bool = False,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.parallel, self.post = parallel, post
        self.norm1, self.attn = norm(width), attn
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2, self.mlp = (nn.Identity() if parallel else norm(width)), mlp
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.modulation = nn.Linear(width, 6 * width) if conditional else None

    def init_rules(self) -> dict[str, Rule]:
        """Modulation starts at zero: the plain block."""
        return {} if self.modulation is None else {"modulation.weight": BRANCH._replace(value=0.0)}

    def forward(
        self,
        x: Tensor,
        route: Route,
        turn: Turn | None = None,
        condition: Tensor | None = None,
        past: tuple[Kept, int] | None = None,
        keep: Tensor | None = None,
        first: int | None = None,
    ) -> Tensor:
        """x: (B, N, D); condition: (B, N or 1, D); keep: (2, B, N or 1, 1) factors on both branches of stochastic depth.

        first: only so many of the tokens are answered, (B, first, D), all of them are seen; None = all.
        """
        change = None if self.modulation is None or condition is None else self.modulation(F.silu(condition)).chunk(6, -1)
        late = None if change is None else [part[:, :first] for part in change]  # for the tokens that are answered
        keep = None if keep is None else keep[:, :, :first]

        def attention(y: Tensor) -> Tensor:
            y = y if change is None else y * (1 + change[0]) + change[1]
            y = self.ls1(self.attn(y, route, turn, past, first))
            y = y if late is None else (1 + late[2]) * y
            return y if keep is None else keep[0] * y

        def feed(y: Tensor) -> Tensor:
            y = y if late is None else y * (1 + late[3]) + late[4]
            y = self.ls2(self.mlp(y))
            y = y if late is None else (1 + late[5]) * y
            return y if keep is None else keep[1] * y

        if self.post:
            x = self.norm1(x[:, :first] + attention(x))
            return self.norm2(x + feed(x))
        if self.parallel:
            y = self.norm1(x)
            return x[:, :first] + attention(y) + feed(y[:, :first])
        x = x[:, :first] + attention(self.norm1(x))
        return x + feed(self.norm2(x))
