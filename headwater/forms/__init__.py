"""Forms of weights: one file per idea. A recipe names them in `model.backbone.forms`."""

from headwater.forms.adapters import Bottleneck, Prefix, Rescaled
from headwater.forms.form import Form, additions, densified
from headwater.forms.lora import LoRA
from headwater.forms.low_precision import FP8, NVFP4
from headwater.forms.low_rank import LowRank
from headwater.forms.masked import Masked
from headwater.forms.saved import add, save_additions
from headwater.forms.sparse import SparseLowRank
from headwater.forms.ternary import Ternary

__all__ = [
    "FP8",
    "NVFP4",
    "Bottleneck",
    "Form",
    "LoRA",
    "LowRank",
    "Masked",
    "Prefix",
    "Rescaled",
    "SparseLowRank",
    "Ternary",
    "add",
    "additions",
    "densified",
    "save_additions",
]
