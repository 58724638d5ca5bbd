"""`headwater shard`: what goes in comes out of stock WebDataset, and nothing is lost in silence."""

import csv
import inspect
import io
import json
import struct
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import webdataset
from PIL import Image

from headwater.datamodules.files import File
from headwater.datamodules.index import load_index
from headwater.tools.shard import shard


def image(path: Path, mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.name)).integers(0, 256, (size[1], size[0], 3), np.uint8)
    picture = Image.fromarray(noise)
    (picture.quantize(16) if mode == "P" else picture.convert(mode)).save(path)
    return path


def video(path: Path, frames: int = 5) -> None:
    with av.open(str(path), "w") as media:
        stream = media.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * i, np.uint8), format="rgb24")
            media.mux(stream.encode(frame))
        media.mux(stream.encode())


def read(out: Path, split: str = "train") -> list[dict]:
    tars = sorted(str(p) for p in out.glob(f"{split}-*.tar"))
    return list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)) if tars else []


def source_of(sample: dict) -> str:
    return json.loads(sample["json"])["source"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "my data & more"
    image(root / "a cat & a dog.v1.jpg").with_suffix(".txt").write_text("a cat & a dog\n")
    image(root / "sub" / "palette.png", "P").with_suffix(".txt").write_text("café ☕")
    image(root / "sub" / "חתול.PNG", "LA").with_suffix(".txt").write_text("חתול על שטיח")
    soundfile.write(root / "sub" / "palette.wav", np.zeros((800, 2)), 8000)
    np.save(root / "sub" / "palette.npy", np.ones((5, 7), np.float32))
    (root / "sub" / "palette.json").write_text('{"source": "web", "score": 1}')
    return root


def skips(out: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    return {row["source"]: row["reason"] for row in rows}


def test_folder_tree_round_trip(tree, tmp_path, capsys):
    shard(str(tree), str(tmp_path / "out"))
    samples = read(tmp_path / "out")
    assert [s["__key__"] for s in samples] == ["000000", "000001", "000002"]
    assert [source_of(s) for s in samples] == ["a cat & a dog.v1.jpg", "sub/palette.png", "sub/חתול.PNG"]
    assert samples[0]["jpg"] == (tree / "a cat & a dog.v1.jpg").read_bytes()
    assert samples[0]["txt"] == b"a cat & a dog"
    assert Image.open(io.BytesIO(samples[1]["png"])).mode == "P"
    assert Image.open(io.BytesIO(samples[2]["png"])).mode == "LA"
    assert samples[2]["txt"].decode() == "חתול על שטיח"
    assert samples[1]["wav"] == (tree / "sub/palette.wav").read_bytes()
    assert np.load(io.BytesIO(samples[1]["npy"])).shape == (5, 7)
    assert json.loads(samples[1]["json"]) == {"source": "sub/palette.png", "source_given": "web", "score": 1}
    printed = capsys.readouterr().out
    assert "folder tree" in printed
    assert "3 written, 0 skipped" in printed


def test_two_runs_are_identical(tree, tmp_path):
    (tree / "bad.jpg").write_bytes(b"not an image")
    for out in ("one", "two"):
        shard(str(tree), str(tmp_path / out), samples=2)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / out).iterdir()} for out in ("one", "two"))
    assert {"train-00000.tar", "train-00001.tar", "train-00000.tar.idx", "skipped.jsonl"} <= one.keys()
    assert one == two


