"""Vectors as one of K codes: the formulas that quantisers of models and targets of objectives share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def nearest(x: Tensor, centres: Tensor) -> Tensor:
    """(..., F) vectors and (K, F) centres -> (...) the number of the centre at the smallest Euclidean distance."""
    return torch.cdist(x, centres).argmin(-1)  # which autocast leaves in float32


def select_code(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """(..., V) scores and Gumbel noise -> one-hot of the largest sum, with the gradient of the softmax at this temperature.

    Straight-through Gumbel-softmax: Jang et al. 2016, arXiv:1611.01144.
    """
    soft = ((logits + noise) / temperature).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return hard + soft - soft.detach()


def perplexity(mean: Tensor) -> Tensor:
    """(..., V) probabilities -> (...) how many codes are in use: exp of the entropy, V when all are used alike."""
    return (-(mean * mean.clamp(min=1e-7).log()).sum(-1)).exp()


def diversity(mean: Tensor) -> Tensor:
    """(G, V) probabilities of codes, averaged over a batch -> the share of codes that are not in use, 0 to 1.

    (G V - sum over books of perplexity) / (G V): what the implementation of wav2vec 2.0 minimises in place of minus the entropy
    (Baevski et al. 2020, arXiv:2006.11477, footnote to equation 4).
    """
    return 1 - perplexity(mean).sum() / mean.numel()
