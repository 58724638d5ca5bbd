"""`headwater index`: hashes and lengths of real members, made once, completed where they lack, never lost."""

import io
import shutil
import subprocess

import av
import fsspec
import numpy as np
import pytest
import soundfile
from PIL import Image

from headwater import cli
from headwater.datamodules.files import File, expand
from headwater.datamodules.index import content_hash, index_path, load_index, save_index, scan
from headwater.datamodules.writer import ShardWriter
from headwater.modalities.text import TextReader
from headwater.tools import decode
from headwater.tools.checks import check
from headwater.tools.index_shards import current, index_one, index_shards
from headwater.tools.lengths import FACTS, measure, promised


@pytest.fixture
def real(tmp_path):
    """Embedded shards without their indices."""
    for name in ("things-unseen-000", "sounds-test-000", "episodes-test-000"):
        shutil.copy(expand(f"embedded:{name}.tar")[0], tmp_path)
    return tmp_path


def members(path):
    index = load_index(path)
    with File(str(path)) as file:
        return {index.key(row): index.read(file, row) for row in range(len(index))}


def npy(array, version=None):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array), version, allow_pickle=True)
    return buffer.getvalue()


def sound(form, subtype=None, count=4000):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.sin(np.arange(count) / 9) / 2, 8000, format=form, subtype=subtype)
    return buffer.getvalue()


def aac(frames=6):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="adts") as out:
        stream = out.add_stream("aac", rate=8000, layout="mono")
        for k in range(frames):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, 1024 * k
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return buffer.getvalue()


def film(form, codec, frames=7):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as out:
        stream = out.add_stream(codec, rate=12)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for k in range(frames):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 48, 3), 9 * k, np.uint8), format="rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue()


def picture(form):
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), (9, 99, 199)).save(buffer, form)
    return buffer.getvalue()


def in_full(extension, content):
    """Lengths by decoding everything."""
    if extension == "png":
        return Image.open(io.BytesIO(content)).convert("RGBA").size
    if extension == "ogg":
        wave, rate = soundfile.read(io.BytesIO(content))
        return [len(wave) / rate]
    if extension == "mp4":
        with av.open(io.BytesIO(content)) as media:
            frames = [frame.time for frame in media.decode(video=0)]
            rate = float(media.streams.video[0].average_rate)
        return [len(frames), frames[-1] - frames[0] + 1 / rate, rate]
    if extension == "npy":
        return [len(np.load(io.BytesIO(content)))]
    return [len(content.decode().split())] if extension == "txt" else []


def test_hashes_and_lengths_are_those_of_the_decoded_members(real):
    index_shards(str(real), jobs=1, measure=True)
    for path in sorted(real.glob("*.tar")):
        index = load_index(path)
        assert np.array_equal(index.hash, scan(path, hashed=True).hash)
        for row, found in enumerate(members(path).values()):
            for extension, content in found.items():
                noted = [index.hints[name][row] for name in promised(extension)]
                assert noted == pytest.approx(in_full(extension, content)), (path, index.key(row), extension)
        assert set(index.hints) == {name for e in index.extensions for name in promised(e)}
        assert not np.isnan([*index.hints.values()]).any()


def test_a_current_index_is_left_alone_until_force(real):
    index_shards(str(real), jobs=2)
    before = {path: path.stat().st_mtime_ns for path in real.glob("*.idx")}
    assert len(before) == 3
    index_shards(str(real), jobs=1)
    assert {path: path.stat().st_mtime_ns for path in real.glob("*.idx")} == before
    index_shards(str(real), jobs=1, force=True)
    assert all(path.stat().st_mtime_ns > time for path, time in before.items())


@pytest.mark.parametrize("force", [False, True])
def test_only_what_lacks_is_read_and_what_the_writer_noted_is_kept(tmp_path, monkeypatch, force):
    with ShardWriter(tmp_path / "a-{}.tar") as writer:
        for k in range(4):
            hints = {"txt.score": k / 4, "txt.words": 99.0} if k < 2 else None  # 99 is no count of words: it must survive
            writer.write(f"{k}", {"txt": b"one two", "png": picture("PNG")}, hints)
    read = []
    monkeypatch.setattr("headwater.tools.index_shards.measure", lambda e, content: read.append(e) or measure(e, content))
    done = index_one(str(writer.shards[0]), measured=True, force=force)
    hints = load_index(writer.shards[0]).hints
    assert done.state == ("made" if force else "completed")
    assert hints["txt.score"][:2].tolist() == [0, 0.25]
    assert np.isnan(hints["txt.score"][2:]).all()
    assert hints["txt.words"].tolist() == [99, 99, 2, 2]
    assert hints["png.width"].tolist() == [30] * 4
    assert sorted(read) == ["png"] * 4 + ["txt"] * 2
    assert index_one(str(writer.shards[0]), measured=True).state == "current"


