"""`headwater doctor` says of everything that it is active, or why not, and ends well."""

import json

import pytest
import stub_apex

from headwater import fused
from headwater.tools import doctor as module
from headwater.tools.doctor import ACTIVE, doctor, examined


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No compiling: it is slow, and its own test does it."""
    fused.missing.cache_clear()
    monkeypatch.setattr(module, "compiler", lambda: "not tried")
    yield
    fused.missing.cache_clear()


def test_everything_is_active_or_has_a_reason(capsys):
    doctor(json=True)
    told = json.loads(capsys.readouterr().out)
    assert set(told["ops"]) == set(fused.NAMES)
    assert all(row["apex"] and row["runs"] for row in told["ops"].values())
    assert {choice["kind"] for choice in told["decoders"] if choice["state"] == ACTIVE} == {"jpeg", "audio", "video"}
    assert told["versions"]["apex"] == "not installed"
    assert told["collectives"]["gloo"] == ACTIVE
    assert told["attention"]["cpu"]["used"]["full"] == "flash"


def test_the_page_names_what_runs(capsys):
    doctor()
    said = capsys.readouterr().out
    for part in ("torch: timm.optim.Lamb", "apex is not installed", "simplejpeg", "attention on cpu", "by gloo", "cores"):
        assert part in said


def test_an_apex_without_one_extension(monkeypatch, tmp_path):
    stub_apex.install(monkeypatch, tmp_path, without=("xentropy_cuda",))
    monkeypatch.setattr(module, "devices", lambda: ["cuda"])
    monkeypatch.setattr(module, "device_words", lambda device: "a card")
    monkeypatch.setattr(module, "kernels", lambda *given: {})
    told = examined()["ops"]
    assert told["adam"]["apex"] == ACTIVE
    assert told["adam"]["runs"] == "apex: apex.optimizers.FusedAdam"
    assert "xentropy_cuda" in told["xentropy"]["apex"]
    assert told["xentropy"]["runs"] == "torch: F.cross_entropy"


@pytest.mark.slow
def test_the_compiler_is_tried(monkeypatch):
    monkeypatch.undo()
    assert isinstance(module.compiler(), str)
