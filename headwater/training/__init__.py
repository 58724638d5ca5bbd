"""Schedules and callbacks of a run."""

from headwater.training.averaging import Average
from headwater.training.checkpointing import Checkpointed
from headwater.training.compiled import Compiled
from headwater.training.fisher import Fisher
from headwater.training.freezing import Bottom, Freezing, Named, Settled
from headwater.training.fused_ops import Fused
from headwater.training.fused_optimizers import DistributedAdamW, FusedAdamW, FusedLamb, FusedNovograd, FusedSgd
from headwater.training.groups import Groups
from headwater.training.guard import Guard
from headwater.training.mixing import Mixing
from headwater.training.optimizers import AdamW8bit, GaLore, Mixed, ScheduleFree
from headwater.training.replay import Forgetting, Shares
from headwater.training.restarts import Jagged, Restarts
from headwater.training.salient import Salient
from headwater.training.schedules import WSD, Cosine, Geometric, HalfCosine, Infinite, InverseSqrt, Linear, Points, Rewarm, Step
from headwater.training.start import Start
from headwater.training.watchdog import Watchdog

__all__ = [
    "WSD",
    "AdamW8bit",
    "Average",
    "Bottom",
    "Checkpointed",
    "Compiled",
    "Cosine",
    "DistributedAdamW",
    "Fisher",
    "Forgetting",
    "Freezing",
    "Fused",
    "FusedAdamW",
    "FusedLamb",
    "FusedNovograd",
    "FusedSgd",
    "GaLore",
    "Geometric",
    "Groups",
    "Guard",
    "HalfCosine",
    "Infinite",
    "InverseSqrt",
    "Jagged",
    "Linear",
    "Mixed",
    "Mixing",
    "Named",
    "Points",
    "Restarts",
    "Rewarm",
    "Salient",
    "ScheduleFree",
    "Settled",
    "Shares",
    "Start",
    "Step",
    "Watchdog",
]
