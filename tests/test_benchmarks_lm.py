"""Ours and transformers' models start equal, learn from the same batches and are scored alike."""

import json

import pytest
from test_benchmarks import part as part
from torch.testing import assert_close

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def lm(part, monkeypatch):
    module = part("lm")
    pairs = [(a, b, c) for a in "abcdefgh" for b in "xyzuvw" for c in range(9)]
    texts = [f"The {a} {b} sees {c} boats and a very long sentence about them." for a, b, c in pairs]
    monkeypatch.setattr(module, "prose", lambda seed, length: (texts[:400], texts[400:]))
    monkeypatch.setattr(module, "measured", lambda kind, row, options: 10.0)
    module.encoded.cache_clear()
    return module


def test_quick_run_prints_ratios(lm, capsys):
    lm.main(["--quick"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["bench"] == "lm"
    assert set(result["ratios"]) == {"transformers", "transformers_gpt2", "transformers_llama"}
    for kind in ("gpt2", "llama"):
        ours, theirs = (result[kind]["bits_per_byte"][name] for name in ("headwater", kind))
        assert abs(ours / theirs - 1) < 0.01


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_both_sides_have_the_same_loss_and_take_the_same_step(lm, kind):
    train, _ = lm.batches(lm.QUICK, 3)
    ours, theirs = lm.pair(kind, lm.QUICK)
    mine, others = lm.our_step(ours), lm.their_step(theirs)
    for ids in train:
        assert_close(mine(ids, 1e-3), others(ids, 1e-3), rtol=1e-3, atol=1e-3)
