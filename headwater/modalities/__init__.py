"""One file per kind of signal: how it is read and how it is encoded."""

from headwater.modalities.action import Action, State
from headwater.modalities.action_tokens import ActionTokens
from headwater.modalities.audio import Audio
from headwater.modalities.autoencoder import Autoencoder
from headwater.modalities.cells import Cells
from headwater.modalities.codec import Codec
from headwater.modalities.facts import Facts
from headwater.modalities.graph import Graph
from headwater.modalities.image import Image
from headwater.modalities.label import Categories, Category, Numbers, Transcript
from headwater.modalities.layout import Layout
from headwater.modalities.pixel_label import Boxes, PatchClasses
from headwater.modalities.points import Points
from headwater.modalities.records import Records
from headwater.modalities.series import Series
from headwater.modalities.spectral import Spectral
from headwater.modalities.table import Table
from headwater.modalities.text import Text
from headwater.modalities.tokenised import Tokenised
from headwater.modalities.video import Video
from headwater.modalities.wave import Wave

__all__ = [
    "Action",
    "ActionTokens",
    "Audio",
    "Autoencoder",
    "Boxes",
    "Categories",
    "Category",
    "Cells",
    "Codec",
    "Facts",
    "Graph",
    "Image",
    "Layout",
    "Numbers",
    "PatchClasses",
    "Points",
    "Records",
    "Series",
    "Spectral",
    "State",
    "Table",
    "Text",
    "Tokenised",
    "Transcript",
    "Video",
    "Wave",
]
