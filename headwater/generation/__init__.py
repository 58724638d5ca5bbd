"""Generation from a model alone, without the objective that trained it."""

from headwater.generation.canvas import Settings
from headwater.generation.infill import infill
from headwater.generation.signals import generate, stream

__all__ = ["Settings", "generate", "infill", "stream"]