def test_bad_files_are_named_and_skipped(tree, tmp_path, capsys):
    good = (tree / "a cat & a dog.v1.jpg").read_bytes()
    bad = {
        "cut.jpg": good[: len(good) // 2],
        "zero.png": b"",
        "hiss.wav": b"RIFF0000",
        "noise.mp4": bytes(100),
        "bad.json": b"{",
        "latin.txt": b"caf\xe9",
        "blank.txt": b" \n",
        "model.pkl": b"\x80\x04.",
    }
    for name, content in bad.items():
        (tree / name).write_bytes(content)
    np.save(tree / "object.npy", np.array([{"a": 1}], object), allow_pickle=True)
    shard(str(tree), str(tmp_path / "out"))
    found = skips(tmp_path / "out")
    assert found.keys() == {*bad, "object.npy"}
    assert "empty file" in found["zero.png"]
    assert "empty caption" in found["blank.txt"]
    assert "allow_pickle" in found["object.npy"]
    assert "extension .pkl is not known" in found["model.pkl"]
    assert len(read(tmp_path / "out")) == 3
    printed = capsys.readouterr().out
    assert "3 written, 9 skipped" in printed
    assert all(name in printed for name in found)


def test_same_stem_and_extension_is_reported(tmp_path):
    image(tmp_path / "in/a.jpg")
    image(tmp_path / "in/a.JPG")
    shard(str(tmp_path / "in"), str(tmp_path / "out"))
    assert len(read(tmp_path / "out")) == 1
    assert "rename one" in next(iter(skips(tmp_path / "out").values()))


def test_video_first_frame_is_decoded(tmp_path):
    (tmp_path / "in").mkdir()
    video(tmp_path / "in/clip one.mp4")
    (tmp_path / "in/clip one.txt").write_text("a clip")
    shard(str(tmp_path / "in"), str(tmp_path / "out"))
    (sample,) = read(tmp_path / "out")
    assert sample["mp4"] == (tmp_path / "in/clip one.mp4").read_bytes()


def test_image_folder(tmp_path, capsys):
    for name in ("tabby_cat/1.png", "tabby_cat/2.jpg", "golden-retriever/1.png", "golden-retriever/1.jpg"):
        image(tmp_path / "in" / name)
    (tmp_path / "in/tabby_cat/broken.png").write_bytes(b"\x89PNG")
    shard(str(tmp_path / "in"), str(tmp_path / "out"))
    samples = read(tmp_path / "out")
    assert [(s["txt"], s["cls"]) for s in samples] == [(b"golden retriever", b"0")] * 2 + [(b"tabby cat", b"1")] * 2
    assert json.loads((tmp_path / "out/classes.json").read_text()) == ["golden-retriever", "tabby_cat"]
    assert skips(tmp_path / "out").keys() == {"tabby_cat/broken.png"}
    printed = capsys.readouterr().out
    assert "image-folder" in printed
    assert "golden-retriever" in printed


ROWS = [
    {"path": "pictures/one two.jpg", "sound": "s.wav", "caption": 'say "hi"', "score": "1"},
    {"path": "pictures/b&c.png", "sound": "s.wav", "caption": "שלום", "score": "2"},
    {"path": "pictures/gone.jpg", "sound": "s.wav", "caption": "missing", "score": "3"},
    {"path": "pictures/b&c.png", "sound": "s.wav", "caption": "", "score": "4"},
]


def write_manifest(path: Path, rows: list[dict]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n[1]\n")
    elif path.suffix == ".tsv":
        path.write_text("\n".join("\t".join(line) for line in [rows[0].keys(), *(r.values() for r in rows)]) + "\nshort\n")
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize(("name", "skipped"), [("m.csv", 2), ("m.tsv", 3), ("m.jsonl", 4), ("m.parquet", 2)])
def test_manifests(tmp_path, name, skipped, capsys):
    image(tmp_path / "pictures/one two.jpg")
    image(tmp_path / "pictures/b&c.png", "P")
    soundfile.write(tmp_path / "s.wav", np.zeros(100), 8000)
    write_manifest(tmp_path / name, ROWS)
    shard(str(tmp_path / name), str(tmp_path / "out"))
    samples = read(tmp_path / "out")
    assert [source_of(s) for s in samples] == ["pictures/b&c.png", "pictures/one two.jpg"]
    assert [s["txt"].decode() for s in samples] == ["שלום", 'say "hi"']
    assert [json.loads(s["json"])["score"] for s in samples] == ["2", "1"]
    assert all(s["wav"] == (tmp_path / "s.wav").read_bytes() for s in samples)
    assert len((tmp_path / "out/skipped.jsonl").read_text().splitlines()) == skipped
    assert "missing file" in skips(tmp_path / "out")["pictures/gone.jpg"]
    printed = capsys.readouterr().out
    assert "file columns: path, sound" in printed
    assert f"2 written, {skipped} skipped" in printed


def test_manifest_with_absolute_paths_two_image_columns_and_named_caption(tmp_path):
    left, right = image(tmp_path / "l.png"), image(tmp_path / "r.png", "L")
    row = {"left": str(left), "Right eye": str(right), "title": "no", "words": ["yes", "also"], "weight": float("nan")}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    shard(str(tmp_path / "m.jsonl"), str(tmp_path / "out"), caption="words")
    (sample,) = read(tmp_path / "out")
    assert (sample["png"], sample["right_eye.png"], sample["txt"]) == (left.read_bytes(), right.read_bytes(), b"yes")
    facts = json.loads(sample["json"])
    assert facts == {"title": "no", "words": ["yes", "also"], "weight": None, "source": str(left)}


def test_split_is_by_name_and_keeps_captions_of_one_file_together(tmp_path):
    files = [image(tmp_path / f"in/{i}.png") for i in range(40)]
    rows = [{"image": f"in/{f.name}", "caption": text} for f in files for text in ("one", "two")]
    write_manifest(tmp_path / "all.csv", rows)
    write_manifest(tmp_path / "part.csv", rows[20:])
    places = []
    for name in ("all", "part"):
        shard(str(tmp_path / f"{name}.csv"), str(tmp_path / name), train=0.7)
        places.append({split: {source_of(s) for s in read(tmp_path / name, split)} for split in ("train", "validation")})
    whole, part = places
    assert not whole["train"] & whole["validation"]
    assert len(whole["train"] | whole["validation"]) == 40
    assert 4 <= len(whole["validation"]) <= 20
    assert part["train"] <= whole["train"]
    assert part["validation"] <= whole["validation"]
    keys = [s["__key__"] for split in ("train", "validation") for s in read(tmp_path / "all", split)]
    assert len(set(keys)) == 80


def test_size_shrinks_only_larger_images(tmp_path):
    image(tmp_path / "in/large.png", "P", (100, 50))
    image(tmp_path / "in/small.png", "P", (20, 10))
    shard(str(tmp_path / "in"), str(tmp_path / "out"), size=40)
    large, small = read(tmp_path / "out")
    assert Image.open(io.BytesIO(large["png"])).size == (40, 20)
    assert small["png"] == (tmp_path / "in/small.png").read_bytes()


def test_index_beside_the_tar_reads_the_same_bytes(tree, tmp_path):
    shard(str(tree), str(tmp_path / "out"))
    tar = tmp_path / "out/train-00000.tar"
    assert (tmp_path / "out/train-00000.tar.idx").exists()
    with File(str(tar)) as file:
        assert load_index(tar).read(file, 0)["txt"] == b"a cat & a dog"


def test_overwrite_is_asked_for_and_removes_stale_shards(tree, tmp_path):
    out = tmp_path / "out"
    shard(str(tree), str(out), samples=1)
    with pytest.raises(SystemExit, match=r"holds 3 shards.*--overwrite"):
        shard(str(tree), str(out))
    shard(str(tree), str(out), overwrite=True)
    assert sorted(p.name for p in out.glob("train-*")) == ["train-00000.tar", "train-00000.tar.idx"]
    assert len(read(out)) == 3


def test_output_inside_the_source_is_not_read(tree):
    shard(str(tree), str(tree / "out"))
    shard(str(tree), str(tree / "out"), overwrite=True)
    assert skips(tree / "out") == {}


def test_nothing_to_write_is_an_error_and_keeps_old_shards(tree, tmp_path):
    shard(str(tree), str(tmp_path / "out"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/x.jpg").write_bytes(b"x")
    with pytest.raises(SystemExit, match=r"nothing to write.*expected.*check"):
        shard(str(tmp_path / "bad"), str(tmp_path / "out"), overwrite=True)
    assert len(read(tmp_path / "out")) == 3


@pytest.mark.parametrize(
    ("name", "content", "caption", "message"),
    [
        ("gone", None, None, "does not exist"),
        ("x.zip", b"x", None, "expected a folder or a manifest"),
        ("m.csv", b"path,caption\na.jpg,hi\n", "words", "no column 'words'.*path, caption"),
        ("m.csv", b"path,caption\na.jpg,\xff\n", None, "UTF-8"),
        ("m.csv", b"a,a\n1,2\n", None, "distinct column names"),
        ("m.parquet", b"PAR", None, "cannot be read"),
    ],
)
def test_errors_say_what_to_do(tmp_path, name, content, caption, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        shard(str(tmp_path / name), str(tmp_path / "out"), caption=caption)


def test_import_is_light():
    code = "import sys, headwater.tools.shard, headwater.tools.inspect; sys.exit(any(m in sys.modules for m in names))"
    code = f"names = ('torch', 'av', 'PIL'); {code}"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_files_of_a_modality_of_ones_own_are_kept_on_request(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / f"in/{i}.beats").write_text("600\n700")
        (tmp_path / f"in/{i}.txt").write_text(f"heart {i}")
    shard(str(tmp_path / "in"), str(tmp_path / "out"), keep=".beats, csv")
    index = load_index(tmp_path / "out/train-00000.tar")
    assert set(index.extensions) == {"beats", "json", "txt"}
    assert (index.sizes("beats") == 7).all()


def test_lengths_go_into_the_index(tree, tmp_path):
    video(tree / "sub/palette.mp4", frames=7)
    shard(str(tree), str(tmp_path / "out"))
    index = load_index(tmp_path / "out/train-00000.tar")
    row = {name: float(values[1]) for name, values in index.hints.items()}
    assert row == {
        **{"jpg.width": pytest.approx(np.nan, nan_ok=True), "jpg.height": pytest.approx(np.nan, nan_ok=True)},
        **{"png.width": 24, "png.height": 16, "txt.words": 2, "wav.seconds": pytest.approx(0.1), "npy.steps": 5},
        **{"mp4.frames": 7, "mp4.seconds": pytest.approx(0.7), "mp4.fps": 10},
    }
    assert float(index.hints["jpg.width"][0]) == 24


def test_shrunk_images_are_measured_as_they_are_written(tmp_path):
    image(tmp_path / "in/large.png", size=(100, 50))
    shard(str(tmp_path / "in"), str(tmp_path / "out"), size=40)
    assert float(load_index(tmp_path / "out/train-00000.tar").hints["png.width"][0]) == 40


def bomb(width: int, height: int) -> bytes:
    """A PNG that announces so many pixels and holds none."""
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    chunks = (struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part)) for name, part in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_objects_and_pickles_are_refused_by_name(tree, tmp_path):
    (tree / "large.png").write_bytes(bomb(10_000, 10_000))
    (tree / "huge.png").write_bytes(bomb(100_000, 100_000))
    np.save(tree / "objects.npy", np.array([{"a": 1}], object), allow_pickle=True)
    np.savez(tree / "many.npz", a=np.ones(3))
    (tree / "many.npz").rename(tree / "many.npy")
    (tree / "claims.npy").write_bytes(
        b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999,), }" + b" " * 50
    )
    for extension in ("pkl", "pickle", "pyd", "pth", "pt", "joblib"):
        (tree / f"model.{extension}").write_bytes(b"\x80\x04.")
    shard(str(tree), str(tmp_path / "out"))
    found = skips(tmp_path / "out")
    assert "10000x10000 are 100 million pixels; expected at most 89 million" in found["large.png"]
    assert "decompression bomb" in found["huge.png"]
    assert "an array of Python objects" in found["objects.npy"]
    assert {"many.npy", "claims.npy"} <= found.keys()
    assert all("a pickle runs code" in found[f"model.{extension}"] for extension in ("pkl", "pickle", "pyd", "pth", "pt", "joblib"))
    assert len(read(tmp_path / "out")) == 3
    with pytest.raises(SystemExit, match=r"found --keep pkl; a pickle runs code"):
        shard(str(tree), str(tmp_path / "more"), keep="beats,.PKL")


def test_semicolons_are_seen(tmp_path, capsys):
    image(tmp_path / "a.png")
    (tmp_path / "m.csv").write_text('path;caption;score\na.png;"one; two";1,5\n')
    shard(str(tmp_path / "m.csv"), str(tmp_path / "out"))
    (sample,) = read(tmp_path / "out")
    assert sample["txt"] == b"one; two"
    assert json.loads(sample["json"])["score"] == "1,5"
    assert "CSV manifest with semicolons, file columns: path" in capsys.readouterr().out


def test_a_manifest_without_caption_says_so_in_the_table(tmp_path, capsys):
    image(tmp_path / "a.png")
    (tmp_path / "m.csv").write_text("path,words\na.png,one\n")
    shard(str(tmp_path / "m.csv"), str(tmp_path / "out"))
    printed = " ".join(capsys.readouterr().out.split())
    assert "no column is the caption" in printed
    assert "txt" not in read(tmp_path / "out")[0]


def test_a_stopped_run_is_started_anew_without_asking(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    for number in range(4):
        image(source / f"{number}.png")
    code = "import os, headwater.tools.ingest.splits as s; old = s.ShardWriter.close; n = []\n"
    code += "def close(self):\n    old(self); n.append(1)\n    if len(n) == 2: os.kill(os.getpid(), 9)\n"
    code += "s.ShardWriter.close = close\nfrom headwater.tools.shard import shard\n"
    code += f"shard({str(source)!r}, {str(out)!r}, samples=1)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == -9
    assert len(list(out.glob("*.tar"))) == 2
    shard(str(source), str(out))
    assert len(list(out.glob("*.tar"))) == 1
    assert len(read(out)) == 4
    with pytest.raises(SystemExit, match="holds 1 shards"):
        shard(str(source), str(out))


def made(number: int) -> dict[str, bytes]:
    if number == 2:
        raise ValueError("the wrist camera is missing")
    return {"txt": b"made", "json": b'{"steps": 3, "far": NaN}', "wrist.png": bomb(1, 1)} if number else {"txt": b"made"}


def test_members_that_are_made_headers_and_reports(tmp_path, monkeypatch, capsys):
    """What the readers of robot episodes rely on."""
    import headwater.tools.ingest.lerobot as lerobot
    from headwater.tools.ingest.sources import Found, Sample

    asked = []

    def read_lerobot(root: Path, allow_misaligned: bool) -> Found:
        asked.append(allow_misaligned)
        samples = [Sample(f"e{n}", {}, {}, {"arm": "left", "steps": 4}, partial(made, n), "test" if n else "") for n in range(3)]
        return Found("episodes", samples, [], header={"fps": 10}, report=["3 episodes, 1 misaligned"])

    monkeypatch.setattr(lerobot, "matches_lerobot", lambda root: True)
    monkeypatch.setattr(lerobot, "read_lerobot", read_lerobot)
    (tmp_path / "in").mkdir()
    with pytest.raises(SystemExit, match="splits of its own: test"):
        shard(str(tmp_path / "in"), str(tmp_path / "out"), train=0.5)
    monkeypatch.setitem(made.__globals__, "bomb", lambda *size: image(tmp_path / "x.png").read_bytes())
    shard(str(tmp_path / "in"), str(tmp_path / "out"), allow_misaligned=True)
    assert asked == [False, True]
    (first,), (second,) = read(tmp_path / "out"), read(tmp_path / "out", "test")
    assert json.loads(first["json"]) == {"arm": "left", "steps": 4, "source": "e0"}
    assert json.loads(second["json"]) == {"arm": "left", "steps": 4, "far": None, "source": "e1"}
    index = load_index(tmp_path / "out/test-00000.tar")
    assert index.card.header == {"fps": 10}
    assert float(index.hints["wrist.png.width"][0]) == 24
    assert skips(tmp_path / "out") == {"e2": "the wrist camera is missing"}
    assert "3 episodes, 1 misaligned" in capsys.readouterr().out


def test_the_command_line_reaches_every_option(tree, tmp_path, capsys):
    from headwater.cli import main

    with pytest.raises(SystemExit):
        main(["shard", "--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in [*inspect.signature(shard).parameters][2:] if name != "fetch")
    assert "--fetch.per_host" in shown
    main(["shard", str(tree), str(tmp_path / "out"), "--fetch.threads", "2", "--allow_misaligned", "--train", "1"])
    assert len(read(tmp_path / "out")) == 3
