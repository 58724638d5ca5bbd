"""One file per kind of signal: how it is read and how it is encoded."""

from headwater.modalities.action import Action
from headwater.modalities.audio import Audio
from headwater.modalities.image import Image
from headwater.modalities.text import Text
from headwater.modalities.video import Video

__all__ = ["Action", "Audio", "Image", "Text", "Video"]
