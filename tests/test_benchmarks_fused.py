"""The benchmark of fused operations runs, and says what apex does not serve, and why."""

import importlib
import json
from pathlib import Path

from headwater import fused


def test_quick_run(monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    fused.missing.cache_clear()
    importlib.import_module("benchmarks.speed.fused").main(["--quick"])
    said = capsys.readouterr().out.splitlines()
    result = json.loads(said[-1])
    assert result["bench"] == "fused"
    assert set(result["ratios"]) == {"adam", "lamb", "novograd", "sgd", "clip", "layer_norm", "rms_norm", "xentropy"}
    assert all(row["eager"] == 1 and min(row.values()) > 0 for row in result["ratios"].values())
    assert set(result["left_out"]) == {op for op in result["ratios"] if fused.missing(op, "cpu")}
    assert "no apex: " in said[1]
