"""Sets of shards: which files belong together, and what comes twice in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

import numpy as np

from headwater.datamodules.index import ShardIndex, content_hash


def sets_of(paths: Sequence[str]) -> list[str]:
    """The set of each shard, whose names differ only in their number: "out/train-00003.tar" -> "out/train-*.tar".

    Without the folder where all are in the same.
    """
    folders = {path.rpartition("/")[0] for path in paths}
    shown = [path.rpartition("/")[2] if len(folders) == 1 else path for path in paths]
    return [re.sub(r"\d+(?=\.tar$)", "*", path) for path in shown]


def stem(path: str) -> str:
    """The name of the set without its folder: "out/train-00003.tar" -> "train", "" for "out/00003.tar"."""
    return re.sub(r"[-_]?\d*$", "", PurePosixPath(path).name.removesuffix(".tar"))


def key_prints(index: ShardIndex) -> np.ndarray:
    """(S,) uint64: a hash of every key, so that millions can be compared."""
    return np.fromiter((content_hash(key.encode()) for key in index.keys.to_pylist()), np.uint64, len(index))


def content_prints(index: ShardIndex) -> np.ndarray:
    """(S,) uint64: a hash of all members of each sample in any order, extensions included; 0 where a hash was not taken."""
    from headwater.random import mix  # imports torch, which `headwater stats --help` does without

    names = np.array([content_hash(e.encode()) for e in index.extensions], np.uint64)
    mixed = mix(index.hash ^ names[index.kind] ^ mix(index.bytes.astype(np.uint64)))
    sums = np.add.reduceat(mixed, index.first[:-1]) if len(index) else mixed
    unknown = np.logical_or.reduceat(index.hash == 0, index.first[:-1]) if len(index) else mixed.astype(bool)
    return np.where(unknown, np.uint64(0), np.maximum(sums, np.uint64(1)))


def repeated(prints: Iterable[np.ndarray]) -> np.ndarray:
    """The hashes that come more than once in all these arrays, sorted; 0 means unknown and does not count."""
    together = np.sort(np.concatenate([*prints, np.empty(0, np.uint64)]))
    twice = together[1:][together[1:] == together[:-1]]
    return np.unique(twice[twice > 0])
