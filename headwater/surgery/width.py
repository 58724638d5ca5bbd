"""A wider model from a narrower one that computes the same: every unit is copied, and whoever reads it shares its weight out.

Net2Net (Chen et al. 2015, arXiv:1511.05641) for transformers as in bert2BERT (Chen et al. 2021, arXiv:2110.07143; function
preserving and advanced knowledge initialisation). Shares are drawn, so that copies do not stay equal in training. A width that is
no multiple of the old one is exact too: units left over carry the mean of the others (LayerNorm) or nothing (RMSNorm), which the
norm's weight makes up for (LEMON, Wang et al. 2023, arXiv:2310.07999).
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from headwater import random
from headwater.hub.rules import ratio
from headwater.layers import DynamicTanh
from headwater.model import Encoder
from headwater.position import Alibi, Sincos
from headwater.surgery.remake import Change, filled, remade, trunk_of
from headwater.trunk import Trunk

Kind = Literal["same", "upper"]


class Stream(NamedTuple):
    """How the residual stream grows: `copies` of its `old` units, then `rest` units. mean: the rest carries the mean, else zero."""

    old: int
    copies: int
    rest: int
    mean: bool

    @property
    def units(self) -> Tensor:
        """The unit that each new one is a copy of, those of the rest by turns."""
        return torch.arange(self.old * self.copies + self.rest) % self.old

    @property
    def shrink(self) -> float:
        """What the rest does to a norm's variance, for which its weight (by the root) and eps make up."""
        return self.old * self.copies / (self.old * self.copies + self.rest)


class Inside(NamedTuple):
    """Which old one each row of qkv, each unit that attention gives, each row of fc1 and each hidden unit is a copy of."""

    qkv: Tensor
    attended: Tensor
    fc1: Tensor
    hidden: Tensor


def grow_rows(own: Tensor, index: Tensor, upper: Tensor | None = None) -> Tensor:
    """Rows by `index`, (old, ...) -> (new, ...). upper: the matrix of the block above, which gives rows that are there already."""
    made = own[index].clone()
    if upper is not None:
        place = torch.arange(len(index))
        first = torch.full((len(own),), len(index)).scatter_reduce(0, index, place, "amin")
        again = place != first[index]
        made[again] = upper[index[again]]
    return made


def share_columns(own: Tensor, index: Tensor, seed: int, name: str) -> Tensor:
    """Columns by `index`, the copies of one summing up to it, in shares that are drawn. (M, old) -> (M, new)."""
    share = 0.5 + random.uniform(torch.tensor(seed), (len(own), len(index)), name).double()
    total = share.new_zeros(own.shape).index_add_(1, index, share)
    return (own.double()[:, index] * share / total[:, index]).to(own.dtype)


