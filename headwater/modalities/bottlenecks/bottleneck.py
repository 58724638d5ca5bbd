"""What stands between an encoder and a decoder and says what a code is: an id, several ids, or a vector of few numbers.

Every bottleneck is one call, `bottleneck(z) -> Coded`, so an `Autoencoder` changes from one to another in one line of its recipe.
What a bottleneck draws comes from seeds, and without seeds it draws nothing. What it averages over training (codebooks, moments of
latents) are buffers: `observe` notes a piece of a batch, and `move` takes the notes of all pieces and ranks, once per step.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from headwater.spec import Described


class Coded(NamedTuple):
    """x: (B, N, d) what the decoder gets, with gradient. ids: (B, N, G) of each codebook; None = the vectors are the codes.

    loss: (B, N) what the bottleneck itself costs; None = nothing.
    """

    x: Tensor
    ids: Tensor | None = None
    loss: Tensor | None = None


class Bottleneck(nn.Module, Described):
    """Subclasses set the numbers below in __init__ or `fit`, and write `forward` and `vectors`.

    inputs: how many numbers of each token it wants; None = those of the encoder as they are, without a linear layer before it:
    `fit` then tells how many these are.
    features: d, how many it gives. vocab: ids in all codebooks together; None = codes are vectors. books: G, ids per token, the
    k-th of them from k * vocab / G on. costs: it has a loss.
    """

    inputs: int | None
    features: int
    vocab: int | None = None
    books: int = 1
    costs: bool = False

    def fit(self, width: int) -> None:
        """Take over the width of the encoder; called before the first pass where `inputs` is None."""

    def forward(self, z: Tensor, seed: Tensor | None = None, progress: float = 1.0) -> Coded:
        """z: (B, N, inputs); seed: (B, N) of what is drawn in training, None = nothing is; progress: of the run, 0 to 1."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it lets through")

    def code(self, z: Tensor) -> Tensor:
        """(B, N, inputs) -> the codes: ids (B, N, G), each from 0 on, or vectors (B, N, d)."""
        coded = self(z)
        return coded.x if coded.ids is None else coded.ids

    def vectors(self, codes: Tensor) -> Tensor:
        """What the decoder gets for such codes, (B, N, d)."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its codes stand for")

    def observe(self, z: Tensor, coded: Coded, real: Tensor, seed: Tensor) -> None:
        """Note what a piece of a training step showed. real, seed: (B, N)."""

    def move(self) -> None:
        """Once per optimizer step, on all ranks: take in what was noted."""
