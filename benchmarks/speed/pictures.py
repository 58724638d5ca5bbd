"""Pictures with captions: every loader delivers batches of the same uint8 pixels and the same texts, shuffled.

One function per loader, each the way its own documentation tells to do it, first as shipped and then with the JPEG decoder
that headwater uses. A batch is (pixels (B, H, W, 3) or (B, 3, H, W) uint8, list of B texts).
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.speed.samples import Corpus, Sample
from benchmarks.speed.stopwatch import Row

BATCH, BUFFER = 64, 1000
Batches = Iterator[tuple[Tensor, list[str]]]
Decode = Callable[[bytes], Tensor]


def simple(content: bytes) -> Tensor:
    """JPEG -> (H, W, 3) by simplejpeg."""
    import simplejpeg

    return torch.from_numpy(simplejpeg.decode_jpeg(content, "RGB"))


def pillow(content: bytes) -> Tensor:
    """JPEG -> (H, W, 3) by Pillow."""
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(io.BytesIO(content)).convert("RGB")))


def webdataset(corpus: Corpus, workers: int, decode: Decode | None) -> Batches:
    """webdataset with its usual shuffle buffer. decode: None = its own decoder, which is Pillow."""
    import webdataset as wds

    if decode is None:
        handlers: list[Any] = ["torchrgb8"]
    else:
        handlers = [lambda key, content: decode(content) if key.endswith(".jpg") else None]
    data = wds.WebDataset(corpus.tars, shardshuffle=len(corpus.tars)).repeat().shuffle(BUFFER)
    data = data.decode(*handlers).to_tuple("jpg", "txt").batched(BATCH)
    yield from wds.WebLoader(data, batch_size=None, num_workers=workers)


def energon(corpus: Corpus, workers: int, decode: Decode | None) -> Batches:
    """Megatron-Energon on the same tars. decode: None = its own decoder for 8-bit tensors."""
    from megatron import energon as e

    class Captions(e.DefaultTaskEncoder):
        decoder = e.SampleDecoder(image_decode="torchrgb8") if decode is None else None

        @e.stateless
        def encode_sample(self, sample: Any) -> Any:
            if decode is not None:
                sample.image, sample.caption = decode(sample.image), sample.caption.decode()
            return sample

    one = e.WorkerConfig(rank=0, world_size=1, num_workers=workers)
    data = e.get_train_dataset(
        corpus.beside("energon", lambda folder: _energon_format(corpus, folder)),
        worker_config=one,
        batch_size=BATCH,
        shuffle_buffer_size=BUFFER,
        max_samples_per_sequence=100,
        task_encoder=Captions(),
    )
    for batch in e.get_loader(data):
        yield batch.image, batch.caption


def _energon_format(corpus: Corpus, folder: Path) -> None:
    """What `energon prepare` writes, in a folder of its own: it gives its index the name that ours has."""
    from megatron.energon.flavors import BaseWebdatasetFactory

    for tar in corpus.tars:
        os.link(tar, folder / Path(tar).name)
    names = [Path(tar).name for tar in corpus.tars]
    with contextlib.redirect_stdout(io.StringIO()):
        BaseWebdatasetFactory.prepare_dataset(folder, names, split_parts_ratio=[("train", 1.0)], workers=2)
    (folder / ".nv-meta" / "dataset.yaml").write_text(
        "sample_type:\n  __module__: megatron.energon\n  __class__: CaptioningSample\nfield_map:\n  image: jpg\n  caption: txt\n"
    )


def litdata(corpus: Corpus, workers: int, decode: Decode | None) -> Batches:
    """litData on its own chunks. decode: None = its own decoder, which is torchvision's."""
    import litdata as lit
    from litdata.streaming.serializers import JPEGSerializer

    class Plugged(JPEGSerializer):
        deserialize = staticmethod(decode or pillow)

    folder = corpus.beside("litdata", lambda folder: _litdata_format(corpus, folder))
    data = lit.StreamingDataset(str(folder), shuffle=True, serializers={"jpeg": Plugged()} if decode else None)
    for batch in lit.StreamingDataLoader(data, batch_size=BATCH, num_workers=workers):
        yield batch["image"], batch["caption"]


def _litdata_format(corpus: Corpus, folder: Path) -> None:
    import litdata as lit
    from litdata.types import Jpeg

    def convert(sample: Sample) -> dict[str, Any]:
        jpg, facts = sample.members["jpg"], sample.members["json"].decode()
        return {"image": Jpeg(bytes=jpg), "caption": sample.text, "json": facts}

    samples = list(corpus.samples())
    lit.optimize(convert, samples, str(folder), chunk_bytes="64MB", num_workers=1, start_method="fork", verbose=False)