def test_force_drops_the_hints_of_members_that_have_changed(tmp_path):
    with ShardWriter(tmp_path / "a-{}.tar") as writer:
        for key in "ab":
            writer.write(key, {"txt": key.encode()}, {"txt.score": 1.0})
    tar = writer.shards[0]
    content = bytearray(tar.read_bytes())
    content[load_index(tar).extent(1).offset] = ord("c")
    tar.write_bytes(content)
    assert index_one(str(tar)).state == "current"
    index_one(str(tar), force=True)
    assert load_index(tar).hash.tolist() == [content_hash(b"a"), content_hash(b"c")]
    assert np.isnan(load_index(tar).hints["txt.score"]).tolist() == [False, True]


def test_hints_of_samples_that_were_replaced_are_dropped(tmp_path):
    def write(contents):
        with ShardWriter(tmp_path / "a-{}.tar") as writer:
            for key, content in contents.items():
                writer.write(key, {"txt": content}, {"txt.score": 1.0})
        return writer.shards[0]

    tar = write({"a": b"first", "b": b"second"})
    old = load_index(tar)
    shutil.move(write({"a": b"first", "b": b"2nd"}), tar)  # of the same number of blocks
    save_index(old)
    assert current(str(tar)) is None
    index_one(str(tar))
    assert current(str(tar)) is not None
    assert current(str(tar)).hash.tolist() == [content_hash(b"first"), content_hash(b"2nd")]
    assert not current(str(tar)).hints


