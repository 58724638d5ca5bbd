"""Fixtures of the data layer."""

import pytest

from headwater.modalities import Action, Audio, Image, Text, Video
from headwater.trunk import Trunk


@pytest.fixture(scope="session")
def readers():
    """A small reader of every modality."""

    def trunk():
        return Trunk(8, 1, 2)

    encoders = {
        "image": Image(trunk(), patch=16),
        "text": Text(trunk()),
        "audio": Audio(trunk()),
        "video": Video(trunk(), size=56, patch=28, frames=4),
        "action": Action(trunk(), choices=7),
    }
    return {name: encoder.reader for name, encoder in encoders.items()}
