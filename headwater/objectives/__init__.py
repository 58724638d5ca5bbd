"""One file per idea: each hides something, asks the model for it back, and scores the answer."""

from headwater.objectives.causal import Causal
from headwater.objectives.contrastive import Contrastive
from headwater.objectives.flow import Flow
from headwater.objectives.masked import Masked
from headwater.objectives.objective import Objective, Term
from headwater.objectives.weighted import Weighted

__all__ = ["Causal", "Contrastive", "Flow", "Masked", "Objective", "Term", "Weighted"]
