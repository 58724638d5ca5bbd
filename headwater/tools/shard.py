"""Turn a folder or a manifest of files into WebDataset shards: `headwater shard DIR out/`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from headwater.datamodules.faults import PICKLES
from headwater.tools.decode import KIND
from headwater.tools.engine import Engine
from headwater.tools.ingest.corpora import matches_common_voice, matches_librispeech, read_common_voice, read_librispeech
from headwater.tools.ingest.fetch import FETCH, Fetch, clear, fetch_all
from headwater.tools.ingest.hf_datasets import matches_saved, read_saved
from headwater.tools.ingest.manifests import MANIFESTS, NO_CAPTION, Get, read_manifest
from headwater.tools.ingest.sources import Found, read_folder, show
from headwater.tools.ingest.splits import SPLITS, Written, shards_in, write

HDF5 = (".h5", ".hdf5")
UNFINISHED = "unfinished"  # lies in the output while shards are written


def shard(
    source: str,
    out: str,
    caption: str | None = None,
    samples: int = 10_000,
    train: float = 1.0,
    size: int | None = None,
    overwrite: bool = False,
    keep: str = "",
    url: str = "",
    retry: str = "",
    fetch: Fetch = FETCH,
    clip: float | None = None,
    gop: int = 8,
    allow_misaligned: bool = False,
    engine: Engine = "local",
) -> None:
    """Make WebDataset shards from folders, manifests, films, corpora, data sets or robots.

    Hidden files are left out. Files that do not decode are skipped, named and listed in out/skipped.jsonl.

    Args:
        source: a folder (files with the same stem are one sample; only images in subfolders: the subfolder is the class); a
            CSV, TSV (unquoted), JSONL or Parquet manifest whose columns hold file paths or URLs and texts; a Hugging Face
            data set saved to disk; a speech corpus like LibriSpeech or Common Voice; robot episodes as LeRobot or HDF5.
        out: folder for train-00000.tar, validation-00000.tar and their indices.
        caption: column of a manifest or data set written as .txt; guessed from caption, text, title, label. Of a list, the
            first entry.
        samples: samples per shard.
        train: share of samples in the train shards, by a hash of the source name; the rest goes to validation shards. All clips
            of a film and all sentences of a speaker go to one side. Splits that the source has are kept instead.
        size: re-encode larger images so that the longer side has this many pixels (first frame only); default: original bytes.
            With clip, also the longer side of the clips.
        overwrite: replace the shards that `out` holds.
        keep: further extensions, "csv,beats", for readers of your own; these files are taken as they are.
        url: manifest columns to fetch, "image_url,sound_url"; guessed when one column of URLs stands out.
        retry: fetch again what failed for good in an earlier run: "permanent", or classes such as "gone,media".
        fetch: how URLs are fetched.
        clip: cut each video into clips of so many seconds.
        gop: frames from one keyframe of a clip to the next; a reader may start at any of them.
        allow_misaligned: take robot episodes whose streams differ in length or rate, cut to what they share.
        engine: local = threads of this machine; ray = tasks of a Ray cluster, whose machines must see the files by the same path.
    """
    root, folder = (Path(one).absolute() if engine == "ray" else Path(one) for one in (source, out))
    old = _refuse(root, folder, samples, train, size, overwrite)
    extensions = [extension.lstrip(".").lower() for extension in _listed(keep)]
    if pickled := PICKLES & {*extensions}:
        raise SystemExit(f"found --keep {min(pickled)}; a pickle runs code when it is read and is never taken; save arrays as .npy")
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    get = partial(fetch_all, out=folder, how=fetch, retry=retry, wanted={*KIND, *extensions}, progress=console.is_terminal)
    found = _read(root, folder, caption, extensions, _listed(url), get, allow_misaligned)
    fetched = any(folder / "fetched" in path.parents for sample in found.samples for path in sample.files.values())
    if clip is not None:
        from headwater.tools.ingest.films import cut_films

        found = cut_films(found, clip, size, gop)
    console.print(f"{show(root)}: {found.kind}, {len(found.samples)} samples found")
    for sentence in found.report:
        console.print(sentence)
    own = {sample.split for sample in found.samples} - {""}
    if own and train < 1:
        raise SystemExit(f"found --train {train}, but {root} has splits of its own: {', '.join(sorted(own))}; leave it out")
    old |= _old(folder, own, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED).write_text("shards are being written here, or that was stopped; the same command starts them anew\n")
    written = write(found, folder, samples, train, size, console.is_terminal, engine)
    lines = [json.dumps(skip._asdict(), ensure_ascii=False) + "\n" for skip in written.skipped]
    (folder / "skipped.jsonl").write_text("".join(lines), encoding="utf-8")
    _report(found, written, folder, console)
    if written.shards:
        _replace(found, folder, old - written.shards, bool(old))
        if fetched and not fetch.keep:
            clear(folder)
    (folder / UNFINISHED).unlink()
    if not written.shards:
        known = " ".join(f".{extension}" for extension in KIND)
        raise SystemExit(
            f"nothing to write: {show(root)} ({found.kind}) gave 0 samples and {len(written.skipped)} skipped; expected at least"
            f" one file that decodes among {known}; see {folder / 'skipped.jsonl'}, check the path and the files"
        )


def _replace(found: Found, out: Path, stale: set[Path], replaced: bool) -> None:
    """Remove the old shards that were not written over, and put down the names of the classes."""
    for path in stale:
        path.unlink()
        Path(f"{path}.idx").unlink(missing_ok=True)
    if found.classes:
        (out / "classes.json").write_text(json.dumps(found.classes, ensure_ascii=False), encoding="utf-8")
    elif replaced:
        (out / "classes.json").unlink(missing_ok=True)


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _read(root: Path, out: Path, caption: str | None, keep: list[str], url: list[str], get: Get, allow_misaligned: bool) -> Found:
    """What kind of source is this? The special ones first; any folder is at least a folder of files."""
    if root.is_file() and root.suffix.lower() in MANIFESTS:
        return read_manifest(root, caption, keep, url, get)
    if url:
        raise SystemExit(f"--url {','.join(url)} names columns but {root} is no manifest; leave it out, or give a manifest")
    if matches_saved(root):
        return read_saved(root, caption)
    if caption is not None:
        raise SystemExit(f"--caption {caption} names a column but {root} has none; leave it out, or give a manifest")
    from headwater.tools.ingest.lerobot import matches_lerobot, read_lerobot

    if matches_common_voice(root):
        return read_common_voice(root)
    if matches_librispeech(root):
        return read_librispeech(root)
    if matches_lerobot(root):
        return read_lerobot(root, allow_misaligned)
    if matches_hdf5(root):
        from headwater.tools.ingest.hdf5 import read_hdf5

        return read_hdf5(root, allow_misaligned)
    return read_folder(root, out, keep)


def matches_hdf5(root: Path) -> bool:
    """Whether this is an HDF5 file, or a folder with such files and nothing else that shards take but notes."""
    extensions = {path.suffix.lower() for path in (root.rglob("*") if root.is_dir() else [root])}
    return bool(extensions & {*HDF5}) and not extensions & {
        f".{extension}" for extension in KIND if extension not in ("txt", "json")
    }


def _refuse(root: Path, out: Path, samples: int, train: float, size: int | None, overwrite: bool) -> set[Path]:
    """Stop on what cannot work; return the shards that are to be replaced."""
    if not root.exists():
        raise SystemExit(f"{root} does not exist; expected a folder or a manifest; check the path")
    if root.is_file() and root.suffix.lower() not in (*MANIFESTS, *HDF5):
        raise SystemExit(f"{root} is a file; expected a folder or a manifest ({', '.join(MANIFESTS)}); give its folder")
    if not 0 < train <= 1 or samples < 1 or (size is not None and size < 1):
        raise SystemExit(f"found --train {train} --samples {samples} --size {size}; expected 0 < train <= 1 and counts from 1 up")
    if out.exists() and not out.is_dir():
        raise SystemExit(f"{out} is a file; expected a folder for the shards; give another path")
    return _old(out, {*SPLITS}, overwrite)


def _old(out: Path, splits: set[str], overwrite: bool) -> set[Path]:
    """The shards of these splits that are to be replaced; stops when there are some and that was not asked for."""
    old = shards_in(out, splits)
    if old and not overwrite and not (out / UNFINISHED).exists():
        raise SystemExit(f"{out} holds {len(old)} shards; expected none; give another folder, or --overwrite to replace them")
    return old


def _report(found: Found, written: Written, out: Path, console: Console) -> None:
    """What was written, the classes, and the first of what was left out."""
    total = sum(count["samples"] for count in written.counts.values())
    wordless = "no column is the caption: no .txt is written; name one with --caption" if NO_CAPTION in found.kind else None
    table = Table("split", "samples", "members", title=show(out), caption=wordless)
    for split, count in sorted(written.counts.items(), key=lambda item: (item[0] not in SPLITS, item[0] != "train", item[0])):
        table.add_row(split, str(count["samples"]), ", ".join(f"{e} {n}" for e, n in sorted(count.items()) if e != "samples"))
    if total:
        console.print(table)
    if found.classes:
        classes = Table("number", "class", title="classes")
        for number, name in enumerate(found.classes):
            classes.add_row(str(number), name)
        console.print(classes)
    named = [f"{skip.source} ({skip.reason})" for skip in written.skipped[:10]]
    if len(written.skipped) > len(named):
        named.append(f"{len(written.skipped) - len(named)} more in {show(out / 'skipped.jsonl')}")
    console.print(f"{total} written, {len(written.skipped)} skipped{': ' if named else ''}{'; '.join(named)}")
