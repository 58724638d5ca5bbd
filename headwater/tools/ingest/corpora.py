"""Speech corpora with a layout of their own, LibriSpeech and Common Voice: speakers never cross from one split to another."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

from headwater.tools.decode import KIND, extension_of
from headwater.tools.ingest.manifests import table_rows
from headwater.tools.ingest.sources import Found, Sample, Skip, show
from headwater.tools.ingest.splits import split_of

TABLES = ("train", "dev", "test")


def matches_librispeech(root: Path) -> bool:
    """Whether a folder holds transcripts as SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt."""
    return root.is_dir() and next(root.rglob("*.trans.txt"), None) is not None


def read_librispeech(root: Path) -> Found:
    """One sample per line of the transcripts. Subsets above the speakers, train-clean-100 and the like, are the splits.

    Layout after Panayotov et al., LibriSpeech, 2015 (openslr.org/12): SPEAKER/CHAPTER/SPEAKER-CHAPTER-NNNN.flac.
    """
    samples: list[Sample] = []
    skipped: list[Skip] = []
    for transcript in sorted(root.rglob("*.trans.txt")):
        folder = transcript.parent
        files = {f.stem: f for f in sorted(folder.iterdir()) if KIND.get(extension_of(f.name)) == "audio"}
        above = folder.relative_to(root).parts[:-2]
        speaker, chapter = folder.parent.name, folder.name
        for line in transcript.read_text(encoding="utf-8").splitlines():
            name, _, text = line.strip().partition(" ")
            file = files.pop(name, None)
            if file is None:
                skipped.append(
                    Skip(show((folder / name).relative_to(root)), f"named in {transcript.name} but missing, or named twice")
                )
                continue
            facts = {"speaker": speaker, "chapter": chapter}
            split = split_of(above[-1]) if above else ""
            place = show(file.relative_to(root))
            samples.append(Sample(place, {extension_of(file.name): file}, {"txt": text}, facts, split=split, group=speaker))
        skipped += [Skip(show(f.relative_to(root)), f"no line in {transcript.name}") for f in files.values()]
    return _found("speech corpus like LibriSpeech", samples, skipped, "speaker")


def matches_common_voice(root: Path) -> bool:
    """Whether a folder holds clips/ and train.tsv, dev.tsv, test.tsv or validated.tsv."""
    return (root / "clips").is_dir() and any((root / f"{name}.tsv").is_file() for name in (*TABLES, "validated"))


def read_common_voice(root: Path) -> Found:
    """One sample per row of train.tsv, dev.tsv and test.tsv; of validated.tsv, split by speaker, where none of them is there.

    Layout after Ardila et al., Common Voice, 2020: client_id, path and sentence are columns, the sound is clips/PATH.
    """
    tables = [name for name in TABLES if (root / f"{name}.tsv").is_file()]
    samples: list[Sample] = []
    skipped: list[Skip] = []
    for table in tables or ["validated"]:
        for number, row in table_rows(root / f"{table}.tsv"):
            lacking = [] if isinstance(row, str) else [c for c in ("client_id", "path", "sentence") if not row.get(c)]
            if isinstance(row, str) or lacking:
                skipped.append(Skip(f"{table}.tsv:{number}", row if isinstance(row, str) else f"no {', '.join(lacking)}"))
                continue
            name = row.pop("path")
            name = name if extension_of(name) in KIND else f"{name}.mp3"  # early releases left the extension out
            text, client = row.pop("sentence"), row["client_id"]
            facts = {column: value for column, value in row.items() if value}
            files = {extension_of(name): root / "clips" / name}
            samples.append(
                Sample(f"clips/{name}", files, {"txt": text}, facts, split=split_of(table) if tables else "", group=client)
            )
    found = _found("speech corpus like Common Voice", samples, skipped, "client")
    unused = sorted(path.name for path in root.glob("*.tsv") if path.stem not in (tables or ["validated"]))
    return found._replace(report=[*found.report, *([f"not read: {', '.join(unused)}"] if unused else [])])


def _found(kind: str, samples: list[Sample], skipped: list[Skip], who: str) -> Found:
    """What was read, with a warning about every pair of splits that share speakers or files."""
    splits = sorted({sample.split for sample in samples})
    groups, names = ({s: {getattr(one, of) for one in samples if one.split == s} for s in splits} for of in ("group", "name"))
    count = ", ".join(f"{split or 'all'} {len(groups[split])}" for split in splits)
    report = [f"{who}s: {count}"]
    for one, two in combinations(splits, 2):
        for what, sets in ((who, groups), ("file", names)):
            if both := sorted(sets[one] & sets[two]):
                report.append(f"warning: {len(both)} {what}s are in {one} and in {two}, such as {both[0]}")
    if splits == ["train"]:  # the rest of the corpus is not here, so that --train may divide it
        samples = [sample._replace(split="") for sample in samples]
    return Found(kind, sorted(samples, key=lambda sample: sample.name), skipped, report=report)
