"""What text is corrupted by, and what is asked for in return: parts of `Denoising`."""

from headwater.objectives.noise.denoisers import Denoiser, Prefix, Reconstruction, SpanCorruption
from headwater.objectives.noise.gap_sentences import GapSentences
from headwater.objectives.noise.operators import Delete, Infill, Insert, Noise, Permute, Replace, Rotate, Shuffle

__all__ = [
    "Delete",
    "Denoiser",
    "GapSentences",
    "Infill",
    "Insert",
    "Noise",
    "Permute",
    "Prefix",
    "Reconstruction",
    "Replace",
    "Rotate",
    "Shuffle",
    "SpanCorruption",
]
