"""Operations on trained weights: merging, growth, other vocabularies, longer contexts, parts of other models."""

from headwater.surgery.context import longer
from headwater.surgery.depth import deeper
from headwater.surgery.growing import Growing, grown
from headwater.surgery.merging import added, combined, greedy, merged, soup
from headwater.surgery.remake import within
from headwater.surgery.transplant import bidirectional, redrawn, transplanted
from headwater.surgery.vocabulary import reworded
from headwater.surgery.width import wider

__all__ = [
    "Growing",
    "added",
    "bidirectional",
    "combined",
    "deeper",
    "greedy",
    "grown",
    "longer",
    "merged",
    "redrawn",
    "reworded",
    "soup",
    "transplanted",
    "wider",
    "within",
]