def grow_written(own: Tensor, stream: Stream, upper: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """What is added to the stream, row by row: (old, ...) -> (new, ...). scale: factors (old,) that come behind, of LayerScale."""
    made = grow_rows(own, stream.units, upper)
    if stream.rest:
        weighted = own if scale is None else own * scale.reshape(-1, *[1] * (own.ndim - 1))
        made[-stream.rest :] = weighted.double().mean(0).to(own.dtype) if stream.mean else 0.0
    return made


def grow_read(own: Tensor, stream: Stream, seed: int, name: str) -> Tensor:
    """What reads the normalised stream, whose rest is zero: (M, old) -> (M, new)."""
    full = stream.old * stream.copies
    rest = own[:, stream.units[full:]]  # multiplies zero at first
    return torch.cat([share_columns(own, stream.units[:full], seed, name), rest], 1)


def grow_norm(own: Tensor, stream: Stream, norm: nn.Module, kind: str) -> Tensor:
    """Weight or bias of a norm of the stream, (old,) -> (new,); what else it has stays. kind: the name of the parameter.

    The rest makes what LayerNorm and RMSNorm give larger; a bounded tanh looks at each unit alone.
    """
    if kind == "alpha":
        return own
    made = own[stream.units].clone()
    if stream.rest and kind == "bias":
        made[-stream.rest :] = 0.0
    return made * math.sqrt(stream.shrink) if kind == "weight" and not isinstance(norm, DynamicTanh) else made


def wider(
    encoder: Encoder,
    width: int | None = None,
    heads: int | None = None,
    hidden: int | None = None,
    kind: Kind = "same",
    seed: int = 0,
) -> Encoder:
    """An encoder with a wider trunk: a class_path for `encoders` in a recipe.

    encoder: what is grown; its positions must not depend on the width ("rotary", "none", Learned). width: of the new trunk; None =
    as it is. heads: of attention, each as large as before; None = as many more as the width. hidden: of the feed-forward layers;
    None = as the width. kind: where copies come from: "same" = the same block, and the output stays what it was; "upper" = the
    block above (bert2BERT's AKI), which changes the output. seed: of the shares.
    """
    trunk = trunk_of(encoder)
    attn, args = trunk.blocks[0].attn, trunk.spec["init_args"]
    width = width or trunk.width
    heads = heads or max(trunk.heads, round(trunk.heads * width / trunk.width))
    hidden = hidden or max(trunk.hidden, int(width * args["mlp_ratio"]))
    group = trunk.heads // attn.kv_heads
    stream = Stream(trunk.width, width // trunk.width, width % trunk.width, args["norm"] == "layer")
    _check(encoder, stream, width, heads, hidden)
    changed = {
        "width": width,
        "heads": heads,
        "kv_heads": heads // group,
        "head_size": trunk.size,
        "mlp_ratio": ratio(hidden, width),
    }
    made = remade(encoder, changed | {"eps": args["eps"] * stream.shrink})
    inside = _inside(trunk, heads // group, hidden)
    changes: Change = {}
    for number, block in enumerate(trunk.blocks):
        upper = trunk.blocks[min(number + 1, len(trunk.blocks) - 1)] if kind == "upper" else None
        changes |= _block(f"trunk.blocks.{number}.", block, upper, stream, inside, seed)
    return filled(made, encoder, changes | _around(encoder, stream, seed))


def _inside(trunk: Trunk, kv_heads: int, hidden: int) -> Inside:
    """Heads are copied in groups: one of keys and values with the queries that it serves."""
    attn: Any = trunk.blocks[0].attn
    groups = torch.arange(kv_heads) % attn.kv_heads
    queries = _spans(_spans(groups, trunk.heads // attn.kv_heads), trunk.size)
    keys = _spans(groups, trunk.size) + trunk.heads * trunk.size
    units = torch.arange(hidden) % trunk.hidden
    gated = trunk.spec["init_args"]["gated"]
    return Inside(
        torch.cat([queries, keys, keys + attn.kv_heads * trunk.size]),
        queries,
        torch.cat([units, units + trunk.hidden]) if gated else units,
        units,
    )


def _spans(index: Tensor, size: int) -> Tensor:
    """Numbers of runs -> numbers of all that is in them."""
    return (index[:, None] * size + torch.arange(size)).flatten()


def _block(prefix: str, block: Any, upper: Any, stream: Stream, inside: Inside, seed: int) -> Change:
    """The tensors of a grown block. upper: the block above, where copies come from it."""
    above, changes = {} if upper is None else upper.state_dict(), Change()
    rows = {"attn.qkv": inside.qkv, "mlp.fc1": inside.fc1}
    columns = {"attn.proj": (inside.attended, block.ls1), "mlp.fc2": (inside.hidden, block.ls2)}
    for name, value in block.state_dict().items():
        (layer, _, what), also = name.rpartition("."), above.get(name)
        if layer in rows:
            value = grow_rows(value, rows[layer], also)
            value = grow_read(value, stream, seed, prefix + name) if what == "weight" else value
        elif layer in columns:
            index, scale = columns[layer]
            if what == "weight":
                value, also = (w if w is None else share_columns(w, index, seed, prefix + name) for w in (value, also))
            value = grow_written(value, stream, also, getattr(scale, "gamma", None))
        elif layer in ("norm1", "norm2"):
            value = grow_norm(value, stream, block.norm1, what)
        elif layer in ("ls1", "ls2"):
            value = value[stream.units].clone()
            value[len(value) - stream.rest :] = 1.0  # the mean of what is written is scaled already
        changes[prefix + name] = ("inflated", value)
    return changes


def _around(encoder: Any, stream: Stream, seed: int) -> Change:
    """The tensors of an encoder outside of its blocks."""
    norms = {"trunk.norm": encoder.trunk.norm, "trunk.norm_pre": encoder.trunk.norm_pre, "pooled_norm": encoder.pooled_norm}
    tables = ("trunk.registers", "trunk.position.table", *(["stem.weight"] if isinstance(encoder.stem, nn.Embedding) else []))
    changes: Change = {}
    for name, value in encoder.state_dict().items():
        layer, _, what = name.rpartition(".")
        if name == "head.weight":
            value = grow_read(value, stream, seed, name)
        elif layer in norms:
            value = grow_norm(value, stream, norms[layer], what)
            if layer == "trunk.norm" and encoder.head is None and what != "alpha":  # the table that reads has all copies
                value = value / stream.copies
        elif name in tables:
            value = grow_written(value.T, stream).T
        elif layer == "stem":
            value = grow_written(value, stream)
        else:
            continue
        changes[name] = ("inflated", value)
    return changes


def _check(encoder: Any, stream: Stream, width: int, heads: int, hidden: int) -> None:
    """ValueError for what cannot grow, or not without changing what is computed."""
    trunk, args = encoder.trunk, encoder.trunk.spec["init_args"]
    group, uneven = trunk.heads // trunk.blocks[0].attn.kv_heads, bool(stream.rest)
    if width < trunk.width or heads < trunk.heads or hidden < trunk.hidden:
        raise ValueError(
            f"found width {width}, {heads} heads and hidden size {hidden} for a trunk of {trunk.width}, {trunk.heads} and "
            f"{trunk.hidden}; expected at least as much of each"
        )
    if heads % group:
        raise ValueError(f"found {heads} heads; expected a multiple of {group}, the queries that each key-value head serves")
    layered = uneven and args["norm"] == "layer"
    reasons = {
        "sines of the width as positions; take rotary or Learned ones": width != trunk.width and isinstance(trunk.position, Sincos),
        "scores that fall at a rate per head": heads != trunk.heads and isinstance(trunk.position, Alibi),
        "a condition, which is made of sines of the width": width != trunk.width and trunk.conditional,
        "pooling by attention": width != trunk.width and encoder.pooler is not None,
        "a stem of several layers": width != trunk.width and not isinstance(encoder.stem, nn.Linear | nn.Embedding),
        "norms behind the sums or before the first block, which need a multiple of the width": layered
        and (args["post"] or args["entry_norm"] or not isinstance(encoder.pooled_norm, nn.Identity)),
        "norms of queries and keys, which need a multiple of the width": uneven and args["qk_norm"],
        "a tied head without a last norm": encoder.head is None and stream.copies > 1 and isinstance(trunk.norm, nn.Identity),
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise ValueError(f"{type(encoder).__name__} cannot grow to width {width}; found {'; '.join(found)}")
