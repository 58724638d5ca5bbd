"""Shards go both ways between headwater, stock webdataset, open_clip's loader and plain `tar`."""

import io
import subprocess
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from webdataset.tariterators import tar_file_expander

from headwater.datamodules.files import File
from headwater.datamodules.index import load_index
from headwater.datamodules.sources import OpenSource, Source
from headwater.datamodules.writer import ShardWriter
from headwater.modalities.image import ImageReader
from headwater.modalities.text import TextReader

READERS = {"image": ImageReader(32, 16, shape="crop"), "text": TextReader()}


@pytest.fixture(scope="module")
def samples():
    """Real pictures and titles of the embedded shards, as JPEG: key -> members."""
    (index,) = (load_index(card.path) for card in OpenSource("s", Source("embedded:things-unseen-*.tar"), READERS, 0, 0).cards)
    out = {}
    with File(index.path) as file:
        for row in range(40):
            members = index.read(file, row, ["png", "txt"])
            picture = Image.open(io.BytesIO(members["png"])).convert("RGBA")
            flat = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
            buffer = io.BytesIO()
            flat.save(buffer, "JPEG", quality=95)
            out[index.key(row)] = {"jpg": buffer.getvalue(), "txt": members["txt"]}
    return out


@pytest.fixture(scope="module")
def ours(samples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    with ShardWriter(folder / "{:05d}.tar", samples=10, header={"made": "by a test"}) as writer:
        for key, members in samples.items():
            writer.write(key, members)
    return folder


def test_stock_webdataset_decodes_ours(ours, samples):
    read = (
        webdataset.WebDataset(str(ours / "{00000..00003}.tar"), shardshuffle=False)
        .decode("pilrgb")
        .to_tuple("__key__", "jpg", "txt")
    )
    found = {key: (picture, text) for key, picture, text in read}
    assert found.keys() == samples.keys()
    for key, (picture, text) in found.items():
        assert text == samples[key]["txt"].decode()
        assert picture.size == Image.open(io.BytesIO(samples[key]["jpg"])).size


@pytest.mark.parametrize("train", [True, False])
def test_open_clip_trains_and_evaluates_on_ours(ours, samples, train, monkeypatch):
    import open_clip
    import open_clip_train.data
    from open_clip_train.data import get_wds_dataset

    # webdataset 1.0.2 ends every tar with an empty sample, at which open_clip 3.3.0 stumbles whoever wrote the tar
    monkeypatch.setattr(open_clip_train.data, "tar_file_expander", partial(tar_file_expander, eof_value=None))
    pattern = str(ours / "{00000..00003}.tar")
    options = {"train_data": pattern, "val_data": pattern, "train_num_samples": 40, "val_num_samples": 40, "workers": 1}
    options |= {"batch_size": 8, "world_size": 1, "seed": 0, "dataset_resampled": False, "train_data_upsampling_factors": None}
    preprocess = open_clip.image_transform(32, is_train=False)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    data = get_wds_dataset(SimpleNamespace(**options), preprocess, train, tokenizer=tokenizer)
    pictures, texts = zip(*data.dataloader)
    assert torch.cat(pictures).shape == (40, 3, 32, 32)
    read = {tuple(row.tolist()) for row in torch.cat(texts)}
    assert read == {tuple(tokenizer(m["txt"].decode())[0].tolist()) for m in samples.values()}


@pytest.mark.parametrize("writer", ["webdataset", "tar", "tar ."])
def test_we_read_what_others_write(samples, tmp_path, writer):
    if writer == "webdataset":
        with webdataset.ShardWriter(str(tmp_path / "%05d.tar"), maxcount=10, verbose=0) as sink:
            for key, members in samples.items():
                sink.write({"__key__": key, **members})
    else:
        files = tmp_path / "files"
        files.mkdir()
        for key, members in samples.items():
            for extension, content in members.items():
                (files / f"{key}.{extension}").write_bytes(content)
        what = ["."] if writer == "tar ." else sorted(p.name for p in files.iterdir())
        subprocess.run(["tar", "cf", str(tmp_path / "a.tar"), "-C", str(files), *what], check=True)
    source = OpenSource("s", Source(str(tmp_path)), READERS, 0, 2)
    assert source.faults == []
    read = source.read(np.arange(40))
    assert not [fault for one in read for fault in one.faults]
    texts = sorted(READERS["text"].restore(one.sample["text"].map(lambda f: f[None])) for one in read)
    assert texts == sorted(m["txt"].decode().strip() for m in samples.values())


def test_what_we_write_is_a_tar_for_everyone(ours, samples):
    listed = subprocess.run(["tar", "tf", str(ours / "00000.tar")], check=True, capture_output=True, text=True).stdout.split()
    keys = list(samples)[:10]
    assert listed == [f"{key}.{extension}" for key in keys for extension in ("jpg", "txt")]