def streaming(corpus: Corpus, workers: int, decode: Decode | None) -> Batches:
    """MosaicML Streaming on its own shards. decode: None = its own encoding "jpeg", which is Pillow."""
    from streaming import StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    class Captions(StreamingDataset):
        def __getitem__(self, at: int) -> tuple[Tensor, str]:
            sample = super().__getitem__(at)
            image = sample["image"]
            return torch.from_numpy(np.array(image)) if decode is None else decode(image), sample["caption"]

    kind = "jpeg" if decode is None else "bytes"
    folder = corpus.beside(f"mds-{kind}", lambda folder: _mds_format(corpus, folder, kind))
    clean_stale_shared_memory()
    data = Captions(local=str(folder), shuffle=True, batch_size=BATCH)
    yield from StreamingDataLoader(data, batch_size=BATCH, num_workers=workers)


def _mds_format(corpus: Corpus, folder: Path, kind: str) -> None:
    from PIL import Image
    from streaming import MDSWriter

    files = corpus.beside("files", lambda folder: _files(corpus, folder))
    with MDSWriter(out=str(folder), columns={"image": kind, "caption": "str", "json": "str"}) as out:
        for sample in corpus.samples():
            jpg = sample.members["jpg"]
            image = Image.open(files / f"{sample.key}.jpg") if kind == "jpeg" else jpg  # a file is stored as it is
            out.write({"image": image, "caption": sample.text, "json": sample.members["json"].decode()})


class Files(Dataset):
    """A folder of KEY.jpg and KEY.txt."""

    def __init__(self, folder: Path, decode: Decode) -> None:
        self.stems, self.decode = sorted(str(path)[:-4] for path in folder.glob("*.jpg")), decode

    def __len__(self) -> int:
        return len(self.stems)

    def __getitem__(self, at: int) -> tuple[Tensor, str]:
        with open(f"{self.stems[at]}.jpg", "rb") as jpg, open(f"{self.stems[at]}.txt", encoding="utf-8") as txt:
            return self.decode(jpg.read()), txt.read()


def plain(corpus: Corpus, workers: int, decode: Decode | None) -> Batches:
    """Files in a folder and torch's own loader. decode: None = Pillow."""
    data = Files(corpus.beside("files", lambda folder: _files(corpus, folder)), decode or pillow)
    yield from DataLoader(data, BATCH, shuffle=True, num_workers=workers)


def _files(corpus: Corpus, folder: Path) -> None:
    for sample in corpus.samples():
        for extension, content in sample.members.items():
            (folder / f"{sample.key}.{extension}").write_bytes(content)


PEERS = {"webdataset": webdataset, "energon": energon, "litdata": litdata, "streaming": streaming, "plain": plain}


def rows(corpus: Corpus, workers: int, truth: dict[str, bytes]) -> list[Row]:
    """Each peer as shipped, and with simplejpeg. truth: text -> JPEG."""

    def row(name: str, load: Callable[..., Batches], decode: Decode | None) -> Row:
        def check(stream: Batches) -> str:
            pictures, texts = next(stream)
            return compare(dict(zip(texts, pictures, strict=True)), truth)

        label = f"{name} + simplejpeg" if decode else name
        return Row(label, lambda: load(corpus, workers, decode), lambda batch: len(batch[1]), check)

    return [row(name, load, decode) for name, load in PEERS.items() for decode in (None, simple)]


def compare(found: dict[str, Tensor], truth: dict[str, bytes]) -> str:
    """Pictures of a batch against Pillow's decoding of what was written: the largest difference; raises beyond rounding."""
    if len(found) <= BATCH // 2:  # a peer may mix epochs, and have a sample twice
        raise ValueError(f"a batch held {len(found)} different texts; expected about {BATCH}")
    place = {text: number for number, text in enumerate(truth)}
    if list(found) == sorted(found, key=place.__getitem__):
        raise ValueError("the batch was in the order of the tars; expected a shuffled one")
    worst = 0
    for text, picture in found.items():
        expected = pillow(truth[text]).int()
        picture = picture.int() if picture.shape[-1] == 3 else picture.permute(1, 2, 0).int()
        worst = max(worst, int((picture - expected).abs().max()))
    if worst > 4:
        raise ValueError(f"pixels differ by up to {worst} of 255 from Pillow's; expected rounding at most")
    return "pixels equal to Pillow's" if not worst else f"pixels within {worst} of Pillow's"
