"""Designers of tasks: what feedback may change about what is learned."""

from headwater.objectives.designers.designer import Designer
from headwater.objectives.designers.targets import SoftTargets, TokenWeights
from headwater.objectives.designers.weights import PartWeights, SourceWeights

__all__ = ["Designer", "PartWeights", "SoftTargets", "SourceWeights", "TokenWeights"]
