"""JPEG files opened by three libraries: the size from the header, and pixels no larger than needed."""

from __future__ import annotations

import io

import numpy as np


class Jpeg:
    """An open JPEG. height, width: what its header declares; nothing is decoded yet."""

    height: int
    width: int

    def pixels(self, height: int, width: int) -> np.ndarray:
        """uint8 RGB (H, W, 3), perhaps scaled down, but to no fewer rows and columns than asked for."""
        raise NotImplementedError


class SimplejpegJpeg(Jpeg):
    """libjpeg-turbo without a detour; scales while it decodes. ValueError on what is no JPEG or not whole."""

    def __init__(self, content: bytes) -> None:
        import simplejpeg

        self._content, self._decode = content, simplejpeg.decode_jpeg
        self.height, self.width, _, _ = simplejpeg.decode_jpeg_header(content)

    def pixels(self, height: int, width: int) -> np.ndarray:
        return self._decode(self._content, "RGB", min_height=height, min_width=width)


class PillowJpeg(Jpeg):
    """Pillow; scales while it decodes."""

    def __init__(self, content: bytes) -> None:
        from PIL import Image

        self._content = content
        self.width, self.height = Image.open(io.BytesIO(content), formats=["JPEG"]).size

    def pixels(self, height: int, width: int) -> np.ndarray:
        from PIL import Image

        picture = Image.open(io.BytesIO(self._content), formats=["JPEG"])
        picture.draft("RGB", (width, height))
        return np.asarray(picture.convert("RGB"))


class TorchvisionJpeg(PillowJpeg):
    """torchvision's own decoder; always the full size. It reads no header alone, so Pillow does."""

    def pixels(self, height: int, width: int) -> np.ndarray:
        import torch
        from torchvision.io import ImageReadMode, decode_jpeg

        picture = decode_jpeg(torch.frombuffer(bytearray(self._content), dtype=torch.uint8), ImageReadMode.RGB)
        return picture.permute(1, 2, 0).contiguous().numpy()


BACKENDS = {"simplejpeg": SimplejpegJpeg, "torchvision": TorchvisionJpeg, "pillow": PillowJpeg}  # the fastest first
