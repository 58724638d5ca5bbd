"""Speech corpora made of the embedded speech: layouts, splits, and speakers that keep to one side."""

import csv
import io
import json
import tarfile
from collections import defaultdict
from pathlib import Path

import pytest
import soundfile
import webdataset

import headwater
from headwater.tools.ingest.corpora import read_common_voice, read_librispeech
from headwater.tools.shard import shard

EMBEDDED = Path(headwater.__file__).parent / "embedded"


@pytest.fixture(scope="module")
def spoken() -> dict[str, list[tuple[str, bytes]]]:
    """Voice -> (text, ogg) of the embedded speech, six voices."""
    parts: dict[str, dict[str, bytes]] = defaultdict(dict)
    with tarfile.open(EMBEDDED / "speech-train-000.tar") as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            if member.isfile():
                parts[key][extension] = tar.extractfile(member).read()
    voices = defaultdict(list)
    for sample in parts.values():
        voices[json.loads(sample["json"])["voice"]].append((sample["txt"].decode(), sample["ogg"]))
    return dict(sorted(voices.items(), key=lambda item: -len(item[1]))[:6])


def sound(path: Path, ogg: bytes) -> None:
    data, rate = soundfile.read(io.BytesIO(ogg))
    soundfile.write(path, data, rate)


def samples(out: Path, split: str) -> list[dict]:
    tars = [str(path) for path in sorted(out.glob(f"{split}-*.tar"))]
    return list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)) if tars else []


def librispeech(root: Path, spoken: dict, subsets: list[str]) -> Path:
    """Speakers are dealt to the subsets in turn; each has one chapter of four sentences."""
    for number, sentences in enumerate(spoken.values()):
        speaker, chapter = str(100 + number), str(7000 + number)
        folder = root / subsets[number % len(subsets)] / speaker / chapter
        folder.mkdir(parents=True)
        lines = []
        for n, (text, ogg) in enumerate(sentences[:4]):
            sound(folder / f"{speaker}-{chapter}-{n:04d}.flac", ogg)
            lines.append(f"{speaker}-{chapter}-{n:04d} {text.upper()}\n")
        (folder / f"{speaker}-{chapter}.trans.txt").write_text("".join(lines))
    return root


def test_librispeech_with_its_splits(spoken, tmp_path, capsys):
    root = librispeech(tmp_path / "LibriSpeech", spoken, ["train-clean-100", "train-other-500", "dev-clean", "test-clean"])
    folder = root / "train-clean-100/100/7000"
    (folder / "100-7000-0001.flac").unlink()
    sound(folder / "100-7000-0009.flac", next(iter(spoken.values()))[0][1])
    shard(str(root), str(tmp_path / "out"))
    found = {split: samples(tmp_path / "out", split) for split in ("train", "validation", "test")}
    assert [len(found[split]) for split in found] == [15, 4, 4]
    first = found["train"][0]
    assert first["txt"].decode() == next(iter(spoken.values()))[0][0].upper()
    facts = json.loads(first["json"])
    assert facts == {"speaker": "100", "chapter": "7000", "source": "train-clean-100/100/7000/100-7000-0000.flac"}
    assert first["flac"] == (folder / "100-7000-0000.flac").read_bytes()
    reasons = (tmp_path / "out/skipped.jsonl").read_text()
    assert "100-7000-0001" in reasons
    assert "no line in 100-7000.trans.txt" in reasons
    printed = capsys.readouterr().out
    assert "speakers: test 1, train 4, validation 1" in printed
    assert "warning" not in printed
    with pytest.raises(SystemExit, match=r"found --train 0.5, but .* has splits of its own: test, train, validation"):
        shard(str(root), str(tmp_path / "other"), train=0.5)


def test_speakers_of_one_subset_are_divided_whole(spoken, tmp_path):
    root = librispeech(tmp_path / "in", spoken, ["train-clean-100"])
    shard(str(root), str(tmp_path / "out"), train=0.5)
    speakers = [{json.loads(s["json"])["speaker"] for s in samples(tmp_path / "out", split)} for split in ("train", "validation")]
    assert all(speakers)
    assert not speakers[0] & speakers[1]
    assert len(speakers[0] | speakers[1]) == 6


def test_a_speaker_in_two_splits_is_reported(spoken, tmp_path):
    root = librispeech(tmp_path / "in", spoken, ["train-clean-100", "test-clean"])
    (root / "test-clean/101").rename(root / "test-clean/100")
    assert "warning: 1 speakers are in test and in train, such as 100" in read_librispeech(root).report


def common_voice(root: Path, spoken: dict, tables: list[str]) -> Path:
    (root / "clips").mkdir(parents=True)
    rows = defaultdict(list)
    for number, sentences in enumerate(spoken.values()):
        for n, (text, ogg) in enumerate(sentences[:3]):
            name = f"common_voice_en_{number}{n}.mp3"
            sound(root / "clips" / name, ogg)
            row = {"client_id": f"{number:064x}", "path": name, "sentence": f'{text}, "he said', "age": "", "locale": "en"}
            rows[tables[number % len(tables)]].append(row)
    for table, lines in rows.items():
        with (root / f"{table}.tsv").open("w", newline="") as file:
            writer = csv.DictWriter(file, lines[0], delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None)
            writer.writeheader()
            writer.writerows(lines)
    return root


def test_common_voice_is_split_by_its_tables(spoken, tmp_path, capsys):
    root = common_voice(tmp_path / "cv", spoken, ["train", "train", "dev", "test"])
    (root / "other.tsv").write_text((root / "train.tsv").read_text())
    with (root / "train.tsv").open("a") as file:
        file.write(f"{'f' * 64}\tgone.mp3\tnever recorded\t\ten\n{'f' * 64}\tx.mp3\t\t\ten\nshort\n")
    shard(str(root), str(tmp_path / "out"))
    found = {split: samples(tmp_path / "out", split) for split in ("train", "validation", "test")}
    assert [len(found[split]) for split in found] == [12, 3, 3]
    one = found["train"][0]
    assert one["txt"].decode().endswith(', "he said')
    assert json.loads(one["json"]) == {"client_id": "0" * 64, "locale": "en", "source": "clips/common_voice_en_00.mp3"}
    assert soundfile.info(io.BytesIO(one["mp3"])).duration > 0.2
    reasons = (tmp_path / "out/skipped.jsonl").read_text()
    assert all(reason in reasons for reason in ("missing file", "no sentence", "1 fields, the header has 5"))
    assert "not read: other.tsv" in capsys.readouterr().out


def test_a_client_in_two_tables_is_reported(spoken, tmp_path):
    root = common_voice(tmp_path / "cv", spoken, ["train", "test"])
    with (root / "test.tsv").open("a") as file:
        file.write((root / "train.tsv").read_text().splitlines()[1] + "\n")
    report = read_common_voice(root).report
    assert f"warning: 1 clients are in test and in train, such as {'0' * 64}" in report
    assert "warning: 1 files are in test and in train, such as clips/common_voice_en_00.mp3" in report


def test_only_validated_clips_are_divided_by_client(spoken, tmp_path):
    root = common_voice(tmp_path / "cv", spoken, ["validated"])
    shard(str(root), str(tmp_path / "out"), train=0.6)
    clients = [{json.loads(s["json"])["client_id"] for s in samples(tmp_path / "out", split)} for split in ("train", "validation")]
    assert all(clients)
    assert not clients[0] & clients[1]
