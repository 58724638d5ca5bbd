"""What was learnt: callbacks on frozen features that never touch the objective."""

from headwater.evaluation.retrieval import Retrieval
from headwater.evaluation.steps import NextStep

__all__ = ["NextStep", "Retrieval"]
