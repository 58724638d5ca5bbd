"""Properties of the walk over tars: what any writer wrote is found, and any damage is survived."""

import io
import os
import subprocess
import tarfile
from pathlib import PureWindowsPath

import numpy as np
import pytest
from broken import entry, pax, record, sound, summed, walk

from headwater.datamodules.files import File
from headwater.datamodules.index import load_index, scan, split_name
from headwater.datamodules.tar import BLOCK, LONGEST, Damage, Member, global_header, header, pax_records, shown, unsafe
from headwater.datamodules.writer import ShardWriter

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

# the same examples every time; new ones are the fuzzer's task
quick = settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


LETTERS = st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/\\:")
PARTS = st.text(LETTERS, min_size=1, max_size=12) | st.text("abcdefgh", min_size=90, max_size=130)
NAMES = st.builds("{}{}.{}".format, st.sampled_from(["", "./", "a/", "folder/" * 20]), PARTS, PARTS).filter(
    lambda name: not unsafe(name)
)
CONTENTS = st.binary(max_size=40) | st.integers(0, 3000).map(lambda n: bytes(k % 251 for k in range(n)))
FILES = st.lists(st.tuples(NAMES, CONTENTS), max_size=8)


def pairs(raw):
    """Name and content of all members, which must be all that there is."""
    found = walk(raw)
    assert not [one for one in found if isinstance(one, Damage)]
    return [(one.name, raw[one.offset : one.offset + one.size]) for one in found]


def regular(raw):
    """The same by the standard library."""
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        return [(m.name, archive.extractfile(m).read()) for m in archive if m.isreg() and not m.issparse()]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@quick
@given(files=FILES)
def test_what_tarfile_writes_is_found(form, files):
    files = fitting(files, form)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert pairs(out.getvalue()) == files


def fitting(files, form):
    """Those whose names this format has room for: ustar ends at 255 bytes."""
    out = []
    for name, content in files:
        try:
            tarfile.TarInfo(name).tobuf(form)
        except ValueError:
            continue
        out.append((name, content))
    return out


@quick
@given(
    samples=st.dictionaries(
        PARTS.map(lambda key: key.replace(".", "-")).filter(lambda key: not unsafe(key) and not key.startswith("__")),
        st.dictionaries(PARTS.map(str.lower).filter(lambda e: e == e.lower()), CONTENTS, min_size=1, max_size=4),
        min_size=1,
        max_size=5,
    )
)
@example({"k" * 120: {"txt": b"a name of more than 100 bytes"}, "\u00e4" * 40: {"png": b"one that is not ASCII", "txt": b"x"}})
def test_what_our_writer_writes_is_found(tmp_path_factory, samples):
    folder = tmp_path_factory.mktemp("written")
    with ShardWriter(folder / "{}.tar", header={"source": "test"}) as writer:
        for key, members in samples.items():
            writer.write(key, members)
    raw = writer.shards[0].read_bytes()
    expected = [(f"{key}.{e}", content) for key, members in samples.items() for e, content in members.items()]
    assert pairs(raw) == regular(raw) == expected
    for index in (scan(writer.shards[0]), load_index(writer.shards[0])):
        sound(index, raw)
        with File(index.path) as file:
            assert {index.key(row): index.read(file, row) for row in range(len(index))} == samples
        assert index.card.header == {"source": "test"}


