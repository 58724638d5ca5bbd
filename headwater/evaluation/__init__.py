"""What was learnt: callbacks on frozen features that never touch the objective."""

from headwater.evaluation.bits import Bits
from headwater.evaluation.retrieval import Retrieval
from headwater.evaluation.samples import Samples
from headwater.evaluation.steps import NextStep

__all__ = ["Bits", "NextStep", "Retrieval", "Samples"]
