"""Shards in object stores: a local copy to work on, and its index saved beside the original."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from tempfile import TemporaryDirectory

from headwater.datamodules.files import filesystem, insist, is_remote
from headwater.datamodules.index import ShardIndex, index_path, save_index


@contextmanager
def fetched(path: str) -> Iterator[str]:
    """A local file with the bytes of a shard: the shard itself, or a copy that is gone when the block ends.

    A walk over the headers of a remote tar would cost one request per member; fetching it whole costs one.
    """
    if not is_remote(path):
        yield path
        return
    if path.startswith("pipe:"):
        raise ValueError(f"{path} can only be read from its head on; expected a tar in a folder or an object store")
    store, name = filesystem(path)
    with TemporaryDirectory(prefix="headwater-") as folder:
        copy = os.path.join(folder, "shard.tar")
        insist(lambda: store.get_file(name, copy))
        yield copy


def named(index: ShardIndex, path: str) -> ShardIndex:
    """The index of a copy, with the place of the original in its name and faults."""
    faults = tuple(fault.replace(index.path, path, 1) for fault in index.faults)
    return replace(index, card=index.card._replace(path=path, faults=faults))


def save(index: ShardIndex, copy: str) -> None:
    """Save the index beside its shard, of which `copy` is a local file. OSError where the store cannot be written."""
    saved = save_index(replace(index, card=index.card._replace(path=copy)))
    if not is_remote(index.path):
        return
    store, name = filesystem(f"{index.path}.idx")
    try:
        insist(lambda: store.put_file(str(saved), name))
    except NotImplementedError as error:
        raise OSError(f"{index.path}.idx cannot be written: its store is read-only; give the source a cache instead") from error


def size_of(path: str) -> int:
    """Bytes of the index beside a shard, 0 where there is none."""
    if not is_remote(path):
        beside = index_path(path)
        return beside.stat().st_size if beside.exists() else 0
    store, name = filesystem(f"{path}.idx")
    return int(insist(lambda: store.info(name))["size"] or 0) if insist(lambda: store.exists(name)) else 0


def absolute(paths: list[str], engine: str) -> list[str]:
    """Paths as the tasks of a cluster know them: they run in another folder."""
    return [path if engine == "local" or is_remote(path) else os.path.abspath(path) for path in paths]
