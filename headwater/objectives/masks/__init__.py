"""What masked prediction hides, and how it asks for it: parts of `Masked`, and of whoever hides tokens."""

from headwater.objectives.masks.policies import Around, Blocks, Spans, Suffix, Uniform, Units, Words
from headwater.objectives.masks.salient import Salient

__all__ = [
    "Around",
    "Blocks",
    "Salient",
    "Spans",
    "Suffix",
    "Uniform",
    "Units",
    "Words",
]
