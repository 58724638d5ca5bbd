"""The one transformer trunk, used by encoders, fusion blocks and decoders.

Parameter names follow timm's VisionTransformer (blocks.0.attn.qkv.weight), so its weights load without a table.
Positions are added here from `Tokens.position`, so whoever makes a token need not know about them.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater.attention import Route, plan
from headwater.cache import Kept, current
from headwater.init import TABLE, Rule, initialise
from headwater.layers import Activation, Attention, Bias, Block, Mlp, NormKind, Turn, make_norm
from headwater.position import NAMED, Position
from headwater.spec import Described
from headwater.tokens import Tokens, append, attention_mask


class Trunk(nn.Module, Described):
    """A stack of blocks over Tokens of any modality.

    Args:
        width: D, the size of every token.
        depth: number of blocks.
        heads: attention heads; None = one per 64 of width.
        position: how `Tokens.position` enters: sines added at the input, rotation inside attention, scores that fall with
            distance, not at all, or an object of headwater.position.
        mlp_ratio: hidden size of the feed-forward layer over width.
        conditional: build the layers that take a `condition` (diffusion time, labels).
        kv_heads: heads of keys and values, a divisor of `heads`; None = as many.
        head_size: d of a head; None = width / heads.
        norm: LayerNorm, RMSNorm, or a bounded tanh in their place. eps: added to the variance.
        activation, gated: of the feed-forward layer; "silu" and gated is SwiGLU.
        qk_norm: normalise queries and keys.
        bias: which linear layers have one: all, only those of queries, keys and values, or none.
        parallel: attention and feed-forward side by side (Wang and Komatsuzaki 2021, GPT-J).
        post: norms behind the sums and none at the end, as the first transformers had them.
        entry_norm: a norm before the first block (CLIP, BERT).
        final_norm: a norm behind the last block; never with `post`.
        drop_path: largest rate at which a sample skips a branch in training, rising over the depth (arXiv:1603.09382).
        layer_scale: first value of a learned factor per feature on each branch; None = none.
        registers: learned tokens per sample, class token first; they come back behind the N that were given
            (Darcet et al. 2023, arXiv:2309.16588).
    """

    def __init__(
        self,
        width: int = 192,
        depth: int = 4,
        heads: int | None = None,
        position: Literal["sincos", "rotary", "alibi", "none"] | Position = "sincos",
        mlp_ratio: float = 4.0,
        conditional: bool = False,
        kv_heads: int | None = None,
        head_size: int | None = None,
        norm: NormKind = "layer",
        eps: float = 1e-6,
        activation: Activation = "gelu",
        gated: bool = False,
        qk_norm: bool = False,
        bias: Bias = "all",
        parallel: bool = False,
        post: bool = False,
        entry_norm: bool = False,
        final_norm: bool = True,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        registers: int = 0,
    ) -> None:
        super().__init__()
        heads = heads or max(1, width // 64)
        if head_size is None and (width % heads or (width // heads) % 2):
            raise ValueError(f"width {width} over {heads} heads leaves {width / heads} per head; expected an even whole number")
        if heads % (kv_heads or heads):
            raise ValueError(f"found kv_heads {kv_heads} for {heads} heads; expected a divisor, so that groups are equal")
        if post and (parallel or conditional):
            raise ValueError("found post with parallel or conditional; both need the norm before the branch")
        self.width, self.heads, self.conditional, self.drop_path = width, heads, conditional, drop_path
        self.size = head_size or width // heads
        self.position = NAMED[position]() if isinstance(position, str) else position
        self.position.fit(width, heads)
        self.hidden, self.activation = int(width * mlp_ratio), activation
        self.make_norm = partial(make_norm, norm, eps=eps)

        def block() -> Block:
            attn = Attention(width, heads, kv_heads, self.size, self.make_norm if qk_norm else None, bias)
            mlp = Mlp(width, self.hidden, activation, gated, bias == "all")
            return Block(width, attn, mlp, self.make_norm, conditional, parallel, post, layer_scale)

        self.norm_pre = self.make_norm(width) if entry_norm else nn.Identity()
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.norm = self.make_norm(width) if final_norm and not post else nn.Identity()
        self.registers = nn.Parameter(torch.empty(registers, width)) if registers else None
        initialise(self)

    def init_rules(self) -> dict[str, Rule]:
        return {} if self.registers is None else {"registers": TABLE}

    def forward(
        self,
        t: Tokens,
        causal: bool = False,
        condition: Tensor | None = None,
        first: int | None = None,
    ) -> Tokens:
        """t.x: (B, N, D); condition: (B, N or 1, D). Tokens that are not valid come out finite and mean nothing.

        first: only so many of the tokens are wanted and come back, the same as without it; the last block does no more for the
        others than that they are seen. Causal passes within a Cache are given only the tokens that are new.
        """
        if condition is not None and not self.conditional:
            raise ValueError("this trunk was built without conditioning, but a condition came in; set `conditional: true` on it")
        length, t = t.x.shape[1], self.placed(t)
        cache = current() if causal else None
        memory = None if cache is None else cache.of(self)
        if self.registers is not None and (memory is None or memory.seen is None):  # no given token sees them: once is enough
            t = append(t, self.registers)
            if condition is not None and condition.shape[1] > 1:
                condition = F.pad(condition, (0, 0, 0, t.x.shape[1] - length))
        t, keys = (t, t) if memory is None else memory.extend(t)
        turn, route = self.turn(t), self._route(t, keys, causal, memory)
        condition = None if condition is None else condition.to(t.x.dtype)
        x, keep = self.norm_pre(t.x), self.kept(t)
        if first is not None:
            t = t.map(lambda field: field[:, :first])
        final = route if first is None else self._route(t, keys, causal, memory)
        for number, block in enumerate(self.blocks):
            past, last = None if memory is None else (memory, number), number == len(self.blocks) - 1
            way = (final, first) if last else (route, None)
            x = block(x, way[0], turn, condition, past, None if keep is None else keep[number], way[1])
        return t._replace(x=self.norm(x[:, :first]))

    def placed(self, t: Tokens) -> Tokens:
        """With the code of each place added, where positions are added; appended tokens have none."""
        if (code := self.position.add(t)) is None:
            return t
        code = code.to(t.x.dtype)
        return t._replace(x=t.x + (code if t.order is None else code * t.given()[..., None]))

    def turn(self, t: Tokens) -> Turn | None:
        """Cosine and sine of the angles of each place, where positions turn; appended tokens do not."""
        if (angle := self.position.angle(t, self.size)) is None:
            return None
        angle = angle if t.order is None else angle * t.given()[:, None, :, None]
        return angle.cos(), angle.sin()

    def _route(self, t: Tokens, keys: Tokens, causal: bool, memory: Kept | None) -> Route:
        """How t attends to keys. The few new tokens of a cached pass have a dense mask: it is small, and never the same twice."""
        mask, bias = attention_mask(t, keys, causal), self.position.bias(t, keys)
        return plan(mask, t.x, self.heads, bias) if memory is None or bias is not None else Route(mask=mask.dense)

    def kept(self, t: Tokens) -> Tensor | None:
        """(depth, 2, B, N or 1, 1) 0 = the sample skips this branch, else 1 / (1 - rate); None outside of training."""
        if not self.drop_path or not self.training:
            return None
        depth, device = len(self.blocks), t.x.device
        rate = torch.linspace(0, self.drop_path, depth, device=device)[:, None, None, None, None]
        if t.document is None:
            draw = torch.rand(depth, 2, len(t.x), 1, 1, device=device)
        else:
            draw = torch.rand(depth, 2, int(t.document.max()) + 1, 1, device=device)[:, :, t.document.clamp(min=0)]
        return ((draw >= rate) / (1 - rate)).to(t.x.dtype)
