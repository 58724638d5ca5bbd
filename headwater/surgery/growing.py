"""Growth that is learned: every weight of a large trunk is a multi-linear function of all weights of a small one.

The matrices of all blocks, cut into squares, are one tensor: types of weight x input x output x blocks. Four cores, joined in a
ring of rank R, map each of its modes to that of the large trunk (Mango, Pan et al. 2023, arXiv:2310.10699; with rank 1 and no
mixing of types it is LiGO's map, Wang et al. 2023, arXiv:2303.00980, https://github.com/VITA-Group/LiGO). The cores are trained for
some hundred steps on the loss of the task, by any objective; then the weights are computed once and trained on as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call

from headwater import random
from headwater.init import Rule
from headwater.model import Encoder
from headwater.surgery.depth import Order, deeper, sources
from headwater.surgery.remake import filled, remade, trunk_of
from headwater.surgery.width import wider
from headwater.tokens import Pooled, Tokens

MATRICES = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")


def multilinear(small: Tensor, types: Tensor, inputs: Tensor, outputs: Tensor, layers: Tensor) -> Tensor:
    """The weights of a large trunk: (T, O, I, L) -> (T', O', I', L').

    types: (R, T, T', R), outputs: (R, O, O', R), layers: (R, L, L', R), inputs: (R, I, I', R), each joined to the next by its last
    dimension, and the inputs to the types (Mango, equation 5).
    """
    made = torch.einsum("atuc,toil->acuoil", types, small)
    made = torch.einsum("elmg,acuoil->acegumoi", layers, made)
    made = torch.einsum("cope,acegumoi->agumpi", outputs, made)
    return torch.einsum("gija,agumpi->upjm", inputs, made)


def squares(blocks: nn.ModuleList) -> Tensor:
    """The matrices of all blocks, cut into squares of the width: (T, D, D, L)."""
    return torch.stack([torch.cat([_cut(name, block.state_dict()[name]) for name in MATRICES]) for block in blocks], -1)


def _cut(name: str, matrix: Tensor) -> Tensor:
    """(T D, D) or, of those that lead back to the stream, (D, T D) -> (T, D, D)."""
    if name in ("attn.proj.weight", "mlp.fc2.weight"):
        return rearrange(matrix, "o (t i) -> t o i", i=len(matrix))
    return rearrange(matrix, "(t o) i -> t o i", o=matrix.shape[1])


def joined(made: Tensor, counts: dict[str, int]) -> dict[str, Tensor]:
    """The inverse of `squares`: (T, D, D, L) -> matrices by their name in a trunk. counts: squares of each matrix."""
    found = {}
    for number, block in enumerate(made.unbind(-1)):
        for name, part in zip(counts, block.split(list(counts.values())), strict=True):
            wide = name in ("attn.proj.weight", "mlp.fc2.weight")
            found[f"trunk.blocks.{number}.{name}"] = rearrange(part, "t o i -> o (t i)" if wide else "t o i -> (t o) i")
    return found


class Verbs(nn.Module):
    """An encoder whose every verb can be called with other weights."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, verb: str, *given: Any) -> Any:
        return getattr(self.encoder, verb)(*given)


