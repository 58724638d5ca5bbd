"""Parts of one encoder in another, parts drawn anew, and an encoder that sees in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from re import search
from typing import Any

import torch

from headwater.hub.audit import Row, near
from headwater.init import Normal, initialise
from headwater.model import Encoder
from headwater.pooling import Pooling
from headwater.surgery.remake import Change, filled, remade

KINDS = {  # kind of module -> where its tensors are
    "attention": r"(^|\.)attn\.",
    "mlp": r"(^|\.)mlp\.",
    "norm": r"norm",
    "embedding": r"^(stem|head)\.|registers$|position\.",
}


def matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Names that a kind of module ("attention", "mlp", "norm", "embedding") or a regular expression finds; each must find some."""
    found: dict[str, None] = {}
    for pattern in patterns:
        some = [name for name in names if search(KINDS.get(pattern, pattern), name)]
        if not some:
            meant = near(Row("missing", pattern, "", ()), [Row("unexpected", "", name, ()) for name in names])
            raise ValueError(
                f"found nothing called {pattern!r}{f', perhaps {meant}' if meant else ''}; expected one of {', '.join(KINDS)} or a "
                f"regular expression for some of {', '.join(list(names)[:4])}, ..."
            )
        found |= dict.fromkeys(some)
    return list(found)


@torch.no_grad()
def transplanted(encoder: Encoder, source: Encoder, parts: list[str]) -> Encoder:
    """An encoder with some tensors of another one: a class_path for `encoders` in a recipe.

    encoder: what receives; it keeps the rest. source: what gives. parts: kinds of module or regular expressions; see `matching`.
    Carrying over attention alone, or the MLPs alone, tells where what was learned is. ValueError where shapes differ. The result
    starts a run as it is, and `report` tells what came from where.
    """
    theirs, names = source.state_dict(), matching(list(encoder.state_dict()), parts)
    changes: Change = {n: ("renamed", theirs[n]) for n in names if n in theirs}
    if absent := [n for n in names if n not in theirs]:
        raise ValueError(f"the source has no {', '.join(absent[:4])}; name only parts that both encoders have")
    made = filled(deepcopy(encoder), encoder, changes)
    made.settled = True
    return made


@torch.no_grad()
def redrawn(encoder: Encoder, parts: list[str], seed: int = 0, scheme: Normal | None = None) -> Encoder:
    """An encoder some of whose tensors start anew, by the rules of `headwater.init`: a class_path for `encoders` in a recipe.

    encoder: what keeps the rest. parts: kinds of module or regular expressions; see `matching`. New embeddings behind trained
    blocks carry over what does not depend on the ids. seed, scheme: of the draws; None = Normal().
    """
    names = matching(list(encoder.state_dict()), parts)
    fresh = deepcopy(encoder)
    fresh.settled = False
    initialise(fresh, seed, scheme)
    drawn = fresh.state_dict()
    made = filled(deepcopy(encoder), encoder, {n: ("new", drawn[n]) for n in names})
    made.settled = True
    return made


def bidirectional(encoder: Encoder, pooling: Pooling | None = None) -> Encoder:
    """A causal language model as an encoder that sees both ways: a class_path for `encoders` in a recipe.

    Our trunk has no mask of its own: objectives ask for one. So the weights stay; `causal` of the encoder is taken back, where it
    has it, and tokens may become one vector in another way (`pooling`; None = as they did). An objective such as Masked then
    teaches it to use what comes later (LLM2Vec, BehnamGhader et al. 2024, arXiv:2404.05961).
    """
    own: dict[str, Any] = {"causal": False} if "causal" in encoder.spec["init_args"] else {}
    own |= {} if pooling is None else {"pooling": pooling}
    made = remade(encoder, own=own)
    old = encoder.state_dict()
    fresh: Change = {n: ("new", w) for n, w in made.state_dict().items() if n not in old}  # of pooling by attention
    return filled(made, encoder, fresh)
