"""A deeper model from a shallower one: which block each new one is copied from."""

from __future__ import annotations

from typing import Literal

import torch

from headwater.hub.audit import How
from headwater.model import Encoder
from headwater.surgery.remake import Change, filled, remade, trunk_of

Order = Literal["stack", "interleave", "overlap"]
OUTPUTS = ("attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias")  # by which a block's branches reach the stream


def sources(old: int, new: int, how: Order = "stack") -> list[int]:
    """Of which of `old` blocks each of `new` ones is a copy.

    "stack": the whole stack again and again (Gong et al. 2019, Efficient Training of BERT by Progressively Stacking).
    "interleave": each block several times in a row. "overlap": the first half of the new ones from the bottom, the other half up to
    the top, so that the middle comes twice (depth up-scaling; SOLAR, Kim et al. 2023, arXiv:2312.15166; Yi, arXiv:2403.04652).
    """
    if how == "overlap":
        if new > 2 * old:
            raise ValueError(f"found depth {new} for an overlap of two copies of {old} blocks; expected at most {2 * old}")
        low = (new + 1) // 2
        return [*range(low), *range(old - (new - low), old)]
    return [i % old if how == "stack" else i * old // new for i in range(new)]


def deeper(encoder: Encoder, depth: int, how: Order = "stack", quiet: bool = False) -> Encoder:
    """An encoder with more blocks, each a copy of one that was there: a class_path for `encoders` in a recipe.

    encoder: what is grown. depth: blocks of the new one. how: see `sources`. quiet: a second copy of a block adds nothing at first,
    so that the output stays what it was (block expansion; LLaMA Pro, Wu et al. 2024, arXiv:2401.02415).
    """
    trunk = trunk_of(encoder)
    old = len(trunk.blocks)
    if depth < old:
        raise ValueError(f"found depth {depth} for a trunk of {old} blocks; expected at least as many")
    if quiet and trunk.spec["init_args"]["post"]:
        raise ValueError("found quiet on a trunk with norms behind the sums, whose blocks change what adds nothing; leave it out")
    state, origin = encoder.state_dict(), sources(old, depth, how)
    changes: Change = {}
    for number, source in enumerate(origin):
        prefix, silent = f"trunk.blocks.{source}.", quiet and source in origin[:number]
        for name, value in state.items():
            if name.startswith(prefix):
                inner = name.removeprefix(prefix)
                zero = silent and inner in OUTPUTS
                how_made: How = "new" if zero else "matched" if number == source else "renamed"
                changes[f"trunk.blocks.{number}.{inner}"] = (how_made, torch.zeros_like(value) if zero else value)
    return filled(remade(encoder, {"depth": depth}), encoder, changes)
