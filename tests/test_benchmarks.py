"""The speed benchmark runs, says what it left out, and ends with the line that others read."""

import importlib
import json
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def part(monkeypatch):
    """`part(name)` -> a module of the benchmark, which is not part of the package."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"benchmarks.speed.{name}")


def ticking(seconds):
    while True:
        time.sleep(seconds)
        yield 8


def broken():
    raise ModuleNotFoundError("No module named 'elsewhere'")
    yield


def dying():
    yield 8
    sys.exit()


@pytest.mark.slow
def test_rows_take_turns_and_what_does_not_run_is_named(part):
    stopwatch, said = part("stopwatch"), []

    def row(name, stream):
        return stopwatch.Row(name, stream, lambda batch: batch, lambda stream: f"batches of {next(stream)}")

    rows = [row("slow", lambda: ticking(0.004)), row("missing", broken), row("fast", lambda: ticking(0.001)), row("dying", dying)]
    found = stopwatch.measure(rows, 2, 20, 3, said.append)
    assert list(found) == ["slow", "missing", "fast", "dying"]
    assert said[0] == "  slow: batches of 8"
    assert found["missing"] == "left out, ModuleNotFoundError: No module named 'elsewhere'"
    assert found["dying"] == "left out, its process ended in repeat 0"
    assert len(found["fast"].speed) == 3
    assert found["slow"].median < 8 / 0.004
    assert 1.5 < stopwatch.ratio(found["fast"], found["slow"]) < 8


def test_both_writers_write_what_they_were_given(part, tmp_path):
    samples, writing = part("samples"), part("writing")
    given = [samples.Sample(f"{k:04d}", {"jpg": bytes([k % 256] * 700), "txt": b"a dog"}) for k in range(writing.SHARD + 5)]
    for write in (writing.headwater, writing.webdataset):
        folder = tmp_path / write.__name__ / "tars"
        folder.mkdir(parents=True)
        assert len(list(write(folder, iter(given)))) == len(given)
        assert list(samples.Corpus(folder.parent).samples()) == given


def test_views_and_texts_differ_from_sample_to_sample(part):
    made = [part("samples").jpeg(number) for number in range(0, 8000, 160)]
    assert len({m["jpg"] for m in made}) == len({m["txt"] for m in made}) == len(made)
    assert all(m["jpg"].startswith(b"\xff\xd8") and 1000 < len(m["jpg"]) < 5000 for m in made)


def test_quick_run_with_what_needs_no_peer(part, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    part("loader").main(["--quick", "--case", "jpeg"])
    said = capsys.readouterr().out
    result = json.loads(said.splitlines()[-1])
    assert result["bench"] == "loader"
    assert result["rows"]["headwater"] > 0
    assert {"webdataset", "plain"} <= set(result["ratios"])
    assert {"energon", "litdata", "streaming"} <= {*result["ratios"], *result["left_out"]}  # ran, or is named with the reason
    assert "reached: " in said or "missed: " in said
