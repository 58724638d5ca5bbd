"""Designers of tasks: what feedback may change about what is learned."""

from headwater.objectives.designers.changes import Blur, Change, Colour, Drop, Erase, Level, Noise, Zoom
from headwater.objectives.designers.designer import Designer
from headwater.objectives.designers.masks import MaskScores, Scored
from headwater.objectives.designers.targets import SoftTargets, TokenWeights
from headwater.objectives.designers.views import Families, Views
from headwater.objectives.designers.weights import PartWeights, SourceWeights

__all__ = [
    "Blur",
    "Change",
    "Colour",
    "Designer",
    "Drop",
    "Erase",
    "Families",
    "Level",
    "MaskScores",
    "Noise",
    "PartWeights",
    "Scored",
    "SoftTargets",
    "SourceWeights",
    "TokenWeights",
    "Views",
    "Zoom",
]
