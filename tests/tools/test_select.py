"""`headwater select`: scores of a pool for a target, and what scored best as shards."""

import numpy as np
import pytest
import torch
from pyarrow import parquet

from headwater import cli
from headwater.datamodules.index import load_index
from headwater.datamodules.writer import ShardWriter
from headwater.tools.select import Reading, part_of, select, trained
from headwater.training.ghost import Ghost
from headwater.training.influence import Target, aligned

RECIPE = """
model:
  backbone: {encoders: {text: {class_path: Text, init_args: {length: 24, trunk: {width: 24, depth: 1, heads: 2}}}}}
  objective:
    class_path: Weighted
    init_args:
      parts: {next: {class_path: Causal}, mask: {class_path: Masked, init_args: {modality: text, mode: substitute}}}
trainer: {max_steps: 20, accelerator: cpu, logger: false}
data: {train: {pool: {shards: "pool-*.tar"}}, batch_size: 8, workers: 0}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a pool of 50 texts in two shards, five of them like the target, and a run on it."""
    folder = tmp_path_factory.mktemp("select")
    sets = {
        "pool": ["abcabcabcabc" + str(k) if k % 10 == 0 else "xyzxzyxyzxzy" + str(k) for k in range(50)],
        "target": ["abcabcab" + "cab"[k:] for k in range(3)],
    }
    for name, texts in sets.items():
        with ShardWriter(folder / f"{name}-{{:03d}}.tar", samples=30) as writer:
            for k, text in enumerate(texts):
                writer.write(f"{name}{k:03d}", {"txt": text.encode()})
        with ShardWriter(folder / f"{name}-more-{{:03d}}.tar") as writer:
            writer.write("torn", {"txt": b"\xff\xfe"})  # no text
    (folder / "small.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cli.main(["fit", "--config", "small.yaml"])
    return folder


@pytest.fixture(autouse=True)
def inside(run, monkeypatch):
    monkeypatch.chdir(run)


@pytest.mark.parametrize("by", ["cosine", "product", "oracle", "predicted"])
def test_what_is_like_the_target_is_chosen(run, by, capsys):
    select("runs/small/000", "pool-*.tar", "target-*.tar", by, by=by, part="next", probes=40, rows=16)
    table = parquet.read_table(f"{by}/scores.parquet").to_pydict()
    assert len(table["key"]) == 51
    assert np.isnan(table["score"][table["key"].index("torn")])
    chosen = [key for key, yes in zip(table["key"], table["chosen"], strict=True) if yes]
    assert chosen == [f"pool{k:03d}" for k in range(0, 50, 10)]
    index = load_index(f"{by}/chosen-00000.tar")
    assert index.keys.to_pylist() == chosen
    asked = np.isfinite(table["oracle"]).sum()
    assert asked == {"cosine": 0, "product": 0, "oracle": 50, "predicted": 40}[by] or (by == "predicted" and asked == 39)
    said = capsys.readouterr().out
    assert f"50 samples scored by {by} in" in said
    assert "1 lack something" in said
    assert ("rank correlation" in said) == (by == "predicted")


def test_scores_are_those_of_the_newest_weights_whatever_the_rows():
    found = []
    for rows in (7, 64):
        select("runs/small/000", "pool-*.tar", "target-*.tar", f"rows-{rows}", keep=0, part="next", rows=rows)
        found.append(np.array(parquet.read_table(f"rows-{rows}/scores.parquet")["score"]))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-6)
    pretrainer, optimizer = trained("runs/small/000")
    saved = torch.load("runs/small/000/checkpoints/last.ckpt", weights_only=True)
    assert all(torch.equal(saved["state_dict"][name], p) for name, p in pretrainer.named_parameters())
    assert {float(state["step"]) for state in optimizer.state.values()} == {20.0}
    objective = part_of(pretrainer.objective, "next")
    reading, aim = (Reading(pretrainer, objective, shards, 64, 0) for shards in ("pool-*.tar", "target-*.tar"))
    ((index, batch),), ((_, wanted),) = reading.batches(np.arange(51)), aim.batches(np.arange(4))
    ghost = Ghost(pretrainer.backbone, objective)
    reference = Target(pretrainer.backbone, objective, [wanted]).gradient(ghost.names)
    np.testing.assert_allclose(found[1][index], aligned(ghost, reference, [batch]), rtol=1e-4, atol=1e-6)


def test_what_cannot_be_is_refused(run):
    with pytest.raises(ValueError, match="found no part 'other' of the objective; it has next, mask"):
        select("runs/small/000", "pool-*.tar", "target-*.tar", "none", part="other")
    with pytest.raises(ValueError, match=r"keep=2\.0"):
        select("runs/small/000", "pool-*.tar", "target-*.tar", "none", keep=2.0)
    with pytest.raises(FileNotFoundError, match="no run at nowhere"):
        select("nowhere", "pool-*.tar", "target-*.tar", "none")
    with pytest.raises(ValueError, match=r"found no sample in pool-more-000\.tar that can be read and has all of text"):
        select("runs/small/000", "pool-more-000.tar", "target-*.tar", "none", part="next")
    assert not (run / "none").exists()
