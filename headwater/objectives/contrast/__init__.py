"""What contrastive objectives compare, and what the comparison should look like: parts of `Contrastive`."""

from headwater.objectives.contrast.consistency import Consistent
from headwater.objectives.contrast.gaussian import Gaussian
from headwater.objectives.contrast.hard_negatives import HardNegatives, WithoutFalse
from headwater.objectives.contrast.losses import Bound, Margin, Sigmoid, Softmax
from headwater.objectives.contrast.positives import Alike, Identity, SameLabel
from headwater.objectives.contrast.scores import Cosine
from headwater.objectives.contrast.soft_positives import Momentum, Nearest, NoiseAware
from headwater.objectives.contrast.token_sets import LateInteraction, Transport

__all__ = [
    "Alike",
    "Bound",
    "Consistent",
    "Cosine",
    "Gaussian",
    "HardNegatives",
    "Identity",
    "LateInteraction",
    "Margin",
    "Momentum",
    "Nearest",
    "NoiseAware",
    "SameLabel",
    "Sigmoid",
    "Softmax",
    "Transport",
    "WithoutFalse",
]