def test_tokens_are_counted_as_the_reader_counts_them(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({"a": 0, "dog": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    words.save(str(tmp_path / "words.json"))
    texts = ["a dog", "a dog, a dog and a cat", "dog"]
    with ShardWriter(tmp_path / "a-{}.tar") as writer:
        for k, text in enumerate(texts):
            writer.write(f"{k}", {"txt": text.encode(), "caption": text.encode()})
    for tokenizer in (str(tmp_path / "words.json"), "bytes"):
        index_shards(str(writer.shards[0]), tokenizer=tokenizer)
        reader, index = TextReader(tokenizer, length=1000), load_index(writer.shards[0])
        for extension in ("txt", "caption"):
            counts = index.hints[f"{extension}.tokens-{reader.digest}"]
            for text, count in zip(texts, counts):
                assert reader.length({"size": len(text), f"tokens-{reader.digest}": count}) == len(reader.tokens(text).x)
    assert len(load_index(writer.shards[0]).hints) == 4
    with pytest.raises(FileNotFoundError, match="expected 'bytes' or the path"):
        index_shards(str(writer.shards[0]), tokenizer=str(tmp_path / "none.json"))


def test_faults_are_listed_and_are_no_error(real, capsys):
    whole = (real / "things-unseen-000.tar").read_bytes()
    end = scan(real / "things-unseen-000.tar").extent(45).offset + 1
    (real / "cut-000.tar").write_bytes(whole[:end])
    with ShardWriter(real / "bad-{}.tar") as writer:
        writer.write("0", {"png": b"no picture", "wav": b"no sound", "mp4": b"no film", "npy": b"no array", "txt": b"\xff"})
    index_shards(str(real / "*.tar"), jobs=1, measure=True)
    printed = capsys.readouterr().out
    assert "is cut off" in printed
    for extension in ("png", "wav", "mp4", "npy", "txt"):
        assert f"0.{extension} cannot be measured" in printed
    assert len(load_index(real / "cut-000.tar")) == 45
    assert all(np.isnan(column).all() for column in load_index(writer.shards[0]).hints.values())


def test_what_cannot_be_read_ends_in_an_error_after_the_others(real, capsys):
    fsspec.filesystem("memory").pipe("/half/2.tar", (real / "sounds-test-000.tar").read_bytes())
    with pytest.raises(SystemExit, match="1 of 2 shards could not be indexed"):
        index_shards("memory://half/{1..2}.tar", jobs=1)
    assert "error: memory://half/1.tar: FileNotFoundError" in capsys.readouterr().out
    assert len(load_index("memory://half/2.tar")) == 33


def test_remote_shards_get_their_index_in_the_store(real):
    store = fsspec.filesystem("memory")
    for path in real.glob("*.tar"):
        store.pipe(f"/bucket/{path.name}", path.read_bytes())
    index_shards("memory://bucket", jobs=1, measure=True)
    index_shards(str(real), jobs=1, measure=True)
    for path in real.glob("*.tar"):
        there, here = load_index(f"memory://bucket/{path.name}"), load_index(path)
        assert there.keys.equals(here.keys)
        assert np.array_equal(there.hash, here.hash)
        assert there.hints.keys() == here.hints.keys()
        assert all(np.array_equal(there.hints[name], here.hints[name]) for name in here.hints)
        assert index_one(f"memory://bucket/{path.name}", measured=True).state == "current"


def test_tars_of_other_programs(tmp_path):
    texts = {"a": b"x", "f" * 120: b"long", "sub/ünï": "é".encode()}
    for key, content in texts.items():
        path = tmp_path / "files" / f"{key}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for form in ("gnu", "pax", "ustar", "v7"):
        names = [f"{key}.txt" for key in texts if form not in ("ustar", "v7") or len(key) < 90]
        subprocess.run(["tar", f"--format={form}", "-cf", f"../{form}.tar", *names], cwd=tmp_path / "files", check=True)
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "stock.tar")) as writer:
        for key, content in texts.items():
            writer.write({"__key__": key, "txt": content})
    index_shards(str(tmp_path / "*.tar"), jobs=1)
    for form in ("gnu", "pax", "ustar", "v7", "stock"):
        found = members(tmp_path / f"{form}.tar")
        assert found == {key: {"txt": content} for key, content in texts.items() if key in found}
        assert len(found) == (2 if form in ("ustar", "v7") else 3)
        assert load_index(tmp_path / f"{form}.tar").hash.all()
        assert check(str(tmp_path / f"{form}.tar"), decode=True).problems == []


@pytest.mark.parametrize(
    ("extension", "content", "facts"),
    [
        *(
            (form, picture(name), (30, 20))
            for form, name in (("jpg", "JPEG"), ("left.png", "PNG"), ("webp", "WEBP"), ("gif", "GIF"))
        ),
        *((form, sound(form.upper()), (0.5,)) for form in ("wav", "flac", "ogg")),
        ("mp3", sound("MP3"), (0.5,)),
        ("opus", sound("OGG", "OPUS"), (0.5,)),
        ("mp4", film("mp4", "mpeg4"), (7, 7 / 12, 12)),
        ("webm", film("webm", "libvpx"), (7, 7 / 12, 12)),
        ("avi", film("avi", "mpeg4"), (7, 7 / 12, 12)),
        *(("npy", npy(np.zeros((5, 2), kind)), (5,)) for kind in ("f4", "u1", [("a", "f4")])),
        ("npy", npy(np.zeros(3), (2, 0)), (3,)),
        ("npy", npy(np.zeros(3), (3, 0)), (3,)),
        ("npy", npy(1.5), (1,)),
        ("txt", b"ein Hund sieht", (3,)),
        ("json", b"{}", ()),
        ("beats", b"?", ()),
    ],
)
def test_lengths_are_read_from_headers(extension, content, facts):
    found = measure(extension, content)
    assert tuple(found) == promised(extension)
    assert tuple(found.values()) == pytest.approx(facts, rel=0.002)


def test_raw_aac_has_no_length_in_its_header_and_is_measured_by_packets():
    assert measure("aac", aac())["aac.seconds"] == pytest.approx(6 * 1024 / 8000, abs=0.26)


@pytest.mark.parametrize("extension", [kinds[0] for kind, kinds in decode.EXTENSIONS.items() if kind in FACTS and kind != "text"])
@pytest.mark.parametrize("content", [b"", b"\0" * 600, b"some text that is no medium"])
def test_what_is_no_medium_has_no_length(extension, content):
    with pytest.raises(Exception, match=r".+"):
        measure(extension, content)


def test_arrays_of_objects_are_pickles_and_refused():
    with pytest.raises(ValueError, match="pickle"):
        measure("npy", npy(np.array([{}], object)))


def test_the_command(real, capsys):
    cli.main(["index", str(real), "--measure", "--jobs", "1"])
    assert "things-unseen" in capsys.readouterr().out
    assert index_path(real / "things-unseen-000.tar").exists()
    with pytest.raises(SystemExit, match="headwater: found no shard at"):
        cli.main(["index", str(real / "none-*.tar")])
