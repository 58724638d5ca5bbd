"""One file per idea: each hides something, asks the model for it back, and scores the answer."""

from headwater.objectives.agreeing import Agreeing
from headwater.objectives.anchored import Anchored
from headwater.objectives.balanced import Balanced
from headwater.objectives.causal import Causal
from headwater.objectives.common_minima import CommonMinima
from headwater.objectives.contrastive import Contrastive
from headwater.objectives.ctc import CTC
from headwater.objectives.denoising import Denoising
from headwater.objectives.discrete_diffusion import DiscreteDiffusion
from headwater.objectives.distilled import Distilled
from headwater.objectives.dropout import Dropped
from headwater.objectives.episodes import Episodes
from headwater.objectives.flow import Flow
from headwater.objectives.harmonised import Harmonised
from headwater.objectives.interleaved import Interleaved
from headwater.objectives.joint_embedding import JointEmbedding
from headwater.objectives.latent import Latent
from headwater.objectives.masked import Masked
from headwater.objectives.matched import Matched
from headwater.objectives.matching import Matching
from headwater.objectives.metadata import Conditioned
from headwater.objectives.multi_token import MultiToken
from headwater.objectives.objective import Objective, Term
from headwater.objectives.paired import Paired
from headwater.objectives.positions import Positions
from headwater.objectives.prefixed import Prefixed
from headwater.objectives.probed import Probed
from headwater.objectives.reconstructed import Reconstructed
from headwater.objectives.regions import Regions
from headwater.objectives.registers import Registers
from headwater.objectives.related import Related
from headwater.objectives.replaced import Replaced
from headwater.objectives.roles import Roles
from headwater.objectives.segments import Segments
from headwater.objectives.self_distillation import SelfDistillation
from headwater.objectives.shuffled import Shuffled
from headwater.objectives.slots import Slots
from headwater.objectives.supervised import Supervised
from headwater.objectives.swapped import Swapped
from headwater.objectives.transformed import Transformed
from headwater.objectives.transfusion import Transfusion
from headwater.objectives.vpretraining import VPretraining
from headwater.objectives.weighted import Weighted

__all__ = [
    "CTC",
    "Agreeing",
    "Anchored",
    "Balanced",
    "Causal",
    "CommonMinima",
    "Conditioned",
    "Contrastive",
    "Denoising",
    "DiscreteDiffusion",
    "Distilled",
    "Dropped",
    "Episodes",
    "Flow",
    "Harmonised",
    "Interleaved",
    "JointEmbedding",
    "Latent",
    "Masked",
    "Matched",
    "Matching",
    "MultiToken",
    "Objective",
    "Paired",
    "Positions",
    "Prefixed",
    "Probed",
    "Reconstructed",
    "Regions",
    "Registers",
    "Related",
    "Replaced",
    "Roles",
    "Segments",
    "SelfDistillation",
    "Shuffled",
    "Slots",
    "Supervised",
    "Swapped",
    "Term",
    "Transformed",
    "Transfusion",
    "VPretraining",
    "Weighted",
]
