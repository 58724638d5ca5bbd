"""What masked prediction asks for at hidden places, and how the answers are scored: parts of `Masked`."""

from headwater.objectives.targets.codes import Clusters, Quantiser, RandomProjection
from headwater.objectives.targets.features import Features
from headwater.objectives.targets.properties import Properties
from headwater.objectives.targets.target import Places, Values

__all__ = [
    "Clusters",
    "Features",
    "Places",
    "Properties",
    "Quantiser",
    "RandomProjection",
    "Values",
]
