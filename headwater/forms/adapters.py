"""Small trainable additions that are no low-rank matrix: bottleneck adapters, learned factors, prefixes of attention."""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from headwater.attention import Route
from headwater.cache import Kept
from headwater.forms.form import Around, Form, Formed
from headwater.init import BRANCH, PATH, TABLE, ZERO, Rule
from headwater.layers import ACTIVATIONS, Activation, Attention, Turn

ENDS = r"blocks\..*(attn\.(out_)?proj|mlp\.(fc2|c_proj))$"  # the last layer of every branch


class Bottlenecked(Around):
    """y + up * act(down * y + shift) of the answer y of the layer inside. down: (size, out), shift: (size,), up: (out, size)."""

    added = ("down", "shift", "up")

    def __init__(self, base: nn.Linear | Formed, size: int, activation: Activation) -> None:
        super().__init__(base)
        self.activation, like = activation, base.weight.detach()
        self.down = nn.Parameter(like.new_empty(size, self.out_features))
        self.shift = nn.Parameter(like.new_empty(size))
        self.up = nn.Parameter(like.new_empty(self.out_features, size))

    def new_rules(self) -> dict[str, Rule]:
        return {"down": PATH, "shift": ZERO, "up": BRANCH._replace(value=0.0)}

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + F.linear(ACTIVATIONS[self.activation](F.linear(y, self.down, self.shift)), self.up)


class Bottleneck(Form):
    """Adapters: a narrow layer and back behind every branch, while the rest stays (Houlsby et al. 2019, arXiv:1902.00751).

    size * (2 * out + 1) parameters per layer; no effect at first; does not merge.

    Args:
        match, seed: as in Form.
        size: of the narrow layer.
        activation: of it.
        frozen: nothing else trains in the encoders or fusion around these layers.
    """

    kinds, layer, weight_only = (nn.Linear, Formed), Bottlenecked, False

    def __init__(
        self, match: str = ENDS, size: int = 16, activation: Activation = "gelu", frozen: bool = True, seed: int = 0
    ) -> None:
        super().__init__(match, seed)
        if size < 1:
            raise ValueError(f"found size {size}; expected 1 or more")
        self.size, self.activation, self.frozen = size, activation, frozen

    def make(self, old: nn.Linear | Formed, name: str) -> nn.Module:
        return Bottlenecked(old, self.size, self.activation)


class Multiplied(Around):
    """The layer inside, with the last (K,) of its inputs or outputs times 1 + factors."""

    added = ("factors",)

    def __init__(self, base: nn.Linear | Formed, side: Literal["in", "out"], share: float) -> None:
        super().__init__(base)
        self.side = side
        size = self.in_features if side == "in" else self.out_features
        self.rest = size - round(share * size)
        self.factors = nn.Parameter(base.weight.detach().new_empty(size - self.rest))

    def new_rules(self) -> dict[str, Rule]:
        return {"factors": ZERO}

    def whole(self) -> Tensor:
        """A factor for each input or output."""
        return 1 + F.pad(self.factors, (self.rest, 0))

    def changed(self, weight: Tensor) -> Tensor:
        return weight * (self.whole() if self.side == "in" else self.whole()[:, None])

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return self.base.bias if self.base.bias is None or self.side == "in" else self.base.bias * self.whole()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x * self.whole()) if self.side == "in" else self.base(x) * self.whole()


class Rescaled(Form):
    """(IA)^3: learned factors on features, while the rest stays (Liu et al. 2022, arXiv:2205.05638).

    https://github.com/r-three/t-few. The paper's are keys, values and the hidden features of feed-forward layers: `match: "qkv$",
    share: 0.6667` and `match: "fc2$", side: in`. As many parameters as features; no effect at first; merges.

    Args:
        match, seed: as in Form.
        side: factors on what the layers give, or on what they are given.
        share: the last share of these features has factors; two thirds of `qkv` are keys and values.
        frozen: nothing else trains in the encoders or fusion around these layers.
    """

    kinds, layer = (nn.Linear, Formed), Multiplied

    def __init__(
        self, match: str, side: Literal["in", "out"] = "out", share: float = 1.0, frozen: bool = True, seed: int = 0
    ) -> None:
        super().__init__(match, seed)
        if not 0 < share <= 1:
            raise ValueError(f"found share {share}; expected the share of features with factors, above 0 and up to 1")
        self.side, self.share, self.frozen = side, share, frozen

    def make(self, old: nn.Linear | Formed, name: str) -> nn.Module:
        return Multiplied(old, self.side, self.share)


class Prefixed(nn.Module):
    """Attention that also sees learned keys and values, (kv heads, count, d), as far as a gate (heads,) says."""

    added = ("keys", "values", "gate")

    def __init__(self, base: Attention, count: int) -> None:
        super().__init__()
        self.base, like = base, base.proj.weight.detach()
        self.keys, self.values = (nn.Parameter(like.new_empty(base.kv_heads, count, base.size)) for _ in range(2))
        self.gate = nn.Parameter(like.new_empty(base.heads))

    def new_rules(self) -> dict[str, Rule]:
        return {"keys": TABLE._replace(std=1.0), "values": TABLE, "gate": ZERO}

    init_rules = new_rules

    def forward(
        self, x: Tensor, route: Route, turn: Turn | None, past: tuple[Kept, int] | None = None, first: int | None = None
    ) -> Tensor:
        """As Attention. Prefixes have no place: queries meet them before they are turned."""
        base, group = self.base, self.base.heads // self.base.kv_heads
        width, bias = base.heads * base.size, base.qkv.bias
        q = F.linear(x[:, :first], base.qkv.weight[:width], None if bias is None else bias[:width])
        q = base.q_norm(rearrange(q, "b n (h d) -> b h n d", d=base.size))
        keys, values = (p.repeat_interleave(group, 0).to(q.dtype) for p in (self.keys, self.values))
        seen = torch.tanh(self.gate).to(q.dtype)[:, None, None] * F.scaled_dot_product_attention(q, keys[None], values[None])
        return base(x, route, turn, past, first) + F.linear(rearrange(seen, "b h n d -> b n (h d)"), base.proj.weight)


class Prefix(Form):
    """Learned keys and values in front of every layer's attention, while the rest stays (prefix tuning, Li and Liang 2021,
    arXiv:2101.00190), behind a gate that starts at zero (LLaMA-Adapter, Zhang et al. 2023, arXiv:2303.16199).

    For the attention of our own trunks; causal, packed and cached passes alike. 2 * count * kv heads * d + heads parameters per
    layer; no effect at first; does not merge.

    Args:
        match, seed: as in Form, for the names of attention layers.
        count: prefixes per layer.
        frozen: nothing else trains in the encoders or fusion around these layers.
    """

    kinds, layer = (Attention,), Prefixed

    def __init__(self, match: str = r"blocks\.\d+\.attn$", count: int = 16, frozen: bool = True, seed: int = 0) -> None:
        super().__init__(match, seed)
        if count < 1:
            raise ValueError(f"found {count} prefixes; expected 1 or more")
        self.count, self.frozen = count, frozen

    def make(self, old: Attention, name: str) -> nn.Module:
        return Prefixed(old, self.count)
