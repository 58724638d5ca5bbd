import io

import numpy as np
import pytest
import torch

from headwater.datamodules.collate import collate
from headwater.modalities.video import VideoReader


def film(frames=6, side=16):
    """Frame k is a flat grey of 40 k: compression keeps it to within a few levels."""
    return np.repeat(40 * np.arange(frames, dtype=np.uint8), side * side * 3).reshape(frames, side, side, 3)


def encoded(frames):
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", "mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    return {"mp4": file.getvalue()}


@pytest.mark.parametrize(("stride", "limit", "levels"), [(1, 16, range(0, 240, 40)), (2, 16, [0, 80, 160]), (1, 2, [0, 40])])
def test_every_strideth_frame_is_read_up_to_the_limit(stride, limit, levels):
    decoded = VideoReader(16, frames=limit, stride=stride).decode(encoded(film()))
    assert decoded.shape == (len(levels), 16, 16, 3)
    assert abs(decoded.mean((1, 2, 3)) - np.array(levels)).max() < 6


@pytest.mark.parametrize("tubelet", [1, 2, 3])
def test_tubelets_hold_their_frames_and_know_the_last_one(tubelet):
    reader = VideoReader(16, patch=8, tubelet=tubelet)
    t = reader.tokens(film(5))
    steps = -(-5 // tubelet)
    assert t.x.shape == (steps * 4, tubelet * 8 * 8 * 3)
    assert t.order.tolist() == [tubelet * (k + 1) - 1 for k in range(steps) for _ in range(4)]
    assert torch.equal(t.position[:, 0].long(), t.order)
    assert t.position[:4, 1:].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    levels = t.x.reshape(steps, 4, tubelet, -1).float().mean((1, 3)).flatten()
    assert levels.tolist() == [40 * min(k, 4) for k in range(steps * tubelet)]  # the last frame is repeated


def test_restore_gives_the_frames_whatever_the_padding():
    reader = VideoReader(16, tubelet=2)
    t = reader.prepare(collate([{"v": reader.tokens(film(2))}, {"v": reader.tokens(film(6))}], ["v"])["v"])
    assert np.array_equal(reader.restore(t), film(2))


def test_damaged_files_raise():
    members = encoded(film())
    with pytest.raises(Exception):  # noqa: B017, PT011  whatever the decoder says; the data module names the sample
        VideoReader(16).decode({"mp4": members["mp4"][:40]})
