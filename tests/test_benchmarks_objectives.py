"""Our side of the benchmark of objectives trains, and a peer that is missing is named."""

import json
import sys

import pytest
from test_benchmarks import part as part

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize("name", ["mae", "dino"])
def test_quick_run_without_the_peer(part, name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lightly", None)  # importing it raises ModuleNotFoundError
    part("objectives").main(["--quick", "--part", name])
    said = capsys.readouterr().out
    result = json.loads(said.splitlines()[-1])
    assert result["ratios"] == {}
    assert f"lightly_{name}: left out, " in said
    figures = result[name]["decoder 64"] if name == "mae" else result[name]
    assert "lightly" in figures["left_out"][f"lightly_{name}"]
    assert set(figures["samples/s"]) == {"headwater", "headwater, fused AdamW"}
    assert all(share > 0 for share in figures["share_of_matrix_product"].values())
