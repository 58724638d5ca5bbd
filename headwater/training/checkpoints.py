"""The checkpoints of a run: written whole or not at all, by a thread while training goes on, and known to be good when read."""

from __future__ import annotations

import hashlib
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils import _pytree as pytree

LINK = "last.ckpt"  # leads to the newest
NAME = re.compile(r"step-(\d+)-([0-9a-f]{16})\.ckpt")  # the hash is part of the name, as torch.hub's files have it
DAMAGED = ".damaged"


class Checkpoints:
    """Writes the newest `keep` checkpoints of a run to `folder`, as step-000200-<hash>.ckpt, and `last.ckpt`, a link to the newest.

    A file is written under another name, flushed to the disk and then renamed: under its own name it is whole, even after a power
    cut. At most one is being written at a time; the next waits for it. Where the disk is full the run goes on with the
    checkpoints that it has.

    Args:
        folder: of checkpoints; made when needed.
        keep: how many; 2 or more survive a damaged newest one.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"found keep={keep} checkpoints; expected 1 or more")
        self.folder, self.keep = folder, keep
        self.failed: OSError | None = None  # why the last one could not be written; None = it could
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._pending: Future[Path] | None = None

    def write(self, step: int, state: dict[str, Any]) -> None:
        """Copy the state to memory of the CPU, and let the thread write it. Tensors and plain types only, or it cannot be read."""
        self.wait()
        self._pending = self._writer.submit(self._write, step, copied(state))

    def look(self) -> None:
        """After every step: whatever went wrong in the thread is raised here, and a disk error becomes a warning."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
            self.failed = None
        except OSError as error:
            self.failed = error
            rank_zero_warn(
                f"a checkpoint could not be written to {self.folder}: {error}. The one before it remains, training goes on, and "
                "the next one is tried in its turn; make room until then"
            )

    def begin(self, step: int) -> None:
        """A run goes on from `step`, 0 = anew: later checkpoints are damaged and get another name, half ones are deleted."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for partial in self.folder.glob("*.partial"):
            partial.unlink()
        for path in found(self.folder):
            if step_of(path) > step:
                path.rename(path.with_name(path.name + DAMAGED))
        if whole := found(self.folder):
            self._point_to(whole[0])

    def _write(self, step: int, state: dict[str, Any]) -> Path:
        partial = self.folder / f"step-{step:06d}.partial"
        try:
            with partial.open("wb") as file:
                hashed = Hashed(file)
                hashed.save(state)
                os.fsync(file.fileno())
            target = self.folder / f"step-{step:06d}-{hashed.digest()}.ckpt"
            os.replace(partial, target)
            self._point_to(target)
        finally:
            partial.unlink(missing_ok=True)  # half a checkpoint would keep the disk full
        before = [path for path in found(self.folder) if step_of(path) != step]
        twice = [path for path in found(self.folder) if step_of(path) == step and path != target]
        for path in [*twice, *before[self.keep - 1 :]]:
            path.unlink()
        return target

    def _point_to(self, path: Path) -> None:
        link = self.folder / f"{LINK}.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        os.replace(link, self.folder / LINK)
        folder = os.open(self.folder, os.O_RDONLY)
        os.fsync(folder)  # the new names too must outlive a power cut
        os.close(folder)


class Hashed:
    """A file that is being written, and the SHA-256 of what went into it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()

    def save(self, state: dict[str, Any]) -> None:
        """torch.save, with the error of the disk where it reports one of its own."""
        try:
            torch.save(state, self)  # type: ignore[arg-type]
        except Exception:
            if self.error is not None:
                raise self.error from None
            raise

    def digest(self) -> str:
        """The 16 digits that go into the name."""
        return self.hash.hexdigest()[:16]


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """The same with every tensor copied to memory of the CPU. Tensors that are one remain one; views do not keep what is around."""
    made: dict[Any, Tensor] = {}

    def copy(x: Tensor) -> Tensor:
        place = x.device, x.data_ptr(), x.shape, x.stride(), x.dtype
        if place not in made or not x.numel():
            made[place] = x.detach().to("cpu", copy=True)
        return made[place]

    out = pytree.tree_map_only(Tensor, copy, state)
    if hasattr(state.get("state_dict"), "_metadata"):  # versions of modules, an attribute beside the entries
        out["state_dict"]._metadata = state["state_dict"]._metadata
    return out


def step_of(path: Path) -> int:
    """Of a checkpoint, by its name."""
    return int(NAME.fullmatch(path.name)[1])  # type: ignore[index]


def found(folder: Path) -> list[Path]:
    """Checkpoints of a folder, the newest first."""
    every = [path for path in folder.glob("step-*.ckpt") if NAME.fullmatch(path.name)]
    return sorted(every, key=step_of, reverse=True)


def is_whole(path: Path) -> bool:
    """Does the content have the hash in the name?"""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16] == NAME.fullmatch(path.name)[2]  # type: ignore[index]


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, None where there is none, and the names of damaged ones after it.

    ValueError where there are checkpoints, and all are damaged. A folder without names of this kind may have a `last.ckpt`.
    """
    damaged: list[str] = []
    for path in found(folder):
        if is_whole(path):
            return path, damaged
        damaged.append(path.name)
    if damaged:
        raise ValueError(
            f"found {len(damaged)} checkpoints in {folder}, all damaged (their content does not have the hash in the name): "
            f"{', '.join(damaged)}. Bring back a copy of one, or start anew without --resume"
        )
    last = folder / LINK
    return (last if last.exists() else None), []


def check_tensors(saved: dict[str, Tensor], module: nn.Module) -> None:
    """A run goes on only with the tensors that it had: ValueError names those that a changed recipe or code made others."""
    now = module.state_dict()
    faults = [f"{name} is new" for name in now if name not in saved]
    faults += [f"{name} is no more" for name in saved if name not in now]
    shapes = [(name, tuple(saved[name].shape), tuple(now[name].shape)) for name in now if name in saved]
    faults += [f"{name} was {before}, is {after}" for name, before, after in shapes if before != after]
    if faults:
        raise ValueError(
            f"found {len(faults)} tensors that are not as in the checkpoint: {'; '.join(faults[:5])}"
            f"{' ...' if len(faults) > 5 else ''}. A run goes on with the recipe and code that began it (config.yaml in its folder "
            "has all settings); model.start begins another run with such weights"
        )
