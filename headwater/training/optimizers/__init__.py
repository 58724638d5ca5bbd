"""Optimizers that torch and timm lack. All take the groups of `headwater.training.groups`."""

from headwater.training.optimizers.galore import GaLore
from headwater.training.optimizers.mixed import Mixed
from headwater.training.optimizers.quantised import AdamW8bit
from headwater.training.optimizers.schedule_free import ScheduleFree

__all__ = ["AdamW8bit", "GaLore", "Mixed", "ScheduleFree"]