@quick
@given(
    samples=st.dictionaries(
        st.text("abc-_/ \u00e9", min_size=1, max_size=130).filter(lambda k: k[0] not in "/" and k[-1] != "/"), CONTENTS
    )
)
def test_what_webdataset_writes_is_found(samples):
    webdataset = pytest.importorskip("webdataset")
    out = io.BytesIO()
    writer = webdataset.TarWriter(out, encoder=False)
    for key, content in samples.items():
        writer.write({"__key__": key, "bin": content, "txt": b"text"})
    writer.close()
    assert pairs(out.getvalue()) == [
        (f"{key}.{e}", c) for key, content in samples.items() for e, c in (("bin", content), ("txt", b"text"))
    ]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Files of every kind that a folder may hold."""
    root = tmp_path_factory.mktemp("tree")
    deep = root / ("long-" * 10) / ("folder-" * 12)
    deep.mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "0.txt").write_bytes(b"plain")
    (root / "1.txt").write_bytes(b"")
    (root / "2.bin").write_bytes(bytes(range(256)) * 40)
    (root / "\u00fcml\u00e4ut \u6f22\u5b57.txt").write_bytes(b"unicode")
    (root / ("n" * 99 + ".t")).write_bytes(b"101 letters")
    (root / ("n" * 98 + ".t")).write_bytes(b"100 letters")
    (deep / ("x" * 120 + ".txt")).write_bytes(b"deep")
    with open(os.fsencode(root) + b"/\xe9t\xe9.txt", "wb") as file:
        file.write(b"Latin-1")
    (root / "link.txt").symlink_to("0.txt")
    os.link(root / "2.bin", root / "hard.bin")
    os.mkfifo(root / "pipe.txt")
    with (root / "holes.bin").open("wb") as file:
        for k in range(12):
            file.seek(k * 300_000)
            file.write(b"island")
    return root


GNU_TAR = [*(["--format", form] for form in ("v7", "oldgnu", "gnu", "ustar", "posix")), ["-S", "--format=gnu"]]
GNU_TAR += [["-S", "--format=posix", f"--sparse-version={version}"] for version in ("0.0", "0.1", "1.0")]


@pytest.mark.parametrize("options", GNU_TAR, ids=" ".join)
def test_what_gnu_tar_writes_is_found(tree, options):
    run = subprocess.run(["tar", *options, "-cf", "-", "."], cwd=tree, capture_output=True)
    assert run.returncode in (0, 2), run.stderr  # 2: some names are too long for the old formats
    raw = run.stdout
    found = walk(raw)
    expected = [(name.encode("utf-8", "surrogateescape"), content) for name, content in regular(raw)]
    names = {one.offset: one.name for one in found if isinstance(one, Member)}
    members = [(name, raw[at : at + size]) for name, at, size in (one for one in found if isinstance(one, Member))]
    assert [(name.decode("utf-8", "backslashreplace").replace("\\x", "%"), content) for name, content in expected] == members
    assert len(names) == len(members) >= 5
    whys = [one.why for one in found if isinstance(one, Damage)]
    assert sum("is a link" in why for why in whys) == 2
    assert sum("not a file" in why for why in whys) == ("v7" not in options)  # which has no pipes
    assert sum("sparse file" in why for why in whys) == ("-S" in options)


@quick
@given(NAMES, st.integers(0, (1 << 32) - 1))
@example("n" * 99, 0)
@example("n" * 100, 0)
@example("n" * 101, 1)
@example("\u00e9" * 50, 7)
def test_our_header_is_that_of_tarfile(name, size):
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    assert header(name, size) == member.tobuf(tarfile.GNU_FORMAT)


TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=200)


@quick
@given(st.dictionaries(TEXTS.filter(lambda key: key and "=" not in key), TEXTS, max_size=6))
def test_pax_records_round_trip(records):
    content = b"".join(record(key, value) for key, value in records.items())
    assert pax_records(content) == (records, True)
    assert pax_records(content + bytes(100)) == (records, True)
    by_tarfile = tarfile.TarInfo._create_pax_generic_header(records, b"x", "utf-8")
    assert pax_records(by_tarfile[BLOCK:]) == (records, True)


@quick
@given(st.binary(max_size=300))
@example(b"6 a=b\n7 c=d")
@example(b"99999999999999999999 a=b\n")
def test_damaged_pax_records_are_told(content):
    records, whole = pax_records(content)
    assert not whole or b"".join(content.split(b"\n")) or not records
    assert pax_records(record("path", "name") + b"?" + content) == ({"path": "name"}, False)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9), lambda inner: st.lists(inner, max_size=3), max_leaves=9
)


@quick
@given(st.dictionaries(st.text(max_size=9), PLAIN, max_size=4))
def test_facts_of_a_source_round_trip(facts):
    found = {}
    assert pairs(global_header(facts) + entry("a.txt", b"text") + bytes(2 * BLOCK)) == [("a.txt", b"text")]
    walk(global_header(facts) + bytes(2 * BLOCK), found)
    assert found == facts


@quick
@given(size=st.integers(0, 3000), wide=st.booleans())
def test_sizes_in_octal_and_base_256(size, wide):
    block = bytearray(entry("a.bin", size=size)[:BLOCK])
    block[124:136] = b"\x80" + size.to_bytes(11, "big") if wide else b"%11o " % size
    raw = summed(block) + bytes(size) + bytes(-size % BLOCK) + bytes(2 * BLOCK)
    assert pairs(raw) == [("a.bin", bytes(size))]


def test_a_pax_record_may_give_the_size():
    block = entry("a.bin", size=0)
    raw = pax(record("size", "5") + record("path", "b.bin")) + block + b"12345".ljust(BLOCK, b"\0") + bytes(2 * BLOCK)
    assert pairs(raw) == [("b.bin", b"12345")]


def test_records_may_not_be_endless():
    evil = entry("././@LongLink", b"n" * (LONGEST + 1), b"L") + entry("a.txt", b"x") + entry("b.txt", b"y") + bytes(2 * BLOCK)
    found = walk(evil)
    assert [one.name for one in found if isinstance(one, Member)] == ["b.txt"]
    assert f"announces {LONGEST + 1} bytes; expected at most {LONGEST}" in found[0].why


@quick
@given(
    st.text(max_size=60) | st.builds("/".join, st.lists(st.sampled_from(["..", ".", "a", "", "C:", "..\\x", "b.txt"]), max_size=5))
)
@example("a" * 5000)
@example("C:\\a.txt")
@example("a\\..\\..\\b.txt")
def test_names_that_lead_out_are_unsafe(name):
    windows = PureWindowsPath(name)
    outside = ".." in windows.parts or bool(windows.root)
    control = any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in name)
    assert bool(unsafe(name)) == (outside or control or len(name) > 4096)
    assert shown(name).isprintable()
    assert len(shown(name)) <= 2200


@st.composite
def damaged(draw):
    """A good tar after some steps of damage."""
    files = draw(st.lists(st.tuples(NAMES, CONTENTS), min_size=1, max_size=5))
    form = draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    raw = bytearray(b"".join(entry(name, content, form=form) for name, content in fitting(files, form)) + bytes(2 * BLOCK))
    for _ in range(draw(st.integers(1, 4))):
        place, block = draw(st.integers(0, len(raw))), draw(st.integers(0, len(raw) // BLOCK)) * BLOCK
        step = draw(st.sampled_from(["byte", "field", "cut", "remove", "insert", "repeat", "sum"]))
        if step == "byte":
            raw[place : place + 1] = draw(st.binary(min_size=1, max_size=4))
        elif step == "field":
            at = block + draw(st.sampled_from([0, 124, 148, 156, 257, 345]))
            raw[at : at + 12] = draw(st.binary(min_size=12, max_size=12) | st.from_regex(rb"[0-7]{12}", fullmatch=True))
        elif step == "cut":
            del raw[draw(st.sampled_from([place, block])) :]
        elif step == "remove":
            del raw[block : block + draw(st.sampled_from([1, 100, BLOCK, 2 * BLOCK, 4096]))]
        elif step == "insert":
            raw[block:block] = draw(st.binary(max_size=40)) * draw(st.sampled_from([1, 13, BLOCK]))
        elif step == "repeat":
            raw[block:block] = raw[draw(st.integers(0, len(raw))) :]
        if step in ("sum", "field") and len(raw) >= block + BLOCK:
            raw[block : block + BLOCK] = summed(raw[block : block + BLOCK])
    return bytes(raw)


@settings(quick, max_examples=300)
@given(damaged() | st.binary(max_size=3000))
def test_any_damage_is_survived(tmp_path_factory, raw):
    found = walk(raw)
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    path.write_bytes(raw)
    index = scan(path)
    sound(index, raw)
    indexed = sum(split_name(one.name)[1] != "" for one in found if isinstance(one, Member))
    assert len(index.kind) <= indexed
    assert bool(index.faults) >= any(isinstance(one, Damage) for one in found)


@pytest.mark.parametrize("kind", ["headers", "zeros", "vast", "names", "magic"])
def test_hostile_files_take_no_longer_than_their_size(kind):
    """A few megabytes that would take minutes, were any part of them read again and again; `walk` counts the bytes."""
    vast = summed(entry("a.txt", size=1 << 60)[:BLOCK])
    piece = {
        "headers": entry("a.txt"),
        "zeros": entry("a.txt") + bytes(BLOCK),
        "vast": vast,
        "names": pax(b"9" * 400),
        "magic": b"01234567" * 19 + b"0" * 105 + b"ustar" * 51,
    }[kind]
    raw = np.tile(np.frombuffer(piece, np.uint8), (1 << 21) // len(piece)).tobytes()
    assert len(walk(raw)) > 0