class Growing(Encoder):
    """A large encoder that learns how it grows from a small one; `grown` makes a plain one of it.

    At first it is what `wider` and `deeper` give, with some noise. What is no matrix of a block (stem, head, norms, biases) comes
    from there too and is trained as it is; the small encoder's matrices stay what they are.

    Args:
        encoder: the small one, of an own trunk whose heads fill its width and whose feed-forward layers are whole times as wide.
        width: of the large trunk, a multiple of the small one's; None = as wide.
        depth: its number of blocks; None = as many.
        rank: of the ring of cores.
        how: which block each new one starts as a copy of; see `headwater.surgery.deeper`.
        noise: deviation of what is added to the cores, times their largest entry: copies do not stay copies.
        seed: of the noise.
    """

    settled = True
    cacheable = False
    small: Tensor
    _verbs: Any

    def __init__(
        self,
        encoder: Encoder,
        width: int | None = None,
        depth: int | None = None,
        rank: int = 1,
        how: Order = "stack",
        noise: float = 0.01,
        seed: int = 0,
    ) -> None:
        nn.Module.__init__(self)
        small = trunk_of(encoder)
        old, new = small.width, width or small.width
        if new % old or small.hidden % old or small.size * small.heads != old or small.blocks[0].attn.kv_heads != small.heads:
            raise ValueError(
                f"found a trunk of width {old}, {small.heads} heads of {small.size} and hidden size {small.hidden} to grow to "
                f"{new}; expected multiples of its width, and heads that fill it, one for keys and values each"
            )
        depth = depth or len(small.blocks)
        target = deeper(wider(encoder, new, hidden=small.hidden * new // old), depth, how)
        self.reader, self.width, self.embedded, self.dim = target.reader, new, new, target.dim
        self.features, self.vocab, self.start = target.features, target.vocab, target.start
        self.counts = {name: encoder.state_dict()[f"trunk.blocks.0.{name}"].numel() // old**2 for name in MATRICES}
        self.register_buffer("small", squares(small.blocks))
        kinds = torch.eye(sum(self.counts.values()))
        copies = torch.eye(old).repeat(1, new // old)
        layers = torch.eye(len(small.blocks))[sources(len(small.blocks), depth, how)].T
        starts = {"types": kinds, "outputs": copies, "layers": layers, "inputs": copies * old / new}
        self.cores = nn.ParameterDict({name: core(start, rank, noise, seed, name) for name, start in starts.items()})
        matrices = {f"trunk.blocks.{k}.{name}" for k in range(depth) for name in MATRICES}
        blocks: Any = target.trunk.blocks
        for number, source in enumerate(sources(len(small.blocks), depth, how)):
            inner = blocks[number].mlp.fc1.bias
            if inner is not None:  # hidden units are copied square by square, not as a whole
                own = small.blocks[source].mlp.fc1.bias.detach()
                inner.data.copy_(own.reshape(-1, old).repeat(1, new // old).flatten())
        rest = {name.replace(".", "/"): p for name, p in target.named_parameters() if name not in matrices}
        self.rest = nn.ParameterDict(rest)
        object.__setattr__(self, "_verbs", Verbs(target.to("meta")))  # no part of this module: its weights are computed

    def init_rules(self) -> dict[str, Rule]:
        return {}

    def train(self, mode: bool = True) -> Growing:
        """The computed encoder too."""
        self._verbs.train(mode)
        return super().train(mode)

    def matrices(self) -> dict[str, Tensor]:
        """The matrices of all blocks of the large trunk, by name."""
        cores = {name: self.cores[name] for name in ("types", "inputs", "outputs", "layers")}
        return joined(multilinear(self.small, **cores), self.counts)

    def _ask(self, verb: str, *given: Any, blocks: bool = False) -> Any:
        weights = {f"encoder.{name.replace('/', '.')}": p for name, p in self.rest.items()}
        weights |= {f"encoder.{name}": w for name, w in self.matrices().items()} if blocks else {}
        return functional_call(self._verbs, weights, (verb, *given))

    def embed(self, raw: Tokens) -> Tokens:
        return self._ask("embed", raw)

    def forward(self, t: Tokens, causal: bool = False, condition: Tensor | None = None) -> Tokens:
        return self._ask("forward", t, causal, condition, blocks=True)

    def pool(self, t: Tokens) -> Pooled:
        return self._ask("pool", t)

    def unembed(self, x: Tensor) -> Tensor:
        return self._ask("unembed", x)


def core(start: Tensor, rank: int, noise: float, seed: int, name: str) -> nn.Parameter:
    """(A, A') -> (R, A, A', R): the start, along the whole diagonal of the ring, and noise; of types along its first entry only.

    So rank 1 begins as plain growth, and further ranks begin at nothing, while their cores already have a gradient.
    """
    made = torch.zeros(rank, *start.shape, rank)
    for k in range(1 if name == "types" else rank):
        made[k, :, :, k] = start
    return nn.Parameter(made + noise * float(start.abs().max()) * random.normal(torch.tensor(seed), made.shape, name))


@torch.no_grad()
def grown(encoder: Encoder) -> Encoder:
    """The encoder that a `Growing` one has become, with weights of its own: a class_path for `encoders` in a recipe."""
    if not isinstance(encoder, Growing):
        raise ValueError(f"found {type(encoder).__name__}; expected Growing, whose cores were trained")
    changes = {name: ("new", w) for name, w in encoder.matrices().items()}
    changes |= {name.replace("/", "."): ("matched", p.detach()) for name, p in encoder.rest.items()}
    made = remade(encoder._verbs.encoder)
    made.settled = True
    return filled(made, encoder._verbs.encoder, changes)  # type: ignore[arg-type]
